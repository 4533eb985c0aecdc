//! INIT, the first request of a connection.

use super::cursor::{Cursor, Fault};
use super::encode::Out;
use super::flags::InitFlags;

/// The kernel's offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Init {
    /// Version of the protocol, 7.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
    /// The most that is read ahead, in bytes.
    pub max_readahead: u32,
    /// The capabilities of the kernel.
    pub flags: InitFlags,
}

impl Init {
    pub(super) fn parse(mut body: Cursor<'_>) -> Result<Init, Fault> {
        let (major, minor) = (body.u32()?, body.u32()?);
        let (max_readahead, low) = (body.u32()?, u64::from(body.u32()?));
        let extended = InitFlags::from_bits(low).contains(InitFlags::INIT_EXT);
        let high = if extended { u64::from(body.u32()?) } else { 0 };
        Ok(Init { major, minor, max_readahead, flags: InitFlags::from_bits(low | high << 32) })
    }
}

/// The reply to INIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitReply {
    /// Minor version of protocol 7.
    pub minor: u32,
    /// The most that the kernel may read ahead, in bytes.
    pub max_readahead: u32,
    /// The accepted ones of the kernel's flags.
    pub flags: InitFlags,
    /// Requests that nobody waits for (write-back, read-ahead) that may be under way at a time.
    pub max_background: u16,
    /// So many of them make the kernel take the file system for congested.
    pub congestion_threshold: u16,
    /// Data of the longest WRITE, in bytes.
    pub max_write: u32,
    /// Resolution of times, in nanoseconds.
    pub time_gran: u32,
    /// Pages of the longest request.
    pub max_pages: u16,
}

/// sizeof(struct fuse_init_out)
pub(super) const INIT_OUT_LEN: usize = 64;

impl InitReply {
    pub(super) fn encode(&self, out: &mut Out<'_>) {
        let bits = self.flags.bits();
        out.u32(7).u32(self.minor).u32(self.max_readahead).u32(bits as u32);
        out.u16(self.max_background).u16(self.congestion_threshold);
        out.u32(self.max_write).u32(self.time_gran).u16(self.max_pages);
        // map_alignment is of DAX only.
        out.u16(0).u32((bits >> 32) as u32);
        // max_stack_depth (of passthrough only), request_timeout (none), and what is not used.
        out.zeros(7 * 4);
    }
}
