//! The server's side of the handshake.

use std::fmt;

use super::message::{Reader, is_string, parse_contexts, parse_info, put_reply, put_string, string};
use crate::life::Visitor;
use crate::nbd::constants::*;
use crate::nbd::export::{ExportInfo, TransmissionFlags};

/// Longest data of an option that is parsed, in bytes: enough for two strings and some numbers.
const OPTION_LEN_MAX: u32 = 16 << 10;
/// Longest data of an option that is skipped, in bytes; with more the connection is closed.
const OPTION_SKIP_MAX: u32 = 1 << 20;
/// Most options of one handshake; a client needs fewer than ten.
const OPTIONS_MAX: u32 = 64;
/// Context ids are the server's choice.
const BASE_ALLOCATION_ID: u32 = 1;

/// The next input that the handshake needs, or its end.
#[derive(Clone, PartialEq, Eq)]
pub enum Step {
    /// More bytes of the client, by [`ServerHandshake::receive`].
    Input,
    /// The export of this name, by [`ServerHandshake::found`].
    Open(String),
    /// The names of all exports, by [`ServerHandshake::listed`].
    List,
    /// No input: the handshake is over, the output has to be sent, and requests follow.
    Ready(Negotiated),
    /// No input: the output has to be sent and the connection closed.
    Close(CloseReason),
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Input => f.write_str("Input"),
            Step::Open(_) => f.write_str("Open(a name)"),
            Step::List => f.write_str("List"),
            Step::Ready(negotiated) => f.debug_tuple("Ready").field(negotiated).finish(),
            Step::Close(reason) => f.debug_tuple("Close").field(reason).finish(),
        }
    }
}

/// Result of the negotiation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// The export.
    pub info: ExportInfo,
    /// Replies are structured.
    pub structured: bool,
    /// The id of the context `base:allocation`, if the client chose it.
    pub base_allocation: Option<u32>,
    /// Bytes received after the handshake: the first requests.
    pub leftover: Vec<u8>,
}

/// Why a handshake ends without an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum CloseReason {
    /// The client ended the handshake.
    #[error("the client ended the handshake")]
    Aborted,
    /// The client named a missing export by `OPT_EXPORT_NAME`, which has no other answer than to close.
    #[error("the client named an unknown export")]
    UnknownExport,
    /// There is a newer connection of the same session and queue, and the client used `OPT_EXPORT_NAME`.
    #[error("the client has a newer connection")]
    Outdated,
    /// The client does not follow the protocol.
    #[error("the client broke the protocol: {0}")]
    Protocol(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    /// For the client's flags.
    Flags,
    /// For an option.
    Option,
    /// For the rest of an option's data that is skipped.
    Skip { option: u32, left: u32 },
    /// For the caller's answer about an export.
    Export(Asked),
    /// For the caller's list of exports.
    Names,
    /// The handshake is over.
    Over,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    ByName,
    Info { go: bool, name: bool, description: bool },
}

/// A handshake in progress. Its memory is bounded: besides received bytes that are not parsed yet, it holds at most
/// one option.
pub struct ServerHandshake {
    waiting: Waiting,
    input: Vec<u8>,
    output: Vec<u8>,
    options: u32,
    no_zeroes: bool,
    structured: bool,
    /// The export for which contexts were set.
    context_export: Option<String>,
    asked_name: String,
    visitor: Option<Visitor>,
}

/// Why a client does not get an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoExport {
    /// The export does not exist, or is hidden.
    Unknown,
    /// The export exists but is refused to this client, for this reason.
    Refused(String),
}

impl fmt::Debug for ServerHandshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerHandshake").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

impl Default for ServerHandshake {
    fn default() -> ServerHandshake {
        ServerHandshake::new()
    }
}

impl ServerHandshake {
    /// A new handshake; the greeting is in its output.
    pub fn new() -> ServerHandshake {
        let mut output = Vec::with_capacity(64);
        output.extend(NBD_MAGIC.to_be_bytes());
        output.extend(OPTION_MAGIC.to_be_bytes());
        output.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        ServerHandshake {
            waiting: Waiting::Flags,
            input: Vec::new(),
            output,
            options: 0,
            no_zeroes: false,
            structured: false,
            context_export: None,
            asked_name: String::new(),
            visitor: None,
        }
    }

    /// Takes bytes that the client sent.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Returns bytes for the client, to be sent before the next step.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Continues until an input is needed.
    pub fn step(&mut self) -> Step {
        loop {
            let step = match self.waiting {
                Waiting::Flags => self.flags(),
                Waiting::Option => self.option(),
                Waiting::Skip { option, left } => self.skip(option, left),
                Waiting::Export(_) => Some(Step::Open(self.asked_name.clone())),
                Waiting::Names => Some(Step::List),
                Waiting::Over => Some(Step::Close(CloseReason::Aborted)),
            };
            if let Some(step) = step {
                return step;
            }
        }
    }

    /// Whether the export of [`Step::Open`] is to be entered, not only described (`OPT_INFO`). An export that is only
    /// described may be asked for again, and need not be opened.
    pub fn enters(&self) -> bool {
        matches!(self.waiting, Waiting::Export(Asked::ByName | Asked::Info { go: true, .. }))
    }

    /// The life of the client, if it sent one.
    pub const fn visitor(&self) -> Option<&Visitor> {
        self.visitor.as_ref()
    }

    /// Answers [`Step::Open`].
    ///
    /// `info` is the export, or the reason that the client gets instead.
    pub fn found(&mut self, info: Result<&ExportInfo, &NoExport>) -> Option<Step> {
        let Waiting::Export(asked) = self.waiting else { return None };
        self.waiting = Waiting::Option;
        match (asked, info) {
            (Asked::ByName, Err(_)) => return Some(self.close(CloseReason::UnknownExport)),
            (Asked::ByName, Ok(info)) => {
                self.output.extend(info.size.to_be_bytes());
                self.output.extend(self.flags_for(info).bits().to_be_bytes());
                let zeroes = if self.no_zeroes { 0 } else { EXPORT_NAME_ZEROES };
                self.output.extend(std::iter::repeat_n(0, zeroes));
                return Some(self.ready(info));
            }
            (Asked::Info { go, .. }, Err(why)) => {
                let option = if go { OPT_GO } else { OPT_INFO };
                match why {
                    NoExport::Unknown => self.refuse(option, REP_ERR_UNKNOWN, "there is no such export"),
                    NoExport::Refused(reason) => self.refuse(option, REP_ERR_POLICY, reason),
                }
            }
            (Asked::Info { go, name, description }, Ok(info)) => {
                self.describe(if go { OPT_GO } else { OPT_INFO }, info, name, description);
                if go {
                    return Some(self.ready(info));
                }
            }
        }
        None
    }

    /// Answers [`Step::Open`] for an existing export that has a newer connection of the client's session and queue.
    /// Only a client that named the export by its key gets this answer.
    pub fn outdated(&mut self) -> Option<Step> {
        let Waiting::Export(asked) = self.waiting else { return None };
        self.waiting = Waiting::Option;
        match asked {
            Asked::ByName => return Some(self.close(CloseReason::Outdated)),
            Asked::Info { go, .. } => {
                self.refuse(if go { OPT_GO } else { OPT_INFO }, REP_ERR_POLICY, OUTDATED);
            }
        }
        None
    }

    /// Answers [`Step::List`]. None: policy forbids listing.
    pub fn listed(&mut self, names: Option<&[String]>) {
        if self.waiting != Waiting::Names {
            return;
        }
        self.waiting = Waiting::Option;
        let Some(names) = names else {
            return self.refuse(OPT_LIST, REP_ERR_POLICY, "names of exports are not listed here");
        };
        for name in names {
            let mut data = Vec::new();
            put_string(&mut data, name);
            self.reply(OPT_LIST, REP_SERVER, &data);
        }
        self.reply(OPT_LIST, REP_ACK, &[]);
    }

    fn flags(&mut self) -> Option<Step> {
        let Some(flags) = self.input.first_chunk().map(|flags| u32::from_be_bytes(*flags)) else {
            return Some(Step::Input);
        };
        self.input.drain(..4);
        if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
            return Some(self.close(CloseReason::Protocol("unknown client flags")));
        }
        self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
        self.waiting = Waiting::Option;
        None
    }

    fn option(&mut self) -> Option<Step> {
        let mut reader = Reader(&self.input);
        let (Some(magic), Some(option), Some(len)) = (reader.u64(), reader.u32(), reader.u32()) else {
            return Some(Step::Input);
        };
        if magic != OPTION_MAGIC {
            return Some(self.close(CloseReason::Protocol("an option without its magic number")));
        }
        if len > OPTION_SKIP_MAX {
            return Some(self.close(CloseReason::Protocol("an option of unreasonable length")));
        }
        if self.options == OPTIONS_MAX {
            return Some(self.close(CloseReason::Protocol("too many options")));
        }
        if len > OPTION_LEN_MAX {
            self.options += 1;
            self.input.drain(..16);
            self.waiting = Waiting::Skip { option, left: len };
            return None;
        }
        let Some(data) = reader.take(len as usize).map(<[u8]>::to_vec) else { return Some(Step::Input) };
        self.options += 1;
        self.input.drain(..16 + len as usize);
        self.answer(option, &data)
    }

    fn skip(&mut self, option: u32, left: u32) -> Option<Step> {
        let passed = self.input.len().min(left as usize);
        self.input.drain(..passed);
        let left = left - passed as u32;
        self.waiting = Waiting::Skip { option, left };
        if left > 0 {
            return Some(Step::Input);
        }
        self.waiting = Waiting::Option;
        match option {
            OPT_EXPORT_NAME => {
                return Some(self.close(CloseReason::Protocol("a name of unreasonable length")));
            }
            // The data of this option are irrelevant.
            OPT_ABORT => return self.answer(option, &[]),
            // A failed setting of contexts also clears the earlier one.
            OPT_SET_META_CONTEXT => self.context_export = None,
            _ => {}
        }
        self.refuse(option, REP_ERR_TOO_BIG, "the option is too long");
        None
    }

    fn answer(&mut self, option: u32, data: &[u8]) -> Option<Step> {
        match option {
            OPT_EXPORT_NAME => match string(data) {
                Some(name) => self.ask(name.to_owned(), Asked::ByName),
                None => return Some(self.close(CloseReason::UnknownExport)),
            },
            OPT_ABORT => {
                self.reply(option, REP_ACK, &[]);
                return Some(self.close(CloseReason::Aborted));
            }
            OPT_LIST if data.is_empty() => self.waiting = Waiting::Names,
            OPT_LIST => self.refuse(option, REP_ERR_INVALID, "a list takes no data"),
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                self.reply(option, REP_ACK, &[]);
            }
            OPT_STRUCTURED_REPLY => self.refuse(option, REP_ERR_INVALID, "structured replies take no data"),
            OPT_INFO | OPT_GO => match parse_info(data) {
                Some((name, asks)) => {
                    let asked = Asked::Info {
                        go: option == OPT_GO,
                        name: asks.contains(&INFO_NAME),
                        description: asks.contains(&INFO_DESCRIPTION),
                    };
                    self.ask(name, asked);
                }
                None => self.refuse(option, REP_ERR_INVALID, "the request for information is malformed"),
            },
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.contexts(option, data),
            OPT_XPM_LIFE => match std::str::from_utf8(data).ok().and_then(|text| text.parse().ok()) {
                Some(visitor) => {
                    self.visitor = Some(visitor);
                    self.reply(option, REP_ACK, &[]);
                }
                None => self.refuse(option, REP_ERR_INVALID, "this is not the life of a client"),
            },
            _ => self.refuse(option, REP_ERR_UNSUP, "this option is not supported"),
        }
        None
    }

    fn ask(&mut self, name: String, asked: Asked) {
        self.asked_name = name;
        self.waiting = Waiting::Export(asked);
    }

    fn contexts(&mut self, option: u32, data: &[u8]) {
        let set = option == OPT_SET_META_CONTEXT;
        if set {
            self.context_export = None;
        }
        if !self.structured {
            return self.refuse(option, REP_ERR_INVALID, "structured replies have to be negotiated first");
        }
        let Some((export, queries)) = parse_contexts(data) else {
            return self.refuse(option, REP_ERR_INVALID, "the queries for contexts are malformed");
        };
        let matches = |query: &&str| *query == BASE_ALLOCATION || (!set && *query == "base:");
        if queries.iter().any(matches) || (!set && queries.is_empty()) {
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            let mut found = id.to_be_bytes().to_vec();
            found.extend(BASE_ALLOCATION.as_bytes());
            self.reply(option, REP_META_CONTEXT, &found);
            if set {
                self.context_export = Some(export);
            }
        }
        self.reply(option, REP_ACK, &[]);
    }

    fn describe(&mut self, option: u32, info: &ExportInfo, name: bool, description: bool) {
        let mut export = INFO_EXPORT.to_be_bytes().to_vec();
        export.extend(info.size.to_be_bytes());
        export.extend(self.flags_for(info).bits().to_be_bytes());
        self.reply(option, REP_INFO, &export);
        let mut block = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [info.block.min, info.block.preferred, info.block.max] {
            block.extend(size.to_be_bytes());
        }
        self.reply(option, REP_INFO, &block);
        if name {
            let mut data = INFO_NAME.to_be_bytes().to_vec();
            data.extend(self.asked_name.as_bytes());
            self.reply(option, REP_INFO, &data);
        }
        if let (true, Some(text)) = (description, &info.description)
            && is_string(text)
        {
            let mut data = INFO_DESCRIPTION.to_be_bytes().to_vec();
            data.extend(text.as_bytes());
            self.reply(option, REP_INFO, &data);
        }
        self.reply(option, REP_ACK, &[]);
    }

    /// DF is announced only together with structured replies.
    fn flags_for(&self, info: &ExportInfo) -> TransmissionFlags {
        info.flags
            .with(TransmissionFlags::HAS_FLAGS)
            .with(TransmissionFlags::SEND_DF)
            .coherent(self.structured)
    }

    fn ready(&mut self, info: &ExportInfo) -> Step {
        self.waiting = Waiting::Over;
        let context = self.context_export.take().is_some_and(|export| export == self.asked_name);
        Step::Ready(Negotiated {
            info: ExportInfo { flags: self.flags_for(info), ..info.clone() },
            structured: self.structured,
            base_allocation: context.then_some(BASE_ALLOCATION_ID),
            leftover: std::mem::take(&mut self.input),
        })
    }

    fn close(&mut self, reason: CloseReason) -> Step {
        self.waiting = Waiting::Over;
        self.input = Vec::new();
        Step::Close(reason)
    }

    fn refuse(&mut self, option: u32, error: u32, text: &str) {
        self.reply(option, error, text.as_bytes());
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        put_reply(&mut self.output, option, kind, data);
    }
}
