//! The operations in flight, and the requests (parts) that they are split into.
//!
//! Both tables have as many slots as the link's depth and never grow. Most operations consist of one part; a
//! long operation takes part slots as they become free, in the order of posting. A request's cookie contains
//! its slot and the slot's generation, which changes with each use: so a reply is detected as invalid when
//! its cookie was never sent or was answered before.

use std::collections::VecDeque;

use xpm_protocol::nbd::{REQUEST_LEN, Request};

use super::plan::Plan;
use crate::io::{Completion, IoBuf, IoError, Kind, Operation};
use crate::slots::Slots;

/// The data of a request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Data {
    None,
    /// Follows the request.
    Send(IoBuf),
    /// Follows the reply, unless the reply is an error.
    Receive(IoBuf),
}

/// A request.
struct Part {
    generation: u32,
    busy: bool,
    /// The kernel has accepted all of its bytes.
    sent: bool,
    /// The server refused the request before all of it was sent.
    refused: Option<IoError>,
    operation: u32,
    header: [u8; REQUEST_LEN],
    data: Data,
}

/// An operation.
struct Owner {
    operation: Operation,
    plan: Plan,
    /// Bytes for which parts exist already.
    planned: u64,
    /// All parts have been created.
    complete: bool,
    /// Parts that were created and not answered yet.
    open: u32,
    error: Option<IoError>,
}

/// A reply that answers no request in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unasked;

/// The tables of a link.
pub(super) struct Parts {
    owners: Slots<Owner>,
    parts: Vec<Part>,
    parts_free: Vec<u32>,
    /// Operations that need more parts.
    waiting: VecDeque<u32>,
}

impl Parts {
    pub(super) fn new(depth: u32) -> Parts {
        let part = |_| Part {
            generation: 0,
            busy: false,
            sent: false,
            refused: None,
            operation: 0,
            header: [0; REQUEST_LEN],
            data: Data::None,
        };
        Parts {
            owners: Slots::new(depth as usize),
            parts: (0..depth).map(part).collect(),
            parts_free: (0..depth).rev().collect(),
            waiting: VecDeque::with_capacity(depth as usize),
        }
    }

    /// Operations in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.owners.used()
    }

    /// Takes an operation.
    ///
    /// # Panics
    /// When the number of operations in flight equals the depth; the caller checks this first.
    pub(super) fn add(&mut self, operation: Operation, plan: Plan) {
        let owner = Owner { operation, plan, planned: 0, complete: false, open: 0, error: None };
        let slot = self.owners.insert(owner);
        self.waiting.push_back(slot);
    }

    /// Creates the next part, if an operation needs one and a slot is free.
    pub(super) fn next(&mut self) -> Option<u32> {
        let slot = *self.waiting.front()?;
        let number = self.parts_free.pop()?;
        let owner = self.owners.get_mut(slot).expect("a waiting operation is in flight");
        let part = &mut self.parts[number as usize];
        part.generation = part.generation.wrapping_add(1);
        (part.busy, part.sent, part.refused, part.operation) = (true, false, None, slot);
        let cookie = u64::from(part.generation) << 32 | u64::from(number);
        part.data = owner.cut(cookie, &mut part.header);
        if owner.complete {
            self.waiting.pop_front();
        }
        Some(number)
    }

    /// The header of a part, and the data that is sent behind it.
    pub(super) fn to_send(&self, number: u32) -> (&[u8; REQUEST_LEN], Option<IoBuf>) {
        let part = &self.parts[number as usize];
        match part.data {
            Data::Send(buf) => (&part.header, Some(buf)),
            Data::None | Data::Receive(_) => (&part.header, None),
        }
    }

    /// Records that all of a part was sent. The server may have refused the part already; then the part ends
    /// now.
    pub(super) fn sent(&mut self, number: u32) -> Option<Completion> {
        let part = &mut self.parts[number as usize];
        part.sent = true;
        match part.refused {
            Some(error) => self.end(number, Some(error)),
            None => None,
        }
    }

    /// The part that a successful reply answers, and the destination of its data.
    pub(super) fn data_of(&self, cookie: u64) -> Result<(u32, Option<IoBuf>), Unasked> {
        let number = self.find(cookie)?;
        let part = &self.parts[number as usize];
        match part.data {
            _ if !part.sent => Err(Unasked),
            Data::Receive(buf) => Ok((number, Some(buf))),
            Data::None | Data::Send(_) => Ok((number, None)),
        }
    }

    /// Handles a reply with an error. A server may refuse a write before all of its bytes are sent: the
    /// buffer is needed until they are sent, so the write ends then.
    pub(super) fn refused(&mut self, cookie: u64, error: IoError) -> Result<Option<Completion>, Unasked> {
        let number = self.find(cookie)?;
        let part = &mut self.parts[number as usize];
        match part.data {
            _ if part.sent => Ok(self.end(number, Some(error))),
            Data::Send(_) if part.refused.is_none() => {
                part.refused = Some(error);
                Ok(None)
            }
            _ => Err(Unasked),
        }
    }

    /// Records that a part was answered, with all of its data.
    pub(super) fn done(&mut self, number: u32) -> Option<Completion> {
        self.end(number, None)
    }

    fn find(&self, cookie: u64) -> Result<u32, Unasked> {
        let number = cookie as u32;
        let part = self.parts.get(number as usize).ok_or(Unasked)?;
        let same = part.busy && u64::from(part.generation) == cookie >> 32;
        if same { Ok(number) } else { Err(Unasked) }
    }

    fn end(&mut self, number: u32, error: Option<IoError>) -> Option<Completion> {
        let part = &mut self.parts[number as usize];
        part.busy = false;
        let slot = part.operation;
        self.parts_free.push(number);
        let owner = self.owners.get_mut(slot).expect("a part's operation is in flight");
        owner.open -= 1;
        owner.error = owner.error.or(error);
        if owner.error.is_some() && !owner.complete {
            // No further parts are created. Only the first operation in `waiting` can have some of its parts
            // and not all.
            owner.complete = true;
            let first = self.waiting.pop_front();
            debug_assert_eq!(first, Some(slot), "parts are made for the first in line");
        }
        if owner.open > 0 || !owner.complete {
            return None;
        }
        let completion = Completion { token: owner.operation.token, result: owner.error.map_or(Ok(()), Err) };
        self.owners.remove(slot);
        Some(completion)
    }
}

impl Owner {
    /// Cuts the next part off: writes its header and returns its data.
    fn cut(&mut self, cookie: u64, header: &mut [u8; REQUEST_LEN]) -> Data {
        let Operation { kind, offset, len, buf, .. } = self.operation;
        let (offset, length) = match kind {
            Kind::Flush => (0, 0),
            _ => (offset + self.planned, (len - self.planned).min(self.plan.step)),
        };
        let part = buf.map(|buf| buf.part(self.planned as usize, length as usize));
        Request {
            flags: self.plan.flags,
            command: self.plan.command,
            cookie,
            offset,
            length: u32::try_from(length).expect("a step fits 32 bits"),
        }
        .encode(header);
        self.planned += length;
        self.complete = kind == Kind::Flush || self.planned == len;
        self.open += 1;
        match (kind, part) {
            (Kind::Read, Some(buf)) => Data::Receive(buf),
            (Kind::Write, Some(buf)) => Data::Send(buf),
            _ => Data::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use xpm_protocol::nbd::{Command, CommandFlags};

    use super::*;

    const PLAN: Plan = Plan { command: Command::Trim, flags: CommandFlags::NONE, step: 10 };

    fn add(parts: &mut Parts, len: u64, token: u64) {
        parts.add(Operation { kind: Kind::Trim, offset: 0, len, buf: None, token }, PLAN);
    }

    fn cookie(parts: &Parts, number: u32) -> u64 {
        Request::decode(parts.to_send(number).0).unwrap().cookie
    }

    #[test]
    fn a_long_operation_completes_once_and_does_not_block_others() {
        let mut parts = Parts::new(2);
        add(&mut parts, 25, 7);
        add(&mut parts, 5, 8);
        let (a, b) = (parts.next().unwrap(), parts.next().unwrap());
        assert_eq!(parts.next(), None, "both slots are taken");
        parts.sent(a);
        parts.sent(b);
        assert_eq!(parts.done(a), None);
        let c = parts.next().unwrap();
        assert_eq!(Request::decode(parts.to_send(c).0).unwrap().length, 5);
        parts.sent(c);
        assert_eq!(parts.done(c), None);
        let d = parts.next().unwrap();
        parts.sent(d);
        assert_eq!(parts.done(d), Some(Completion { token: 8, result: Ok(()) }));
        assert_eq!(parts.done(b), Some(Completion { token: 7, result: Ok(()) }));
        assert_eq!(parts.in_flight(), 0);
    }

    #[test]
    fn a_failed_part_ends_its_operation_after_those_in_flight() {
        let mut parts = Parts::new(2);
        add(&mut parts, 1000, 7);
        add(&mut parts, 5, 8);
        let (a, b) = (parts.next().unwrap(), parts.next().unwrap());
        parts.sent(a);
        parts.sent(b);
        assert_eq!(parts.refused(cookie(&parts, a), IoError::NoSpace), Ok(None));
        let failed = Completion { token: 7, result: Err(IoError::NoSpace) };
        assert_eq!(parts.refused(cookie(&parts, b), IoError::Failed), Ok(Some(failed)));
        let c = parts.next().unwrap();
        parts.sent(c);
        assert_eq!(parts.done(c), Some(Completion { token: 8, result: Ok(()) }));
        assert_eq!(parts.next(), None);
    }

    #[test]
    fn invalid_cookies_are_detected() {
        let mut parts = Parts::new(2);
        assert_eq!(parts.data_of(0), Err(Unasked));
        add(&mut parts, 5, 7);
        let number = parts.next().unwrap();
        let sent = cookie(&parts, number);
        assert_eq!(parts.data_of(sent), Err(Unasked), "not sent yet");
        assert_eq!(parts.refused(sent, IoError::Failed), Err(Unasked), "not sent yet");
        parts.sent(number);
        assert_eq!(parts.data_of(sent), Ok((number, None)));
        for bogus in [sent ^ 1, sent + (1 << 32), u64::MAX, sent | 0xffff] {
            assert_eq!(parts.data_of(bogus), Err(Unasked));
        }
        parts.done(number);
        assert_eq!(parts.data_of(sent), Err(Unasked), "answered before");
        add(&mut parts, 5, 7);
        parts.next();
        assert_eq!(parts.data_of(sent), Err(Unasked), "answered before, and the slot is in use again");
    }
}
