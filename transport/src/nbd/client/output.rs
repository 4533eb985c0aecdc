//! The client's send path: requests, and the data of writes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use xpm_protocol::nbd::REQUEST_LEN;

use super::parts::Parts;
use crate::io::{Completion, IoBuf};
use crate::nbd::socket::{Pieces, is_passing, send};

/// The parts that are to be sent, in order. The data of a write goes to the socket straight from the
/// operation's buffer.
#[derive(Debug)]
pub(super) struct Output {
    queue: VecDeque<u32>,
    /// Bytes of the first part that are sent already.
    sent: usize,
}

/// The state of the socket after a send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Free,
    Blocked,
}

impl Output {
    pub(super) fn new(depth: u32) -> Output {
        Output { queue: VecDeque::with_capacity(depth as usize), sent: 0 }
    }

    /// Whether no request is sent only in part.
    pub(super) fn is_between_requests(&self) -> bool {
        self.queue.is_empty()
    }

    /// Sends as much as the socket accepts, and appends the completions of the operations that end by it to
    /// `ended`.
    pub(super) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        parts: &mut Parts,
        ended: &mut Vec<Completion>,
    ) -> io::Result<Flow> {
        loop {
            while let Some(number) = parts.next() {
                self.queue.push_back(number);
            }
            if self.queue.is_empty() {
                return Ok(Flow::Free);
            }
            let mut pieces = Pieces::new();
            self.gather(parts, &mut pieces);
            let wanted = pieces.bytes();
            match send(socket, &pieces) {
                Ok(sent) => {
                    self.advance(sent, parts, ended);
                    if sent < wanted {
                        return Ok(Flow::Blocked);
                    }
                }
                Err(error) if is_passing(&error) => return Ok(Flow::Blocked),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn gather<'a>(&self, parts: &'a Parts, pieces: &mut Pieces<'a>) {
        let mut skip = self.sent;
        for number in &self.queue {
            if pieces.is_nearly_full() {
                break;
            }
            let (header, payload) = parts.to_send(*number);
            let from = skip.min(REQUEST_LEN);
            pieces.push_ref(&header[from..]);
            skip -= from;
            if let Some(payload) = payload {
                pieces.push(payload.part(skip, payload.len() - skip));
            }
            skip = 0;
        }
    }

    fn advance(&mut self, mut sent: usize, parts: &mut Parts, ended: &mut Vec<Completion>) {
        while let Some(number) = self.queue.front().copied() {
            let (header, payload) = parts.to_send(number);
            let rest = header.len() + payload.map_or(0, IoBuf::len) - self.sent;
            if sent < rest {
                self.sent += sent;
                return;
            }
            sent -= rest;
            self.sent = 0;
            self.queue.pop_front();
            ended.extend(parts.sent(number));
        }
    }
}
