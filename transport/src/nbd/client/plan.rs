//! Translating operations to NBD requests: the command, its flags, and the longest part.

use xpm_protocol::nbd::{Command, CommandFlags, ExportInfo, PAYLOAD_MAX, TransmissionFlags};

use crate::io::{IoError, Kind, Operation};

/// Longest request without a payload, in bytes. The length fits the 32 bits of the wire, is a multiple of any
/// block size, and every server accepts it.
const BARE_MAX: u64 = 1 << 30;

/// The form of an operation's requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) command: Command,
    pub(super) flags: CommandFlags,
    /// Longest part, in bytes.
    pub(super) step: u64,
}

/// The limits of an export.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    size: u64,
    flags: TransmissionFlags,
    block_min: u64,
    payload_max: u64,
}

impl Limits {
    pub(super) fn new(info: &ExportInfo) -> Limits {
        let block_min = u64::from(info.block.min.max(1));
        let payload_max = u64::from(info.block.max.min(PAYLOAD_MAX));
        let payload_max = (payload_max - payload_max % block_min).max(block_min);
        Limits { size: info.size, flags: info.flags, block_min, payload_max }
    }

    /// The plan for an operation; an error is the operation's result when no request is needed.
    pub(super) fn plan(&self, operation: &Operation) -> Result<Plan, Result<(), IoError>> {
        let has = |flag| self.flags.contains(flag);
        if operation.kind == Kind::Flush {
            // A server without FLUSH has no write cache: its answered writes are in place.
            let plan = Plan { command: Command::Flush, flags: CommandFlags::NONE, step: 0 };
            return if has(TransmissionFlags::SEND_FLUSH) { Ok(plan) } else { Err(Ok(())) };
        }
        self.check(operation).map_err(Err)?;
        if operation.len == 0 {
            return Err(Ok(()));
        }
        let (offered, command, flags, step) = match operation.kind {
            Kind::Read => (true, Command::Read, CommandFlags::NONE, self.payload_max),
            Kind::Write => (true, Command::Write, CommandFlags::NONE, self.payload_max),
            Kind::Trim => (has(TransmissionFlags::SEND_TRIM), Command::Trim, CommandFlags::NONE, BARE_MAX),
            Kind::Zero | Kind::Flush => {
                let offered = has(TransmissionFlags::SEND_WRITE_ZEROES);
                (offered, Command::WriteZeroes, CommandFlags::NO_HOLE, BARE_MAX)
            }
        };
        if offered { Ok(Plan { command, flags, step }) } else { Err(Err(IoError::Unsupported)) }
    }

    fn check(&self, operation: &Operation) -> Result<(), IoError> {
        let changes = operation.kind != Kind::Read;
        let inside = operation.offset.checked_add(operation.len).is_some_and(|end| end <= self.size);
        let aligned = (operation.offset | operation.len).is_multiple_of(self.block_min);
        let with_buffer = matches!(operation.kind, Kind::Read | Kind::Write);
        let buffer = operation.buf.map_or(0, |buf| buf.len() as u64);
        let refused = changes && self.flags.contains(TransmissionFlags::READ_ONLY);
        if inside && aligned && !refused && (!with_buffer || buffer == operation.len) {
            Ok(())
        } else {
            Err(IoError::Invalid)
        }
    }
}

#[cfg(test)]
mod tests {
    use xpm_protocol::nbd::BlockSizes;

    use super::*;

    fn limits(flags: TransmissionFlags, block: BlockSizes) -> Limits {
        Limits::new(&ExportInfo { size: 1 << 40, flags, block, description: None })
    }

    fn operation(kind: Kind, offset: u64, len: u64) -> Operation {
        Operation { kind, offset, len, buf: None, token: 0 }
    }

    #[test]
    fn only_commands_that_the_server_offers_are_sent() {
        let bare = limits(TransmissionFlags::HAS_FLAGS, BlockSizes::DEFAULT);
        let unsupported = Err(Err(IoError::Unsupported));
        assert_eq!(bare.plan(&operation(Kind::Trim, 0, 4096)), unsupported);
        assert_eq!(bare.plan(&operation(Kind::Zero, 0, 4096)), unsupported);
        assert_eq!(bare.plan(&operation(Kind::Flush, 0, 0)), Err(Ok(())));
        let all = TransmissionFlags::SEND_TRIM
            .with(TransmissionFlags::SEND_WRITE_ZEROES)
            .with(TransmissionFlags::SEND_FLUSH);
        let all = limits(all, BlockSizes::DEFAULT);
        assert_eq!(all.plan(&operation(Kind::Trim, 0, 1 << 40)).unwrap().command, Command::Trim);
        assert_eq!(all.plan(&operation(Kind::Zero, 0, 1)).unwrap().flags, CommandFlags::NO_HOLE);
        assert_eq!(all.plan(&operation(Kind::Flush, 7, 9)).unwrap().command, Command::Flush);
        let read_only =
            limits(TransmissionFlags::SEND_TRIM.with(TransmissionFlags::READ_ONLY), BlockSizes::DEFAULT);
        assert_eq!(read_only.plan(&operation(Kind::Trim, 0, 1)), Err(Err(IoError::Invalid)));
    }

    #[test]
    fn ranges_are_checked_without_overflow() {
        let limits =
            limits(TransmissionFlags::SEND_TRIM, BlockSizes { min: 512, preferred: 4096, max: 1 << 20 });
        for (offset, len) in [(1 << 40, 512), (u64::MAX - 511, 512), (512, u64::MAX), (1, 512), (0, 511)] {
            assert_eq!(limits.plan(&operation(Kind::Trim, offset, len)), Err(Err(IoError::Invalid)));
        }
        assert_eq!(limits.plan(&operation(Kind::Read, 0, 512)), Err(Err(IoError::Invalid)), "no buffer");
        assert_eq!(limits.plan(&operation(Kind::Trim, 512, 0)), Err(Ok(())));
    }

    #[test]
    fn a_step_is_never_zero() {
        for block in [
            BlockSizes { min: 65536, preferred: 65536, max: 4096 },
            BlockSizes { min: 0, preferred: 0, max: 0 },
            BlockSizes { min: 1, preferred: 512, max: u32::MAX },
        ] {
            let limits = limits(TransmissionFlags::default(), block);
            assert!(limits.payload_max > 0 && limits.payload_max.is_multiple_of(limits.block_min));
        }
    }
}
