//! A thread that looks after channels which nobody uses just now: they too have to follow when the volume
//! changes (see [`xpm_client_core::Change`]), and only a look at them lets them.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::fault::calls::Calls;
use crate::fault::sigbus::Registered;
use crate::pager::Shared;
use xpm_client_core::volume::Volume;

/// How often it is looked whether channels are waited for, and how often they are looked after then.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const TEND_EVERY: Duration = Duration::from_micros(100);
/// How long after the last step the next one is expected.
const LINGER: Duration = Duration::from_millis(200);

pub(crate) struct Tender {
    pub(crate) pager: Shared,
    pub(crate) volume: Volume,
    pub(crate) calls: Arc<Mutex<Calls>>,
    pub(crate) inline: Option<Arc<Registered>>,
}

impl Tender {
    /// Looks after them until the pager is stopped.
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

    /// One that is taken is looked after by the one who has it.
    fn tend(&self) {
        if let Ok(mut calls) = self.calls.try_lock() {
            calls.tend();
        }
        if let Some(inline) = &self.inline {
            inline.tend();
        }
    }
}
