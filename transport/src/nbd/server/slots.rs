//! A table of fixed size, whose places are numbers that travel as tokens.

/// Values by place; as many as the table was made for.
pub(super) struct Slots<T> {
    values: Box<[Option<T>]>,
    free: Vec<u32>,
}

impl<T> Slots<T> {
    pub(super) fn new(count: u32) -> Slots<T> {
        Slots { values: (0..count).map(|_| None).collect(), free: (0..count).rev().collect() }
    }

    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub(super) fn used(&self) -> usize {
        self.values.len() - self.free.len()
    }

    /// # Panics
    /// When the table is full, which the caller looks at before.
    pub(super) fn insert(&mut self, value: T) -> u32 {
        let place = self.free.pop().expect("the caller saw a free place");
        self.values[place as usize] = Some(value);
        place
    }

    pub(super) fn get_mut(&mut self, place: u32) -> Option<&mut T> {
        self.values.get_mut(place as usize)?.as_mut()
    }

    pub(super) fn remove(&mut self, place: u32) -> Option<T> {
        let value = self.values.get_mut(place as usize)?.take()?;
        self.free.push(place);
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_given_once_until_it_is_free() {
        let mut slots = Slots::new(2);
        let (a, b) = (slots.insert('a'), slots.insert('b'));
        assert!(slots.is_full());
        assert_eq!((slots.remove(a), slots.remove(a)), (Some('a'), None));
        assert_eq!(slots.insert('c'), a);
        assert_eq!(slots.get_mut(b), Some(&mut 'b'));
        assert_eq!((slots.used(), slots.remove(7)), (2, None));
    }
}
