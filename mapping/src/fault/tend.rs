//! A thread that polls channels which no other thread uses now. Such channels also have to follow a change of the
//! volume (see [`xpm_client_core::Change`]), and a channel follows only when it is polled.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::fault::calls::Calls;
use crate::fault::sigbus::Registered;
use crate::pager::Shared;
use xpm_client_core::volume::Volume;

/// Interval of checking whether a change waits for channels, and interval of polling them while it does.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const TEND_EVERY: Duration = Duration::from_micros(100);
/// Time after the last step of a change in which the next step is expected.
const LINGER: Duration = Duration::from_millis(200);

pub(crate) struct Tender {
    pub(crate) pager: Shared,
    pub(crate) volume: Volume,
    pub(crate) calls: Arc<Mutex<Calls>>,
    pub(crate) inline: Option<Arc<Registered>>,
}

impl Tender {
    /// Polls unused channels while a change waits, until the pager is stopped.
    pub(crate) fn run(self) {
        let mut waited: Option<Instant> = None;
        while !self.pager.is_stopped() {
            if self.volume.waits_for_channels() {
                waited = Some(Instant::now());
                self.tend();
            }
            let soon = waited.is_some_and(|since| since.elapsed() < LINGER);
            std::thread::sleep(if soon { TEND_EVERY } else { LOOK_EVERY });
        }
    }

    /// Polls all channels that are free now; the user of any other channel polls it.
    fn tend(&self) {
        if let Ok(mut calls) = self.calls.try_lock() {
            calls.tend();
        }
        if let Some(inline) = &self.inline {
            inline.tend();
        }
    }
}
