//! Limits on connections that have not proved themselves: pure bookkeeping, shared by all listeners.
//!
//! Anybody who reaches a port can open connections and stay silent. So connections without proof (a key, a token)
//! have a limited number of places, apart from connections with proof. Each address may use a share of these places.
//! A new connection is never refused: if there is no place for it, the oldest connection without proof is closed, one
//! of the same address if that address has used up its share. An honest peer proves itself within milliseconds, and
//! so is seldom the oldest.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

/// Origin of a peer for the shares: an IPv4 address, or the /64 network of an IPv6 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A unix socket: the permissions of its file decide who may connect.
    Local,
    /// IPv4, and IPv4 within IPv6.
    V4(u32),
    /// The first half of an IPv6 address.
    V6(u64),
}

impl From<IpAddr> for Origin {
    fn from(address: IpAddr) -> Origin {
        match address.to_canonical() {
            IpAddr::V4(address) => Origin::V4(address.to_bits()),
            IpAddr::V6(address) => Origin::V6((address.to_bits() >> 64) as u64),
        }
    }
}

/// Number of a connection at a gate; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entry(u64);

/// Connections without proof. A `P` is what closes one.
#[derive(Debug)]
pub struct Gate<P> {
    places: usize,
    share: usize,
    last: u64,
    waiting: BTreeMap<Entry, (Origin, P)>,
    of_origin: HashMap<Origin, usize>,
}

impl<P> Gate<P> {
    /// A gate with this many places, at least 1. A single network address may use at most a quarter of them; peers
    /// of unix sockets may use all of them.
    pub fn new(places: usize) -> Gate<P> {
        let places = places.max(1);
        let share = places.div_ceil(4);
        Gate { places, share, last: 0, waiting: BTreeMap::new(), of_origin: HashMap::new() }
    }

    /// The number of the next connection.
    pub const fn next(&self) -> Entry {
        Entry(self.last + 1)
    }

    /// Registers a new connection. Returns the connection that has to be closed in its place, if any.
    pub fn enter(&mut self, origin: Origin, peer: P) -> Option<P> {
        let own = self.of_origin.get(&origin).copied().unwrap_or(0);
        let has_share = origin != Origin::Local && own >= self.share;
        let oldest = match (has_share, self.waiting.len() >= self.places) {
            (true, _) => self.waiting.iter().find(|(_, (of, _))| *of == origin).map(|(entry, _)| *entry),
            (false, true) => self.waiting.keys().next().copied(),
            (false, false) => None,
        };
        let closed = oldest.and_then(|entry| self.leave(entry));
        self.last += 1;
        self.waiting.insert(Entry(self.last), (origin, peer));
        *self.of_origin.entry(origin).or_insert(0) += 1;
        closed
    }

    /// Removes a connection that proved itself or ended. None if it was removed before.
    pub fn leave(&mut self, entry: Entry) -> Option<P> {
        let (origin, peer) = self.waiting.remove(&entry)?;
        if let Some(count) = self.of_origin.get_mut(&origin) {
            *count -= 1;
            if *count == 0 {
                self.of_origin.remove(&origin);
            }
        }
        Some(peer)
    }

    /// Whether this connection is registered.
    pub fn has(&self, entry: Entry) -> bool {
        self.waiting.contains_key(&entry)
    }

    /// Number of connections without proof.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether a connection is in the way of others: half of the places are in use, or the whole share of its origin.
    pub fn is_in_the_way(&self, entry: Entry) -> bool {
        let Some((origin, _)) = self.waiting.get(&entry) else { return false };
        let own = self.of_origin.get(origin).copied().unwrap_or(0);
        self.waiting.len() * 2 >= self.places || *origin != Origin::Local && own >= self.share
    }

    /// Whether there is no connection without proof.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(text: &str) -> Origin {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn an_origin_is_what_one_host_controls() {
        assert_eq!(of("10.0.0.1"), of("::ffff:10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
        assert_eq!(of("fd00::1"), of("fd00::2:3"));
        assert_ne!(of("fd00::1"), of("fd00:0:0:1::1"));
    }

    #[test]
    fn a_flood_of_one_address_closes_its_own_connections() {
        let mut gate = Gate::new(8);
        let honest = gate.next();
        assert_eq!(gate.enter(of("10.0.0.1"), 'h'), None);
        let closed: Vec<_> = ('a'..='f').filter_map(|peer| gate.enter(of("10.0.0.66"), peer)).collect();
        assert_eq!(closed, ['a', 'b', 'c', 'd'], "the oldest first");
        assert_eq!(gate.leave(honest), Some('h'));
        assert_eq!(gate.leave(honest), None);
        assert_eq!(gate.len(), 2);
    }

    #[test]
    fn a_flood_of_many_addresses_closes_the_oldest() {
        let mut gate = Gate::new(4);
        for number in 0..10_u8 {
            let closed = gate.enter(Origin::V4(number.into()), number);
            assert_eq!(closed, number.checked_sub(4));
        }
        let mut local = Gate::new(4);
        assert!((0..4).all(|peer| local.enter(Origin::Local, peer).is_none()), "a unix socket has no shares");
        assert_eq!(local.enter(Origin::Local, 4), Some(0));
    }

    proptest! {
        #[test]
        fn it_never_holds_more_than_its_places(places in 1_usize..9, peers in prop::collection::vec((0_u32..4, any::<bool>()), 0..60)) {
            let (mut gate, mut inside) = (Gate::new(places), Vec::new());
            for (origin, leaves) in peers {
                let entry = gate.next();
                if let Some(closed) = gate.enter(Origin::V4(origin), entry) {
                    inside.retain(|one| *one != closed);
                }
                inside.push(entry);
                if leaves {
                    prop_assert!(gate.leave(inside.remove(0)).is_some());
                }
                prop_assert!(gate.len() <= places);
                prop_assert_eq!(gate.len(), inside.len());
                prop_assert_eq!(gate.of_origin.values().sum::<usize>(), inside.len());
            }
        }
    }
}
