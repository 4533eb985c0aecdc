//! The messages of the vhost-user protocol, from the back-end's side (QEMU, docs/interop/vhost-user.rst).
//!
//! A message is a header of three 32-bit words (request, flags, length of the body), its body, and file
//! descriptors that are passed with its first byte. All numbers are in this machine's byte order.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::inflight::InflightInfo;
use super::memory::RegionInfo;
use super::ring::Addresses;

const HEADER_LEN: usize = 12;
/// Longest body: a configuration space of 4 KiB and its header.
const BODY_LEN_MAX: usize = 4096 + 64;
/// Most descriptors of one message.
const FILES_MAX: usize = 32;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Feature bits of the protocol.
pub(super) mod protocol {
    /// Several queues are supported.
    pub(in super::super) const MQ: u64 = 1;
    /// Every message can be acknowledged.
    pub(in super::super) const REPLY_ACK: u64 = 1 << 3;
    /// The back-end can send messages over a socket of its own.
    pub(in super::super) const BACKEND_REQ: u64 = 1 << 5;
    /// The back-end provides the configuration space.
    pub(in super::super) const CONFIG: u64 = 1 << 9;
    /// Requests in flight are marked in shared memory.
    pub(in super::super) const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// Memory regions are added and removed individually.
    pub(in super::super) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
}

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const BACKEND_CONFIG_CHANGE: u32 = 2;

/// A front end's request.
#[derive(Debug)]
pub(super) enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<(RegionInfo, OwnedFd)>),
    SetVringNum(u16, u32),
    SetVringAddr(u16, Addresses),
    SetVringBase(u16, u32),
    GetVringBase(u16),
    SetVringKick(u16, Option<OwnedFd>),
    SetVringCall(u16, Option<OwnedFd>),
    SetVringErr(u16, Option<OwnedFd>),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable(u16, bool),
    SetBackendReqFd(OwnedFd),
    GetConfig { offset: u32, len: u32 },
    SetConfig,
    GetInflightFd(InflightInfo),
    SetInflightFd(InflightInfo, OwnedFd),
    GetMaxMemSlots,
    AddMemReg(RegionInfo, OwnedFd),
    RemMemReg(RegionInfo),
}

/// A request, and the data that its answer needs.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: Request,
    pub(super) answered: Answered,
}

/// The data of a message that its answer needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answered {
    code: u32,
    /// Length of its body.
    len: usize,
    /// Whether the front end wants to know the result.
    acknowledge: bool,
}

impl Answered {
    /// Whether the front end can learn that its request was refused: it asked for the result, and expects no
    /// other answer.
    pub(super) const fn can_be_refused(&self) -> bool {
        self.acknowledge && !matches!(self.code, 1 | 11 | 15 | 17 | 24 | 31 | 36)
    }
}

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    /// The front end closed it.
    #[error("the front end is gone")]
    Closed,
    /// The socket failed.
    #[error("the front end's socket: {0}")]
    Socket(#[from] io::Error),
    /// A request was refused, and the protocol has no other way to report that.
    #[error("refused to its front end: {0}")]
    Refused(String),
    /// The request violates the protocol.
    #[error("request {code} of the front end is not of the vhost-user protocol as it was agreed on: {what}")]
    Malformed {
        /// The request's number.
        code: u32,
        /// The defect.
        what: &'static str,
    },
}

/// Receives the next message. Blocks.
pub(super) fn receive(socket: &UnixStream) -> Result<Message, ReceiveError> {
    let (header, files) = receive_header(socket)?;
    let word = |place: usize| {
        u32::from_ne_bytes([header[place], header[place + 1], header[place + 2], header[place + 3]])
    };
    let (code, flags, len) = (word(0), word(4), word(8) as usize);
    let malformed = |what| ReceiveError::Malformed { code, what };
    if flags & VERSION_MASK != VERSION || flags & REPLY != 0 {
        return Err(malformed("its flags are wrong"));
    }
    if len > BODY_LEN_MAX {
        return Err(malformed("it is too long"));
    }
    let mut body = vec![0; len];
    (&*socket).read_exact(&mut body)?;
    let request = parse(code, &Body(&body), files).map_err(malformed)?;
    Ok(Message { request, answered: Answered { code, len, acknowledge: flags & NEED_REPLY != 0 } })
}

fn receive_header(socket: &UnixStream) -> Result<([u8; HEADER_LEN], Vec<OwnedFd>), ReceiveError> {
    let mut header = [0; HEADER_LEN];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut passed = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut header)], &mut passed, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result.map_err(io::Error::from)?,
        }
    };
    let mut files = Vec::new();
    for message in passed.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            files.extend(descriptors);
        }
    }
    if received.bytes == 0 {
        return Err(ReceiveError::Closed);
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(ReceiveError::Malformed { code: 0, what: "it has too many descriptors" });
    }
    (&*socket).read_exact(&mut header[received.bytes..])?;
    Ok((header, files))
}

/// The numbers of a body.
struct Body<'a>(&'a [u8]);

impl Body<'_> {
    fn has(&self, len: usize) -> Result<(), &'static str> {
        if self.0.len() == len { Ok(()) } else { Err("its length is wrong") }
    }

    /// The word at `place`; 0 behind the end.
    fn word(&self, place: usize) -> u32 {
        self.long_or_word::<4>(place).map_or(0, u32::from_ne_bytes)
    }

    fn long(&self, place: usize) -> u64 {
        self.long_or_word::<8>(place).map_or(0, u64::from_ne_bytes)
    }

    fn half(&self, place: usize) -> u16 {
        self.long_or_word::<2>(place).map_or(0, u16::from_ne_bytes)
    }

    fn long_or_word<const N: usize>(&self, place: usize) -> Option<[u8; N]> {
        self.0.get(place..place + N)?.try_into().ok()
    }

    fn whole_long(&self) -> Result<u64, &'static str> {
        self.has(8)?;
        Ok(self.long(0))
    }

    /// Index of a queue and a number.
    fn vring_state(&self) -> Result<(u16, u32), &'static str> {
        self.has(8)?;
        Ok((index(self.word(0))?, self.word(4)))
    }

    fn region(&self, place: usize) -> RegionInfo {
        RegionInfo {
            guest: self.long(place),
            len: self.long(place + 8),
            user: self.long(place + 16),
            offset: self.long(place + 24),
        }
    }

    fn inflight(&self) -> Result<InflightInfo, &'static str> {
        // Some front ends pad the body to a multiple of eight bytes.
        if self.0.len() != 20 && self.0.len() != 24 {
            return Err("its length is wrong");
        }
        Ok(InflightInfo {
            len: self.long(0),
            offset: self.long(8),
            queues: self.half(16),
            entries: self.half(18),
        })
    }
}

fn index(number: u32) -> Result<u16, &'static str> {
    u16::try_from(number).map_err(|_| "there is no such queue")
}

const REGION_LEN: usize = 32;

fn parse(code: u32, body: &Body<'_>, files: Vec<OwnedFd>) -> Result<Request, &'static str> {
    let mut files = files.into_iter();
    let request = match code {
        1 => Request::GetFeatures,
        2 => Request::SetFeatures(body.whole_long()?),
        3 => Request::SetOwner,
        4 => Request::ResetOwner,
        5 => {
            let count = body.word(0) as usize;
            if count > FILES_MAX || files.len() != count {
                return Err("it does not have one descriptor for each region");
            }
            body.has(8 + count * REGION_LEN)?;
            let region = |(place, file)| (body.region(8 + place * REGION_LEN), file);
            Request::SetMemTable((0..).zip(files.by_ref()).map(region).collect())
        }
        8 => body.vring_state().map(|(index, size)| Request::SetVringNum(index, size))?,
        9 => {
            body.has(40)?;
            // The second word has a flag for the migration log, which is not offered.
            let addresses =
                Addresses { descriptors: body.long(8), used: body.long(16), available: body.long(24) };
            Request::SetVringAddr(index(body.word(0))?, addresses)
        }
        10 => body.vring_state().map(|(index, base)| Request::SetVringBase(index, base))?,
        11 => Request::GetVringBase(body.vring_state()?.0),
        12 => vring_file(body, &mut files).map(|(index, file)| Request::SetVringKick(index, file))?,
        13 => vring_file(body, &mut files).map(|(index, file)| Request::SetVringCall(index, file))?,
        14 => vring_file(body, &mut files).map(|(index, file)| Request::SetVringErr(index, file))?,
        15 => Request::GetProtocolFeatures,
        16 => Request::SetProtocolFeatures(body.whole_long()?),
        17 => Request::GetQueueNum,
        18 => body.vring_state().map(|(index, on)| Request::SetVringEnable(index, on != 0))?,
        21 => Request::SetBackendReqFd(one(&mut files)?),
        24 => {
            let (offset, len) = (body.word(0), body.word(4));
            body.has((len as usize).saturating_add(12))?;
            Request::GetConfig { offset, len }
        }
        25 => Request::SetConfig,
        31 => Request::GetInflightFd(body.inflight()?),
        32 => Request::SetInflightFd(body.inflight()?, one(&mut files)?),
        36 => Request::GetMaxMemSlots,
        37 => {
            body.has(8 + REGION_LEN)?;
            Request::AddMemReg(body.region(8), one(&mut files)?)
        }
        38 => {
            body.has(8 + REGION_LEN)?;
            // Some front ends pass the region's file too.
            drop(files.next());
            Request::RemMemReg(body.region(8))
        }
        _ => return Err("it is not known"),
    };
    match files.next() {
        None => Ok(request),
        Some(_) => Err("it has a descriptor too many"),
    }
}

fn one(files: &mut impl Iterator<Item = OwnedFd>) -> Result<OwnedFd, &'static str> {
    files.next().ok_or("it has no descriptor")
}

/// The index of a queue, and a descriptor unless a bit says that there is none.
fn vring_file(
    body: &Body<'_>,
    files: &mut impl Iterator<Item = OwnedFd>,
) -> Result<(u16, Option<OwnedFd>), &'static str> {
    let number = body.whole_long()?;
    let file = if number & 0x100 == 0 { Some(one(files)?) } else { None };
    Ok(((number & 0xff) as u16, file))
}

/// The answer to a request.
#[derive(Debug)]
pub(super) enum Reply {
    /// No answer except the result, if the front end asked for it.
    Done,
    Number(u64),
    VringState(u16, u32),
    Config {
        offset: u32,
        bytes: Vec<u8>,
    },
    Inflight(InflightInfo, OwnedFd),
}

/// Sends the answer to a message. The front end learns that a request was refused only if it asked for the
/// result.
pub(super) fn answer(socket: &UnixStream, message: &Answered, reply: Option<&Reply>) -> io::Result<()> {
    let body = match reply {
        None | Some(Reply::Done) if !message.acknowledge => return Ok(()),
        None => 1_u64.to_ne_bytes().to_vec(),
        Some(Reply::Done) => 0_u64.to_ne_bytes().to_vec(),
        Some(Reply::Number(number)) => number.to_ne_bytes().to_vec(),
        Some(Reply::VringState(index, number)) => {
            [u32::from(*index).to_ne_bytes(), number.to_ne_bytes()].concat()
        }
        Some(Reply::Config { offset, bytes }) => {
            let len = bytes.len() as u32;
            [offset.to_ne_bytes(), len.to_ne_bytes(), [0; 4]]
                .concat()
                .into_iter()
                .chain(bytes.clone())
                .collect()
        }
        Some(Reply::Inflight(info, _)) => [
            info.len.to_ne_bytes().as_slice(),
            &info.offset.to_ne_bytes(),
            &info.queues.to_ne_bytes(),
            &info.entries.to_ne_bytes(),
            // Padded like the front end's message.
            &[0; 4][..message.len.saturating_sub(20).min(4)],
        ]
        .concat(),
    };
    let file = match reply {
        Some(Reply::Inflight(_, file)) => Some(file.as_fd()),
        _ => None,
    };
    send(socket, message.code, VERSION | REPLY, &body, file, SendFlags::NOSIGNAL)
}

/// Tells the front end, on the socket that it passed for this purpose, to read the configuration space again.
/// Does not wait for it.
pub(super) fn tell_config_change(socket: &UnixStream) -> io::Result<()> {
    send(socket, BACKEND_CONFIG_CHANGE, VERSION, &[], None, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
}

fn send(
    socket: &UnixStream,
    code: u32,
    flags: u32,
    body: &[u8],
    file: Option<BorrowedFd<'_>>,
    how: SendFlags,
) -> io::Result<()> {
    let header = [code, flags, body.len() as u32].map(u32::to_ne_bytes).concat();
    let bytes = [header.as_slice(), body].concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut passed = SendAncillaryBuffer::new(&mut space);
    let files: Vec<BorrowedFd<'_>> = file.into_iter().collect();
    if !files.is_empty() {
        passed.push(SendAncillaryMessage::ScmRights(&files));
    }
    let mut sent = 0;
    while sent < bytes.len() {
        match sendmsg(socket, &[IoSlice::new(&bytes[sent..])], &mut passed, how) {
            Ok(count) => {
                sent += count;
                passed.clear();
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::super::memory::tests::memfd;
    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    fn message(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
        [[code, flags, body.len() as u32].map(u32::to_ne_bytes).concat().as_slice(), body].concat()
    }

    #[test]
    fn a_request_and_its_answer() {
        let (ours, mut theirs) = pair();
        theirs.write_all(&message(11, 1, &[[2_u8, 0, 0, 0], [0; 4]].concat())).unwrap();
        let got = receive(&ours).unwrap();
        assert!(matches!(got.request, Request::GetVringBase(2)));
        answer(&ours, &got.answered, Some(&Reply::VringState(2, 9))).unwrap();
        let mut bytes = [0; 20];
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes.to_vec(), message(11, 5, &[[2_u8, 0, 0, 0], [9, 0, 0, 0]].concat()));
        drop(theirs);
        assert!(matches!(receive(&ours), Err(ReceiveError::Closed)));
    }

    #[test]
    fn results_are_sent_to_front_ends_that_ask() {
        let (ours, mut theirs) = pair();
        for (flags, reply) in [(1, Some(&Reply::Done)), (1, None), (9, Some(&Reply::Done)), (9, None)] {
            theirs.write_all(&message(3, flags, &[])).unwrap();
            let got = receive(&ours).unwrap();
            answer(&ours, &got.answered, reply).unwrap();
        }
        drop(ours);
        let mut bytes = Vec::new();
        theirs.read_to_end(&mut bytes).unwrap();
        let expected = [message(3, 5, &0_u64.to_ne_bytes()), message(3, 5, &1_u64.to_ne_bytes())].concat();
        assert_eq!(bytes, expected);
    }

    #[test]
    fn descriptors_arrive_with_their_message() {
        let (ours, theirs) = pair();
        let file = memfd(4096);
        let region = [0_u64, 4096, 0, 0].map(u64::to_ne_bytes).concat();
        let body = [[1_u32, 0].map(u32::to_ne_bytes).concat(), region].concat();
        send(&theirs, 5, VERSION, &body, Some(file.as_fd()), SendFlags::empty()).unwrap();
        let Request::SetMemTable(regions) = receive(&ours).unwrap().request else { panic!("another one") };
        assert_eq!(regions[0].0, RegionInfo { guest: 0, len: 4096, user: 0, offset: 0 });
        send(&theirs, 5, VERSION, &body, None, SendFlags::empty()).unwrap();
        assert!(receive(&ours).is_err(), "a region without a file");
        let (ours, theirs) = pair();
        send(&theirs, 1, VERSION, &[], Some(file.as_fd()), SendFlags::empty()).unwrap();
        assert!(receive(&ours).is_err(), "a file that nobody wants");
    }

    proptest! {
        #[test]
        fn any_message_is_answered(code in 0..45_u32, flags in 0..16_u32, body in prop::collection::vec(any::<u8>(), 0..80)) {
            let (ours, mut theirs) = pair();
            theirs.write_all(&message(code, flags, &body)).unwrap();
            drop(theirs);
            let _ = receive(&ours);
        }
    }
}
