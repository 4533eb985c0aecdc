//! The client's receive path: replies, and the data of reads.

use std::io;
use std::os::fd::BorrowedFd;

use xpm_protocol::nbd::{ReplyHeader, SimpleReply};

use super::parts::Parts;
use crate::io::{Completion, IoBuf, IoError};
use crate::link::LinkDown;
use crate::nbd::socket::{Pieces, receive};

/// Length of the receive buffer in bytes: the replies of a deep queue of small reads arrive in one call. Of a
/// long read at most this much is copied; the rest is received straight into the operation's buffer.
const INPUT_LEN: usize = 64 << 10;

/// The data of a read that is being received.
#[derive(Debug, Clone, Copy)]
struct Payload {
    part: u32,
    /// The part of the operation's buffer that is not filled yet.
    rest: IoBuf,
}

/// Received bytes that are not processed yet: bytes `start..end` of the buffer. They belong to `payload`
/// first, if there is one.
#[derive(Debug)]
pub(super) struct Input {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    payload: Option<Payload>,
}

impl Input {
    pub(super) fn new() -> Input {
        Input { buffer: vec![0; INPUT_LEN].into_boxed_slice(), start: 0, end: 0, payload: None }
    }

    /// Receives the available bytes, and appends the completions of the operations that end by them to
    /// `ended`.
    pub(super) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        parts: &mut Parts,
        ended: &mut Vec<Completion>,
    ) -> Result<(), LinkDown> {
        loop {
            let (wanted, received) = match self.fill(socket) {
                Ok((_, 0)) => return Err(LinkDown::Broken),
                Ok(counts) => counts,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(()),
                    io::ErrorKind::Interrupted => continue,
                    _ => return Err(LinkDown::Broken),
                },
            };
            self.digest(parts, ended)?;
            // The call filled less than the room: the socket is empty.
            if received < wanted {
                return Ok(());
            }
        }
    }

    /// Makes one receive call: the rest of the payload goes straight to its destination, the bytes behind it
    /// into the buffer. Returns the bytes asked for and the bytes received.
    fn fill(&mut self, socket: BorrowedFd<'_>) -> io::Result<(usize, usize)> {
        let mut pieces = Pieces::new();
        if let Some(payload) = &self.payload {
            pieces.push(payload.rest);
        }
        pieces.push_mut(&mut self.buffer[self.end..]);
        let wanted = pieces.bytes();
        let received = receive(socket, &mut pieces)?;
        let mut behind = received;
        if let Some(payload) = &mut self.payload {
            let direct = received.min(payload.rest.len());
            payload.rest = payload.rest.part(direct, payload.rest.len() - direct);
            behind -= direct;
        }
        self.end += behind;
        Ok((wanted, received))
    }

    /// Processes the received bytes until the buffer holds only a part of a header, or nothing.
    fn digest(&mut self, parts: &mut Parts, ended: &mut Vec<Completion>) -> Result<(), LinkDown> {
        loop {
            if let Some(payload) = self.payload {
                match self.copy(payload.rest) {
                    rest if rest.is_empty() => {
                        self.payload = None;
                        ended.extend(parts.done(payload.part));
                    }
                    rest => {
                        self.payload = Some(Payload { rest, ..payload });
                        break;
                    }
                }
            }
            match ReplyHeader::decode(&self.buffer[self.start..self.end]) {
                Ok(None) => break,
                Ok(Some((ReplyHeader::Simple(reply), len))) => {
                    self.start += len;
                    self.reply(reply, parts, ended).map_err(|_| LinkDown::Protocol)?;
                }
                Ok(Some((ReplyHeader::Chunk(_), _))) | Err(_) => return Err(LinkDown::Protocol),
            }
        }
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        Ok(())
    }

    fn reply(
        &mut self,
        reply: SimpleReply,
        parts: &mut Parts,
        ended: &mut Vec<Completion>,
    ) -> Result<(), super::parts::Unasked> {
        if let Some(errno) = reply.error {
            ended.extend(parts.refused(reply.cookie, IoError::from_nbd(errno))?);
            return Ok(());
        }
        match parts.data_of(reply.cookie)? {
            (part, Some(rest)) => self.payload = Some(Payload { part, rest }),
            (part, None) => ended.extend(parts.done(part)),
        }
        Ok(())
    }

    /// Copies as much of a payload as is in the buffer; returns the unfilled rest of `target`.
    fn copy(&mut self, target: IoBuf) -> IoBuf {
        let count = target.len().min(self.end - self.start);
        target.part(0, count).copy_from_slice(&self.buffer[self.start..self.start + count]);
        self.start += count;
        target.part(count, target.len() - count)
    }
}
