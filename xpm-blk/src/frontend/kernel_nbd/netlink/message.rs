//! Generic netlink messages: headers and attributes as in netlink(7) and `linux/genetlink.h`,
//! built and read as bytes. Numbers are in the machine's own byte order.

/// `NLMSG_ERROR`: an answer with an errno, 0 for success.
pub(super) const TYPE_ERROR: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`
const FLAGS_REQUEST_ACK: u16 = 1 | 4;
/// `NLM_F_CAPPED`, in an error message: the message does not repeat the request.
const FLAG_CAPPED: u16 = 0x100;
/// `NLM_F_ACK_TLVS`, in an error message: attributes follow.
const FLAG_ACK_TLVS: u16 = 0x200;
/// `NLMSGERR_ATTR_MSG`: the kernel's reason as text.
const ERROR_ATTRIBUTE_TEXT: u16 = 1;
/// `NLA_F_NESTED`
const NESTED: u16 = 1 << 15;
/// The bits of an attribute's type that are its number (`NLA_TYPE_MASK`).
const TYPE_MASK: u16 = 0x3fff;

const HEADER_LEN: usize = 16;
const GENERIC_LEN: usize = 4;
const ATTRIBUTE_LEN: usize = 4;

/// A request under construction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A request of a generic netlink family that asks for an acknowledgement.
    pub(super) fn new(family: u16, sequence: u32, command: u8, version: u8) -> Request {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&0_u32.to_ne_bytes());
        bytes.extend_from_slice(&family.to_ne_bytes());
        bytes.extend_from_slice(&FLAGS_REQUEST_ACK.to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&0_u32.to_ne_bytes());
        bytes.extend_from_slice(&[command, version, 0, 0]);
        Request { bytes }
    }

    pub(super) fn u32(mut self, kind: u16, value: u32) -> Request {
        self.attribute(kind, &value.to_ne_bytes());
        self
    }

    pub(super) fn u64(mut self, kind: u16, value: u64) -> Request {
        self.attribute(kind, &value.to_ne_bytes());
        self
    }

    /// A text with the terminating zero that the kernel requires.
    pub(super) fn text(mut self, kind: u16, value: &str) -> Request {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes);
        self
    }

    /// Attributes within an attribute.
    pub(super) fn nested(mut self, kind: u16, content: impl FnOnce(Request) -> Request) -> Request {
        let start = self.bytes.len();
        self.attribute(kind | NESTED, &[]);
        let mut inner = content(self);
        let len = inner.bytes.len() - start;
        inner.bytes[start..start + 2].copy_from_slice(&(len as u16).to_ne_bytes());
        inner
    }

    /// The message, ready to be sent.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let len = self.bytes.len() as u32;
        self.bytes[0..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes
    }

    fn attribute(&mut self, kind: u16, payload: &[u8]) {
        let len = (ATTRIBUTE_LEN + payload.len()) as u16;
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(payload);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A message of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) sequence: u32,
    flags: u16,
    body: &'a [u8],
}

/// The result of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Outcome {
    /// A positive errno; 0 for success.
    pub(super) errno: i32,
    /// The kernel's reason, if it gives one.
    pub(super) reason: Option<String>,
}

impl<'a> Message<'a> {
    /// The command and the attributes of a generic netlink message.
    pub(super) fn generic(&self) -> Option<(u8, Attributes<'a>)> {
        let (head, rest) = self.body.split_at_checked(GENERIC_LEN)?;
        Some((head[0], Attributes(rest)))
    }

    /// The result, if this message contains one.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        if self.kind != TYPE_ERROR {
            return None;
        }
        let (errno, rest) = self.body.split_first_chunk::<4>()?;
        let (repeated, _) = rest.split_first_chunk::<4>()?;
        let repeated = match self.flags & FLAG_CAPPED {
            0 => u32::from_ne_bytes(*repeated) as usize,
            _ => HEADER_LEN,
        };
        let reason = (self.flags & FLAG_ACK_TLVS != 0)
            .then(|| rest.get(repeated.next_multiple_of(4)..))
            .flatten()
            .and_then(|bytes| Attributes(bytes).text(ERROR_ATTRIBUTE_TEXT));
        Some(Outcome { errno: i32::from_ne_bytes(*errno).wrapping_neg(), reason })
    }
}

/// The messages of one datagram, up to the first incomplete one.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let header = rest.first_chunk::<HEADER_LEN>()?;
        let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let body = rest.get(HEADER_LEN..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
            body,
        })
    })
}

/// A run of attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// Number and payload of each attribute, up to the first incomplete one.
    pub(super) fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let header = rest.first_chunk::<ATTRIBUTE_LEN>()?;
            let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
            let payload = rest.get(ATTRIBUTE_LEN..len)?;
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
            Some((u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK, payload))
        })
    }

    fn find(self, kind: u16) -> Option<&'a [u8]> {
        self.iter().find_map(|(found, payload)| (found == kind).then_some(payload))
    }

    pub(super) fn u8(self, kind: u16) -> Option<u8> {
        self.find(kind)?.first().copied()
    }

    pub(super) fn u16(self, kind: u16) -> Option<u16> {
        self.find(kind)?.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
    }

    pub(super) fn u32(self, kind: u16) -> Option<u32> {
        self.find(kind)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
    }

    pub(super) fn text(self, kind: u16) -> Option<String> {
        let bytes = self.find(kind)?;
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    pub(super) fn nested(self, kind: u16) -> Option<Attributes<'a>> {
        self.find(kind).map(Attributes)
    }

    /// The attributes within each attribute of a list.
    pub(super) fn items(self) -> impl Iterator<Item = Attributes<'a>> {
        self.iter().map(|(_, payload)| Attributes(payload))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn golden_request() {
        let bytes = Request::new(0x1c, 5, 1, 1)
            .u32(1, 7)
            .u64(2, 0x10)
            .nested(7, |list| list.nested(1, |item| item.u32(1, 9)))
            .text(10, "xpm")
            .finish();
        #[rustfmt::skip]
        let golden = [
            // header: length 64, type 0x1c, request and ack, sequence 5, port 0
            64, 0, 0, 0, 0x1c, 0, 5, 0, 5, 0, 0, 0, 0, 0, 0, 0,
            // generic header: command 1, version 1
            1, 1, 0, 0,
            // u32, u64
            8, 0, 1, 0, 7, 0, 0, 0,
            12, 0, 2, 0, 0x10, 0, 0, 0, 0, 0, 0, 0,
            // list, item, u32
            16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 9, 0, 0, 0,
            // text with its zero
            8, 0, 10, 0, b'x', b'p', b'm', 0,
        ];
        assert_eq!(bytes[..], golden[..]);
    }

    #[test]
    fn a_written_message_can_be_parsed() {
        let bytes = Request::new(0x1c, 5, 3, 1).u32(1, 7).text(2, "a").nested(3, |n| n.u32(4, 8)).finish();
        let message = messages(&bytes).next().unwrap();
        let (command, attributes) = message.generic().unwrap();
        assert_eq!((command, message.kind, message.sequence), (3, 0x1c, 5));
        assert_eq!(attributes.u32(1), Some(7));
        assert_eq!(attributes.text(2).as_deref(), Some("a"));
        assert_eq!(attributes.nested(3).unwrap().u32(4), Some(8));
        assert_eq!(attributes.u32(9), None);
    }

    #[test]
    fn outcome_with_the_kernels_reason() {
        let mut error = Vec::new();
        error.extend_from_slice(&0_u32.to_ne_bytes());
        error.extend_from_slice(&TYPE_ERROR.to_ne_bytes());
        error.extend_from_slice(&(FLAG_CAPPED | FLAG_ACK_TLVS).to_ne_bytes());
        error.extend_from_slice(&[9, 0, 0, 0, 0, 0, 0, 0]);
        error.extend_from_slice(&(-16_i32).to_ne_bytes());
        error.extend_from_slice(&[0; HEADER_LEN]);
        error.extend_from_slice(&[9, 0, 1, 0, b'b', b'u', b's', b'y', 0, 0, 0, 0]);
        let len = error.len() as u32;
        error[0..4].copy_from_slice(&len.to_ne_bytes());
        let outcome = messages(&error).next().unwrap().outcome().unwrap();
        assert_eq!(outcome, Outcome { errno: 16, reason: Some("busy".to_owned()) });
    }

    proptest! {
        #[test]
        fn any_datagram_is_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            for message in messages(&bytes) {
                let _ = message.outcome();
                if let Some((_, attributes)) = message.generic() {
                    let _ = (attributes.text(1), attributes.u32(1), attributes.u16(1), attributes.u8(1));
                    let _ = attributes.items().map(|item| item.iter().count()).sum::<usize>();
                }
            }
        }
    }
}
