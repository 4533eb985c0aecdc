//! Resolving host names without blocking a connection attempt for long.
//!
//! Resolving takes ten seconds and more when the name server is unreachable, and it may read system files. So
//! it runs on a thread of its own, and a connector continues with the addresses that are known. Addresses
//! that are found too late for one attempt are used by the next.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Stack of the thread, in bytes: glibc's resolver needs some tens of KiB.
const STACK_LEN: usize = 256 << 10;

/// The addresses of some names. Not for a data path: a look-up may block for as long as the caller allows.
#[derive(Debug, Default)]
pub struct Names {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    found: Mutex<Found>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Found {
    is_running: bool,
    /// How often all names were looked up.
    rounds: u64,
    addresses: Vec<SocketAddr>,
}

impl Shared {
    /// Critical sections consist of assignments only, so a poisoned lock is safe to use.
    fn lock(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Names {
    /// Starts a new look-up of `names` (`HOST:PORT`), waits at most `patience` for it, and returns the known
    /// addresses, of this look-up or of the previous one. Names that cannot be resolved now contribute no
    /// address.
    pub fn resolve(&self, names: &[String], patience: Duration) -> Vec<SocketAddr> {
        if names.is_empty() {
            return Vec::new();
        }
        let mut found = self.shared.lock();
        let round = found.rounds + 1;
        if !found.is_running {
            found.is_running = self.start(names);
        }
        let end = Instant::now() + patience;
        while found.is_running && found.rounds < round {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            found = self.shared.changed.wait_timeout(found, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        found.addresses.clone()
    }

    /// Returns false when the system cannot create another thread.
    fn start(&self, names: &[String]) -> bool {
        let (shared, names) = (self.shared.clone(), names.to_vec());
        let look = move || {
            let all: Vec<SocketAddr> =
                names.iter().filter_map(|name| name.to_socket_addrs().ok()).flatten().collect();
            let mut found = shared.lock();
            // While the name server is unreachable, the known addresses stay.
            if !all.is_empty() {
                found.addresses = all;
            }
            (found.is_running, found.rounds) = (false, found.rounds + 1);
            shared.changed.notify_all();
        };
        std::thread::Builder::new().name("xpm-names".to_owned()).stack_size(STACK_LEN).spawn(look).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_resolves_and_an_invalid_name_has_no_address() {
        let names = Names::default();
        let found =
            names.resolve(&["localhost:7".to_owned(), "no such host:7".to_owned()], Duration::from_secs(20));
        assert!(
            !found.is_empty() && found.iter().all(|one| one.ip().is_loopback() && one.port() == 7),
            "{found:?}"
        );
        let again = names.resolve(&["no such host:7".to_owned()], Duration::from_secs(20));
        assert_eq!(again, found, "what was known stays known");
        assert!(Names::default().resolve(&[], Duration::MAX).is_empty());
    }
}
