//! Requests whose operations end later: the operations in flight at the store, and the buffers that they use.

use std::io;

use xpm_protocol::nbd::{Command, Request};

use super::buffers::{Buffers, Run};
use crate::io::{Completion, IoBuf, IoError, Kind, Operation};
use crate::slots::Slots;
use crate::store::{Posted, Store};

/// Most operations of one connection in flight at its store.
const OPERATIONS_MAX: usize = 128;
/// Longest part of a request, in bytes.
const PART_LEN_MAX: usize = 1 << 20;

/// A buffer in use.
pub(super) type Buffer = (Run, IoBuf);

/// How a request relates to its operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// The request is one operation.
    Whole,
    /// More operations follow, up to the one announced by [`Deferred::last`].
    Growing,
    /// The request is one part of a longer read, whose progress [`super::connection`] counts.
    Streamed,
}

/// A request that is over, and the data of a successful read.
pub(super) struct Ended {
    pub(super) cookie: u64,
    pub(super) offset: u64,
    /// Whether it is a part of a longer read.
    pub(super) streamed: bool,
    pub(super) command: Command,
    pub(super) length: u32,
    pub(super) result: Result<Option<Buffer>, IoError>,
}

struct Pending {
    cookie: u64,
    command: Command,
    offset: u64,
    length: u32,
    /// Its operations in flight.
    operations: u32,
    extent: Extent,
    result: Result<(), IoError>,
}

struct InFlight {
    request: u32,
    buffer: Option<Buffer>,
}

/// All requests and operations of one connection that are in flight.
pub(super) struct Deferred {
    pub(super) buffers: Option<Buffers>,
    requests: Slots<Pending>,
    operations: Slots<InFlight>,
    completions: Vec<Completion>,
    /// An operation for which the store had no room; it is posted before any other.
    refused: Option<Operation>,
    /// Whether an operation was posted since the last submit.
    posted: bool,
}

impl Deferred {
    pub(super) fn new(buffers_len: usize) -> io::Result<Deferred> {
        Ok(Deferred {
            buffers: (buffers_len > 0).then(|| Buffers::new(buffers_len)).transpose()?,
            requests: Slots::new(OPERATIONS_MAX),
            operations: Slots::new(OPERATIONS_MAX),
            completions: Vec::with_capacity(OPERATIONS_MAX),
            refused: None,
            posted: false,
        })
    }

    /// Requests that are not over.
    pub(super) fn in_flight(&self) -> usize {
        self.requests.used()
    }

    /// Whether another request can begin and post its first operation.
    pub(super) fn has_room(&self) -> bool {
        !self.requests.is_full() && self.has_part_room()
    }

    /// Whether another operation can be posted.
    pub(super) fn has_part_room(&self) -> bool {
        !self.operations.is_full() && self.refused.is_none()
    }

    /// The length of the longest buffer for a request of which `remaining` bytes are left.
    pub(super) fn part_len(&self, remaining: u32) -> usize {
        let longest = self.buffers.as_ref().map_or(PART_LEN_MAX, Buffers::run_len_max);
        (remaining as usize).min(PART_LEN_MAX).min(longest)
    }

    pub(super) fn take_buffer(&mut self, len: usize) -> Option<Buffer> {
        self.buffers.as_mut()?.take(len)
    }

    fn free_buffer(&mut self, (run, _): Buffer) {
        if let Some(buffers) = &mut self.buffers {
            buffers.free(run);
        }
    }

    /// Begins a request that is over when its operations are; the caller has checked that there is room.
    pub(super) fn begin(&mut self, request: &Request, extent: Extent) -> u32 {
        self.requests.insert(Pending {
            cookie: request.cookie,
            command: request.command,
            offset: request.offset,
            length: request.length,
            operations: 0,
            extent,
            result: Ok(()),
        })
    }

    /// Announces that the next operation of the request is its last.
    pub(super) fn last(&mut self, request: u32) {
        if let Some(pending) = self.requests.get_mut(request) {
            pending.extent = Extent::Whole;
        }
    }

    /// Posts an operation of a request; the caller has checked that there is room. Returns the request if it
    /// is over at once.
    pub(super) fn post(
        &mut self,
        store: &mut dyn Store,
        request: u32,
        (kind, offset, len): (Kind, u64, u64),
        buffer: Option<Buffer>,
    ) -> Option<Ended> {
        if let Some(pending) = self.requests.get_mut(request) {
            pending.operations += 1;
        }
        let token = u64::from(self.operations.insert(InFlight { request, buffer }));
        let buf = buffer.map(|(_, buf)| buf);
        self.give(store, Operation { kind, offset, len, buf, token })
    }

    /// Posts the operation for which the store had no room.
    pub(super) fn retry(&mut self, store: &mut dyn Store) -> Option<Ended> {
        let operation = self.refused.take()?;
        self.give(store, operation)
    }

    fn give(&mut self, store: &mut dyn Store, operation: Operation) -> Option<Ended> {
        self.posted = true;
        match store.post(operation) {
            Posted::Done(result) => self.end(Completion { token: operation.token, result }),
            Posted::Pending => None,
            Posted::Full => {
                self.refused = Some(operation);
                None
            }
        }
    }

    /// Sends the posted operations. Returns false when there were none.
    pub(super) fn submit(&mut self, store: &mut dyn Store) -> bool {
        let posted = std::mem::take(&mut self.posted);
        if posted {
            store.submit();
        }
        posted
    }

    /// Fetches completions for [`Deferred::next_ended`]. Returns true when there were any: a completion does
    /// not always end a request, but always frees room.
    pub(super) fn poll(&mut self, store: &mut dyn Store) -> bool {
        if self.operations.used() > 0 || store.wait_fd().is_some() {
            store.poll(&mut self.completions);
        }
        !self.completions.is_empty()
    }

    /// The next request that is over by the completions that [`Deferred::poll`] fetched.
    pub(super) fn next_ended(&mut self) -> Option<Ended> {
        while let Some(completion) = self.completions.pop() {
            if let Some(ended) = self.end(completion) {
                return Some(ended);
            }
        }
        None
    }

    fn end(&mut self, completion: Completion) -> Option<Ended> {
        let place = u32::try_from(completion.token).ok()?;
        let operation = self.operations.remove(place)?;
        let pending = self.requests.get_mut(operation.request)?;
        pending.operations -= 1;
        pending.result = pending.result.and(completion.result);
        let (over, result) = (pending.operations == 0 && pending.extent != Extent::Growing, pending.result);
        let data = match (pending.command, result) {
            (Command::Read, Ok(())) => operation.buffer,
            _ => {
                operation.buffer.into_iter().for_each(|buffer| self.free_buffer(buffer));
                None
            }
        };
        if !over {
            return None;
        }
        let Pending { cookie, command, offset, length, extent, .. } =
            self.requests.remove(operation.request)?;
        let streamed = extent == Extent::Streamed;
        Some(Ended { cookie, offset, streamed, command, length, result: result.map(|()| data) })
    }
}
