//! Names of hosts, resolved where nobody waits for long.
//!
//! A name server that is gone makes resolving take ten seconds and more, and files of the system may have to be read. So
//! it happens on a thread of its own, and a connector goes on with the addresses that it has. What is found too late
//! for one attempt is there for the next.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Stack of the thread, in bytes: glibc's resolver needs some tens of KiB.
const STACK_LEN: usize = 256 << 10;

/// Addresses of some names. Not for a data path: looking them up may block for as long as the caller allows.
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
    /// Times that all were looked up.
    rounds: u64,
    addresses: Vec<SocketAddr>,
}

impl Shared {
    /// Only assignments happen under the lock.
    fn lock(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Names {
    /// Begins to look names (`HOST:PORT`) up anew, waits for it for at most `patience`, and gives what is known of them:
    /// of this time, or of the time before. Names that cannot be resolved now keep no address.
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

    /// False when the system has no more threads.
    fn start(&self, names: &[String]) -> bool {
        let (shared, names) = (self.shared.clone(), names.to_vec());
        let look = move || {
            let all: Vec<SocketAddr> =
                names.iter().filter_map(|name| name.to_socket_addrs().ok()).flatten().collect();
            let mut found = shared.lock();
            // A name server that is gone for a moment takes no address away.
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
    fn names_are_resolved_and_what_is_no_name_has_no_address() {
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
