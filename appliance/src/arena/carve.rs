//! Dividing one long range of bytes into pieces.

use std::collections::BTreeMap;

/// The free parts of a range of bytes. Lengths are powers of two, and a piece lies at a multiple of its own
/// length where possible: otherwise small pieces would leave gaps in which no large piece fits, although
/// enough memory is free. A piece is taken from the smallest free part in which it fits aligned.
#[derive(Debug)]
pub(super) struct Carver {
    /// Start to length. No two parts touch.
    free: BTreeMap<u64, u64>,
}

impl Carver {
    /// `len` bytes from 0, all free.
    pub(super) fn new(len: u64) -> Carver {
        Carver { free: BTreeMap::from([(0, len)]) }
    }

    /// Takes `len` contiguous bytes. Returns their start, or none if no free part is long enough.
    pub(super) fn take(&mut self, len: u64) -> Option<u64> {
        let aligned = self.free.iter().filter_map(|(&start, &found)| {
            let at = start.checked_next_multiple_of(len)?;
            (at.checked_add(len)? <= start + found).then_some((found, at))
        });
        let any = || self.free.iter().find(|&(_, &found)| found >= len).map(|(&start, _)| start);
        let start = aligned.min().map(|(_, at)| at).or_else(any)?;
        self.take_at(start, len).then_some(start)
    }

    /// Takes exactly these bytes; returns whether they were free.
    pub(super) fn take_at(&mut self, start: u64, len: u64) -> bool {
        let Some(end) = start.checked_add(len) else { return false };
        let Some((&before, &found)) = self.free.range(..=start).next_back() else { return false };
        if before + found < end {
            return false;
        }
        self.free.remove(&before);
        if before < start {
            self.free.insert(before, start - before);
        }
        if end < before + found {
            self.free.insert(end, before + found - end);
        }
        true
    }

    /// Returns a piece that [`Carver::take`] or [`Carver::take_at`] gave.
    pub(super) fn give(&mut self, start: u64, len: u64) {
        let (mut start, mut len) = (start, len);
        if let Some(after) = self.free.remove(&(start + len)) {
            len += after;
        }
        if let Some((&before, &before_len)) = self.free.range(..start).next_back()
            && before + before_len == start
        {
            self.free.remove(&before);
            start = before;
            len += before_len;
        }
        self.free.insert(start, len);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn small_pieces_leave_room_for_large_ones() {
        let mut carver = Carver::new(32);
        let small = [carver.take(1), carver.take(1)];
        assert_eq!(small, [Some(0), Some(1)]);
        let large: Vec<_> = (0..7).map(|_| carver.take(4)).collect();
        assert_eq!(large, (1..8).map(|place| Some(4 * place)).collect::<Vec<_>>());
        assert_eq!((carver.take(2), carver.take(1)), (Some(2), None));
    }

    proptest! {
        /// Against a bitmap: pieces never overlap and lie inside the range, and the whole range is free again
        /// at the end.
        #[test]
        fn pieces_never_overlap(steps in prop::collection::vec((0..3_u8, 1_u64..20, any::<prop::sample::Index>()), 1..200)) {
            const LEN: usize = 64;
            let (mut carver, mut map, mut held) = (Carver::new(LEN as u64), [false; LEN], Vec::new());
            for (step, len, which) in steps {
                if step == 0 {
                    let start = which.index(LEN) as u64;
                    let part = map.get_mut(start as usize..(start + len) as usize);
                    let free = part.as_ref().is_some_and(|part| !part.contains(&true));
                    prop_assert_eq!(carver.take_at(start, len), free);
                    if free {
                        part.into_iter().for_each(|part| part.fill(true));
                        held.push((start, len));
                    }
                } else if step == 1 && !held.is_empty() {
                    let (start, len): (u64, u64) = held.swap_remove(which.index(held.len()));
                    map[start as usize..(start + len) as usize].fill(false);
                    carver.give(start, len);
                } else if let Some(start) = carver.take(len) {
                    let part = &mut map[start as usize..(start + len) as usize];
                    prop_assert!(!part.contains(&true));
                    part.fill(true);
                    held.push((start, len));
                } else {
                    let longest = map.split(|used| *used).map(<[bool]>::len).max().unwrap_or(0);
                    prop_assert!((longest as u64) < len, "refused though there was room");
                }
            }
            held.into_iter().for_each(|(start, len)| carver.give(start, len));
            prop_assert_eq!(carver.take(LEN as u64), Some(0));
        }
    }
}
