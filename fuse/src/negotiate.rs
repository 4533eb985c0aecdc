//! The capabilities of a connection, negotiated in its first request.

use crate::wire::{Init, InitFlags, InitReply, MINOR};

/// The capabilities that the user requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Data of the longest WRITE, in bytes, at least 4096.
    pub max_write: u32,
    /// Pages of the longest READ or WRITE. The kernel lowers it to `fs.fuse.max_pages_limit`, 256 as a rule.
    pub max_pages: u16,
    /// The most that the kernel reads ahead, in bytes. The final limit also depends on [`Bdi`](crate::Bdi).
    pub max_readahead: u32,
    /// Requests that nobody waits for (write-back, read-ahead) that may be under way at a time, at least 1.
    pub max_background: u16,
    /// So many of them make the kernel take the file system for congested.
    pub congestion_threshold: u16,
}

/// The result of the negotiation. A successor needs it, as there is no second INIT: it is to be kept with the
/// descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    /// Minor version of protocol 7.
    pub minor: u32,
    /// The capabilities of both sides.
    pub flags: InitFlags,
    /// The most that is read ahead, in bytes.
    pub max_readahead: u32,
    /// As wanted.
    pub max_write: u32,
    /// As wanted. The kernel does not tell to what it lowered it.
    pub max_pages: u16,
    /// As wanted.
    pub max_background: u16,
    /// As wanted.
    pub congestion_threshold: u16,
}

/// The kernel cannot do what external memory as a file needs. INIT is to be answered with an error, EPROTO, upon
/// which the mount refuses everything, and the mount is to be undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is another protocol.
    #[error(
        "the kernel speaks version {major}.{minor} of the FUSE protocol; version 7.31 or a later 7 is needed"
    )]
    Version {
        /// Major version.
        major: u32,
        /// Minor version.
        minor: u32,
    },
    /// Requests of a dead server cannot be had again.
    #[error(
        "the kernel cannot resend FUSE requests (FUSE_HAS_RESEND), so that writes would be lost whenever the server is \
         replaced; use Linux 6.9 or newer"
    )]
    NoResend,
    /// Something else is missing.
    #[error("the kernel's FUSE lacks {0}; use Linux 6.9 or newer")]
    Missing(
        /// Name of the flag.
        &'static str,
    ),
}

/// The flags that a connection must have, without HAS_RESEND.
///
/// WRITEBACK_CACHE is more than a matter of speed: without it memory reclaim in a cgroup of version 1 waits for
/// write-back of these pages (Linux 6.16), and a server in the same cgroup waits for itself.
const NEEDED: [(InitFlags, &str); 4] = [
    (InitFlags::WRITEBACK_CACHE, "the write-back cache (FUSE_WRITEBACK_CACHE)"),
    (InitFlags::MAX_PAGES, "requests of more than 32 pages (FUSE_MAX_PAGES)"),
    (InitFlags::BIG_WRITES, "writes of more than a page (FUSE_BIG_WRITES)"),
    (InitFlags::EXPLICIT_INVAL_DATA, "invalidation by notification only (FUSE_EXPLICIT_INVAL_DATA)"),
];

/// Flags that are used if the kernel offers them.
///
/// Not among them: AUTO_INVAL_DATA, as only the server knows when cached pages are no longer right;
/// HANDLE_KILLPRIV_V2, as without it the kernel removes set-user-ID bits itself, by SETATTR; ATOMIC_O_TRUNC, as a
/// SETATTR is fenced like any other; SETXATTR_EXT and SECURITY_CTX, as there are no extended attributes;
/// OVER_IO_URING, which loses writes.
const WELCOME: InitFlags = InitFlags::ASYNC_READ
    .with(InitFlags::ASYNC_DIO)
    .with(InitFlags::PARALLEL_DIROPS)
    .with(InitFlags::DO_READDIRPLUS)
    .with(InitFlags::READDIRPLUS_AUTO)
    .with(InitFlags::ABORT_ERROR);

/// EXPLICIT_INVAL_DATA exists since 7.30, and the layout of the reply has not changed since 7.31.
const MINOR_MIN: u32 = 31;

impl Negotiated {
    /// The flags that the kernel offers and the user requests.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn new(init: &Init, wanted: &Wanted) -> Result<Negotiated, Refused> {
        if init.major != 7 || init.minor < MINOR_MIN {
            return Err(Refused::Version { major: init.major, minor: init.minor });
        }
        // HAS_RESEND is in the upper half of the flags, so that INIT_EXT is there, too.
        if !init.flags.contains(InitFlags::HAS_RESEND) {
            return Err(Refused::NoResend);
        }
        let mut flags = InitFlags::HAS_RESEND.with(InitFlags::INIT_EXT);
        for (flag, name) in NEEDED {
            if !init.flags.contains(flag) {
                return Err(Refused::Missing(name));
            }
            flags = flags.with(flag);
        }
        Ok(Negotiated {
            minor: init.minor.min(MINOR),
            flags: flags.with(InitFlags::from_bits(WELCOME.bits() & init.flags.bits())),
            max_readahead: wanted.max_readahead.min(init.max_readahead),
            max_write: wanted.max_write.max(4096),
            max_pages: wanted.max_pages.max(1),
            max_background: wanted.max_background.max(1),
            congestion_threshold: wanted.congestion_threshold.clamp(1, wanted.max_background.max(1)),
        })
    }

    /// The reply to INIT, to be encoded by [`reply::init`](crate::wire::reply::init).
    pub fn reply(&self) -> InitReply {
        InitReply {
            minor: self.minor,
            max_readahead: self.max_readahead,
            flags: self.flags,
            max_background: self.max_background,
            congestion_threshold: self.congestion_threshold,
            max_write: self.max_write,
            // Times are kept as they are given.
            time_gran: 1,
            max_pages: self.max_pages,
        }
    }

    /// Bytes that a buffer for requests of this connection has at least.
    pub fn read_buffer_len(&self) -> usize {
        crate::wire::read_buffer_len(self.max_write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted = Wanted {
        max_write: 1 << 20,
        max_pages: 256,
        max_readahead: 0,
        max_background: 64,
        congestion_threshold: 48,
    };

    /// INIT as Linux 6.18 sends it: all flags that it has.
    const MODERN: Init =
        Init { major: 7, minor: 44, max_readahead: 1 << 17, flags: InitFlags::from_bits(0x7ff_7fff_fffb) };

    #[test]
    fn takes_what_is_safe_of_a_modern_kernel() {
        let agreed = Negotiated::new(&MODERN, &WANTED).unwrap();
        assert_eq!(agreed.minor, 40);
        // ASYNC_READ 0, BIG_WRITES 5, DO_READDIRPLUS 13, READDIRPLUS_AUTO 14, ASYNC_DIO 15, WRITEBACK_CACHE 16,
        // PARALLEL_DIROPS 18, ABORT_ERROR 21, MAX_PAGES 22, EXPLICIT_INVAL_DATA 25, INIT_EXT 30, HAS_RESEND 39.
        assert_eq!(agreed.flags.bits(), 0x80_4265_e021);
        assert_eq!((agreed.max_write, agreed.max_pages, agreed.max_readahead), (1 << 20, 256, 0));
        assert_eq!((agreed.max_background, agreed.congestion_threshold), (64, 48));
        assert_eq!(agreed.reply().time_gran, 1);
    }

    #[test]
    fn an_older_kernel_is_refused_with_the_reason() {
        let old = Init { flags: MODERN.flags.without(InitFlags::HAS_RESEND), ..MODERN };
        let refused = Negotiated::new(&old, &WANTED).unwrap_err();
        assert_eq!(refused, Refused::NoResend);
        assert!(refused.to_string().contains("Linux 6.9"), "{refused}");
        for (flag, name) in NEEDED {
            let lacking = Init { flags: MODERN.flags.without(flag), ..MODERN };
            assert_eq!(Negotiated::new(&lacking, &WANTED), Err(Refused::Missing(name)));
        }
        for (major, minor) in [(8, 0), (7, 30), (6, 40)] {
            let other = Init { major, minor, ..MODERN };
            assert_eq!(Negotiated::new(&other, &WANTED), Err(Refused::Version { major, minor }));
        }
    }

    #[test]
    fn a_limit_is_never_zero() {
        let wanted = Wanted {
            max_write: 0,
            max_pages: 0,
            max_readahead: 0,
            max_background: 0,
            congestion_threshold: 0,
        };
        let agreed = Negotiated::new(&MODERN, &wanted).unwrap();
        assert_eq!((agreed.max_write, agreed.max_pages), (4096, 1));
        assert_eq!((agreed.max_background, agreed.congestion_threshold), (1, 1));
    }
}
