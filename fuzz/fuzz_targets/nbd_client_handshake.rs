//! A server's bytes, in pieces, against the client's handshake: it neither panics nor believes what
//! cannot be.

#![no_main]

use libfuzzer_sys::fuzz_target;
use xpm_protocol::nbd::TransmissionFlags;
use xpm_protocol::nbd::handshake::client::{Agreed, ClientHandshake, Wishes};

fuzz_target!(|input: &[u8]| {
    // The first byte says what is wished for, and how the rest is cut into pieces.
    let Some((first, bytes)) = input.split_first() else { return };
    let structured = first & 1 != 0;
    let base_allocation = first & 2 != 0;
    let wishes = Wishes { export: "disk".to_owned(), structured, base_allocation, visitor: None };
    let mut handshake = ClientHandshake::new(wishes);
    let mut said = 0;
    for piece in bytes.chunks(usize::from(first >> 2) + 1) {
        handshake.receive(piece);
        let step = handshake.step();
        said += handshake.take_output().len();
        assert!(said < 400, "each thing is said once");
        match step {
            Ok(None) => {
                let _ = handshake.closed().to_string();
            }
            Ok(Some(agreed)) => return check(&agreed, structured, base_allocation),
            Err(error) => {
                let text = error.to_string();
                assert!(!text.contains("disk") && text.len() < 2000, "{text}");
                return;
            }
        }
    }
});

fn check(agreed: &Agreed, structured: bool, base_allocation: bool) {
    let block = agreed.info.block;
    assert!(block.min.is_power_of_two() && block.min <= 1 << 16);
    assert!(block.preferred.is_power_of_two() && block.preferred >= block.min.max(512));
    assert!(block.max >= block.min && block.max.is_multiple_of(block.min));
    assert!(structured || !agreed.structured);
    assert!(agreed.base_allocation.is_none() || (agreed.structured && base_allocation));
    assert!(agreed.structured || !agreed.info.flags.contains(TransmissionFlags::SEND_DF));
}
