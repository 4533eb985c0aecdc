//! One connection in the transmission phase. One thread reads its requests and sends its replies, without a
//! copy where the store's memory can be accessed in place.
//!
//! Reads of a direct store are sent from its memory, writes are received into it. With other stores, reads
//! and writes pass through the connection's own buffers. A write longer than the longest such buffer is cut
//! into parts. A longer read waits until no other request is in flight, and is then fetched and sent part by
//! part, since no other reply may interrupt a reply's data.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use xpm_protocol::nbd::{Command, CommandFlags, Errno, ExportInfo, REQUEST_LEN, Request};

use super::counters::{LoopCounters, add};
use super::deferred::{Deferred, Ended, Extent};
use super::incoming::{Filling, Incoming, Target};
use super::input::Input;
use super::output::{Flushed, Output};
use super::reply;
use crate::io::Kind;
use crate::nbd::socket::{self, Pieces};
use crate::store::Store;

/// Most receive calls in one turn, so that a busy connection does not keep the others of its loop waiting.
const ROUNDS_MAX: usize = 16;
/// The payload of a refused write is still read and discarded, up to this many bytes. For a longer payload
/// the connection is closed, because the next request cannot be found without reading over it.
const DISCARD_MAX: u32 = 64 << 20;

/// The parts of a connection whose handshake is over.
pub(super) struct Ready {
    pub(super) stream: Arc<OwnedFd>,
    pub(super) store: Box<dyn Store>,
    pub(super) info: ExportInfo,
    pub(super) structured: bool,
    /// The id of the context `base:allocation`, if it was negotiated.
    pub(super) base_allocation: Option<u32>,
    /// Bytes that the client sent behind its handshake.
    pub(super) leftover: Vec<u8>,
    /// Bytes of buffers; 0 for a store that is always direct.
    pub(super) buffers_len: usize,
}

/// Why the connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Closed {
    /// The client disconnected, or the store may not be served any more.
    Left,
    /// The client violated the protocol.
    Protocol,
}

/// Why no further request is processed now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stall {
    /// More bytes have to arrive.
    Input,
    /// Replies have to be sent first.
    Output,
    /// Operations at the store have to end first.
    Store,
}

/// The result of one receive call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Received {
    Nothing,
    Some,
    /// The room is full: the socket may hold more.
    Full,
}

/// A read that passes through buffers; while it is in progress, no later request is processed.
struct Streaming {
    request: Request,
    /// Bytes that were fetched already.
    done: u32,
}

pub(super) struct Connection {
    // Field order is drop order: the store may use buffers until it is dropped.
    store: Box<dyn Store>,
    deferred: Deferred,
    /// Shared only briefly, with the check whether the other end is alive.
    stream: Arc<OwnedFd>,
    info: ExportInfo,
    structured: bool,
    base_allocation: Option<u32>,
    input: Input,
    incoming: Option<Incoming>,
    streaming: Option<Streaming>,
    output: Output,
    leaving: bool,
    blocked: bool,
    /// The last value that was passed to [`Store::in_place`].
    in_place: bool,
    stall: Stall,
}

impl Connection {
    pub(super) fn new(ready: Ready) -> io::Result<Connection> {
        Ok(Connection {
            store: ready.store,
            deferred: Deferred::new(ready.buffers_len)?,
            stream: ready.stream,
            info: ready.info,
            structured: ready.structured,
            base_allocation: ready.base_allocation,
            input: Input::new(&ready.leftover),
            incoming: None,
            streaming: None,
            output: Output::new(),
            leaving: false,
            blocked: false,
            in_place: false,
            stall: Stall::Input,
        })
    }

    pub(super) fn stream(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    pub(super) fn store_fd(&self) -> Option<BorrowedFd<'_>> {
        self.store.wait_fd()
    }

    /// Whether the connection waits for bytes from the client.
    pub(super) fn wants_input(&self) -> bool {
        self.stall == Stall::Input && !self.leaving
    }

    /// Whether the connection waits until the client has received replies.
    pub(super) fn wants_output(&self) -> bool {
        self.blocked
    }

    /// Does all work that is possible now, up to a limit that gives other connections their turn.
    pub(super) fn serve(&mut self, counters: &LoopCounters) -> Result<(), Closed> {
        if !self.store.alive() {
            return Err(Closed::Left);
        }
        self.collect(counters)?;
        let mut drained = false;
        for round in 0.. {
            self.stall = self.process(counters)?;
            self.tell_in_place();
            let collected = self.deferred.submit(&mut *self.store) && self.collect(counters)?;
            self.flush()?;
            let go_on = match self.stall {
                Stall::Input if self.leaving || drained || round >= ROUNDS_MAX => false,
                Stall::Input => {
                    let received = self.receive()?;
                    drained = received != Received::Full;
                    received != Received::Nothing
                }
                Stall::Output => !self.blocked,
                Stall::Store => collected,
            };
            if !go_on {
                break;
            }
        }
        self.tell_in_place();
        let over = self.leaving && self.output.is_empty() && self.deferred.in_flight() == 0;
        if over { Err(Closed::Left) } else { Ok(()) }
    }

    fn tell_in_place(&mut self) {
        let receiving =
            self.incoming.as_ref().is_some_and(|incoming| matches!(incoming.target, Target::Direct));
        let unfinished = receiving || self.output.has_direct();
        if unfinished != self.in_place {
            self.in_place = unfinished;
            self.store.in_place(unfinished);
        }
    }

    fn flush(&mut self) -> Result<(), Closed> {
        let buffers = self.deferred.buffers.as_mut();
        let flushed = self.output.flush(self.stream.as_fd(), &mut *self.store, buffers).map_err(|error| {
            if socket::is_bad_memory(&error) {
                self.output.for_each_direct(|offset, len| self.store.found_bad(offset, len));
            }
            Closed::Left
        });
        self.blocked = flushed? == Flushed::Blocked;
        Ok(())
    }

    fn receive(&mut self) -> Result<Received, Closed> {
        let mut pieces = Pieces::new();
        let payload = match &self.incoming {
            Some(incoming) => incoming.pieces(&mut *self.store, &mut pieces),
            None => 0,
        };
        pieces.push_mut(self.input.room());
        let wanted = pieces.bytes();
        let received = match socket::receive(self.stream.as_fd(), &mut pieces) {
            Ok(0) => return Err(Closed::Left),
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Nothing),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Received::Full),
            Err(error) => {
                if let Some(Incoming { offset, remaining, target: Target::Direct, .. }) = self.incoming
                    && socket::is_bad_memory(&error)
                {
                    self.store.found_bad(offset, u64::from(remaining));
                }
                return Err(Closed::Left);
            }
        };
        let to_payload = received.min(payload);
        if let Some(incoming) = &mut self.incoming {
            incoming.advance(to_payload);
        }
        self.input.filled(received - to_payload);
        Ok(if received == wanted { Received::Full } else { Received::Some })
    }

    /// Processes received bytes until a resource is missing, which is returned.
    fn process(&mut self, counters: &LoopCounters) -> Result<Stall, Closed> {
        loop {
            if let Some(ended) = self.deferred.retry(&mut *self.store) {
                self.answer(&ended, counters)?;
            }
            let stall = if self.streaming.is_some() {
                self.stream_next(counters)?
            } else if self.incoming.is_some() {
                self.take_payload(counters)?
            } else if self.leaving {
                Some(Stall::Input)
            } else {
                self.next_request(counters)?
            };
            if let Some(stall) = stall {
                return Ok(stall);
            }
        }
    }

    fn next_request(&mut self, counters: &LoopCounters) -> Result<Option<Stall>, Closed> {
        if !self.output.has_room(self.deferred.in_flight()) {
            return Ok(Some(Stall::Output));
        }
        if !self.deferred.has_room() {
            return Ok(Some(Stall::Store));
        }
        let Some(header) = self.input.peek::<REQUEST_LEN>() else { return Ok(Some(Stall::Input)) };
        let request = Request::decode(&header).map_err(|_| Closed::Protocol)?;
        self.input.take(REQUEST_LEN);
        self.dispatch(request, counters)?;
        Ok(None)
    }

    fn dispatch(&mut self, request: Request, counters: &LoopCounters) -> Result<(), Closed> {
        if request.command == Command::Disconnect {
            self.leaving = true;
            return Ok(());
        }
        if let Err(errno) = request.check(&self.info, self.structured, self.base_allocation.is_some()) {
            return self.refuse(&request, errno, counters);
        }
        match request.command {
            Command::Read => self.read(request, counters),
            Command::Write => self.write(&request),
            Command::Flush => return self.start(&request, Kind::Flush, counters),
            Command::Trim => return self.start(&request, Kind::Trim, counters),
            Command::WriteZeroes if request.flags.contains(CommandFlags::NO_HOLE) => {
                return self.start(&request, Kind::Zero, counters);
            }
            Command::WriteZeroes => return self.start(&request, Kind::Trim, counters),
            Command::BlockStatus => self.block_status(&request),
            // All of the export is in memory already.
            Command::Cache => self.succeed(request.command, request.cookie, 0, counters),
            Command::Disconnect | Command::Other(_) => {}
        }
        Ok(())
    }

    fn refuse(&mut self, request: &Request, errno: Errno, counters: &LoopCounters) -> Result<(), Closed> {
        match request.command {
            Command::Write if request.length > DISCARD_MAX => return Err(Closed::Protocol),
            Command::Write => self.expect_payload(request, Target::Nowhere(errno)),
            command => self.fail(command, request.cookie, errno, counters),
        }
        Ok(())
    }

    fn read(&mut self, request: Request, counters: &LoopCounters) {
        if self.store.is_direct() {
            if !self.store.is_sound(Kind::Read, request.offset, u64::from(request.length)) {
                return self.fail(request.command, request.cookie, Errno::Io, counters);
            }
            self.read_head(request.cookie, request.offset, request.length);
            self.output.direct(request.offset, request.length as usize);
            count(Command::Read, request.length, counters);
        } else if self.deferred.buffers.is_some() {
            self.streaming = Some(Streaming { request, done: 0 });
        } else {
            self.fail(request.command, request.cookie, Errno::Io, counters);
        }
    }

    fn write(&mut self, request: &Request) {
        let target = if self.store.is_direct() {
            match self.store.is_sound(Kind::Write, request.offset, u64::from(request.length)) {
                true => Target::Direct,
                false => Target::Nowhere(Errno::Io),
            }
        } else if self.deferred.buffers.is_some() {
            Target::Parts { request: self.deferred.begin(request, Extent::Growing), filling: None }
        } else {
            Target::Nowhere(Errno::Io)
        };
        self.expect_payload(request, target);
    }

    fn expect_payload(&mut self, request: &Request, target: Target) {
        self.incoming = Some(Incoming {
            cookie: request.cookie,
            length: request.length,
            offset: request.offset,
            remaining: request.length,
            target,
        });
    }

    /// Starts an operation without a buffer.
    fn start(&mut self, request: &Request, kind: Kind, counters: &LoopCounters) -> Result<(), Closed> {
        let range = match kind {
            Kind::Flush => (kind, 0, 0),
            _ => (kind, request.offset, u64::from(request.length)),
        };
        let id = self.deferred.begin(request, Extent::Whole);
        match self.deferred.post(&mut *self.store, id, range, None) {
            Some(ended) => self.answer(&ended, counters),
            None => Ok(()),
        }
    }

    /// Continues the payload of a write.
    fn take_payload(&mut self, counters: &LoopCounters) -> Result<Option<Stall>, Closed> {
        let Some(incoming) = &mut self.incoming else { return Ok(None) };
        if let Target::Parts { filling: filling @ None, .. } = &mut incoming.target {
            if !self.deferred.has_part_room() {
                return Ok(Some(Stall::Store));
            }
            let len = self.deferred.part_len(incoming.remaining);
            let Some(buffer) = self.deferred.take_buffer(len) else {
                return Ok(Some(self.buffers_stall()));
            };
            *filling = Some(Filling { buffer, filled: 0 });
        }
        incoming.copy(&mut self.input, &mut *self.store).map_err(|_| Closed::Left)?;
        if let Target::Parts { request, filling } = &mut incoming.target
            && let Some(full) = filling.take_if(|part| part.filled == part.buffer.1.len())
        {
            let (request, len) = (*request, full.buffer.1.len() as u64);
            let range = (Kind::Write, incoming.offset - len, len);
            if incoming.remaining == 0 {
                self.incoming = None;
                self.deferred.last(request);
            }
            let ended = self.deferred.post(&mut *self.store, request, range, Some(full.buffer));
            return ended.map_or(Ok(()), |ended| self.answer(&ended, counters)).map(|()| None);
        }
        if incoming.remaining > 0 {
            return Ok(Some(Stall::Input));
        }
        match self.incoming.take() {
            Some(Incoming { cookie, target: Target::Nowhere(errno), .. }) => {
                self.fail(Command::Write, cookie, errno, counters);
            }
            Some(Incoming { cookie, length, .. }) => self.succeed(Command::Write, cookie, length, counters),
            None => {}
        }
        Ok(None)
    }

    /// The event that has to happen before a buffer is free.
    fn buffers_stall(&self) -> Stall {
        if self.output.is_empty() { Stall::Store } else { Stall::Output }
    }

    /// Posts the next part of a streamed read, if one is due.
    fn stream_next(&mut self, counters: &LoopCounters) -> Result<Option<Stall>, Closed> {
        let Some(Streaming { request, done }) = &self.streaming else { return Ok(None) };
        let (request, done) = (*request, *done);
        let len = self.deferred.part_len(request.length - done);
        let alone = len == request.length as usize;
        if !self.deferred.has_room() || (!alone && self.deferred.in_flight() > 0) {
            return Ok(Some(Stall::Store));
        }
        let Some(buffer) = self.deferred.take_buffer(len) else { return Ok(Some(self.buffers_stall())) };
        if alone {
            self.streaming = None;
        }
        let id = self.deferred.begin(&request, if alone { Extent::Whole } else { Extent::Streamed });
        let range = (Kind::Read, request.offset + u64::from(done), len as u64);
        match self.deferred.post(&mut *self.store, id, range, Some(buffer)) {
            Some(ended) => self.answer(&ended, counters).map(|()| None),
            None if alone => Ok(None),
            None => Ok(Some(Stall::Store)),
        }
    }

    /// Answers all requests that have ended. Returns true when at least one operation has ended.
    fn collect(&mut self, counters: &LoopCounters) -> Result<bool, Closed> {
        let any = self.deferred.poll(&mut *self.store);
        while let Some(ended) = self.deferred.next_ended() {
            self.answer(&ended, counters)?;
        }
        Ok(any)
    }

    fn answer(&mut self, ended: &Ended, counters: &LoopCounters) -> Result<(), Closed> {
        match ended.result {
            Ok(Some((run, buf))) if ended.streamed => {
                if self.streamed(buf.len() as u32, counters) {
                    self.read_head(ended.cookie, ended.offset, ended.length);
                }
                self.output.buffer(run, buf);
            }
            Ok(Some((run, buf))) => {
                self.read_head(ended.cookie, ended.offset, ended.length);
                self.output.buffer(run, buf);
                count(Command::Read, ended.length, counters);
            }
            Ok(None) => self.succeed(ended.command, ended.cookie, ended.length, counters),
            Err(error) => {
                // A reply that is partly sent already says success: only closing the connection revokes it.
                if ended.streamed && self.streaming.take().is_some_and(|streaming| streaming.done > 0) {
                    return Err(Closed::Left);
                }
                self.fail(ended.command, ended.cookie, error.nbd(), counters);
            }
        }
        Ok(())
    }

    /// Records that the next `len` bytes of the streamed read arrived. Returns true when they are the first.
    fn streamed(&mut self, len: u32, counters: &LoopCounters) -> bool {
        let Some(streaming) = &mut self.streaming else { return false };
        streaming.done += len;
        let (first, whole) = (streaming.done == len, streaming.request.length);
        if streaming.done == whole {
            self.streaming = None;
            count(Command::Read, whole, counters);
        }
        first
    }

    fn block_status(&mut self, request: &Request) {
        let Some(context) = self.base_allocation else { return };
        let store = &mut *self.store;
        self.output.head(|head| reply::block_status(head, request, context, store));
    }

    fn read_head(&mut self, cookie: u64, offset: u64, length: u32) {
        let structured = self.structured;
        self.output.head(|head| match structured {
            true => reply::data(head, cookie, offset, length),
            false => reply::simple(head, cookie, None),
        });
    }

    fn succeed(&mut self, command: Command, cookie: u64, length: u32, counters: &LoopCounters) {
        count(command, length, counters);
        self.output.head(|head| reply::simple(head, cookie, None));
    }

    fn fail(&mut self, command: Command, cookie: u64, errno: Errno, counters: &LoopCounters) {
        add(&counters.errors, 1);
        let chunked = self.structured && matches!(command, Command::Read | Command::BlockStatus);
        self.output.head(|head| match chunked {
            true => reply::error(head, cookie, errno),
            false => reply::simple(head, cookie, Some(errno)),
        });
    }
}

fn count(command: Command, length: u32, counters: &LoopCounters) {
    match command {
        Command::Read => {
            add(&counters.reads, 1);
            add(&counters.read_bytes, u64::from(length));
        }
        Command::Write => {
            add(&counters.writes, 1);
            add(&counters.write_bytes, u64::from(length));
        }
        Command::Trim | Command::WriteZeroes => add(&counters.trims, 1),
        _ => {}
    }
}
