//! The messages of the two ends: private data of the connection manager, and the table of a grant's regions.
//! All numbers are big-endian.
//!
//! A client's request ([`Hello`]) fills the 56 bytes that the connection manager leaves of an InfiniBand CM
//! REQ (IBTA 1, annex A11, IP addressing). The appliance answers with a [`Welcome`], which contains the
//! table's address, or rejects with a [`Refusal`].

use xpm_protocol::nbd::SessionTag;
use xpm_protocol::{Epoch, GrantKey};

/// Version of this protocol.
const VERSION: u8 = 1;
/// Marks a message as one of this protocol.
const MAGIC: u8 = 0x58;

/// Length of an encoded [`Hello`].
pub const HELLO_LEN: usize = 56;
/// Length of an encoded [`Welcome`].
pub const WELCOME_LEN: usize = 24;
/// Length of an encoded [`Refusal`].
pub const REFUSAL_LEN: usize = 3;
/// Length of an encoded [`Entry`] of the table.
pub const ENTRY_LEN: usize = 16;
/// Most regions of one grant: more than any appliance grants.
pub const REGIONS_MAX: u32 = 1 << 16;

/// A client's request for a grant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The grant's key.
    pub key: GrantKey,
    /// The epoch in which the client owns the grant.
    pub epoch: Epoch,
    /// The low half of the session's id.
    pub session: u64,
    /// The session's queue.
    pub queue: u16,
    /// The generation of the connection; it shuts out older connections of the same session and queue.
    pub generation: u32,
}

impl Hello {
    /// The request for a grant by a session.
    pub fn new(key: GrantKey, epoch: Epoch, session: SessionTag) -> Hello {
        Hello {
            key,
            epoch,
            session: short_session(session.id),
            queue: session.queue,
            generation: session.generation,
        }
    }

    /// The message.
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        let mut bytes = [0; HELLO_LEN];
        bytes[0] = MAGIC;
        bytes[1] = VERSION;
        bytes[2..34].copy_from_slice(self.key.as_bytes());
        bytes[34..42].copy_from_slice(&self.epoch.0.to_be_bytes());
        bytes[42..50].copy_from_slice(&self.session.to_be_bytes());
        bytes[50..52].copy_from_slice(&self.queue.to_be_bytes());
        bytes[52..56].copy_from_slice(&self.generation.to_be_bytes());
        bytes
    }

    /// Decodes a message, whose end transports may have padded.
    ///
    /// # Errors
    /// The reason to reject the client with.
    pub fn decode(bytes: &[u8]) -> Result<Hello, Refusal> {
        let bytes: &[u8; HELLO_LEN] = bytes.first_chunk().ok_or(Refusal::Version)?;
        if bytes[0] != MAGIC || bytes[1] != VERSION {
            return Err(Refusal::Version);
        }
        Ok(Hello {
            key: GrantKey::from_bytes(part(&bytes[2..])),
            epoch: Epoch(u64::from_be_bytes(part(&bytes[34..]))),
            session: u64::from_be_bytes(part(&bytes[42..])),
            queue: u16::from_be_bytes(part(&bytes[50..])),
            generation: u32::from_be_bytes(part(&bytes[52..])),
        })
    }
}

/// The part of a session's id that fits into the message.
pub const fn short_session(id: u128) -> u64 {
    id as u64
}

/// The first `N` bytes; the caller has checked the length.
fn part<const N: usize>(bytes: &[u8]) -> [u8; N] {
    *bytes.first_chunk().expect("the length was looked at before")
}

/// The location of the table of the grant's regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Welcome {
    /// Address of the table.
    pub table: u64,
    /// Key of the table's memory.
    pub rkey: u32,
    /// Entries of the table.
    pub regions: u32,
    /// Base-2 logarithm of the length of a region in bytes.
    pub region_shift: u8,
}

impl Welcome {
    /// The message.
    pub fn encode(&self) -> [u8; WELCOME_LEN] {
        let mut bytes = [0; WELCOME_LEN];
        bytes[0] = MAGIC;
        bytes[1] = VERSION;
        bytes[2] = self.region_shift;
        bytes[4..8].copy_from_slice(&self.regions.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.table.to_be_bytes());
        bytes[16..20].copy_from_slice(&self.rkey.to_be_bytes());
        bytes
    }

    /// Decodes a message, whose end transports may have padded. None when the bytes are no such message, or
    /// contain an invalid value.
    pub fn decode(bytes: &[u8]) -> Option<Welcome> {
        let bytes: &[u8; WELCOME_LEN] = bytes.first_chunk()?;
        if bytes[0] != MAGIC || bytes[1] != VERSION {
            return None;
        }
        let welcome = Welcome {
            region_shift: bytes[2],
            regions: u32::from_be_bytes(part(&bytes[4..])),
            table: u64::from_be_bytes(part(&bytes[8..])),
            rkey: u32::from_be_bytes(part(&bytes[16..])),
        };
        let possible =
            (12..=40).contains(&welcome.region_shift) && (1..=REGIONS_MAX).contains(&welcome.regions);
        possible.then_some(welcome)
    }
}

/// Why a client is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// No grant has this key in this epoch.
    Unknown,
    /// The regions are being registered: try again soon.
    NotReady,
    /// The memory is shared with a process on the appliance's host, which excludes RDMA.
    Shared,
    /// The regions cannot be registered with this device.
    Failed,
    /// Another version of this protocol.
    Version,
    /// Too many connections.
    Busy,
    /// A newer connection of the same session and queue exists. Older servers send [`Refusal::Busy`] instead.
    Outdated,
}

impl Refusal {
    /// The message.
    pub const fn encode(self) -> [u8; REFUSAL_LEN] {
        let reason = match self {
            Refusal::Unknown => 1,
            Refusal::NotReady => 2,
            Refusal::Shared => 3,
            Refusal::Failed => 4,
            Refusal::Version => 5,
            Refusal::Busy => 6,
            Refusal::Outdated => 7,
        };
        [MAGIC, VERSION, reason]
    }

    /// Decodes a message, whose end transports may have padded. None when the bytes are not of this protocol,
    /// so that the rejection did not come from the appliance.
    pub fn decode(bytes: &[u8]) -> Option<Refusal> {
        match bytes {
            [MAGIC, VERSION, reason, ..] => match reason {
                1 => Some(Refusal::Unknown),
                2 => Some(Refusal::NotReady),
                3 => Some(Refusal::Shared),
                4 => Some(Refusal::Failed),
                5 => Some(Refusal::Version),
                6 => Some(Refusal::Busy),
                7 => Some(Refusal::Outdated),
                _ => None,
            },
            [MAGIC, _, ..] => Some(Refusal::Version),
            _ => None,
        }
    }
}

/// Length of an encoded [`End`].
pub const END_LEN: usize = 32;
/// Length of a client's request over TCP: [`Hello`], then [`End`].
pub const ASK_LEN: usize = HELLO_LEN + END_LEN;
/// Length of the answer over TCP: see [`encode_answer`].
pub const ANSWER_LEN: usize = 1 + WELCOME_LEN + END_LEN;

/// An end of a reliable connection that is made without the connection manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Number of the queue pair, 24 bits.
    pub number: u32,
    /// Number of its first packet, 24 bits.
    pub packet: u32,
    /// Local identifier of the port; 0 on Ethernet.
    pub lid: u16,
    /// Active MTU of the port, as `enum ibv_mtu` counts: 1 to 5 for 256 to 4096 bytes.
    pub mtu: u8,
    /// Whether the port uses RoCE.
    pub ethernet: bool,
    /// Global identifier of the port.
    pub gid: [u8; 16],
}

impl End {
    /// The message.
    pub fn encode(&self) -> [u8; END_LEN] {
        let mut bytes = [0; END_LEN];
        bytes[..4].copy_from_slice(&self.number.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.packet.to_be_bytes());
        bytes[8..10].copy_from_slice(&self.lid.to_be_bytes());
        bytes[10] = self.mtu;
        bytes[11] = u8::from(self.ethernet);
        bytes[12..28].copy_from_slice(&self.gid);
        bytes
    }

    /// Decodes a message. None when it contains an invalid value.
    pub fn decode(bytes: &[u8; END_LEN]) -> Option<End> {
        let end = End {
            number: u32::from_be_bytes(part(bytes)),
            packet: u32::from_be_bytes(part(&bytes[4..])),
            lid: u16::from_be_bytes(part(&bytes[8..])),
            mtu: bytes[10],
            ethernet: bytes[11] != 0,
            gid: part(&bytes[12..]),
        };
        let numbers = end.number < 1 << 24 && end.packet < 1 << 24;
        (numbers && (1..=5).contains(&end.mtu)).then_some(end)
    }
}

/// An appliance's answer over TCP: 1, welcome and end; or 0, refusal, and zeros.
pub fn encode_answer(answer: Result<(Welcome, End), Refusal>) -> [u8; ANSWER_LEN] {
    let mut bytes = [0; ANSWER_LEN];
    match answer {
        Ok((welcome, end)) => {
            bytes[0] = 1;
            bytes[1..1 + WELCOME_LEN].copy_from_slice(&welcome.encode());
            bytes[1 + WELCOME_LEN..].copy_from_slice(&end.encode());
        }
        Err(refusal) => bytes[1..1 + REFUSAL_LEN].copy_from_slice(&refusal.encode()),
    }
    bytes
}

/// Decodes the answer. None when the bytes are no answer.
pub fn decode_answer(bytes: &[u8; ANSWER_LEN]) -> Option<Result<(Welcome, End), Refusal>> {
    match bytes[0] {
        1 => {
            let welcome = Welcome::decode(&bytes[1..])?;
            let end = End::decode(bytes[1 + WELCOME_LEN..].first_chunk()?)?;
            Some(Ok((welcome, end)))
        }
        0 => Refusal::decode(&bytes[1..]).map(Err),
        _ => None,
    }
}

/// A region in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Its address at the appliance.
    pub address: u64,
    /// Its key, valid on connections of its grant only.
    pub rkey: u32,
}

impl Entry {
    /// The entry's bytes in the table.
    pub fn encode(&self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        bytes[..8].copy_from_slice(&self.address.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.rkey.to_be_bytes());
        bytes
    }

    /// Decodes an entry.
    pub fn decode(bytes: &[u8; ENTRY_LEN]) -> Entry {
        Entry { address: u64::from_be_bytes(part(bytes)), rkey: u32::from_be_bytes(part(&bytes[8..])) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn messages_survive_encoding(
            key: [u8; 32], epoch: u64, id: u128, queue: u16, generation: u32, padding in 0_usize..200,
        ) {
            let session = SessionTag { id, queue, generation };
            let hello = Hello::new(GrantKey::from_bytes(key), Epoch(epoch), session);
            let mut bytes = hello.encode().to_vec();
            bytes.resize(HELLO_LEN + padding, 0);
            prop_assert_eq!(Hello::decode(&bytes), Ok(hello));
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (Hello::decode(&bytes), Refusal::decode(&bytes));
            if let Some(welcome) = Welcome::decode(&bytes) {
                prop_assert!((1..=REGIONS_MAX).contains(&welcome.regions));
                prop_assert!(u64::from(welcome.regions).checked_shl(u32::from(welcome.region_shift)).is_some());
            }
        }

        #[test]
        fn tcp_answers_are_decoded_or_refused(
            bytes in proptest::array::uniform32(any::<u8>()), gid: [u8; 16], numbers in (0_u32..1 << 24, 0_u32..1 << 24),
            lid: u16, mtu in 1_u8..=5, ethernet: bool,
        ) {
            let _ = End::decode(&bytes);
            let end = End { number: numbers.0, packet: numbers.1, lid, mtu, ethernet, gid };
            prop_assert_eq!(End::decode(&end.encode()), Some(end));
            let welcome = Welcome { table: 1, rkey: 2, regions: 3, region_shift: 28 };
            prop_assert_eq!(decode_answer(&encode_answer(Ok((welcome, end)))), Some(Ok((welcome, end))));
            prop_assert_eq!(decode_answer(&encode_answer(Err(Refusal::Busy))), Some(Err(Refusal::Busy)));
            let mut rubbish = [0xff; ANSWER_LEN];
            rubbish[..END_LEN].copy_from_slice(&bytes);
            let _ = decode_answer(&rubbish);
        }

        #[test]
        fn tables_keep_their_entries(address: u64, rkey: u32) {
            let entry = Entry { address, rkey };
            prop_assert_eq!(Entry::decode(&entry.encode()), entry);
        }
    }

    /// Different versions of the program exchange these bytes.
    #[test]
    fn the_layout_of_messages_stays() {
        let session =
            SessionTag { id: 0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00, queue: 0x0102, generation: 3 };
        let bytes = Hello::new(GrantKey::from_bytes([7; 32]), Epoch(9), session).encode();
        assert_eq!(bytes[..2], [0x58, 1]);
        assert_eq!(bytes[2..34], [7; 32]);
        assert_eq!(bytes[34..42], [0, 0, 0, 0, 0, 0, 0, 9]);
        assert_eq!(bytes[42..], [0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff, 0, 1, 2, 0, 0, 0, 3]);

        let welcome =
            Welcome { table: 0x0102_0304_0506_0708, rkey: 0x0a0b_0c0d, regions: 5, region_shift: 28 };
        let bytes = welcome.encode();
        assert_eq!(bytes[..8], [0x58, 1, 28, 0, 0, 0, 0, 5]);
        assert_eq!(bytes[8..20], [1, 2, 3, 4, 5, 6, 7, 8, 0x0a, 0x0b, 0x0c, 0x0d]);
        assert_eq!(Welcome::decode(&bytes), Some(welcome));
        assert_eq!(Refusal::NotReady.encode(), [0x58, 1, 2]);
    }

    #[test]
    fn invalid_values_are_not_decoded() {
        let good = Welcome { table: 0, rkey: 0, regions: 1, region_shift: 24 };
        for bad in [
            Welcome { regions: 0, ..good },
            Welcome { regions: REGIONS_MAX + 1, ..good },
            Welcome { region_shift: 63, ..good },
            Welcome { region_shift: 0, ..good },
        ] {
            assert_eq!(Welcome::decode(&bad.encode()), None, "{bad:?}");
        }
        assert_eq!(Hello::decode(&[0; HELLO_LEN]), Err(Refusal::Version));
        assert_eq!(Hello::decode(&[MAGIC, VERSION]), Err(Refusal::Version));
    }

    #[test]
    fn refusals_are_decoded() {
        for refusal in [
            Refusal::Unknown,
            Refusal::NotReady,
            Refusal::Shared,
            Refusal::Failed,
            Refusal::Version,
            Refusal::Busy,
            Refusal::Outdated,
        ] {
            assert_eq!(Refusal::decode(&refusal.encode()), Some(refusal));
        }
        assert_eq!(Refusal::decode(&[MAGIC, 9, 1]), Some(Refusal::Version));
        assert_eq!(Refusal::decode(&[]), None);
        assert_eq!(Refusal::decode(&[0, 0, 0]), None);
    }
}
