//! Copying what a grant holds into a grant of another appliance, and saying what a run of bytes holds.
//! The data goes from here to there by NBD, and through no client.
//!
//! An order is about some MiB, which its giver keeps unchanged meanwhile. Connections are kept for the
//! next order for a moment. Everything here blocks, on threads for it.

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

/// Bytes of one write.
const WRITE_LEN: u64 = 512 << 10;
/// Bytes that are looked at in one piece.
const LOOK_LEN: usize = 64 << 10;
/// Writes in flight.
const DEPTH: usize = 16;
/// Longest time that connecting may take, and that nothing is answered.
const LIMIT: Duration = Duration::from_secs(5);
/// How long a connection is kept for the next order.
const KEEP: Duration = Duration::from_secs(10);

/// Why an order was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// It asks for what cannot be.
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
    /// The kernel does not give the content of the memory.
    #[error("the memory cannot be read: {0}; look at the host's log")]
    Memory(Errno),
}

/// Carries copies out.
pub struct Copier {
    /// Connections to each target, by its key.
    targets: Mutex<HashMap<GrantKey, Lanes>>,
    session: u128,
    generations: std::sync::atomic::AtomicU32,
}

/// Copies into one target at a time. Each has a number, its *lane*: a connection that takes the place of a broken one on
/// a lane shuts that one out of the target, so that nothing of it arrives late.
#[derive(Default)]
struct Lanes {
    /// Those that have a connection, or an order, by bits.
    taken: u64,
    /// Connections that no order uses, by their lanes.
    idle: Vec<(u16, NbdLink, Instant)>,
}

impl Lanes {
    /// Connections that were kept for long enough go.
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
    /// One without connections.
    ///
    /// # Errors
    /// When the kernel gives no random number.
    pub fn new() -> io::Result<Copier> {
        Ok(Copier {
            targets: Mutex::default(),
            session: xpm_control::random::u128()?,
            generations: std::sync::atomic::AtomicU32::new(0),
        })
    }

    /// Writes what the range holds into the target, and says what that was. Blocks until the target has
    /// answered all of it.
    ///
    /// # Errors
    /// See [`CopyError`]; some of the range may have been written.
    pub fn copy(&self, lease: &Lease, order: &Copy) -> Result<Digest, CopyError> {
        check(lease, order.range)?;
        let (lane, kept) = self.take(&order.key)?;
        let copy = |mut link: NbdLink| copy_by(&mut link, lease, order).map(|digest| (digest, link));
        // One that was kept may have died since.
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

    /// A lane, and its connection if there is one.
    fn take(&self, key: &GrantKey) -> Result<(u16, Option<NbdLink>), CopyError> {
        let mut targets = self.targets();
        let lanes = targets.entry(key.clone()).or_default();
        lanes.prune();
        if let Some((lane, link, _)) = lanes.idle.pop() {
            return Ok((lane, Some(link)));
        }
        let lane = lanes.taken.trailing_ones();
        if lane == u64::BITS {
            let line = "too many copies into one grant at a time: wait for those under way";
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

/// Says what a run of a grant holds. Blocks for as long as it takes to look at it.
///
/// # Errors
/// When the range cannot be, or the grant is revoked meanwhile.
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

/// What was looked at so far.
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

    /// Looks at a run of bytes. Whether any of them is not zero.
    fn look(&mut self, lease: &Lease, offset: u64, len: u64) -> Result<bool, CopyError> {
        let before = self.data;
        let (mut offset, end) = (offset, offset + len);
        let mut local = std::mem::take(&mut self.local);
        while offset < end {
            let _step = lease.begin_step().ok_or(CopyError::Revoked)?;
            // No such piece lies in two regions, whose lengths are powers of two.
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
    /// When something was answered last.
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

    /// Takes answers, and waits for one if there is none.
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

/// Finds the lease that an order is about.
pub(crate) fn lease_of(table: &crate::regions::Table, id: GrantId) -> Result<Arc<Lease>, CopyError> {
    table.lease(id).ok_or_else(|| CopyError::Invalid(format!("there is no grant {id} here")))
}
