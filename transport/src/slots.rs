//! A table of fixed size whose places are small numbers that can be used as tokens.

/// Values by place, up to a capacity fixed at creation.
pub struct Slots<T> {
    values: Box<[Option<T>]>,
    free: Vec<u32>,
}

impl<T> Slots<T> {
    /// A table of `count` places, at most 2^32.
    pub fn new(count: usize) -> Slots<T> {
        let places = u32::try_from(count).unwrap_or(u32::MAX);
        Slots { values: (0..places).map(|_| None).collect(), free: (0..places).rev().collect() }
    }

    /// Whether no place is free.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Places without a value.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Places that have a value.
    pub fn used(&self) -> usize {
        self.values.len() - self.free.len()
    }

    /// Puts a value into a free place, and returns the place.
    ///
    /// # Panics
    /// When the table is full; the caller checks [`Slots::is_full`] first.
    pub fn insert(&mut self, value: T) -> u32 {
        let place = self.free.pop().expect("the caller saw a free place");
        self.values[place as usize] = Some(value);
        place
    }

    /// The value at a place; none if the place is free or there is no such place.
    pub fn get_mut(&mut self, place: u32) -> Option<&mut T> {
        self.values.get_mut(place as usize)?.as_mut()
    }

    /// All values with their places.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut T)> {
        (0..).zip(&mut self.values).filter_map(|(place, value)| Some((place, value.as_mut()?)))
    }

    /// Removes the value from a place and frees the place.
    pub fn remove(&mut self, place: u32) -> Option<T> {
        let value = self.values.get_mut(place as usize)?.take()?;
        self.free.push(place);
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_not_given_out_again_before_it_is_free() {
        let mut slots = Slots::new(2);
        let (a, b) = (slots.insert('a'), slots.insert('b'));
        assert!(slots.is_full());
        assert_eq!((slots.remove(a), slots.remove(a)), (Some('a'), None));
        assert_eq!(slots.insert('c'), a);
        assert_eq!(slots.get_mut(b), Some(&mut 'b'));
        assert_eq!((slots.used(), slots.remove(7)), (2, None));
    }
}
