//! A connection as a [`Link`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, epoll, eventfd};
use xpm_protocol::nbd::{Command, CommandFlags, ExportInfo, REQUEST_LEN, Request};

use super::connect::Connected;
use super::input::Input;
use super::output::{Flow, Output};
use super::parts::Parts;
use super::plan::Limits;
use crate::io::{Completion, Operation};
use crate::link::{Full, Link, LinkDown};
use crate::nbd::socket::{Pieces, send};

/// Most operations in flight.
const DEPTH_MAX: usize = 1 << 16;

/// A [`Link`] over one NBD connection. Nothing is allocated after it was made.
///
/// * Operations longer than the server takes are split; each still ends once.
/// * `Trim` is `NBD_CMD_TRIM`, whose bytes read as zeros afterwards on an appliance; the NBD
///   protocol does not promise that of other servers. `Zero` is `NBD_CMD_WRITE_ZEROES` that keeps
///   the memory.
/// * What the export does not allow (range, alignment, command) is refused here, without a message.
/// * A server that breaks the protocol (a reply to nothing, one reply too many, a wrong magic
///   number) ends the link with [`LinkDown::Protocol`]; it cannot touch memory of operations that
///   have ended, nor memory outside of those in flight.
pub struct NbdLink {
    stream: OwnedFd,
    /// Watches the stream, for room to send only while that is waited for, and the bell.
    watch: OwnedFd,
    /// Readable while `ended` holds completions.
    bell: OwnedFd,
    rung: bool,
    flow: Flow,
    info: ExportInfo,
    limits: Limits,
    depth: usize,
    parts: Parts,
    output: Output,
    input: Input,
    /// Completions of operations that ended without a reply being waited for.
    ended: Vec<Completion>,
    down: Option<LinkDown>,
}

impl NbdLink {
    /// A link for up to `depth` operations at once (1 to 65,536; others are brought into that
    /// range).
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub fn new(connected: Connected, depth: usize) -> io::Result<NbdLink> {
        let Connected { stream, info } = connected;
        let depth = depth.clamp(1, DEPTH_MAX);
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let data = epoll::EventData::new_u64(0);
        epoll::add(&watch, &stream, data, epoll::EventFlags::IN)?;
        epoll::add(&watch, &bell, data, epoll::EventFlags::IN)?;
        Ok(NbdLink {
            stream,
            watch,
            bell,
            rung: false,
            flow: Flow::Free,
            limits: Limits::new(&info),
            info,
            depth,
            parts: Parts::new(depth as u32),
            output: Output::new(depth as u32),
            input: Input::new(),
            ended: Vec::with_capacity(depth),
            down: None,
        })
    }

    /// What the server says of the export.
    pub const fn info(&self) -> &ExportInfo {
        &self.info
    }

    fn send(&mut self) -> Result<(), LinkDown> {
        let flow = self.output.send(self.stream.as_fd(), &mut self.parts, &mut self.ended);
        self.watch_flow(flow.map_err(|_| LinkDown::Broken)?)
    }

    /// Watches for room to send while there is something to send.
    fn watch_flow(&mut self, flow: Flow) -> Result<(), LinkDown> {
        if flow == self.flow {
            return Ok(());
        }
        let events = match flow {
            Flow::Free => epoll::EventFlags::IN,
            Flow::Blocked => epoll::EventFlags::IN | epoll::EventFlags::OUT,
        };
        let data = epoll::EventData::new_u64(0);
        epoll::modify(&self.watch, &self.stream, data, events).map_err(|_| LinkDown::Broken)?;
        self.flow = flow;
        Ok(())
    }

    /// Makes the wait descriptor readable while completions wait, or the news that the link went down: not all that
    /// ends it shows at the socket. The bell cannot be full: it counts to one.
    fn ring(&mut self) {
        if !self.rung && (self.down.is_some() || !self.ended.is_empty()) {
            self.rung = rustix::io::write(&self.bell, &1_u64.to_ne_bytes()).is_ok();
        }
    }

    fn take_ended(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.ended);
        if self.rung {
            self.rung = rustix::io::read(&self.bell, &mut [0; 8]).is_err();
        }
    }

    fn turn(&mut self, completions: &mut Vec<Completion>) -> Result<(), LinkDown> {
        self.input.receive(self.stream.as_fd(), &mut self.parts, completions)?;
        self.send()
    }
}

impl Link for NbdLink {
    fn post(&mut self, operation: Operation) -> Result<(), Full> {
        if self.parts.in_flight() + self.ended.len() >= self.depth {
            return Err(Full);
        }
        match self.limits.plan(&operation) {
            Ok(plan) => self.parts.add(operation, plan),
            Err(result) => self.ended.push(Completion { token: operation.token, result }),
        }
        Ok(())
    }

    fn submit(&mut self) {
        if self.down.is_none() {
            self.down = self.send().err();
        }
        self.ring();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LinkDown> {
        if self.down.is_none() {
            self.down = self.turn(completions).err();
        }
        self.take_ended(completions);
        self.down.map_or(Ok(()), Err)
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.watch.as_fd())
    }
}

impl Drop for NbdLink {
    /// Takes leave, if the connection is in a state for it; the server closes it in any case.
    fn drop(&mut self) {
        if self.down.is_none() && self.output.is_between_requests() {
            let leave = Request {
                flags: CommandFlags::NONE,
                command: Command::Disconnect,
                cookie: 0,
                offset: 0,
                length: 0,
            };
            let mut header = [0; REQUEST_LEN];
            leave.encode(&mut header);
            let mut pieces = Pieces::new();
            pieces.push_ref(&header);
            // Best effort: the end of the stream says the same.
            let _ = send(self.stream.as_fd(), &pieces);
        }
    }
}
