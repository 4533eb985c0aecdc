//! The messages of the handshake; [`super`] documents them in a table.

use xpm_protocol::{GrantKey, Visitor};

const MAGIC: [u8; 8] = *b"xpm-shm\0";
/// Version of a client that does not identify itself.
const VERSION: u32 = 1;
/// Version of a client that sends which life of a client it is.
const VERSION_WITH_VISITOR: u32 = 2;

/// Bytes of a [`Hello`].
pub(super) const HELLO_LEN: usize = 48;
/// Longest text behind a [`Hello`] or an [`Answer`], in bytes.
pub(super) const TEXT_LEN_MAX: usize = 1024;
/// Bytes of an [`Answer`].
pub(super) const ANSWER_LEN: usize = 24;
/// Bytes of a region's length.
pub(super) const LENGTH_LEN: usize = 8;
/// Regions in one message; the kernel passes at most 253 descriptors at once (`SCM_MAX_FD`).
pub(super) const BATCH_MAX: usize = 64;
/// Most regions of a grant.
pub(super) const REGIONS_MAX: u32 = 1 << 16;
/// Longest grant, in bytes: half of what the address space of a process has room for.
pub(super) const GRANT_LEN_MAX: u64 = 1 << 46;

/// A client's first message.
#[derive(Debug)]
pub(super) struct Hello {
    pub(super) key: GrantKey,
    /// Length of the visitor's text that follows, in bytes; 0 for a client that does not identify itself.
    pub(super) visitor_len: u32,
}

/// Why bytes are no valid hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadHello {
    /// Not this protocol: the client would understand no answer.
    Magic,
    /// An unknown version of this protocol.
    Version,
}

impl Hello {
    fn header(&self) -> [u8; HELLO_LEN] {
        let version = if self.visitor_len == 0 { VERSION } else { VERSION_WITH_VISITOR };
        let mut bytes = [0; HELLO_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&version.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.visitor_len.to_be_bytes());
        bytes[16..].copy_from_slice(self.key.as_bytes());
        bytes
    }

    /// The bytes of a hello, with the visitor's text if there is one.
    pub(super) fn encode(key: &GrantKey, visitor: Option<&Visitor>) -> Vec<u8> {
        let text = visitor.map(Visitor::to_string).unwrap_or_default();
        // A visitor's text is a few hundred bytes.
        let hello = Hello { key: key.clone(), visitor_len: text.len() as u32 };
        [hello.header().as_slice(), text.as_bytes()].concat()
    }

    pub(super) fn decode(bytes: &[u8; HELLO_LEN]) -> Result<Hello, BadHello> {
        let [magic @ .., _, _, _, _, _, _, _, _] = bytes.first_chunk::<16>().ok_or(BadHello::Magic)?;
        let number = |at: usize| bytes[at..].first_chunk().map_or(0, |number| u32::from_be_bytes(*number));
        if *magic != MAGIC {
            return Err(BadHello::Magic);
        }
        let visitor_len = match (number(8), number(12)) {
            (VERSION, 0) => 0,
            (VERSION_WITH_VISITOR, len) if len > 0 && len as usize <= TEXT_LEN_MAX => len,
            _ => return Err(BadHello::Version),
        };
        let key = bytes.last_chunk().ok_or(BadHello::Magic)?;
        Ok(Hello { key: GrantKey::from_bytes(*key), visitor_len })
    }
}

/// The server's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// The memory follows.
    Granted { regions: u32, len: u64 },
    /// There is no grant with this key.
    Unknown,
    /// The server does not speak the client's version.
    Version,
    /// The grant is not for this client; the reason follows as a text of `text_len` bytes.
    Refused { text_len: u32 },
}

/// Why bytes are no valid answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BadAnswer(pub(super) &'static str);

impl Answer {
    pub(super) fn encode(&self) -> [u8; ANSWER_LEN] {
        let (status, regions, len) = match *self {
            Answer::Granted { regions, len } => (0_u32, regions, len),
            Answer::Unknown => (1, 0, 0),
            Answer::Version => (2, 0, 0),
            Answer::Refused { text_len } => (3, text_len, 0),
        };
        let mut bytes = [0; ANSWER_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&status.to_be_bytes());
        bytes[12..16].copy_from_slice(&regions.to_be_bytes());
        bytes[16..].copy_from_slice(&len.to_be_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; ANSWER_LEN]) -> Result<Answer, BadAnswer> {
        if bytes[..8] != MAGIC {
            return Err(BadAnswer("this is no shm socket of an appliance"));
        }
        let [_, _, _, _, _, _, _, _, s0, s1, s2, s3, r0, r1, r2, r3, len @ ..] = bytes;
        let regions = u32::from_be_bytes([*r0, *r1, *r2, *r3]);
        let len = u64::from_be_bytes(*len);
        match u32::from_be_bytes([*s0, *s1, *s2, *s3]) {
            0 if regions == 0 || regions > REGIONS_MAX => Err(BadAnswer("an unreasonable number of regions")),
            0 if len == 0 || len > GRANT_LEN_MAX => Err(BadAnswer("a grant of unreasonable length")),
            0 => Ok(Answer::Granted { regions, len }),
            1 => Ok(Answer::Unknown),
            2 => Ok(Answer::Version),
            3 if regions as usize > TEXT_LEN_MAX => Err(BadAnswer("a reason of unreasonable length")),
            3 => Ok(Answer::Refused { text_len: regions }),
            _ => Err(BadAnswer("an unknown status")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_hello() {
        let key = GrantKey::from_bytes(std::array::from_fn(|i| i as u8));
        let mut golden = b"xpm-shm\0\0\0\0\x01\0\0\0\0".to_vec();
        golden.extend(0..32);
        assert_eq!(Hello::encode(&key, None), golden);
        let hello = Hello::decode(golden.first_chunk().unwrap()).unwrap();
        assert_eq!((hello.key, hello.visitor_len), (key.clone(), 0));
        let zeros = "0".repeat(32);
        let visitor = Visitor::new(format!("{zeros}.{zeros}.{zeros}.1").parse().unwrap(), "a");
        let text = visitor.to_string();
        let bytes = Hello::encode(&key, Some(&visitor));
        assert_eq!(bytes[8..16], [0, 0, 0, 2, 0, 0, 0, text.len() as u8]);
        assert_eq!(&bytes[HELLO_LEN..], text.as_bytes());
        assert_eq!(Hello::decode(bytes.first_chunk().unwrap()).unwrap().visitor_len as usize, text.len());
    }

    #[test]
    fn golden_answer() {
        let granted = Answer::Granted { regions: 3, len: 0x0123_4567_89ab };
        assert_eq!(&granted.encode(), b"xpm-shm\0\0\0\0\0\0\0\0\x03\0\0\x01\x23\x45\x67\x89\xab");
        assert_eq!(&Answer::Unknown.encode(), b"xpm-shm\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(&Answer::Version.encode(), b"xpm-shm\0\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0\0");
        for answer in [granted, Answer::Unknown, Answer::Version, Answer::Refused { text_len: 7 }] {
            assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        }
    }

    #[test]
    fn invalid_messages_are_refused() {
        let hello = Hello::encode(&GrantKey::from_bytes([1; 32]), None);
        let change = |at: usize| {
            let mut bytes: [u8; HELLO_LEN] = *hello.first_chunk().unwrap();
            bytes[at] ^= 1;
            Hello::decode(&bytes).map(|_| ())
        };
        assert_eq!(change(0), Err(BadHello::Magic));
        assert_eq!(change(11), Err(BadHello::Version));
        assert_eq!(change(15), Err(BadHello::Version), "a field of a later version");
        for bad in [
            Answer::Granted { regions: 0, len: 1 },
            Answer::Granted { regions: 1, len: 0 },
            Answer::Granted { regions: REGIONS_MAX + 1, len: 1 },
            Answer::Granted { regions: 1, len: u64::MAX },
            Answer::Refused { text_len: TEXT_LEN_MAX as u32 + 1 },
        ] {
            assert!(Answer::decode(&bad.encode()).is_err());
        }
        assert!(Answer::decode(&[0; ANSWER_LEN]).is_err());
        let mut status = Answer::Unknown.encode();
        status[11] = 9;
        assert!(Answer::decode(&status).is_err());
    }
}
