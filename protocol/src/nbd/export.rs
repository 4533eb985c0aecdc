//! What a client is told of an export.

/// Longest payload that every implementation takes, in bytes ("Block sizes" of the
/// specification).
pub const PAYLOAD_MAX: u32 = 32 << 20;

/// Transmission flags (`NBD_FLAG_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TransmissionFlags(u16);

impl TransmissionFlags {
    /// The other flags mean something; always set.
    pub const HAS_FLAGS: TransmissionFlags = TransmissionFlags(1 << 0);
    /// Writes are refused.
    pub const READ_ONLY: TransmissionFlags = TransmissionFlags(1 << 1);
    /// FLUSH is understood.
    pub const SEND_FLUSH: TransmissionFlags = TransmissionFlags(1 << 2);
    /// FUA is understood.
    pub const SEND_FUA: TransmissionFlags = TransmissionFlags(1 << 3);
    /// Access near the last one is faster.
    pub const ROTATIONAL: TransmissionFlags = TransmissionFlags(1 << 4);
    /// TRIM is understood.
    pub const SEND_TRIM: TransmissionFlags = TransmissionFlags(1 << 5);
    /// WRITE_ZEROES is understood.
    pub const SEND_WRITE_ZEROES: TransmissionFlags = TransmissionFlags(1 << 6);
    /// The flag DF of structured replies is understood.
    pub const SEND_DF: TransmissionFlags = TransmissionFlags(1 << 7);
    /// Several connections see the same bytes, and a flush on one covers all.
    pub const CAN_MULTI_CONN: TransmissionFlags = TransmissionFlags(1 << 8);
    /// RESIZE is understood.
    pub const SEND_RESIZE: TransmissionFlags = TransmissionFlags(1 << 9);
    /// CACHE is understood.
    pub const SEND_CACHE: TransmissionFlags = TransmissionFlags(1 << 10);
    /// FAST_ZERO is understood.
    pub const SEND_FAST_ZERO: TransmissionFlags = TransmissionFlags(1 << 11);

    /// The flags of these bits; bits that are not known are kept.
    pub const fn from_bits(bits: u16) -> TransmissionFlags {
        TransmissionFlags(bits)
    }

    /// As bits on the wire.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Whether all of `other` are set.
    #[inline]
    pub const fn contains(self, other: TransmissionFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// With those of `other` as well.
    #[must_use]
    pub const fn with(self, other: TransmissionFlags) -> TransmissionFlags {
        TransmissionFlags(self.0 | other.0)
    }

    /// Without those of `other`.
    #[must_use]
    pub const fn without(self, other: TransmissionFlags) -> TransmissionFlags {
        TransmissionFlags(self.0 & !other.0)
    }

    /// Without those that mean nothing or must not be set: DF where replies are simple, fast zeroes
    /// where there are none ("Transmission flags").
    #[must_use]
    pub(super) const fn coherent(self, structured: bool) -> TransmissionFlags {
        let flags = if structured { self } else { self.without(TransmissionFlags::SEND_DF) };
        if flags.contains(TransmissionFlags::SEND_WRITE_ZEROES) {
            flags
        } else {
            flags.without(TransmissionFlags::SEND_FAST_ZERO)
        }
    }
}

/// Block sizes of an export, in bytes. A server whose sizes are not the default ones checks requests
/// against them, whether or not the client asked for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it; a power of two, at most 64 KiB.
    pub min: u32,
    /// What is handled best; a power of two, at least `min` and 512.
    pub preferred: u32,
    /// Longest payload; a multiple of `min`.
    pub max: u32,
}

impl BlockSizes {
    /// What holds where nothing was said.
    pub const DEFAULT: BlockSizes = BlockSizes { min: 1, preferred: 4096, max: PAYLOAD_MAX };

    /// What a server announced, with `max` rounded down to a multiple of `min`; none when it is
    /// against "Block size constraints".
    pub(super) fn announced(min: u32, preferred: u32, max: u32) -> Option<BlockSizes> {
        let valid = min.is_power_of_two()
            && min <= 64 << 10
            && preferred.is_power_of_two()
            && preferred >= min.max(512)
            && (max.is_multiple_of(min) || max == u32::MAX)
            && max >= min;
        // Only now, for `min` may be 0.
        valid.then(|| BlockSizes { min, preferred, max: max - max % min })
    }
}

/// An export: its size and what can be done with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size: u64,
    /// What is understood.
    pub flags: TransmissionFlags,
    /// Block sizes.
    pub block: BlockSizes,
    /// A text for people, sent to those who ask for it.
    pub description: Option<String>,
}
