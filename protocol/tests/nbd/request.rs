//! Tests of requests: their bytes, and which of them a server accepts.

use proptest::prelude::*;
use xpm_protocol::nbd::{
    BadRequestMagic, BlockSizes, Command, CommandFlags, Errno, ExportInfo, REQUEST_LEN, Request,
    TransmissionFlags,
};

use crate::wire::{hex, info};

const SIZE: u64 = 10 << 20;

fn request(command: Command, flags: CommandFlags, offset: u64, length: u32) -> Request {
    Request { flags, command, cookie: 7, offset, length }
}

fn any_request() -> impl Strategy<Value = Request> {
    (any::<u16>(), any::<u16>(), any::<u64>(), any::<u64>(), any::<u32>()).prop_map(
        |(flags, command, cookie, offset, length)| {
            let mut bytes = hex("25609513");
            bytes.extend(flags.to_be_bytes());
            // Most numbers are known commands.
            bytes.extend((if flags % 8 == 0 { command } else { command % 8 }).to_be_bytes());
            bytes.extend(cookie.to_be_bytes());
            bytes.extend(offset.to_be_bytes());
            bytes.extend(length.to_be_bytes());
            Request::decode(bytes.as_slice().try_into().unwrap()).unwrap()
        },
    )
}

#[test]
fn a_request_is_golden() {
    let flags = CommandFlags::FUA.with(CommandFlags::NO_HOLE).with(CommandFlags::FAST_ZERO);
    let request = Request {
        flags,
        command: Command::WriteZeroes,
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1122_3344_5566_7788,
        length: 0xa0b0_c0d0,
    };
    let mut bytes = [0xff; REQUEST_LEN];
    request.encode(&mut bytes);
    let golden = hex("25609513 0013 0006 0102030405060708 1122334455667788 a0b0c0d0");
    assert_eq!(bytes.as_slice(), golden);
    assert_eq!(Request::decode(&bytes), Ok(request));
    bytes[3] = 0x14;
    assert_eq!(Request::decode(&bytes), Err(BadRequestMagic));
}

#[test]
fn errnos_are_golden() {
    let golden = [
        (Errno::Permission, 1),
        (Errno::Io, 5),
        (Errno::NoMemory, 12),
        (Errno::Invalid, 22),
        (Errno::NoSpace, 28),
        (Errno::Overflow, 75),
        (Errno::NotSupported, 95),
        (Errno::Shutdown, 108),
    ];
    for (errno, number) in golden {
        assert_eq!((errno.to_wire(), Errno::from_wire(number)), (number, Some(errno)));
    }
    assert_eq!(Errno::from_wire(0), None);
    for number in [2, 4, 13, 110, u32::MAX] {
        assert_eq!(Errno::from_wire(number), Some(Errno::Invalid), "unknown ones are EINVAL");
    }
}

/// By "Error values" and "Request types" of the specification, on an export of 10 MiB with blocks of 512 bytes and
/// payloads of at most 1 MiB, all features negotiated.
#[test]
fn checks_follow_the_specification() {
    use Command::*;
    use CommandFlags as F;
    let export = info(SIZE);
    let (ok, invalid, no_space) = (Ok(()), Err(Errno::Invalid), Err(Errno::NoSpace));
    let none = F::NONE;
    let end = SIZE - 512;
    let cases = [
        // In range, to the last block.
        (Read, none, 0, 512, ok),
        (Read, none, end, 512, ok),
        (Write, none, end, 512, ok),
        (Trim, none, 0, SIZE as u32, ok),
        (WriteZeroes, none, 0, SIZE as u32, ok),
        (Cache, none, 0, SIZE as u32, ok),
        (BlockStatus, none, 0, SIZE as u32, ok),
        (Flush, none, 0, 0, ok),
        (Disconnect, none, 0, 0, ok),
        // Beyond the end.
        (Read, none, end, 1024, invalid),
        (Read, none, SIZE, 512, invalid),
        (Write, none, end, 1024, no_space),
        (Write, none, SIZE, 512, no_space),
        (WriteZeroes, none, end, 1024, no_space),
        (Trim, none, end, 1024, invalid),
        (Cache, none, end, 1024, invalid),
        (BlockStatus, none, end, 1024, invalid),
        // Offset and length overflow.
        (Read, none, u64::MAX - 511, 512, invalid),
        (Read, none, u64::MAX - 511, 1024, invalid),
        (Write, none, u64::MAX - 511, 1024, no_space),
        (WriteZeroes, none, u64::MAX - 511, 1024, no_space),
        (Trim, none, u64::MAX - 511, 1024, invalid),
        // An empty range.
        (Read, none, 0, 0, invalid),
        (Write, none, 0, 0, invalid),
        (Trim, none, 0, 0, invalid),
        (WriteZeroes, none, 0, 0, invalid),
        (BlockStatus, none, 0, 0, invalid),
        // Violations of the block sizes.
        (Read, none, 1, 512, invalid),
        (Read, none, 0, 511, invalid),
        (Write, none, 511, 512, invalid),
        (Trim, none, 0, 100, invalid),
        (BlockStatus, none, 256, 512, invalid),
        (Read, none, 0, 1 << 20, ok),
        (Read, none, 0, (1 << 20) + 512, invalid),
        (Write, none, 0, (1 << 20) + 512, invalid),
        // A flush has no range.
        (Flush, none, 0, 512, invalid),
        (Flush, none, 512, 0, invalid),
        (Flush, F::FUA, 0, 0, ok),
        // FUA is valid for all commands, the other flags only for theirs.
        (Read, F::FUA, 0, 512, ok),
        (Write, F::FUA, 0, 512, ok),
        (Trim, F::FUA, 0, 512, ok),
        (BlockStatus, F::FUA, 0, 512, ok),
        (Cache, F::FUA, 0, 512, ok),
        (Read, F::DF, 0, 512, ok),
        (Write, F::DF, 0, 512, invalid),
        (WriteZeroes, F::NO_HOLE.with(F::FAST_ZERO).with(F::FUA), 0, 512, ok),
        (Trim, F::NO_HOLE, 0, 512, invalid),
        (Write, F::FAST_ZERO, 0, 512, invalid),
        (BlockStatus, F::REQ_ONE, 0, 512, ok),
        (Read, F::REQ_ONE, 0, 512, invalid),
        (Cache, F::DF, 0, 512, invalid),
        (Read, F::from_bits(1 << 5), 0, 512, invalid),
        (Write, F::from_bits(1 << 15), 0, 512, invalid),
        // Unknown commands, and commands for other kinds of servers.
        (Other(8), none, 0, 512, invalid),
        (Other(u16::MAX), none, 0, 512, invalid),
        // Disconnect has no answer, so its flags and range are not checked.
        (Disconnect, F::DF, 9, 9, ok),
    ];
    for (command, flags, offset, length, expected) in cases {
        let request = request(command, flags, offset, length);
        assert_eq!(request.check(&export, true, true), expected, "{request:?}");
    }
}

#[test]
fn commands_that_were_not_offered_are_refused() {
    use Command::*;
    use TransmissionFlags as Has;
    let all = info(SIZE);
    let without = |flags: Has| ExportInfo { flags: all.flags.without(flags), ..all.clone() };
    let ask = |command, flags| request(command, flags, 0, if command == Flush { 0 } else { 512 });
    let cases = [
        (Has::SEND_FLUSH, ask(Flush, CommandFlags::NONE)),
        (Has::SEND_TRIM, ask(Trim, CommandFlags::NONE)),
        (Has::SEND_WRITE_ZEROES, ask(WriteZeroes, CommandFlags::NONE)),
        (Has::SEND_CACHE, ask(Cache, CommandFlags::NONE)),
        (Has::SEND_FUA, ask(Write, CommandFlags::FUA)),
        (Has::SEND_FUA, ask(Read, CommandFlags::FUA)),
        (Has::SEND_FAST_ZERO, ask(WriteZeroes, CommandFlags::FAST_ZERO)),
    ];
    for (flag, request) in cases {
        assert_eq!(request.check(&all, false, false), Ok(()), "{request:?}");
        assert_eq!(request.check(&without(flag), false, false), Err(Errno::Invalid), "{request:?}");
    }
    assert_eq!(ask(Read, CommandFlags::DF).check(&all, false, false), Err(Errno::Invalid));
    assert_eq!(ask(BlockStatus, CommandFlags::NONE).check(&all, true, false), Err(Errno::Invalid));
}

#[test]
fn a_read_only_export_is_not_changed() {
    use Command::*;
    let mut export = info(SIZE);
    export.flags = export.flags.with(TransmissionFlags::READ_ONLY);
    for command in [Write, Trim, WriteZeroes] {
        for offset in [0, SIZE] {
            let request = request(command, CommandFlags::NONE, offset, 512);
            assert_eq!(request.check(&export, true, true), Err(Errno::Permission), "{request:?}");
        }
    }
    for command in [Read, Cache, BlockStatus] {
        assert_eq!(request(command, CommandFlags::NONE, 0, 512).check(&export, true, true), Ok(()));
    }
}

proptest! {
    #[test]
    fn requests_round_trip(request in any_request()) {
        let mut bytes = [0; REQUEST_LEN];
        request.encode(&mut bytes);
        prop_assert_eq!(Request::decode(&bytes), Ok(request));
    }

    #[test]
    fn random_bytes_do_not_panic(bytes: [u8; REQUEST_LEN]) {
        let _ = Request::decode(&bytes);
    }

    /// An accepted request lies within the export and uses only offered features. Half of the requests are plausible.
    #[test]
    fn accepted_requests_are_safe(
        request in any_request(),
        plausible: bool,
        size in 0_u64..1 << 33,
        min_shift in 0_u32..17,
        bits: u16,
    ) {
        let request = if plausible {
            Request {
                flags: CommandFlags::NONE,
                offset: ((request.offset % (size + 4096)) >> min_shift) << min_shift,
                length: ((request.length % (1 << 18)) >> min_shift) << min_shift,
                ..request
            }
        } else {
            request
        };
        let block = BlockSizes { min: 1 << min_shift, preferred: 1 << 16, max: 1 << 20 };
        let flags = TransmissionFlags::from_bits(bits);
        let export = ExportInfo { size, flags, block, description: None };
        if request.check(&export, false, false).is_err() {
            return Ok(());
        }
        match request.command {
            Command::Disconnect => {}
            Command::Flush => prop_assert_eq!((request.offset, request.length), (0, 0)),
            Command::Other(_) | Command::BlockStatus => prop_assert!(false),
            command => {
                let (offset, length) = (u128::from(request.offset), u128::from(request.length));
                prop_assert!(length > 0 && offset + length <= u128::from(size));
                prop_assert!(offset % (1 << min_shift) == 0 && length % (1 << min_shift) == 0);
                if matches!(command, Command::Read | Command::Write) {
                    prop_assert!(length <= 1 << 20);
                }
                if !matches!(command, Command::Read | Command::Cache) {
                    prop_assert!(!flags.contains(TransmissionFlags::READ_ONLY));
                }
            }
        }
    }

    #[test]
    fn covers_is_containment(offset: u64, length: u32, ahead in -5_i64..1 << 33, inner: u32) {
        let request = request(Command::Read, CommandFlags::NONE, offset, length);
        let Some(at) = offset.checked_add_signed(ahead) else { return Ok(()) };
        let end = |offset: u64, length: u32| u128::from(offset) + u128::from(length);
        let inside = at >= offset && end(at, inner) <= end(offset, length);
        prop_assert_eq!(request.covers(at, inner), inside);
    }
}
