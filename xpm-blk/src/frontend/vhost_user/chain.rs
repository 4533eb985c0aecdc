//! Walks a chain of descriptors and collects the memory that it describes.
//!
//! A chain is walked once. Its descriptors may contain anything: the walk is bounded, and yields pieces of
//! guest memory only.

use xpm_transport::io::IoBuf;

use super::memory::{GuestMemory, Window};
use super::ring::{Broken, Descriptor, Ring};

/// Most buffers of a request; the guest receives this number (`seg_max`).
pub(super) const SEGMENTS_MAX: u32 = 126;
/// Most pieces of each direction: a buffer that crosses the border of two regions becomes two pieces.
pub(super) const PIECES_MAX: usize = SEGMENTS_MAX as usize + 34;
/// Most descriptors of an indirect table that are read.
const TABLE_MAX: usize = 1024;

/// The memory of a chain. Created once for each queue, and reused for every request.
#[derive(Debug)]
pub(super) struct Pieces {
    /// Buffers that the driver wrote.
    pub(super) readable: Vec<IoBuf>,
    /// Buffers that the device has to write, without the last byte.
    pub(super) writable: Vec<IoBuf>,
    /// Whether a part is not in guest memory, or the chain has too many pieces.
    pub(super) faulty: bool,
    /// The last piece to be written; none if it is not in guest memory.
    last: Option<IoBuf>,
}

impl Pieces {
    pub(super) fn new() -> Pieces {
        Pieces {
            readable: Vec::with_capacity(PIECES_MAX),
            writable: Vec::with_capacity(PIECES_MAX),
            faulty: false,
            last: None,
        }
    }

    /// Walks the chain of a head. Returns the byte for its status, which is the last byte that the device has
    /// to write.
    ///
    /// # Errors
    /// When the chain has no such byte, or is invalid.
    pub(super) fn walk(&mut self, ring: &Ring, memory: &GuestMemory, head: u16) -> Result<IoBuf, Broken> {
        self.readable.clear();
        self.writable.clear();
        self.faulty = false;
        self.last = None;
        self.walk_ring(ring, memory, head)?;
        let last = self.last.ok_or(Broken("a request with no byte for its status"))?;
        let status = last.part(last.len() - 1, 1);
        match self.writable.last_mut() {
            // The piece with the status byte is among those kept; it is removed if it has no other byte.
            Some(kept) if *kept == last && last.len() > 1 => *kept = last.part(0, last.len() - 1),
            Some(kept) if *kept == last => drop(self.writable.pop()),
            _ => {}
        }
        Ok(status)
    }

    fn walk_ring(&mut self, ring: &Ring, memory: &GuestMemory, head: u16) -> Result<(), Broken> {
        let (table, count) = ring.table();
        let mut index = usize::from(head);
        // A chain contains no descriptor twice, so a longer one is a loop.
        for _ in 0..count {
            let descriptor = read(table, count, index)?;
            if descriptor.has(Descriptor::INDIRECT) {
                if !ring.features().indirect || descriptor.has(Descriptor::NEXT) {
                    return Err(Broken("an indirect table where none is allowed"));
                }
                return self.walk_table(memory, descriptor);
            }
            self.add(memory, descriptor)?;
            if !descriptor.has(Descriptor::NEXT) {
                return Ok(());
            }
            index = usize::from(descriptor.next);
        }
        Err(Broken("a chain of descriptors that does not end"))
    }

    fn walk_table(&mut self, memory: &GuestMemory, outer: Descriptor) -> Result<(), Broken> {
        let len = outer.len as usize;
        let count = len / 16;
        if !len.is_multiple_of(16) || count == 0 || count > TABLE_MAX {
            return Err(Broken("a table of descriptors of a length that cannot be"));
        }
        let table = memory
            .window_of_guest(outer.address, len)
            .ok_or(Broken("a table of descriptors that is not in guest memory"))?;
        let mut index = 0;
        for _ in 0..count {
            let descriptor = read(&table, count, index)?;
            if descriptor.has(Descriptor::INDIRECT) {
                return Err(Broken("a table of descriptors within a table"));
            }
            self.add(memory, descriptor)?;
            if !descriptor.has(Descriptor::NEXT) {
                return Ok(());
            }
            index = usize::from(descriptor.next);
        }
        Err(Broken("a table of descriptors that does not end"))
    }

    fn add(&mut self, memory: &GuestMemory, descriptor: Descriptor) -> Result<(), Broken> {
        let writable = descriptor.has(Descriptor::WRITE);
        if !writable && (self.last.is_some() || !self.writable.is_empty()) {
            return Err(Broken("a readable buffer behind a writable one"));
        }
        let (mut address, mut left) = (descriptor.address, u64::from(descriptor.len));
        while left > 0 {
            let Some(piece) = memory.piece(address, left) else {
                self.faulty = true;
                if writable {
                    self.last = None;
                }
                return Ok(());
            };
            self.keep(piece, writable);
            left -= piece.len() as u64;
            address = address.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }

    fn keep(&mut self, piece: IoBuf, writable: bool) {
        let pieces = if writable { &mut self.writable } else { &mut self.readable };
        if writable {
            self.last = Some(piece);
        }
        match pieces.len() < PIECES_MAX {
            true => pieces.push(piece),
            false => self.faulty = true,
        }
    }
}

fn read(table: &Window, count: usize, index: usize) -> Result<Descriptor, Broken> {
    Descriptor::read(table, count, index).ok_or(Broken("a descriptor beyond the end of its table"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::ring::Features;
    use super::super::ring::tests::Driver;
    use super::*;

    const ALL: Features = Features { event_index: false, indirect: true };

    fn walk(driver: &Driver, features: Features, head: u16) -> (Result<IoBuf, Broken>, Pieces) {
        let mut pieces = Pieces::new();
        let ring = driver.ring(features);
        let status = pieces.walk(&ring, &driver.memory, head);
        (status, pieces)
    }

    fn lengths(pieces: &[IoBuf]) -> Vec<usize> {
        pieces.iter().map(|piece| piece.len()).collect()
    }

    #[test]
    fn a_read_and_a_write() {
        let driver = Driver::new(16);
        driver.chain(3, &[(0x8000, 16, false), (0x9000, 4096, true), (0xb000, 1, true)]);
        let (status, pieces) = walk(&driver, ALL, 3);
        assert_eq!(status.unwrap().as_ptr(), driver.memory.piece(0xb000, 1).unwrap().as_ptr());
        assert_eq!((lengths(&pieces.readable), lengths(&pieces.writable)), (vec![16], vec![4096]));
        assert!(!pieces.faulty);
        driver.chain(3, &[(0x8000, 16 + 512, false), (0x9000, 513, true)]);
        let (status, pieces) = walk(&driver, ALL, 3);
        assert_eq!(status.unwrap().as_ptr(), driver.memory.piece(0x9200, 1).unwrap().as_ptr());
        assert_eq!((lengths(&pieces.readable), lengths(&pieces.writable)), (vec![528], vec![512]));
    }

    #[test]
    fn an_indirect_table() {
        let driver = Driver::new(16);
        let table = Descriptor { address: 0x8000, len: 48, flags: Descriptor::INDIRECT, next: 0 };
        driver.describe(driver.descriptors(), 0, table);
        let inner = |address, len, flags, next| Descriptor { address, len, flags, next };
        driver.describe(0x8000, 0, inner(0x9000, 16, Descriptor::NEXT, 2));
        driver.describe(0x8000, 2, inner(0xa000, 512, Descriptor::NEXT | Descriptor::WRITE, 1));
        driver.describe(0x8000, 1, inner(0xb000, 1, Descriptor::WRITE, 0));
        let (status, pieces) = walk(&driver, ALL, 0);
        assert!(status.is_ok());
        assert_eq!((lengths(&pieces.readable), lengths(&pieces.writable)), (vec![16], vec![512]));
        let (status, _) = walk(&driver, Features::default(), 0);
        assert!(status.is_err(), "it was not agreed on");
        // A loop, a table in a table, a table outside of memory, invalid lengths.
        driver.describe(0x8000, 1, inner(0xb000, 1, Descriptor::WRITE | Descriptor::NEXT, 2));
        assert!(walk(&driver, ALL, 0).0.is_err());
        driver.describe(0x8000, 0, inner(0x8000, 48, Descriptor::INDIRECT, 0));
        assert!(walk(&driver, ALL, 0).0.is_err());
        for (address, len) in [(1 << 50, 48), (0x8000, 47), (0x8000, 0), (0x8000, u32::MAX - 15)] {
            driver.describe(driver.descriptors(), 0, Descriptor { address, len, ..table });
            assert!(walk(&driver, ALL, 0).0.is_err(), "{address:#x} {len}");
        }
    }

    #[test]
    fn invalid_chains_are_refused() {
        let driver = Driver::new(4);
        let at = driver.descriptors();
        let looped = Descriptor { address: 0x8000, len: 16, flags: Descriptor::NEXT, next: 0 };
        driver.describe(at, 0, looped);
        assert!(walk(&driver, ALL, 0).0.is_err(), "a loop");
        driver.describe(at, 0, Descriptor { next: 4, ..looped });
        assert!(walk(&driver, ALL, 0).0.is_err(), "beyond the table");
        driver.chain(0, &[(0x8000, 16, false)]);
        assert!(walk(&driver, ALL, 0).0.is_err(), "no status");
        driver.chain(0, &[(0x8000, 16, false), (0x9000, 0, true)]);
        assert!(walk(&driver, ALL, 0).0.is_err(), "no byte for the status");
        driver.chain(0, &[(0x8000, 16, false), (1 << 50, 1, true)]);
        assert!(walk(&driver, ALL, 0).0.is_err(), "its status is nowhere");
        driver.chain(0, &[(0x8000, 16, true), (0x9000, 16, false)]);
        assert!(walk(&driver, ALL, 0).0.is_err(), "the wrong order");
    }

    #[test]
    fn buffers_outside_of_memory_are_reported() {
        let driver = Driver::new(16);
        for (address, len) in [(1 << 50, 512), ((1 << 20) - 256, 512), (u64::MAX - 10, 512), (0, u32::MAX)] {
            driver.chain(0, &[(0x8000, 16, false), (address, len, true), (0xb000, 1, true)]);
            let (status, pieces) = walk(&driver, ALL, 0);
            assert!(status.is_ok() && pieces.faulty, "{address:#x} {len}");
        }
    }

    #[test]
    fn too_many_buffers_are_reported() {
        let driver = Driver::new(256);
        let mut buffers = vec![(0x8000, 16, false)];
        buffers.extend(std::iter::repeat_n((0x9000, 512, true), PIECES_MAX + 10));
        buffers.push((0xb000, 1, true));
        driver.chain(0, &buffers);
        let (status, pieces) = walk(&driver, ALL, 0);
        assert_eq!(status.unwrap().as_ptr(), driver.memory.piece(0xb000, 1).unwrap().as_ptr());
        assert!(pieces.faulty && pieces.writable.len() == PIECES_MAX);
    }

    fn descriptor() -> impl Strategy<Value = Descriptor> {
        let address = prop_oneof![
            0..(1_u64 << 20),
            Just(1_u64 << 30),
            (1_u64 << 30)..(1 << 30) + (1 << 17),
            any::<u64>()
        ];
        let len = prop_oneof![Just(0_u32), 1..64_u32, (0..64_u32).prop_map(|n| n * 16), any::<u32>()];
        (address, len, 0..16_u16, 0..20_u16).prop_map(|(address, len, flags, next)| Descriptor {
            address,
            len,
            flags,
            next,
        })
    }

    proptest! {
        #[test]
        fn any_table_yields_only_guest_memory(
            direct in prop::collection::vec(descriptor(), 16),
            indirect in prop::collection::vec(descriptor(), 64),
            head in 0..16_u16,
        ) {
            let driver = Driver::new(16);
            for (index, descriptor) in (0..).zip(direct) {
                driver.describe(driver.descriptors(), index, descriptor);
            }
            for (index, descriptor) in (0..).zip(indirect) {
                driver.describe(0x1_0000, index, descriptor);
            }
            let (status, pieces) = walk(&driver, ALL, head);
            let ranges = [(0_u64, 1_u64 << 20), (1 << 30, 1 << 16)].map(|(guest, len)| {
                let start = driver.memory.piece(guest, len).unwrap();
                (start.as_ptr().addr(), start.len())
            });
            let within = |piece: &IoBuf| ranges.iter().any(|(start, len)| {
                let first = piece.as_ptr().addr();
                first >= *start && first + piece.len() <= start + len
            });
            prop_assert!(pieces.readable.iter().chain(&pieces.writable).all(within));
            prop_assert!(pieces.readable.iter().chain(&pieces.writable).all(|piece| !piece.is_empty()));
            prop_assert!(status.iter().all(|status| within(status) && status.len() == 1));
        }
    }
}
