//! Bounce buffers: registered memory of a link, through which the data of unregistered buffers are copied.

use std::io;
use std::sync::Arc;

use super::pages::Pages;
use super::verbs::{Access, Domain, Registration};
use crate::io::IoBuf;

/// Length of a bounce buffer, in bytes. Each queue has [`PLACES`] bounce buffers for each appliance, in locked
/// memory: so they are short.
const PLACE_LEN: usize = 8 << 10;
/// Bounce buffers of one link.
const PLACES: usize = 32;

/// The bounce buffers of a link.
pub(super) struct Bounce {
    // Dropped before the pages, because the registration must not outlive them.
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

    /// Takes a bounce buffer for up to `len` bytes; it may hold fewer. Returns its number, memory and key;
    /// none when all are in use.
    pub(super) fn take(&mut self, len: usize) -> Option<(u32, IoBuf, u32)> {
        let place = *self.free.last()?;
        let piece = self.piece(place, len.min(PLACE_LEN));
        let key = self.registration.local_key(piece)?;
        self.free.pop();
        Some((place, piece, key))
    }

    /// The memory of a bounce buffer.
    pub(super) fn piece(&self, place: u32, len: usize) -> IoBuf {
        self.pages.whole().part(place as usize * PLACE_LEN, len)
    }

    pub(super) fn give_back(&mut self, place: u32) {
        self.free.push(place);
    }
}
