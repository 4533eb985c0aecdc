//! The client's side of the handshake.

use std::fmt;

use super::message::{Reader, is_string, put_option, put_string};
use crate::life::Visitor;
use crate::nbd::constants::*;
use crate::nbd::export::{BlockSizes, ExportInfo, TransmissionFlags};

/// Longest data of a reply to an option that is accepted, in bytes.
const REPLY_LEN_MAX: u32 = 64 << 10;
/// Longest part of a server's text that an error repeats, in characters.
const SHOWN_MAX: usize = 400;
/// Most replies to one option; a server that sends more violates the protocol.
const REPLIES_MAX: u32 = 64;

/// A client's requests to a server.
#[derive(Clone, PartialEq, Eq)]
pub struct Wishes {
    /// The export's name; at most 4096 bytes, without NUL.
    pub export: String,
    /// Use structured replies, if the server supports them.
    pub structured: bool,
    /// Use the context `base:allocation`, if the server supports it; needs `structured`.
    pub base_allocation: bool,
    /// The life of this client, for a server that accepts only one life of a client.
    pub visitor: Option<Visitor>,
}

impl fmt::Debug for Wishes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Wishes { export: _, structured, base_allocation, visitor } = self;
        f.debug_struct("Wishes")
            .field("structured", structured)
            .field("base_allocation", base_allocation)
            .field("visitor", visitor)
            .finish_non_exhaustive()
    }
}

/// Result of the negotiation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// The export.
    pub info: ExportInfo,
    /// Replies may be structured.
    pub structured: bool,
    /// The id of the context `base:allocation`.
    pub base_allocation: Option<u32>,
    /// Bytes received after the handshake; empty if the server follows the protocol.
    pub leftover: Vec<u8>,
}

/// Why a handshake failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The server does not have the export, or hides it.
    #[error("the server has no such export")]
    UnknownExport,
    /// The server has the export, but also a newer connection of the same session and queue. Older servers report
    /// [`HandshakeError::UnknownExport`] in this case.
    #[error("the server has a newer connection of the same session and queue")]
    Outdated,
    /// The server refuses this client.
    #[error("the server refuses by policy: {0}")]
    Policy(String),
    /// The server requires TLS.
    #[error("the server wants TLS, which xpm's NBD client does not speak")]
    TlsRequired,
    /// The peer is not an NBD server.
    #[error("this is no NBD server of the newstyle protocol")]
    NotNbd,
    /// The server is going down.
    #[error("the server is going down")]
    ShuttingDown,
    /// The name is not valid in the protocol.
    #[error("the export's name is too long for the protocol, or contains a NUL")]
    BadName,
    /// The server closed the connection.
    #[error("the server closed the connection during the handshake")]
    Closed,
    /// The server refused for another reason.
    #[error("the server refused the export: {0}")]
    Refused(String),
    /// The server does not follow the protocol.
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    Greeting,
    Visitor,
    Structured,
    Context,
    Go,
    /// For the answer to `OPT_EXPORT_NAME`, which has no header.
    ByName,
}

/// A handshake in progress.
pub struct ClientHandshake {
    wishes: Wishes,
    /// Whether the export is to be entered, not only described.
    enters: bool,
    waiting: Waiting,
    input: Vec<u8>,
    output: Vec<u8>,
    no_zeroes: bool,
    structured: bool,
    base_allocation: Option<u32>,
    export: Option<(u64, TransmissionFlags)>,
    block: BlockSizes,
    replies: u32,
}

impl fmt::Debug for ClientHandshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientHandshake").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

impl ClientHandshake {
    /// A new handshake; the server speaks first.
    pub fn new(wishes: Wishes) -> ClientHandshake {
        ClientHandshake {
            wishes,
            enters: true,
            waiting: Waiting::Greeting,
            input: Vec::new(),
            output: Vec::new(),
            no_zeroes: false,
            structured: false,
            base_allocation: None,
            export: None,
            block: BlockSizes::DEFAULT,
            replies: 0,
        }
    }

    /// A new handshake that only asks for a description of the export, by `OPT_INFO`. A server that does not know
    /// that option is asked to let the client enter.
    pub fn describing(wishes: Wishes) -> ClientHandshake {
        ClientHandshake { enters: false, ..ClientHandshake::new(wishes) }
    }

    /// Takes bytes that the server sent.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Returns bytes for the server, to be sent before waiting for more.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Continues the handshake; none if more bytes are needed.
    ///
    /// # Errors
    /// When the negotiation has failed; the connection has to be closed. If the server refused, the output holds an
    /// `OPT_ABORT` that a polite client sends first, without waiting for an answer.
    pub fn step(&mut self) -> Result<Option<Agreed>, HandshakeError> {
        loop {
            let went_on = match self.waiting {
                Waiting::Greeting => self.greeting()?,
                Waiting::ByName => return self.by_name(),
                Waiting::Visitor | Waiting::Structured | Waiting::Context | Waiting::Go => {
                    match self.option_reply()? {
                        Progress::Input => false,
                        Progress::More => true,
                        Progress::Done(agreed) => return Ok(Some(*agreed)),
                    }
                }
            };
            if !went_on {
                return Ok(None);
            }
        }
    }

    /// The error if the server closed the connection while the client waited for more bytes.
    pub fn closed(&self) -> HandshakeError {
        match self.waiting {
            Waiting::ByName => HandshakeError::UnknownExport,
            _ => HandshakeError::Closed,
        }
    }

    fn greeting(&mut self) -> Result<bool, HandshakeError> {
        if !is_string(&self.wishes.export) {
            return Err(HandshakeError::BadName);
        }
        let mut reader = Reader(&self.input);
        // Another service may send less than a whole greeting and then wait, so each byte is checked as it comes.
        if self.input.iter().zip(NBD_MAGIC.to_be_bytes()).any(|(got, wanted)| *got != wanted) {
            return Err(HandshakeError::NotNbd);
        }
        let (Some(_), Some(magic), Some(flags)) = (reader.u64(), reader.u64(), reader.u16()) else {
            return Ok(false);
        };
        if magic != OPTION_MAGIC {
            return Err(HandshakeError::NotNbd);
        }
        self.input.drain(..18);
        self.no_zeroes = flags & FLAG_NO_ZEROES != 0;
        let flags = u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES));
        self.output.extend(flags.to_be_bytes());
        if flags & u32::from(FLAG_FIXED_NEWSTYLE) == 0 {
            self.ask_by_name();
        } else if let Some(visitor) = &self.wishes.visitor {
            let text = visitor.to_string();
            self.ask(OPT_XPM_LIFE, text.as_bytes());
            self.waiting = Waiting::Visitor;
        } else {
            self.ask_for_export();
        }
        Ok(true)
    }

    fn ask_for_export(&mut self) {
        if self.wishes.structured {
            self.ask(OPT_STRUCTURED_REPLY, &[]);
            self.waiting = Waiting::Structured;
        } else {
            self.ask_to_go();
        }
    }

    fn ask(&mut self, option: u32, data: &[u8]) {
        self.replies = 0;
        put_option(&mut self.output, option, data);
    }

    fn ask_by_name(&mut self) {
        let name = self.wishes.export.clone().into_bytes();
        self.ask(OPT_EXPORT_NAME, &name);
        self.waiting = Waiting::ByName;
    }

    fn ask_to_go(&mut self) {
        let mut data = self.export_string();
        data.extend(1_u16.to_be_bytes());
        data.extend(INFO_BLOCK_SIZE.to_be_bytes());
        self.ask(if self.enters { OPT_GO } else { OPT_INFO }, &data);
        self.waiting = Waiting::Go;
    }

    fn ask_for_context(&mut self) {
        let mut data = self.export_string();
        data.extend(1_u32.to_be_bytes());
        put_string(&mut data, BASE_ALLOCATION);
        self.ask(OPT_SET_META_CONTEXT, &data);
        self.waiting = Waiting::Context;
    }

    fn export_string(&self) -> Vec<u8> {
        let mut data = Vec::new();
        put_string(&mut data, &self.wishes.export);
        data
    }

    fn option_reply(&mut self) -> Result<Progress, HandshakeError> {
        let mut reader = Reader(&self.input);
        let (Some(magic), Some(option), Some(kind), Some(len)) =
            (reader.u64(), reader.u32(), reader.u32(), reader.u32())
        else {
            return Ok(Progress::Input);
        };
        if magic != OPTION_REPLY_MAGIC {
            return Err(HandshakeError::Protocol("an option's reply without its magic number"));
        }
        if len > REPLY_LEN_MAX {
            return Err(HandshakeError::Protocol("an option's reply of unreasonable length"));
        }
        let Some(data) = reader.take(len as usize).map(<[u8]>::to_vec) else { return Ok(Progress::Input) };
        self.input.drain(..20 + len as usize);
        self.replies += 1;
        if option != self.option() || self.replies > REPLIES_MAX {
            return Err(HandshakeError::Protocol("a reply to no option of ours"));
        }
        self.take_reply(kind, &data)
    }

    const fn option(&self) -> u32 {
        match self.waiting {
            Waiting::Visitor => OPT_XPM_LIFE,
            Waiting::Structured => OPT_STRUCTURED_REPLY,
            Waiting::Context => OPT_SET_META_CONTEXT,
            _ if self.enters => OPT_GO,
            _ => OPT_INFO,
        }
    }

    fn take_reply(&mut self, kind: u32, data: &[u8]) -> Result<Progress, HandshakeError> {
        match (self.waiting, kind) {
            (Waiting::Structured, REP_ACK) => {
                self.structured = true;
                if self.wishes.base_allocation { self.ask_for_context() } else { self.ask_to_go() }
            }
            (_, REP_ERR_SHUTDOWN) => {
                self.ask(OPT_ABORT, &[]);
                return Err(HandshakeError::ShuttingDown);
            }
            // A server that does not know lives accepts every client that has the key.
            (Waiting::Visitor, REP_ACK | REP_ERR_UNSUP) => self.ask_for_export(),
            (Waiting::Visitor, kind) if kind & REP_ERR != 0 => {
                self.ask(OPT_ABORT, &[]);
                return Err(self.refusal(kind, data));
            }
            // Whatever the reason, the client goes on without it, and ignores contexts that came before an error.
            (Waiting::Structured | Waiting::Context, kind) if kind & REP_ERR != 0 => {
                self.base_allocation = None;
                self.ask_to_go();
            }
            (Waiting::Context, REP_ACK) => self.ask_to_go(),
            (Waiting::Context, REP_META_CONTEXT) => {
                let mut reader = Reader(data);
                if let Some(id) = reader.u32()
                    && reader.0 == BASE_ALLOCATION.as_bytes()
                {
                    self.base_allocation = Some(id);
                }
            }
            (Waiting::Go, REP_INFO) => self.take_info(data)?,
            (Waiting::Go, REP_ACK) => {
                let (size, flags) =
                    self.export.ok_or(HandshakeError::Protocol("an export without its size"))?;
                if u64::from(self.block.max) < size.min(u64::from(self.block.preferred)) {
                    return Err(HandshakeError::Protocol("block sizes that cannot be"));
                }
                return Ok(Progress::Done(Box::new(self.agreed(size, flags))));
            }
            (Waiting::Go, REP_ERR_UNSUP) => self.ask_by_name(),
            (Waiting::Go, kind) if kind & REP_ERR != 0 => {
                self.ask(OPT_ABORT, &[]);
                return Err(self.refusal(kind, data));
            }
            _ => return Err(HandshakeError::Protocol("a reply of a kind that does not belong here")),
        }
        Ok(Progress::More)
    }

    fn take_info(&mut self, data: &[u8]) -> Result<(), HandshakeError> {
        let mut reader = Reader(data);
        match reader.u16() {
            Some(INFO_EXPORT) => {
                let (Some(size), Some(flags), true) = (reader.u64(), reader.u16(), reader.is_empty()) else {
                    return Err(HandshakeError::Protocol("malformed information on the export"));
                };
                self.export = Some((size, TransmissionFlags::from_bits(flags)));
            }
            Some(INFO_BLOCK_SIZE) => {
                let (Some(min), Some(preferred), Some(max), true) =
                    (reader.u32(), reader.u32(), reader.u32(), reader.is_empty())
                else {
                    return Err(HandshakeError::Protocol("malformed block sizes"));
                };
                self.block = BlockSizes::announced(min, preferred, max)
                    .ok_or(HandshakeError::Protocol("block sizes that cannot be"))?;
            }
            Some(_) => {}
            None => return Err(HandshakeError::Protocol("information without a type")),
        }
        Ok(())
    }

    fn by_name(&mut self) -> Result<Option<Agreed>, HandshakeError> {
        let len = 10 + if self.no_zeroes { 0 } else { EXPORT_NAME_ZEROES };
        let mut reader = Reader(&self.input);
        let (Some(size), Some(flags)) = (reader.u64(), reader.u16()) else { return Ok(None) };
        if self.input.len() < len {
            return Ok(None);
        }
        self.input.drain(..len);
        Ok(Some(self.agreed(size, TransmissionFlags::from_bits(flags))))
    }

    fn agreed(&mut self, size: u64, flags: TransmissionFlags) -> Agreed {
        let flags = flags.coherent(self.structured);
        Agreed {
            info: ExportInfo { size, flags, block: self.block, description: None },
            structured: self.structured,
            base_allocation: self.base_allocation,
            leftover: std::mem::take(&mut self.input),
        }
    }

    fn refusal(&self, kind: u32, data: &[u8]) -> HandshakeError {
        let text = self.shown(data);
        match kind {
            REP_ERR_UNKNOWN => HandshakeError::UnknownExport,
            REP_ERR_POLICY if text.split(':').next() == OUTDATED.split(':').next() => {
                HandshakeError::Outdated
            }
            REP_ERR_POLICY => HandshakeError::Policy(text),
            REP_ERR_TLS_REQD => HandshakeError::TlsRequired,
            _ => HandshakeError::Refused(text),
        }
    }

    /// A server's text, fit for display. Servers often repeat the export's name, which may be a secret.
    fn shown(&self, text: &[u8]) -> String {
        let text = printable(&String::from_utf8_lossy(text));
        let text = match printable(&self.wishes.export) {
            name if name.is_empty() => text,
            name => text.replace(&name, "(the name)"),
        };
        text.chars().take(SHOWN_MAX).collect()
    }
}

fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

enum Progress {
    Input,
    More,
    Done(Box<Agreed>),
}
