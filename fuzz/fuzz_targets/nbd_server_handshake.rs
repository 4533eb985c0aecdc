//! A client's bytes, in pieces, against the server's handshake: it neither panics nor says or holds
//! more than what came can ask for, and what it agrees to is what it was told.

#![no_main]

use libfuzzer_sys::fuzz_target;
use xpm_protocol::nbd::handshake::server::{NoExport, ServerHandshake, Step};
use xpm_protocol::nbd::{BlockSizes, ExportInfo, TransmissionFlags};

fuzz_target!(|input: &[u8]| {
    // The first byte says how the rest is cut into pieces.
    let Some((cut, bytes)) = input.split_first() else { return };
    let mut handshake = ServerHandshake::new();
    let greeting = handshake.take_output();
    assert_eq!(greeting.len(), 18);
    let (mut received, mut said) = (0, 0);
    for piece in bytes.chunks(usize::from(*cut) + 1) {
        handshake.receive(piece);
        received += piece.len();
        let over = answer(&mut handshake, received);
        said += handshake.take_output().len();
        assert!(said <= 64 * (received + 64), "{said} bytes said for {received}");
        if over {
            return;
        }
    }
});

/// Goes on until more is needed, or says that the handshake is over.
fn answer(handshake: &mut ServerHandshake, received: usize) -> bool {
    let mut step = handshake.step();
    loop {
        let next = match step {
            Step::Input => return false,
            Step::Open(name) => {
                assert!(name.len() <= 4096 && !name.contains('\0'));
                handshake.found((name.len() < 9).then(export).as_ref().ok_or(&NoExport::Unknown))
            }
            Step::List => {
                handshake.listed(Some(&["an export".to_owned()]));
                None
            }
            Step::Ready(negotiated) => {
                assert!(negotiated.leftover.len() <= received);
                assert!(negotiated.structured || negotiated.base_allocation.is_none());
                let df = negotiated.info.flags.contains(TransmissionFlags::SEND_DF);
                assert_eq!(df, negotiated.structured);
                assert_eq!(negotiated.info.size, export().size);
                return true;
            }
            Step::Close(_) => return true,
        };
        step = next.unwrap_or_else(|| handshake.step());
    }
}

fn export() -> ExportInfo {
    ExportInfo {
        size: 12345,
        flags: TransmissionFlags::HAS_FLAGS,
        block: BlockSizes::DEFAULT,
        description: Some("a description".to_owned()),
    }
}
