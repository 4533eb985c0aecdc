//! Requests of the transmission phase.

use super::constants::*;
use super::errno::Errno;
use super::export::{ExportInfo, TransmissionFlags};

/// Length of a request's header in bytes.
pub const REQUEST_LEN: usize = 28;

/// Command flags (`NBD_CMD_FLAG_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct CommandFlags(u16);

impl CommandFlags {
    /// No flags.
    pub const NONE: CommandFlags = CommandFlags(0);
    /// Answer only once the data are on stable storage.
    pub const FUA: CommandFlags = CommandFlags(1 << 0);
    /// Write zeros without releasing storage.
    pub const NO_HOLE: CommandFlags = CommandFlags(1 << 1);
    /// Send the data of a read in one chunk.
    pub const DF: CommandFlags = CommandFlags(1 << 2);
    /// Report only one extent.
    pub const REQ_ONE: CommandFlags = CommandFlags(1 << 3);
    /// Write zeros only if that is faster than a normal write.
    pub const FAST_ZERO: CommandFlags = CommandFlags(1 << 4);

    /// The flags with these bits, known or not.
    #[inline]
    pub const fn from_bits(bits: u16) -> CommandFlags {
        CommandFlags(bits)
    }

    /// The bits on the wire.
    #[inline]
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Whether all flags of `other` are set.
    #[inline]
    pub const fn contains(self, other: CommandFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether there are flags other than `allowed`.
    #[inline]
    const fn exceeds(self, allowed: u16) -> bool {
        self.0 & !allowed != 0
    }

    /// These flags and those of `other`.
    #[must_use]
    pub const fn with(self, other: CommandFlags) -> CommandFlags {
        CommandFlags(self.0 | other.0)
    }
}

/// A command (`NBD_CMD_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// Read bytes of the export.
    Read,
    /// Write bytes to the export; they follow the header.
    Write,
    /// Close the connection; never answered.
    Disconnect,
    /// Make answered writes stable.
    Flush,
    /// Discard bytes.
    Trim,
    /// Prefetch bytes.
    Cache,
    /// Write zeros to the export.
    WriteZeroes,
    /// Report the states of bytes.
    BlockStatus,
    /// Any other command: the specification lacks it, or has it only as an extension (such as RESIZE).
    Other(u16),
}

impl Command {
    #[inline]
    const fn from_wire(number: u16) -> Command {
        match number {
            CMD_READ => Command::Read,
            CMD_WRITE => Command::Write,
            CMD_DISC => Command::Disconnect,
            CMD_FLUSH => Command::Flush,
            CMD_TRIM => Command::Trim,
            CMD_CACHE => Command::Cache,
            CMD_WRITE_ZEROES => Command::WriteZeroes,
            CMD_BLOCK_STATUS => Command::BlockStatus,
            other => Command::Other(other),
        }
    }

    #[inline]
    const fn to_wire(self) -> u16 {
        match self {
            Command::Read => CMD_READ,
            Command::Write => CMD_WRITE,
            Command::Disconnect => CMD_DISC,
            Command::Flush => CMD_FLUSH,
            Command::Trim => CMD_TRIM,
            Command::Cache => CMD_CACHE,
            Command::WriteZeroes => CMD_WRITE_ZEROES,
            Command::BlockStatus => CMD_BLOCK_STATUS,
            Command::Other(number) => number,
        }
    }
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: CommandFlags,
    /// The command.
    pub command: Command,
    /// The client's cookie, which the reply repeats.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u32,
}

/// The header does not start as a request: the rest of the stream cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a request: its magic number is wrong")]
pub struct BadRequestMagic;

impl Request {
    /// Reads a header.
    ///
    /// # Errors
    /// [`BadRequestMagic`]: the connection has to be closed.
    #[inline]
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Request, BadRequestMagic> {
        let [m0, m1, m2, m3, f0, f1, c0, c1, rest @ ..] = bytes;
        if u32::from_be_bytes([*m0, *m1, *m2, *m3]) != REQUEST_MAGIC {
            return Err(BadRequestMagic);
        }
        let [k0, k1, k2, k3, k4, k5, k6, k7, o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        Ok(Request {
            flags: CommandFlags(u16::from_be_bytes([*f0, *f1])),
            command: Command::from_wire(u16::from_be_bytes([*c0, *c1])),
            cookie: u64::from_be_bytes([*k0, *k1, *k2, *k3, *k4, *k5, *k6, *k7]),
            offset: u64::from_be_bytes([*o0, *o1, *o2, *o3, *o4, *o5, *o6, *o7]),
            length: u32::from_be_bytes([*l0, *l1, *l2, *l3]),
        })
    }

    /// Writes a header.
    #[inline]
    pub fn encode(&self, bytes: &mut [u8; REQUEST_LEN]) {
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.0.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_wire().to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
    }

    /// Whether a server may carry the request out, on this export and with these negotiated features (structured
    /// replies; the context `base:allocation`).
    ///
    /// # Errors
    /// The error to answer.
    #[inline]
    pub fn check(&self, export: &ExportInfo, structured: bool, base_allocation: bool) -> Result<(), Errno> {
        use TransmissionFlags as Has;
        let fua = if export.flags.contains(Has::SEND_FUA) { CommandFlags::FUA.0 } else { 0 };
        let (offered, allowed) = match self.command {
            // This command has no answer, so a malformed one cannot be refused.
            Command::Disconnect => return Ok(()),
            Command::Read if structured => (true, fua | CommandFlags::DF.0),
            Command::Read | Command::Write => (true, fua),
            Command::Flush => (export.flags.contains(Has::SEND_FLUSH), fua),
            Command::Trim => (export.flags.contains(Has::SEND_TRIM), fua),
            Command::Cache => (export.flags.contains(Has::SEND_CACHE), fua),
            Command::WriteZeroes => {
                let fast = export.flags.contains(Has::SEND_FAST_ZERO);
                let fast = if fast { CommandFlags::FAST_ZERO.0 } else { 0 };
                (export.flags.contains(Has::SEND_WRITE_ZEROES), fua | CommandFlags::NO_HOLE.0 | fast)
            }
            Command::BlockStatus => (base_allocation, fua | CommandFlags::REQ_ONE.0),
            Command::Other(_) => (false, 0),
        };
        if !offered || self.flags.exceeds(allowed) {
            return Err(Errno::Invalid);
        }
        match self.command {
            Command::Flush => self.check_flush(),
            _ => self.check_range(export),
        }
    }

    /// Whether bytes of a reply chunk lie within the requested range.
    #[inline]
    pub const fn covers(&self, offset: u64, length: u32) -> bool {
        match offset.checked_sub(self.offset) {
            Some(ahead) => ahead <= self.length as u64 && length as u64 <= self.length as u64 - ahead,
            None => false,
        }
    }

    const fn check_flush(&self) -> Result<(), Errno> {
        if self.offset == 0 && self.length == 0 { Ok(()) } else { Err(Errno::Invalid) }
    }

    fn check_range(&self, export: &ExportInfo) -> Result<(), Errno> {
        let changes = matches!(self.command, Command::Write | Command::WriteZeroes | Command::Trim);
        if changes && export.flags.contains(TransmissionFlags::READ_ONLY) {
            return Err(Errno::Permission);
        }
        if matches!(self.command, Command::Read | Command::Write) && self.length > export.block.max {
            return Err(Errno::Invalid);
        }
        let min = u64::from(export.block.min.max(1));
        let aligned = self.offset.is_multiple_of(min) && u64::from(self.length).is_multiple_of(min);
        if self.length == 0 || !aligned {
            return Err(Errno::Invalid);
        }
        let inside = self.offset.checked_add(u64::from(self.length)).is_some_and(|end| end <= export.size);
        match self.command {
            _ if inside => Ok(()),
            Command::Write | Command::WriteZeroes => Err(Errno::NoSpace),
            _ => Err(Errno::Invalid),
        }
    }
}
