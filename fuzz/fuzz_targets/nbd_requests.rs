//! A stream of requests, as a server reads it: headers come back as they were, and what passes the
//! check lies within the export.

#![no_main]

use libfuzzer_sys::fuzz_target;
use xpm_protocol::nbd::{
    BlockSizes, Command, CommandFlags, Errno, ExportInfo, REQUEST_LEN, Request, TransmissionFlags,
};

fuzz_target!(|input: &[u8]| {
    // An export first, then headers. Writes' data is of no interest here and left out.
    let Some(([f0, f1, shift, negotiated, size @ ..], mut stream)) = input.split_first_chunk::<12>() else {
        return;
    };
    let block = BlockSizes { min: 1 << (shift % 17), preferred: 1 << 16, max: 32 << 20 };
    let export = ExportInfo {
        size: u64::from_be_bytes(*size),
        flags: TransmissionFlags::from_bits(u16::from_be_bytes([*f0, *f1])),
        block,
        description: None,
    };
    let (structured, base_allocation) = (negotiated & 1 != 0, negotiated & 2 != 0);
    while let Some((header, rest)) = stream.split_first_chunk::<REQUEST_LEN>() {
        stream = rest;
        let Ok(request) = Request::decode(header) else { return };
        let mut again = [0; REQUEST_LEN];
        request.encode(&mut again);
        assert_eq!(again, *header);
        match request.check(&export, structured, base_allocation) {
            Ok(()) => passed(&request, &export, structured, base_allocation),
            Err(errno) => {
                assert!(matches!(errno, Errno::Permission | Errno::Invalid | Errno::NoSpace), "{errno}");
                assert_ne!(request.command, Command::Disconnect);
            }
        }
    }
});

fn passed(request: &Request, export: &ExportInfo, structured: bool, base_allocation: bool) {
    match request.command {
        Command::Disconnect => return,
        Command::Flush => return assert_eq!((request.offset, request.length), (0, 0)),
        Command::BlockStatus => assert!(base_allocation),
        Command::Other(_) => panic!("a command that nobody knows"),
        Command::Write | Command::Trim | Command::WriteZeroes => {
            assert!(!export.flags.contains(TransmissionFlags::READ_ONLY));
        }
        Command::Read | Command::Cache => {}
    }
    assert!(structured || !request.flags.contains(CommandFlags::DF));
    let end = u128::from(request.offset) + u128::from(request.length);
    assert!(request.length > 0 && end <= u128::from(export.size));
    assert!(request.offset.is_multiple_of(u64::from(export.block.min)));
    assert!(request.length.is_multiple_of(export.block.min));
}
