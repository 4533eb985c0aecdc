//! [`NbdLink`]: an NBD connection as a [`Link`].

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

/// A [`Link`] over one NBD connection. The link allocates nothing after its creation.
///
/// - Operations longer than the server's limit are split; each operation still completes once.
/// - `Trim` is `NBD_CMD_TRIM`, whose bytes read as zeros afterwards on an appliance; the NBD protocol does
///   not promise that of other servers. `Zero` is `NBD_CMD_WRITE_ZEROES` with the flag that keeps the memory.
/// - Operations that the export does not allow (range, alignment, command) are refused here, without a
///   message.
/// - A server that violates the protocol (a reply to no request, one reply too many, a wrong magic number)
///   ends the link with [`LinkDown::Protocol`]; such a server can change neither memory of operations that have
///   ended, nor memory outside the buffers in flight.
pub struct NbdLink {
    stream: OwnedFd,
    /// An epoll descriptor for the stream and the bell; it waits for room to send only while data is unsent.
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
    /// Completions of operations that end without a reply from the server.
    ended: Vec<Completion>,
    down: Option<LinkDown>,
}

impl NbdLink {
    /// A link for up to `depth` operations at once (clamped to 1 to 65,536).
    ///
    /// # Errors
    /// When the process or the kernel has no free descriptor.
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

    /// The server's description of the export.
    pub const fn info(&self) -> &ExportInfo {
        &self.info
    }

    fn send(&mut self) -> Result<(), LinkDown> {
        let flow = self.output.send(self.stream.as_fd(), &mut self.parts, &mut self.ended);
        self.watch_flow(flow.map_err(|_| LinkDown::Broken)?)
    }

    /// Lets epoll wait for room to send while unsent data is left.
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

    /// Makes the wait descriptor readable while completions wait or the link is down: not every cause that
    /// takes the link down makes the socket readable. The bell's counter cannot overflow: it counts to one.
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
    /// Sends a disconnect request, if no request is half sent; the server closes the connection in any case.
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
            // Best effort: the end of the stream has the same effect.
            let _ = send(self.stream.as_fd(), &pieces);
        }
    }
}
