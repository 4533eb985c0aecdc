//! The device's description for the guest's driver: features, and the configuration space (virtio 1.2,
//! 5.2.4).

use xpm_protocol::BlockSize;

use super::chain::SEGMENTS_MAX;
use super::request::RANGES_MAX;

/// Length of a physical block in bytes, even where logical ones are smaller: file systems and swap align to
/// pages.
const PHYSICAL_BLOCK_LEN: u32 = 4096;
/// Preferred alignment of a discarded range, in sectors.
const DISCARD_ALIGNMENT: u32 = 8;
/// Longest range of a discard, in sectors: the whole pages of the longest request of a Linux block layer.
const RANGE_SECTORS_MAX: u32 = (u32::MAX >> 9) & !7;

/// Feature bits.
pub(super) mod feature {
    const SEG_MAX: u64 = 1 << 2;
    /// The guest's driver reads the logical block size.
    pub(in super::super) const BLK_SIZE: u64 = 1 << 6;
    const FLUSH: u64 = 1 << 9;
    const TOPOLOGY: u64 = 1 << 10;
    const MQ: u64 = 1 << 12;
    const DISCARD: u64 = 1 << 13;
    const WRITE_ZEROES: u64 = 1 << 14;
    /// Descriptors can be tables (indirect descriptors).
    pub(in super::super) const INDIRECT_DESC: u64 = 1 << 28;
    /// Each side states the index at which it wants to be notified.
    pub(in super::super) const EVENT_IDX: u64 = 1 << 29;
    /// The front end supports the protocol's own features.
    pub(in super::super) const PROTOCOL_FEATURES: u64 = 1 << 30;
    const VERSION_1: u64 = 1 << 32;

    /// All offered features. There is no write cache, so none can be switched.
    pub(in super::super) const ALL: u64 = SEG_MAX
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | MQ
        | DISCARD
        | WRITE_ZEROES
        | INDIRECT_DESC
        | EVENT_IDX
        | PROTOCOL_FEATURES
        | VERSION_1;
}

/// Length of the used part in bytes.
const LEN: usize = 60;

/// The configuration space of a device of `size` bytes with `queues` queues.
fn space(size: u64, queues: u16, block_size: BlockSize) -> [u8; LEN] {
    let mut space = [0; LEN];
    let mut put = |place: usize, bytes: &[u8]| space[place..place + bytes.len()].copy_from_slice(bytes);
    put(0, &(size >> 9).to_le_bytes());
    put(12, &SEGMENTS_MAX.to_le_bytes());
    put(20, &block_size.bytes().to_le_bytes());
    put(24, &[(PHYSICAL_BLOCK_LEN / block_size.bytes()).ilog2() as u8]);
    put(34, &queues.to_le_bytes());
    put(36, &RANGE_SECTORS_MAX.to_le_bytes());
    put(40, &RANGES_MAX.to_le_bytes());
    put(44, &DISCARD_ALIGNMENT.to_le_bytes());
    put(48, &RANGE_SECTORS_MAX.to_le_bytes());
    put(52, &RANGES_MAX.to_le_bytes());
    // Zeroing may free memory.
    put(56, &[1]);
    space
}

/// A part of the configuration space; bytes behind its end are zero.
pub(super) fn part((size, queues, block_size): (u64, u16, BlockSize), offset: u32, len: u32) -> Vec<u8> {
    let space = space(size, queues, block_size);
    let at =
        |place: u64| usize::try_from(place).ok().and_then(|place| space.get(place)).copied().unwrap_or(0);
    (u64::from(offset)..u64::from(offset) + u64::from(len)).map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_standard_has_them() {
        const BLOCKS: (u64, u16, BlockSize) = (1 << 30, 4, BlockSize::B512);
        let space = part(BLOCKS, 0, 64);
        assert_eq!(space.len(), 64);
        let word = |place: usize| u32::from_le_bytes(space[place..place + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (1 << 21, 0));
        assert_eq!((word(12), word(20), space[24]), (126, 512, 3));
        assert_eq!((space[34], space[35]), (4, 0));
        assert_eq!((word(36), word(40), word(44)), (0x007f_fff8, 32, 8));
        assert_eq!((word(48), word(52), space[56]), (0x007f_fff8, 32, 1));
        assert_eq!(part(BLOCKS, 34, 1), [4]);
        assert_eq!(part(BLOCKS, u32::MAX, 3), [0, 0, 0]);
        assert_eq!(part((1 << 30, 4, BlockSize::B4096), 20, 5), [0, 16, 0, 0, 0]);
    }
}
