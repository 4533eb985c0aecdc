//! Sets of bits.

macro_rules! flags {
    ($(#[$doc:meta])* $name:ident: $bits:ty { $($(#[$flag_doc:meta])* $flag:ident = $value:expr;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name($bits);

        impl $name {
            /// None.
            pub const NONE: $name = $name(0);
            $($(#[$flag_doc])* pub const $flag: $name = $name($value);)*

            /// The flags of these bits, known or not.
            pub const fn from_bits(bits: $bits) -> $name {
                $name(bits)
            }

            /// As bits.
            pub const fn bits(self) -> $bits {
                self.0
            }

            /// Whether all flags of `other` are among these.
            pub const fn contains(self, other: $name) -> bool {
                self.0 & other.0 == other.0
            }

            /// These and `other`.
            #[must_use]
            pub const fn with(self, other: $name) -> $name {
                $name(self.0 | other.0)
            }

            /// These without `other`.
            #[must_use]
            pub const fn without(self, other: $name) -> $name {
                $name(self.0 & !other.0)
            }
        }
    };
}

flags! {
    /// Flags that the kernel offers in INIT and that the reply accepts; bits 32 and up are its field `flags2`.
    InitFlags: u64 {
        /// Several reads of one file at a time.
        ASYNC_READ = 1 << 0;
        /// O_TRUNC comes with OPEN rather than as a SETATTR.
        ATOMIC_O_TRUNC = 1 << 3;
        /// WRITE of more than a page.
        BIG_WRITES = 1 << 5;
        /// Cached pages are dropped when the attributes show another mtime or size.
        AUTO_INVAL_DATA = 1 << 12;
        /// READDIRPLUS exists.
        DO_READDIRPLUS = 1 << 13;
        /// The kernel chooses between READDIR and READDIRPLUS.
        READDIRPLUS_AUTO = 1 << 14;
        /// Several parts of one direct read or write at a time.
        ASYNC_DIO = 1 << 15;
        /// Written pages stay in the page cache until they are flushed.
        WRITEBACK_CACHE = 1 << 16;
        /// Several look-ups and listings of one directory at a time.
        PARALLEL_DIROPS = 1 << 18;
        /// After an abort the device says ECONNABORTED rather than ENODEV.
        ABORT_ERROR = 1 << 21;
        /// The reply has a limit of pages for a request.
        MAX_PAGES = 1 << 22;
        /// Cached pages are dropped by a notification only.
        EXPLICIT_INVAL_DATA = 1 << 25;
        /// The server removes set-user-ID bits on writes, truncation and changes of the owner.
        HANDLE_KILLPRIV_V2 = 1 << 28;
        /// `flags2` counts.
        INIT_EXT = 1 << 30;
        /// Requests that were read and not answered can be had again (Linux 6.9).
        HAS_RESEND = 1 << 39;
        /// Requests by io_uring (Linux 6.14).
        OVER_IO_URING = 1 << 41;
    }
}

flags! {
    /// How the kernel is to treat an open file, in the reply to OPEN, CREATE and OPENDIR.
    OpenFlags: u32 {
        /// Past the page cache.
        DIRECT_IO = 1 << 0;
        /// Cached pages of the file stay; without it opening the file drops its clean pages.
        KEEP_CACHE = 1 << 1;
        /// A directory's listing is cached.
        CACHE_DIR = 1 << 3;
        /// No FLUSH at close(2); of no effect with the write-back cache.
        NOFLUSH = 1 << 5;
        /// Direct writes to one file at a time.
        PARALLEL_DIRECT_WRITES = 1 << 6;
    }
}

flags! {
    /// Where a WRITE comes from.
    WriteFlags: u32 {
        /// From the page cache; the handle is that of any open file of the inode, uid and pid are not the writer's.
        CACHE = 1 << 0;
        /// The set-user-ID and set-group-ID bits are to be removed.
        KILL_SUIDGID = 1 << 2;
    }
}

flags! {
    /// Which fields of a SETATTR are to be set.
    SetattrValid: u32 {
        /// The permissions.
        MODE = 1 << 0;
        /// The owner.
        UID = 1 << 1;
        /// The group.
        GID = 1 << 2;
        /// The size.
        SIZE = 1 << 3;
        /// The time of the last access.
        ATIME = 1 << 4;
        /// The time of the last change of data.
        MTIME = 1 << 5;
        /// The handle is that of an open file.
        FH = 1 << 6;
        /// The time of the last access is now.
        ATIME_NOW = 1 << 7;
        /// The time of the last change of data is now.
        MTIME_NOW = 1 << 8;
        /// The time of the last change of attributes.
        CTIME = 1 << 10;
        /// The set-user-ID and set-group-ID bits are to be removed.
        KILL_SUIDGID = 1 << 11;
    }
}

flags! {
    /// The operation of fallocate(2).
    FallocateMode: u32 {
        /// The size stays.
        KEEP_SIZE = 1 << 0;
        /// The range becomes a hole.
        PUNCH_HOLE = 1 << 1;
        /// The range is cut out.
        COLLAPSE_RANGE = 1 << 3;
        /// The range reads as zeros.
        ZERO_RANGE = 1 << 4;
        /// A range of zeros is put in.
        INSERT_RANGE = 1 << 5;
        /// Shared pieces get memory of their own.
        UNSHARE_RANGE = 1 << 6;
    }
}

flags! {
    /// How renameat2(2) treats the new name.
    RenameFlags: u32 {
        /// The new name must not exist.
        NOREPLACE = 1 << 0;
        /// Both names change places.
        EXCHANGE = 1 << 1;
        /// The old name becomes a whiteout.
        WHITEOUT = 1 << 2;
    }
}
