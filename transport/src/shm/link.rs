//! A grant's memory as a [`Link`].

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use super::client::ShmGrant;
use crate::io::{Completion, IoBuf, IoError, Kind, Operation};
use crate::link::{Full, Link, LinkDown};
use crate::sound::BadMemory;

/// Polls between two checks for revocation on a busy link; an idle link checks at each poll.
const LOOK_EVERY: u32 = 256;

/// A [`Link`] to memory of the same host. Every operation is done when [`Link::post`] returns, at the speed
/// of memory, and the next [`Link::poll`] returns its completion.
///
/// The wait descriptor becomes readable only when the grant was revoked, never for completions: these exist
/// before a caller can begin to wait.
#[derive(Debug)]
pub struct ShmLink {
    grant: Arc<ShmGrant>,
    ended: Vec<Completion>,
    depth: usize,
    /// Polls since the connection was last checked.
    polls: u32,
    revoked: bool,
}

impl ShmLink {
    /// A link that holds up to `depth` completions (at least 1).
    pub fn new(grant: Arc<ShmGrant>, depth: usize) -> ShmLink {
        let depth = depth.max(1);
        ShmLink { grant, ended: Vec::with_capacity(depth), depth, polls: 0, revoked: false }
    }

    /// The grant whose memory this link accesses.
    pub const fn grant(&self) -> &Arc<ShmGrant> {
        &self.grant
    }

    fn run(&self, operation: &Operation) -> Result<(), IoError> {
        if operation.kind == Kind::Flush {
            return Ok(());
        }
        let part = self.grant.part(operation.offset, operation.len).ok_or(IoError::Invalid)?;
        match operation.kind {
            Kind::Read => part.try_copy_to(buffer(operation)?),
            Kind::Write => buffer(operation)?.try_copy_to(part),
            Kind::Trim => self.grant.trim(part),
            Kind::Zero | Kind::Flush => part.try_zero(),
        }
        .map_err(|BadMemory| IoError::BadMemory)
    }

    fn look(&mut self) {
        self.polls += 1;
        if self.ended.is_empty() || self.polls >= LOOK_EVERY {
            self.polls = 0;
            self.revoked = self.grant.is_revoked();
        }
    }
}

fn buffer(operation: &Operation) -> Result<IoBuf, IoError> {
    operation.buf.filter(|buf| buf.len() as u64 == operation.len).ok_or(IoError::Invalid)
}

impl Link for ShmLink {
    fn post(&mut self, operation: Operation) -> Result<(), Full> {
        if self.ended.len() >= self.depth {
            return Err(Full);
        }
        // After the link went down, the memory may belong to another client.
        if !self.revoked {
            let result = self.run(&operation);
            self.ended.push(Completion { token: operation.token, result });
        }
        Ok(())
    }

    fn submit(&mut self) {}

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LinkDown> {
        if !self.revoked {
            self.look();
        }
        completions.append(&mut self.ended);
        if self.revoked { Err(LinkDown::Revoked) } else { Ok(()) }
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.grant.wait_fd())
    }

    fn direct(&self, offset: u64, len: usize) -> Option<NonNull<u8>> {
        self.grant.direct(offset, len)
    }
}
