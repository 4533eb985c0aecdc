//! The descriptors of regions in the store of the service manager.

use std::collections::BTreeSet;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use xpm_control::manager::Manager;

/// Most regions that are stored. The names of all have to fit into one environment variable, for which the
/// kernel allows 128 KiB.
pub(crate) const SLOTS_MAX: u32 = 16_000;
/// Prefix of the names of regions in the store.
const PREFIX: &str = "r";

/// The part of the store that holds regions.
pub(crate) struct Vault {
    manager: Arc<Manager>,
    slots: Mutex<Slots>,
    /// Whether dropped descriptors are removed from the store: not before all memory is taken back, and not
    /// while the process ends.
    lets_go: AtomicBool,
}

#[derive(Default)]
struct Slots {
    /// Free slots below `next`; all slots from `next` on are free.
    free: BTreeSet<u32>,
    next: u32,
    most: u32,
    /// Whether it was logged that the store is full.
    said: bool,
}

/// A place in the store. Dropping it removes the descriptor from the store.
pub(crate) struct Stored {
    vault: Arc<Vault>,
    slot: u32,
}

impl Slots {
    fn take(&mut self) -> Option<u32> {
        let slot = self.free.pop_first().or((self.next < self.most).then_some(self.next))?;
        self.next = self.next.max(slot + 1);
        Some(slot)
    }

    fn is_used(&self, slot: u32) -> bool {
        slot < self.next && !self.free.contains(&slot)
    }

    /// Takes this slot; returns whether it was free.
    fn claim(&mut self, slot: u32) -> bool {
        if slot < self.next {
            return self.free.remove(&slot);
        }
        self.free.extend(self.next..slot);
        self.next = slot + 1;
        true
    }
}

impl Vault {
    /// A store with places for `most` regions, up to [`SLOTS_MAX`].
    pub(crate) fn new(manager: Arc<Manager>, most: Option<u32>) -> Arc<Vault> {
        let most = most.unwrap_or(SLOTS_MAX).min(SLOTS_MAX);
        let slots = Mutex::new(Slots { most, ..Slots::default() });
        Arc::new(Vault { manager, slots, lets_go: AtomicBool::new(false) })
    }

    /// Sets whether dropped descriptors are removed from the store.
    pub(crate) fn let_go(&self, does: bool) {
        self.lets_go.store(does, SeqCst);
    }

    /// Stores a region's descriptor; none when there is no free place.
    pub(crate) fn store(self: &Arc<Vault>, descriptor: BorrowedFd<'_>) -> Option<Stored> {
        let mut slots = self.lock();
        let slot = slots.take();
        let refused = match slot.map(|slot| (slot, self.manager.store(&name_of(slot), descriptor))) {
            Some((slot, Ok(()))) => return Some(Stored { vault: self.clone(), slot }),
            Some((slot, Err(error))) => {
                slots.free.insert(slot);
                format!("the service manager does not take more ({error})")
            }
            None => format!(
                "{} regions are kept already: raise FileDescriptorStoreMax, or use larger regions",
                slots.most
            ),
        };
        if !std::mem::replace(&mut slots.said, true) {
            tracing::warn!("some of the lent memory will not outlive this process: {refused}");
        }
        None
    }

    /// The place of a descriptor that was passed under this name, if the name is one of a region.
    pub(crate) fn taken_back(self: &Arc<Vault>, name: &str) -> Option<Stored> {
        let slot = slot_of(name)?;
        self.lock().claim(slot).then(|| Stored { vault: self.clone(), slot })
    }

    /// Removes a descriptor that was passed under this name, unless the name is also in use for a needed one.
    pub(crate) fn remove(&self, name: &str) {
        let slots = self.lock();
        if slot_of(name).is_some_and(|slot| slots.is_used(slot)) {
            return;
        }
        match self.manager.remove(name) {
            Ok(()) => {}
            Err(error) => tracing::warn!(
                "the service manager still keeps `{name}`, which is not needed any \
                 more: {error}"
            ),
        }
    }

    /// Stores a descriptor under a name of its own, in place of the previous one.
    pub(crate) fn replace(&self, name: &str, descriptor: &OwnedFd) -> std::io::Result<()> {
        self.manager.remove(name)?;
        self.manager.store(name, descriptor.as_fd())
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Stored {
    fn drop(&mut self) {
        // Under the lock: the name is reused only after this.
        let mut slots = self.vault.lock();
        // A process that panics ends, and its next life takes back as much as possible.
        if !self.vault.lets_go.load(SeqCst) || std::thread::panicking() {
            slots.free.insert(self.slot);
            return;
        }
        match self.vault.manager.remove(&name_of(self.slot)) {
            Ok(()) => {
                slots.free.insert(self.slot);
            }
            Err(error) => tracing::warn!(
                "the service manager keeps memory that is not needed any more until this appliance is \
                 started again: {error}"
            ),
        }
    }
}

fn name_of(slot: u32) -> String {
    format!("{PREFIX}{slot:x}")
}

fn slot_of(name: &str) -> Option<u32> {
    let slot = u32::from_str_radix(name.strip_prefix(PREFIX)?, 16).ok()?;
    (slot < SLOTS_MAX && name_of(slot) == name).then_some(slot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_taken_once() {
        let mut slots = Slots { most: 4, ..Slots::default() };
        assert!(slots.claim(2) && !slots.claim(2));
        assert_eq!(
            [slots.take(), slots.take(), slots.take(), slots.take()],
            [Some(0), Some(1), Some(3), None]
        );
        slots.free.insert(1);
        assert!(!slots.claim(0));
        assert_eq!([slots.take(), slots.take()], [Some(1), None]);
    }

    #[test]
    fn all_names_fit_into_the_environment() {
        let names: Vec<String> = (0..SLOTS_MAX).map(name_of).collect();
        assert!(names.join(":").len() + "LISTEN_FDNAMES=ledger-0:ledger-1".len() < 128 << 10);
        assert!(names.iter().enumerate().all(|(slot, name)| slot_of(name) == Some(slot as u32)));
        for other in ["", "r", "r01", "rg", "R1", "ledger-0", "r1 "] {
            assert_eq!(slot_of(other), None, "{other}");
        }
    }
}
