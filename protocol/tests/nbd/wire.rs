//! Messages built by hand, so that the codec is not tested against itself.

use xpm_protocol::nbd::handshake::server::{NoExport, ServerHandshake, Step};
use xpm_protocol::nbd::{BlockSizes, ExportInfo, TransmissionFlags};

pub(crate) fn info(size: u64) -> ExportInfo {
    let flags = TransmissionFlags::HAS_FLAGS
        .with(TransmissionFlags::SEND_FLUSH)
        .with(TransmissionFlags::SEND_FUA)
        .with(TransmissionFlags::SEND_TRIM)
        .with(TransmissionFlags::SEND_WRITE_ZEROES)
        .with(TransmissionFlags::SEND_FAST_ZERO)
        .with(TransmissionFlags::SEND_CACHE)
        .with(TransmissionFlags::CAN_MULTI_CONN);
    let block = BlockSizes { min: 512, preferred: 4096, max: 1 << 20 };
    ExportInfo { size, flags, block, description: Some("a disk".to_owned()) }
}

/// Bytes from hexadecimal digits; spaces are ignored.
pub(crate) fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
    assert_eq!(digits.len(), text.chars().filter(|c| !c.is_whitespace()).count());
    digits.chunks_exact(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect()
}

pub(crate) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

pub(crate) fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = hex("0003e889045565a9");
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The data of INFO and GO.
pub(crate) fn info_data(name: &str, asks: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((asks.len() as u16).to_be_bytes());
    data.extend(asks.iter().flat_map(|ask| ask.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string(query)));
    data
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    let mut data = (text.len() as u32).to_be_bytes().to_vec();
    data.extend(text.as_bytes());
    data
}

/// The replies in a server's output: option, kind, data.
pub(crate) fn replies(mut bytes: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    let mut found = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(bytes[..8], hex("0003e889045565a9"));
        let len = number(&bytes[16..20]) as usize;
        found.push((number(&bytes[8..12]), number(&bytes[12..16]), bytes[20..20 + len].to_vec()));
        bytes = &bytes[20 + len..];
    }
    found
}

/// A server that has one export, of 1 MiB, named `disk`.
pub(crate) struct Server {
    pub(crate) handshake: ServerHandshake,
    pub(crate) lists: bool,
    /// Names that were looked up, and whether the client wanted to enter them.
    pub(crate) opened: Vec<(String, bool)>,
}

impl Server {
    /// A server whose greeting has been taken.
    pub(crate) fn new() -> Server {
        let mut handshake = ServerHandshake::new();
        handshake.take_output();
        Server { handshake, lists: true, opened: Vec::new() }
    }

    /// A server to which the client has sent its flags.
    pub(crate) fn greeted() -> Server {
        let mut server = Server::new();
        assert_eq!(server.send(&3_u32.to_be_bytes()), (Vec::new(), Step::Input));
        server
    }

    /// Sends these bytes. Returns the answer, and the step at which the server waits then.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> (Vec<u8>, Step) {
        self.handshake.receive(bytes);
        let mut step = self.handshake.step();
        loop {
            let answered = match &step {
                Step::Open(name) => {
                    self.opened.push((name.clone(), self.handshake.enters()));
                    self.handshake
                        .found((name == "disk").then(|| info(1 << 20)).as_ref().ok_or(&NoExport::Unknown))
                }
                Step::List => {
                    let names = ["disk".to_owned(), "other".to_owned()];
                    self.handshake.listed(self.lists.then_some(&names));
                    None
                }
                _ => return (self.handshake.take_output(), step),
            };
            step = answered.unwrap_or_else(|| self.handshake.step());
        }
    }

    /// The replies to an option after which the handshake goes on: kind and data.
    pub(crate) fn ask(&mut self, number: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let (output, step) = self.send(&option(number, data));
        assert_eq!(step, Step::Input);
        let answers = replies(&output);
        assert!(answers.iter().all(|answer| answer.0 == number));
        answers.into_iter().map(|(_, kind, data)| (kind, data)).collect()
    }

    /// The kinds of the replies to an option.
    pub(crate) fn kinds(&mut self, number: u32, data: &[u8]) -> Vec<u32> {
        self.ask(number, data).into_iter().map(|(kind, _)| kind).collect()
    }
}
