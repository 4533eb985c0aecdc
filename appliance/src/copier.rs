//! Copying the content of a grant into a grant of another appliance, and describing the content of a range.
//! The data goes from this appliance to the other by NBD, and through no client.
//!
//! An order covers some MiB, which the client that orders it keeps unchanged meanwhile. Connections are kept
//! for a moment for the next order. All functions block, and run on threads of their own.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use xpm_protocol::api::appliance::{COPY_LEN_MAX, Copy, Digest, Range};
use xpm_protocol::nbd::{ExportName, SessionTag};
use xpm_protocol::units::{ByteSize, PAGE_LEN};
use xpm_protocol::{GrantId, GrantKey};
use xpm_transport::link::Link as _;
use xpm_transport::nbd::client::{ConnectError, NbdLink, connect_first};
use xpm_transport::{IoBuf, Kind, Operation};
use xxhash_rust::xxh3::Xxh3;

use crate::lease::Lease;

/// Length of one write in bytes.
const WRITE_LEN: u64 = 512 << 10;
/// Length of the pieces in which content is examined, in bytes.
const LOOK_LEN: usize = 64 << 10;
/// Writes in flight.
const DEPTH: usize = 16;
/// Time limit for connecting, and for waiting without any answer.
const LIMIT: Duration = Duration::from_secs(5);
/// How long an idle connection is kept for the next order.
const KEEP: Duration = Duration::from_secs(10);

/// Why an order failed.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The order is invalid.
    #[error("{0}")]
    Invalid(String),
    /// The grant was revoked meanwhile.
    #[error("the grant was revoked meanwhile")]
    Revoked,
    /// The target cannot be reached.
    #[error("cannot connect to the appliance that is copied to: {0}")]
    Connect(#[from] ConnectError),
    /// The connection to the target broke, or it refused a write.
    #[error("the appliance that is copied to did not take it: {0}")]
    Target(String),
    /// The kernel could not read the memory.
    #[error("the memory cannot be read: {0}; look at the host's log")]
    Memory(Errno),
}

/// Executes copy orders.
pub struct Copier {
    /// Lanes of each target, by the key of the target's grant.
    targets: Mutex<HashMap<GrantKey, Lanes>>,
    session: u128,
    generations: std::sync::atomic::AtomicU32,
}

/// The concurrent copies into one target. Each has a number, its *lane*: a new connection on a lane replaces
/// a broken one, which the target then closes, so that no request of the broken one arrives late.
#[derive(Default)]
struct Lanes {
    /// Lanes with a connection or an order, as bits.
    taken: u64,
    /// Connections that no order uses, by their lanes.
    idle: Vec<(u16, NbdLink, Instant)>,
}

impl Lanes {
    /// Closes connections that were idle for too long.
    fn prune(&mut self) {
        let taken = &mut self.taken;
        self.idle.retain(|(lane, _, since)| {
            let stays = since.elapsed() < KEEP;
            *taken &= !(u64::from(!stays) << *lane);
            stays
        });
    }
}

impl Copier {
    /// A copier without connections.
    ///
    /// # Errors
    /// When the kernel provides no random number.
    pub fn new() -> io::Result<Copier> {
        Ok(Copier {
            targets: Mutex::default(),
            session: xpm_control::random::u128()?,
            generations: std::sync::atomic::AtomicU32::new(0),
        })
    }

    /// Writes the content of the range into the target, and returns its digest. Blocks until the target has
    /// answered all writes.
    ///
    /// # Errors
    /// See [`CopyError`]; some of the range may have been written.
    pub fn copy(&self, lease: &Lease, order: &Copy) -> Result<Digest, CopyError> {
        check(lease, order.range)?;
        let (lane, kept) = self.take(&order.key)?;
        let copy = |mut link: NbdLink| copy_by(&mut link, lease, order).map(|digest| (digest, link));
        // A kept connection may have broken meanwhile.
        let copied = match kept.map(copy) {
            Some(Err(CopyError::Target(_))) | None => self.connect(order, lane).and_then(copy),
            Some(copied) => copied,
        };
        let (copied, link) = match copied {
            Ok((digest, link)) => (Ok(digest), Some(link)),
            Err(error) => (Err(error), None),
        };
        self.give_back(&order.key, lane, link);
        copied
    }

    /// Takes a lane, with its connection if there is one.
    fn take(&self, key: &GrantKey) -> Result<(u16, Option<NbdLink>), CopyError> {
        let mut targets = self.targets();
        let lanes = targets.entry(key.clone()).or_default();
        lanes.prune();
        if let Some((lane, link, _)) = lanes.idle.pop() {
            return Ok((lane, Some(link)));
        }
        let lane = lanes.taken.trailing_ones();
        if lane == u64::BITS {
            let line = "too many concurrent copies into one grant: wait for the present ones to end";
            return Err(CopyError::Invalid(line.to_owned()));
        }
        lanes.taken |= 1 << lane;
        Ok((lane as u16, None))
    }

    fn give_back(&self, key: &GrantKey, lane: u16, link: Option<NbdLink>) {
        let mut targets = self.targets();
        let lanes = targets.entry(key.clone()).or_default();
        match link {
            Some(link) => lanes.idle.push((lane, link, Instant::now())),
            None => lanes.taken &= !(1 << lane),
        }
        targets.retain(|_, lanes| {
            lanes.prune();
            lanes.taken != 0
        });
    }

    fn connect(&self, order: &Copy, lane: u16) -> Result<NbdLink, CopyError> {
        let name = || {
            let generation = self.generations.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let session = Some(SessionTag { id: self.session, queue: u16::MAX - lane, generation });
            ExportName { key: order.key.clone(), session }
        };
        let connected = connect_first(&order.nbd, name, None, LIMIT)?;
        Ok(NbdLink::new(connected, DEPTH).map_err(ConnectError::Unreachable)?)
    }

    fn targets(&self) -> std::sync::MutexGuard<'_, HashMap<GrantKey, Lanes>> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn copy_by(link: &mut NbdLink, lease: &Lease, order: &Copy) -> Result<Digest, CopyError> {
    let mut digest = Digesting::new();
    let mut writes = Writes { link, open: 0, told: Instant::now() };
    let (mut offset, end) = (order.range.offset, order.range.offset + order.range.len);
    while offset < end {
        let len = WRITE_LEN.min(end - offset);
        if digest.look(lease, offset, len)? {
            writes.write(lease, offset, len, order.to + (offset - order.range.offset))?;
        }
        offset += len;
    }
    writes.end()?;
    Ok(digest.end())
}

/// The digest of a range of a grant. Blocks while the range is read.
///
/// # Errors
/// When the range is invalid, or the grant is revoked meanwhile.
pub fn digest(lease: &Lease, range: Range) -> Result<Digest, CopyError> {
    check(lease, range)?;
    let mut digest = Digesting::new();
    digest.look(lease, range.offset, range.len)?;
    Ok(digest.end())
}

fn check(lease: &Lease, range: Range) -> Result<(), CopyError> {
    let end = range.offset.checked_add(range.len).filter(|end| *end <= lease.len());
    if range.len == 0 || range.len > COPY_LEN_MAX || end.is_none() {
        let line = format!(
            "a range is 1 to {COPY_LEN_MAX} bytes within the {} bytes of grant {}",
            lease.len(),
            lease.grant()
        );
        return Err(CopyError::Invalid(line));
    }
    Ok(())
}

/// The state of a digest in progress.
struct Digesting {
    hash: Xxh3,
    data: u64,
    last: Option<u64>,
    local: Vec<u8>,
}

impl Digesting {
    fn new() -> Digesting {
        Digesting { hash: Xxh3::new(), data: 0, last: None, local: vec![0; LOOK_LEN] }
    }

    /// Adds a range to the digest. Returns whether any of its bytes is not zero.
    fn look(&mut self, lease: &Lease, offset: u64, len: u64) -> Result<bool, CopyError> {
        let before = self.data;
        let (mut offset, end) = (offset, offset + len);
        let mut local = std::mem::take(&mut self.local);
        while offset < end {
            let _step = lease.begin_step().ok_or(CopyError::Revoked)?;
            // Such a piece never spans two regions, because their lengths are powers of two.
            let within = LOOK_LEN - offset as usize % LOOK_LEN;
            let bytes = &mut local[..within.min((end - offset) as usize)];
            if !lease.is_sound(false, offset, bytes.len() as u64) {
                return Err(CopyError::Memory(Errno::IO));
            }
            lease.read(offset, bytes).map_err(CopyError::Memory)?;
            self.hash.update(bytes);
            self.count(offset, bytes);
            offset += bytes.len() as u64;
        }
        self.local = local;
        Ok(self.data > before)
    }

    fn count(&mut self, mut offset: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let page = bytes.len().min((PAGE_LEN - offset % PAGE_LEN) as usize);
            let (first, rest) = bytes.split_at(page);
            if first.iter().fold(0, |all, byte| all | byte) != 0 {
                self.data += page as u64;
                self.last = Some(offset - offset % PAGE_LEN);
            }
            (offset, bytes) = (offset + page as u64, rest);
        }
    }

    fn end(self) -> Digest {
        Digest { xxh3: format!("{:032x}", self.hash.digest128()), data: ByteSize(self.data), last: self.last }
    }
}

/// Writes in flight to the target.
struct Writes<'a> {
    link: &'a mut NbdLink,
    open: usize,
    /// Time of the last answer.
    told: Instant,
}

impl Writes<'_> {
    fn write(&mut self, lease: &Lease, offset: u64, len: u64, to: u64) -> Result<(), CopyError> {
        let (mut offset, mut to, end) = (offset, to, offset + len);
        while offset < end {
            let buf = lease.at(offset, (end - offset) as usize).ok_or(CopyError::Revoked)?;
            self.post(to, buf)?;
            (offset, to) = (offset + buf.len() as u64, to + buf.len() as u64);
        }
        self.link.submit();
        self.turn(Duration::ZERO)
    }

    fn post(&mut self, to: u64, buf: IoBuf) -> Result<(), CopyError> {
        while self.open >= DEPTH {
            self.turn(LIMIT)?;
        }
        let operation =
            Operation { kind: Kind::Write, offset: to, len: buf.len() as u64, buf: Some(buf), token: 0 };
        self.link.post(operation).map_err(|error| CopyError::Target(error.to_string()))?;
        self.open += 1;
        Ok(())
    }

    /// Handles answers, and waits for one if there is none.
    fn turn(&mut self, patience: Duration) -> Result<(), CopyError> {
        let target = |line: String| CopyError::Target(line);
        let mut completions = Vec::with_capacity(DEPTH);
        self.link.poll(&mut completions).map_err(|error| target(error.to_string()))?;
        for completion in &completions {
            completion.result.map_err(|error| target(error.to_string()))?;
        }
        self.open -= completions.len();
        if !completions.is_empty() || self.open == 0 {
            self.told = Instant::now();
            return Ok(());
        }
        if patience.is_zero() {
            return Ok(());
        }
        if self.told.elapsed() >= LIMIT {
            return Err(target(format!("no answer for {LIMIT:?}")));
        }
        if let Some(fd) = self.link.wait_fd() {
            let wait = Timespec { tv_sec: 1, tv_nsec: 0 };
            let _ = poll(&mut [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)], Some(&wait));
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), CopyError> {
        self.link.submit();
        while self.open > 0 {
            self.turn(LIMIT)?;
        }
        Ok(())
    }
}

/// Finds the lease that an order refers to.
pub(crate) fn lease_of(table: &crate::regions::Table, id: GrantId) -> Result<Arc<Lease>, CopyError> {
    table.lease(id).ok_or_else(|| CopyError::Invalid(format!("there is no grant {id} here")))
}
