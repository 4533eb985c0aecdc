//! Slabs: pieces of regions that the client carves out by itself, without a message to another machine.
//!
//! A buddy system over each region: a slab has a power of two of pages, up to the whole region, and lies at a multiple
//! of its length. Other lengths are rounded up, to less than twice the length. In return, a slab is found, split and
//! joined in a number of steps that depends on the region's size only, and a region whose slabs are all freed is one
//! free block again.
//!
//! Free blocks of each order are in doubly linked lists, whose links are in flat arrays beside the
//! memory, never in it: it is on another machine. Source of the method: Knuth, The Art of Computer
//! Programming, volume 1, section 2.5, algorithms R and S.

use xpm_protocol::units::{PAGE_LEN, is_region_len};

/// No block.
const NONE: u32 = u32::MAX;
/// Orders of a region of 64 GiB: 2^0 to 2^24 pages.
const ORDERS: usize = 25;

/// A slab: `len` bytes at `offset` of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slab {
    /// Number of the region, as [`SlabAllocator::add_region`] gave it.
    pub region: u32,
    /// First byte within the region; a multiple of `len`.
    pub offset: u64,
    /// Length in bytes; a power of two, at least 4096.
    pub len: u64,
}

/// Why a slab cannot be allocated or freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum SlabError {
    /// No free run of this length is left.
    #[error("no free run of {0} bytes is left in the regions")]
    NoSpace(u64),
    /// No slab can have this length: it is 0, or longer than any region.
    #[error("no slab can be {0} bytes long")]
    Length(u64),
    /// The slab is not one that was allocated and not freed since.
    #[error("this is no allocated slab: it was freed already, or never allocated")]
    NotAllocated,
    /// A region's length is no power of two from 16 MiB to 64 GiB.
    #[error("a region cannot be {0} bytes long")]
    RegionLength(u64),
    /// The region does not exist.
    #[error("there is no region {0}")]
    NoRegion(u32),
    /// The region has slabs.
    #[error("region {0} still has slabs")]
    RegionInUse(u32),
}

/// The slab that begins at a page, one byte for each page: the order in the low bits.
const FREE: u8 = 0x40;
const USED: u8 = 0x80;
const ORDER: u8 = 0x1f;

struct Region {
    /// Order of the whole region.
    order: u8,
    /// For each page: whether a block starts there, of which order, free or used.
    heads: Box<[u8]>,
    /// For each page at which a free block starts: the next and the previous free block of its order. Other entries
    /// have no meaning. Entries use memory only after they were changed from zero.
    links: Box<[(u32, u32)]>,
    /// First free block of each order.
    free: [u32; ORDERS],
    /// Bit n: there is a free block of order n.
    orders: u32,
    free_pages: u64,
}

/// Carves slabs out of regions. For one thread; put a lock around it to share it.
#[derive(Default)]
pub struct SlabAllocator {
    regions: Vec<Option<Region>>,
    /// The region in which the last slab was found; it is tried first.
    last: usize,
}

impl SlabAllocator {
    /// An allocator without regions.
    pub fn new() -> SlabAllocator {
        SlabAllocator::default()
    }

    /// Adds a region of `len` bytes and returns its number. Takes 9 bytes for each page of it.
    ///
    /// # Errors
    /// [`SlabError::RegionLength`].
    pub fn add_region(&mut self, len: u64) -> Result<u32, SlabError> {
        if !is_region_len(len) {
            return Err(SlabError::RegionLength(len));
        }
        let number = self.regions.iter().position(Option::is_none).unwrap_or(self.regions.len());
        if number == self.regions.len() {
            self.regions.push(None);
        }
        self.regions[number] = Some(Region::new(len));
        Ok(number as u32)
    }

    /// Removes a region.
    ///
    /// # Errors
    /// [`SlabError::RegionInUse`] while it has slabs, [`SlabError::NoRegion`].
    pub fn remove_region(&mut self, number: u32) -> Result<(), SlabError> {
        let place = self.regions.get_mut(number as usize).ok_or(SlabError::NoRegion(number))?;
        let region = place.as_ref().ok_or(SlabError::NoRegion(number))?;
        if region.free_pages != region.pages() {
            return Err(SlabError::RegionInUse(number));
        }
        *place = None;
        Ok(())
    }

    /// Carves out a slab of at least `len` bytes. No message to anyone; nothing is said about what the
    /// memory holds.
    ///
    /// # Errors
    /// [`SlabError::NoSpace`], [`SlabError::Length`].
    pub fn allocate(&mut self, len: u64) -> Result<Slab, SlabError> {
        let order = order_of(len).ok_or(SlabError::Length(len))?;
        let count = self.regions.len();
        for number in (self.last..count).chain(0..self.last.min(count)) {
            let Some(region) = &mut self.regions[number] else { continue };
            if let Some(page) = region.take(order) {
                self.last = number;
                let (offset, len) = (u64::from(page) * PAGE_LEN, PAGE_LEN << order);
                return Ok(Slab { region: number as u32, offset, len });
            }
        }
        Err(SlabError::NoSpace(len))
    }

    /// Carves out the slab of exactly `len` bytes, a power of two, at `offset` of a region, a multiple of `len`: one
    /// that is known from before.
    ///
    /// # Errors
    /// [`SlabError::NoSpace`] when some of it is in another slab; [`SlabError::Length`], [`SlabError::NoRegion`], and
    /// [`SlabError::NotAllocated`] where no slab can lie there.
    pub fn allocate_at(&mut self, region: u32, offset: u64, len: u64) -> Result<Slab, SlabError> {
        let place = self.regions.get_mut(region as usize).and_then(Option::as_mut);
        let found = place.ok_or(SlabError::NoRegion(region))?;
        let order = order_of(len).filter(|order| len == PAGE_LEN << order).ok_or(SlabError::Length(len))?;
        let end = offset.checked_add(len).filter(|end| *end <= found.pages() * PAGE_LEN);
        if end.is_none() || !offset.is_multiple_of(len) {
            return Err(SlabError::NotAllocated);
        }
        match found.take_at((offset / PAGE_LEN) as u32, order) {
            true => Ok(Slab { region, offset, len }),
            false => Err(SlabError::NoSpace(len)),
        }
    }

    /// Gives a slab back.
    ///
    /// # Errors
    /// [`SlabError::NotAllocated`] for anything that is not a slab in use, a second time included.
    pub fn free(&mut self, slab: Slab) -> Result<(), SlabError> {
        let (region, page, order) = self.in_use(slab)?;
        region.give(page, order);
        Ok(())
    }

    /// As [`SlabAllocator::allocate`], but at the start of the longest free run: there it can grow furthest by
    /// [`SlabAllocator::resize`].
    ///
    /// # Errors
    /// [`SlabError::NoSpace`], [`SlabError::Length`].
    pub fn allocate_to_grow(&mut self, len: u64) -> Result<Slab, SlabError> {
        let order = order_of(len).ok_or(SlabError::Length(len))?;
        let longest =
            |(number, region): (usize, &Option<Region>)| Some((region.as_ref()?.longest()?, number));
        let most = self.regions.iter().enumerate().filter_map(longest).max_by_key(|(order, _)| *order);
        let (longest, number) = most.filter(|(found, _)| *found >= order).ok_or(SlabError::NoSpace(len))?;
        let region = self.regions[number].as_mut().ok_or(SlabError::NoSpace(len))?;
        let page = region.take_from(longest, order);
        Ok(Slab { region: number as u32, offset: u64::from(page) * PAGE_LEN, len: PAGE_LEN << order })
    }

    /// Makes a slab longer or shorter without moving it, so that it has at least `len` bytes. A part that is cut off
    /// becomes free.
    ///
    /// # Errors
    /// [`SlabError::NoSpace`] if the slab would have to move: another slab has some of the pages behind it, or its
    /// offset is not a multiple of the new length. [`SlabError::Length`], and [`SlabError::NotAllocated`] for
    /// anything that is not a slab in use.
    pub fn resize(&mut self, slab: Slab, len: u64) -> Result<Slab, SlabError> {
        let order = order_of(len).ok_or(SlabError::Length(len))?;
        let (region, page, now) = self.in_use(slab)?;
        match order <= now {
            true => region.cut(page, now, order),
            false if region.grow(page, now, order) => {}
            false => return Err(SlabError::NoSpace(len)),
        }
        Ok(Slab { len: PAGE_LEN << order, ..slab })
    }

    /// The region, first page and order of a slab that is in use.
    fn in_use(&mut self, slab: Slab) -> Result<(&mut Region, u32, u8), SlabError> {
        let region = self.regions.get_mut(slab.region as usize).and_then(Option::as_mut);
        let region = region.ok_or(SlabError::NotAllocated)?;
        let order = order_of(slab.len).ok_or(SlabError::NotAllocated)?;
        let page = slab.offset / PAGE_LEN;
        let exact = slab.len == PAGE_LEN << order && slab.offset.is_multiple_of(PAGE_LEN);
        if !exact || page >= region.pages() || region.heads[page as usize] != USED | order {
            return Err(SlabError::NotAllocated);
        }
        Ok((region, page as u32, order))
    }

    /// Bytes that are in no slab.
    pub fn free_bytes(&self) -> u64 {
        self.regions.iter().flatten().map(|region| region.free_pages * PAGE_LEN).sum()
    }

    /// Length in bytes of the longest slab that could be allocated now; 0 if nothing is free.
    pub fn longest_free(&self) -> u64 {
        let orders = self.regions.iter().flatten().fold(0, |orders, region| orders | region.orders);
        orders.checked_ilog2().map_or(0, |order| PAGE_LEN << order)
    }
}

/// The order of the smallest block that holds `len` bytes.
fn order_of(len: u64) -> Option<u8> {
    let pages = len.div_ceil(PAGE_LEN).checked_next_power_of_two()?;
    let order = pages.trailing_zeros();
    (len > 0 && (order as usize) < ORDERS).then_some(order as u8)
}

impl Region {
    fn new(len: u64) -> Region {
        let pages = len / PAGE_LEN;
        let mut region = Region {
            order: pages.trailing_zeros() as u8,
            heads: vec![0; pages as usize].into_boxed_slice(),
            links: vec![(0, 0); pages as usize].into_boxed_slice(),
            free: [NONE; ORDERS],
            orders: 0,
            free_pages: pages,
        };
        region.push(0, region.order);
        region
    }

    const fn pages(&self) -> u64 {
        1 << self.order
    }

    /// Takes the block of this order at this page: splits it off the free block that contains it. Returns false if
    /// no free block contains it.
    fn take_at(&mut self, page: u32, order: u8) -> bool {
        let head = |order: u8| page & !((1_u32 << order) - 1);
        let found = (order..=self.order).find(|found| self.heads[head(*found) as usize] == FREE | *found);
        let Some(mut found) = found else { return false };
        self.unlink(head(found), found);
        while found > order {
            let whole = head(found);
            found -= 1;
            // The half that does not contain the page stays free.
            let half = if head(found) == whole { whole + (1 << found) } else { whole };
            self.push(half, found);
        }
        self.heads[page as usize] = USED | order;
        self.free_pages -= 1 << order;
        true
    }

    /// Takes a block of exactly this order: splits it off the smallest free block that is long enough.
    fn take(&mut self, order: u8) -> Option<u32> {
        let fitting = self.orders & (u32::MAX << order);
        (fitting != 0).then(|| self.take_from(fitting.trailing_zeros() as u8, order))
    }

    /// Takes a block of exactly this order: splits it off a free block of the order `found`, which must exist.
    fn take_from(&mut self, mut found: u8, order: u8) -> u32 {
        let page = self.free[found as usize];
        self.unlink(page, found);
        while found > order {
            found -= 1;
            // The upper half stays free.
            self.push(page + (1 << found), found);
        }
        self.heads[page as usize] = USED | order;
        self.free_pages -= 1 << order;
        page
    }

    /// Order of the longest free block.
    fn longest(&self) -> Option<u8> {
        Some(self.orders.checked_ilog2()? as u8)
    }

    /// Adds the pages behind a block in use to it, so that it has a greater order. Returns false, with nothing
    /// changed, if they are not free or the block does not lie at a multiple of its new length.
    fn grow(&mut self, page: u32, now: u8, order: u8) -> bool {
        let fits = order <= self.order && page.is_multiple_of(1 << order);
        // Each of these blocks is the buddy of everything before it, which contains the block in use. So if its pages
        // are all free, they are exactly one free block of this order, not a part of a longer one.
        let behind = (now..order).map(|order| (page + (1 << order), order));
        if !fits || !behind.clone().all(|(page, order)| self.heads[page as usize] == FREE | order) {
            return false;
        }
        behind.for_each(|(page, order)| self.unlink(page, order));
        self.heads[page as usize] = USED | order;
        self.free_pages -= (1 << order) - (1 << now);
        true
    }

    /// Frees the end of a block in use, so that it has a smaller order.
    fn cut(&mut self, page: u32, now: u8, order: u8) {
        self.heads[page as usize] = USED | order;
        (order..now).for_each(|order| self.push(page + (1 << order), order));
        self.free_pages += (1 << now) - (1 << order);
    }

    /// Frees a block, and joins it with its buddy for as long as that is free too.
    fn give(&mut self, mut page: u32, mut order: u8) {
        self.free_pages += 1 << order;
        self.heads[page as usize] = 0;
        while order < self.order {
            let buddy = page ^ (1 << order);
            if self.heads[buddy as usize] != FREE | order {
                break;
            }
            self.unlink(buddy, order);
            page &= !(1 << order);
            order += 1;
        }
        self.push(page, order);
    }

    fn push(&mut self, page: u32, order: u8) {
        let next = self.free[order as usize];
        self.heads[page as usize] = FREE | order;
        self.links[page as usize] = (next, NONE);
        if next != NONE {
            self.links[next as usize].1 = page;
        }
        self.free[order as usize] = page;
        self.orders |= 1 << order;
    }

    fn unlink(&mut self, page: u32, order: u8) {
        let (next, previous) = self.links[page as usize];
        debug_assert_eq!(self.heads[page as usize] & ORDER, order, "the block is of this order");
        self.heads[page as usize] = 0;
        if next != NONE {
            self.links[next as usize].1 = previous;
        }
        if previous != NONE {
            self.links[previous as usize].0 = next;
        } else {
            self.free[order as usize] = next;
            if next == NONE {
                self.orders &= !(1 << order);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const REGION: u64 = 16 << 20;

    /// The slabs in use, by place: slow and obvious.
    #[derive(Default)]
    struct Model {
        slabs: BTreeMap<(u32, u64), u64>,
    }

    impl Model {
        fn add(&mut self, slab: Slab, asked: u64) {
            assert!(slab.len >= asked && slab.len < 2 * asked.max(PAGE_LEN / 2 + 1));
            assert_eq!(slab.offset % slab.len, 0);
            assert!(slab.offset + slab.len <= REGION);
            let place = (slab.region, slab.offset);
            if let Some((&(region, offset), &len)) = self.slabs.range(..place).next_back() {
                assert!(region < slab.region || offset + len <= slab.offset, "overlaps the one before");
            }
            if let Some((&(region, offset), _)) = self.slabs.range(place..).next() {
                assert!(region > slab.region || offset >= slab.offset + slab.len, "overlaps the one behind");
            }
            self.slabs.insert(place, slab.len);
        }

        fn used(&self) -> u64 {
            self.slabs.values().sum()
        }

        /// Whether a block of this length is free somewhere, aligned to its length.
        fn has_room(&self, regions: u32, len: u64) -> bool {
            (0..regions).any(|region| {
                (0..REGION / len).any(|block| {
                    let (start, end) = (block * len, (block + 1) * len);
                    let before = self.slabs.range(..(region, end)).next_back();
                    before.is_none_or(|(&(at, offset), &len)| at != region || offset + len <= start)
                })
            })
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Allocate(u64),
        AllocateAt(u32, u64, u32),
        AllocateToGrow(u64),
        Resize(usize, u64),
        Free(usize),
        FreeTwice(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..13_u32, 0..4096_u64).prop_map(|(order, less)| Step::Allocate((PAGE_LEN << order) - less)),
            1 => (0..2_u32, 0..4096_u64, 0..13_u32).prop_map(|(region, page, order)| {
                Step::AllocateAt(region, (page & !((1 << order) - 1)) * PAGE_LEN, order)
            }),
            1 => (0..13_u32).prop_map(|order| Step::AllocateToGrow(PAGE_LEN << order)),
            2 => (any::<usize>(), 0..13_u32).prop_map(|(pick, order)| Step::Resize(pick, PAGE_LEN << order)),
            2 => any::<usize>().prop_map(Step::Free),
            1 => any::<usize>().prop_map(Step::FreeTwice),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_model(steps in prop::collection::vec(step(), 1..300)) {
            let mut allocator = SlabAllocator::new();
            let mut model = Model::default();
            let regions = 2;
            (0..regions).for_each(|number| assert_eq!(allocator.add_region(REGION), Ok(number)));
            for step in steps {
                match step {
                    Step::Allocate(len) => match allocator.allocate(len) {
                        Ok(slab) => model.add(slab, len),
                        Err(error) => {
                            prop_assert_eq!(error, SlabError::NoSpace(len));
                            let rounded = len.div_ceil(PAGE_LEN).next_power_of_two() * PAGE_LEN;
                            prop_assert!(!model.has_room(regions, rounded));
                        }
                    },
                    Step::AllocateAt(region, offset, order) => {
                        let len = PAGE_LEN << order;
                        let apart = |(place, other): (&(u32, u64), &u64)| {
                            place.0 != region || place.1 >= offset + len || place.1 + other <= offset
                        };
                        match allocator.allocate_at(region, offset, len) {
                            Ok(slab) => {
                                prop_assert_eq!(slab, Slab { region, offset, len });
                                model.add(slab, len);
                            }
                            Err(error) => {
                                prop_assert_eq!(error, SlabError::NoSpace(len));
                                prop_assert!(!model.slabs.iter().all(apart));
                            }
                        }
                    }
                    Step::Free(pick) | Step::FreeTwice(pick) if !model.slabs.is_empty() => {
                        let (&(region, offset), &len) =
                            model.slabs.iter().nth(pick % model.slabs.len()).unwrap();
                        let slab = Slab { region, offset, len };
                        prop_assert_eq!(allocator.free(Slab { len: len * 2, ..slab }), Err(SlabError::NotAllocated));
                        prop_assert_eq!(allocator.free(slab), Ok(()));
                        model.slabs.remove(&(region, offset));
                        if matches!(step, Step::FreeTwice(_)) {
                            prop_assert_eq!(allocator.free(slab), Err(SlabError::NotAllocated));
                        }
                    }
                    Step::AllocateToGrow(len) => {
                        let longest = allocator.longest_free();
                        match allocator.allocate_to_grow(len) {
                            Ok(slab) => {
                                model.add(slab, len);
                                prop_assert_eq!(slab.offset % longest, 0, "it can grow to that");
                                let grown = allocator.resize(slab, longest);
                                prop_assert_eq!(grown, Ok(Slab { len: longest, ..slab }));
                                prop_assert_eq!(allocator.resize(Slab { len: longest, ..slab }, len), Ok(slab));
                            }
                            Err(error) => {
                                prop_assert_eq!(error, SlabError::NoSpace(len));
                                prop_assert!(!model.has_room(regions, len));
                            }
                        }
                    }
                    Step::Resize(pick, new) if !model.slabs.is_empty() => {
                        let (&place, &len) = model.slabs.iter().nth(pick % model.slabs.len()).unwrap();
                        let slab = Slab { region: place.0, offset: place.1, len };
                        let end = place.1 + new;
                        let free = model.slabs.range(place..(place.0, end)).count() <= 1;
                        let fits = place.1 % new == 0 && end <= REGION && free;
                        match allocator.resize(slab, new) {
                            Ok(resized) => {
                                prop_assert_eq!(resized, Slab { len: new, ..slab });
                                prop_assert!(new <= len || fits);
                                model.slabs.insert(place, new);
                            }
                            Err(error) => {
                                prop_assert_eq!(error, SlabError::NoSpace(new));
                                prop_assert!(new > len && !fits);
                            }
                        }
                    }
                    Step::Resize(..) | Step::Free(_) | Step::FreeTwice(_) => {}
                }
                prop_assert_eq!(allocator.free_bytes(), u64::from(regions) * REGION - model.used());
            }
            for ((region, offset), len) in model.slabs {
                prop_assert_eq!(allocator.free(Slab { region, offset, len }), Ok(()));
            }
            prop_assert_eq!(allocator.longest_free(), REGION, "everything is joined again");
            prop_assert_eq!(allocator.remove_region(0), Ok(()));
        }
    }

    #[test]
    fn what_cannot_be() {
        let mut allocator = SlabAllocator::new();
        assert_eq!(allocator.allocate(4096), Err(SlabError::NoSpace(4096)));
        assert_eq!(allocator.add_region(3 << 20), Err(SlabError::RegionLength(3 << 20)));
        let region = allocator.add_region(REGION).unwrap();
        for len in [0, u64::MAX, 1 << 40] {
            assert_eq!(allocator.allocate(len), Err(SlabError::Length(len)));
        }
        assert_eq!(allocator.allocate(REGION + 1), Err(SlabError::NoSpace(REGION + 1)));
        let slab = allocator.allocate(1).unwrap();
        assert_eq!(allocator.remove_region(region), Err(SlabError::RegionInUse(region)));
        for wrong in [
            Slab { region: 7, ..slab },
            Slab { offset: slab.offset + 4096, ..slab },
            Slab { offset: slab.offset + 1, ..slab },
            Slab { offset: u64::MAX, ..slab },
            Slab { len: 0, ..slab },
            Slab { len: u64::MAX, ..slab },
        ] {
            assert_eq!(allocator.free(wrong), Err(SlabError::NotAllocated), "{wrong:?}");
            assert_eq!(allocator.resize(wrong, 4096), Err(SlabError::NotAllocated), "{wrong:?}");
        }
        assert_eq!(allocator.resize(slab, 0), Err(SlabError::Length(0)));
        assert_eq!(allocator.resize(slab, 2 * REGION), Err(SlabError::NoSpace(2 * REGION)));
        assert_eq!(allocator.allocate_to_grow(0), Err(SlabError::Length(0)));
        assert_eq!(allocator.allocate_to_grow(REGION), Err(SlabError::NoSpace(REGION)));
        for (region, offset, len, error) in [
            (7, 0, 4096, SlabError::NoRegion(7)),
            (region, 4096, 8192, SlabError::NotAllocated),
            (region, REGION, 4096, SlabError::NotAllocated),
            (region, u64::MAX - 4095, 4096, SlabError::NotAllocated),
            (region, 0, 5000, SlabError::Length(5000)),
            (region, 0, 0, SlabError::Length(0)),
            (region, slab.offset, 4096, SlabError::NoSpace(4096)),
            (region, 0, REGION, SlabError::NoSpace(REGION)),
        ] {
            assert_eq!(allocator.allocate_at(region, offset, len), Err(error), "{region} {offset} {len}");
        }
        assert_eq!(allocator.free(slab), Ok(()));
        assert_eq!(allocator.remove_region(9), Err(SlabError::NoRegion(9)));
    }
}
