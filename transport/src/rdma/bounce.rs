//! Registered memory of a link, for the buffers that are not.

use std::io;
use std::sync::Arc;

use super::pages::Pages;
use super::verbs::{Access, Domain, Registration};
use crate::io::IoBuf;

/// Length of a place, in bytes. Each queue has all of them for each appliance, in locked memory.
const PLACE_LEN: usize = 8 << 10;
/// Places of one link.
const PLACES: usize = 32;

/// Places to copy through.
pub(super) struct Bounce {
    // Before the pages, so that it does not outlive them.
    registration: Registration,
    pages: Pages,
    free: Vec<u32>,
}

impl Bounce {
    pub(super) fn new(domain: &Arc<Domain>) -> io::Result<Bounce> {
        let pages = Pages::new(PLACE_LEN * PLACES)?;
        let registration = Registration::new(domain, pages.whole(), Access::Local)?;
        Ok(Bounce { registration, pages, free: (0..PLACES as u32).rev().collect() })
    }

    /// A place for up to `len` bytes (its number, its memory, and its key), perhaps for fewer; none
    /// when all are taken.
    pub(super) fn take(&mut self, len: usize) -> Option<(u32, IoBuf, u32)> {
        let place = *self.free.last()?;
        let piece = self.piece(place, len.min(PLACE_LEN));
        let key = self.registration.local_key(piece)?;
        self.free.pop();
        Some((place, piece, key))
    }

    /// The memory of a place.
    pub(super) fn piece(&self, place: u32, len: usize) -> IoBuf {
        self.pages.whole().part(place as usize * PLACE_LEN, len)
    }

    pub(super) fn give_back(&mut self, place: u32) {
        self.free.push(place);
    }
}
