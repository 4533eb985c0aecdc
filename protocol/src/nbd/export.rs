//! Description of an export, as a server sends it to a client.

/// Longest payload that every implementation accepts, in bytes ("Block sizes" of the specification).
pub const PAYLOAD_MAX: u32 = 32 << 20;

/// Transmission flags (`NBD_FLAG_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TransmissionFlags(u16);

impl TransmissionFlags {
    /// The other flags are valid; always set.
    pub const HAS_FLAGS: TransmissionFlags = TransmissionFlags(1 << 0);
    /// Writes are refused.
    pub const READ_ONLY: TransmissionFlags = TransmissionFlags(1 << 1);
    /// FLUSH is supported.
    pub const SEND_FLUSH: TransmissionFlags = TransmissionFlags(1 << 2);
    /// FUA is supported.
    pub const SEND_FUA: TransmissionFlags = TransmissionFlags(1 << 3);
    /// Access near the last position is faster.
    pub const ROTATIONAL: TransmissionFlags = TransmissionFlags(1 << 4);
    /// TRIM is supported.
    pub const SEND_TRIM: TransmissionFlags = TransmissionFlags(1 << 5);
    /// WRITE_ZEROES is supported.
    pub const SEND_WRITE_ZEROES: TransmissionFlags = TransmissionFlags(1 << 6);
    /// The flag DF of structured replies is supported.
    pub const SEND_DF: TransmissionFlags = TransmissionFlags(1 << 7);
    /// Several connections see the same bytes, and a flush on one covers all.
    pub const CAN_MULTI_CONN: TransmissionFlags = TransmissionFlags(1 << 8);
    /// RESIZE is supported.
    pub const SEND_RESIZE: TransmissionFlags = TransmissionFlags(1 << 9);
    /// CACHE is supported.
    pub const SEND_CACHE: TransmissionFlags = TransmissionFlags(1 << 10);
    /// FAST_ZERO is supported.
    pub const SEND_FAST_ZERO: TransmissionFlags = TransmissionFlags(1 << 11);

    /// The flags with these bits; unknown bits are kept.
    pub const fn from_bits(bits: u16) -> TransmissionFlags {
        TransmissionFlags(bits)
    }

    /// The bits on the wire.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Whether all flags of `other` are set.
    #[inline]
    pub const fn contains(self, other: TransmissionFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// These flags and those of `other`.
    #[must_use]
    pub const fn with(self, other: TransmissionFlags) -> TransmissionFlags {
        TransmissionFlags(self.0 | other.0)
    }

    /// These flags without those of `other`.
    #[must_use]
    pub const fn without(self, other: TransmissionFlags) -> TransmissionFlags {
        TransmissionFlags(self.0 & !other.0)
    }

    /// Removes flags that must not be set: DF if replies are simple, and FAST_ZERO without WRITE_ZEROES
    /// ("Transmission flags").
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

/// Block sizes of an export, in bytes. A server whose sizes are not the default ones checks all requests against
/// them, even if the client did not ask for the sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this; a power of two, at most 64 KiB.
    pub min: u32,
    /// Size that works best; a power of two, at least `min` and 512.
    pub preferred: u32,
    /// Longest payload; a multiple of `min`.
    pub max: u32,
}

impl BlockSizes {
    /// The sizes of an export whose server announced none.
    pub const DEFAULT: BlockSizes = BlockSizes { min: 1, preferred: 4096, max: PAYLOAD_MAX };

    /// The sizes that a server announced, with `max` rounded down to a multiple of `min`. None if they violate "Block
    /// size constraints".
    pub(super) fn announced(min: u32, preferred: u32, max: u32) -> Option<BlockSizes> {
        let valid = min.is_power_of_two()
            && min <= 64 << 10
            && preferred.is_power_of_two()
            && preferred >= min.max(512)
            && (max.is_multiple_of(min) || max == u32::MAX)
            && max >= min;
        // Computed after the check, because an invalid `min` may be 0.
        valid.then(|| BlockSizes { min, preferred, max: max - max % min })
    }
}

/// An export: its size and its abilities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: TransmissionFlags,
    /// Block sizes.
    pub block: BlockSizes,
    /// A text for people, sent to clients that ask for it.
    pub description: Option<String>,
}
