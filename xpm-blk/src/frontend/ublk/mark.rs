//! A mark that the kernel stores in each of our devices, so that they can be recognized later.

use xpm_protocol::ClientId;

/// The mark of devices from before marks named their client: `xpm-blk1`.
const OLD: u64 = u64::from_be_bytes(*b"xpm-blk1");
const PREFIX: u64 = (b'x' as u64) << 8 | b'p' as u64;

/// `xp`, 16 bits of the client's id, and 32 bits of the device's session, which no other device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(u64);

impl Mark {
    /// The mark of a client's device with this session.
    pub fn new(client: ClientId, session: u128) -> Mark {
        Mark(PREFIX << 48 | fold::<16>(client.as_u128()) << 32 | fold::<32>(session))
    }

    pub(super) const fn bits(self) -> u64 {
        self.0
    }
}

/// Whether a device with this mark was created by an xpm-blk with the state of this client, or by an older
/// version.
pub(super) fn is_of(mark: u64, client: ClientId) -> bool {
    mark == OLD || mark >> 32 == Mark::new(client, 0).0 >> 32
}

/// Folds all bits of a random number into `BITS` bits.
fn fold<const BITS: u32>(number: u128) -> u64 {
    let mask = (1_u128 << BITS) - 1;
    let folded = (0..128 / BITS).fold(0, |folded, part| folded ^ (number >> (part * BITS)) & mask);
    folded as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_distinguishes_clients_and_sessions() {
        let (one, other) = (ClientId::from_u128(7 << 40), ClientId::from_u128(8 << 90));
        let mark = Mark::new(one, u128::MAX << 3);
        assert!(is_of(mark.bits(), one) && !is_of(mark.bits(), other));
        assert!(is_of(OLD, one));
        assert!(!is_of(0, one) && !is_of(mark.bits() >> 1, one));
        assert_eq!(Mark::new(one, u128::MAX << 3), mark);
        assert_ne!(Mark::new(one, u128::MAX << 4), mark);
        assert_eq!(mark.bits().to_be_bytes()[..2], *b"xp");
    }
}
