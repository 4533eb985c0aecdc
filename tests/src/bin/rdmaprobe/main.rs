//! A client of its own kind: uses the RDMA links of allocations directly, to measure them, and to do what
//! an honest client never does. It finds the allocator in `XPM_ALLOCATOR`.
//!
//! The status is 0 when all was as it must be; else a line says what was not.

#![allow(unsafe_code)]

mod mapped;

use std::io::ErrorKind;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use rustix::event::{PollFd, PollFlags, poll};
use xpm_client_core::{Volume, VolumeOptions};
use xpm_control::client::Client;
use xpm_protocol::api::allocator::{Attach, Grant, Map};
use xpm_protocol::api::blk::{Hold, LinkState, TransportKind};
use xpm_protocol::nbd::{ExportName, SessionTag};
use xpm_protocol::{ClientId, HostId};
use xpm_transport::nbd::client::{NbdLink, Target as NbdTarget};
use xpm_transport::rdma::client::{ConnectError, RdmaLink, Target, connect};
use xpm_transport::{IoBuf, Kind, Link, LinkDown, Operation};

const LIMIT: Duration = Duration::from_secs(10);
/// The memory that tests of fencing write and read.
const AREA: usize = 1 << 20;

/// Probes the RDMA links of allocations.
#[derive(Parser)]
enum Cli {
    /// A client whose allocation was taken goes on: it must be refused, and no byte of it may land.
    Fence { name: String },
    /// A client uses the keys of another allocation on its own connection: it must be refused.
    Foreign { own: String, other: String },
    /// Times accesses of an allocation.
    Latency {
        name: String,
        /// READ or WRITE.
        #[arg(long, value_enum)]
        op: Direction,
        /// Bytes of one access.
        #[arg(long, default_value_t = 4096)]
        len: usize,
        /// How ends are waited for.
        #[arg(long, value_enum)]
        mode: Mode,
        /// Accesses.
        #[arg(long, default_value_t = 2000)]
        count: usize,
        /// Accesses in flight.
        #[arg(long, default_value_t = 1)]
        depth: usize,
    },
    /// Times how long it takes until all of an allocation can be used.
    Attach { name: String },
    /// Maps 16 MiB of an allocation, and checks that pages and calls over RDMA hold what was written.
    Mapped { name: String },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Direction {
    Read,
    Write,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Spin,
    Event,
}

fn main() -> Result<()> {
    match Cli::parse() {
        Cli::Fence { name } => fence(&name),
        Cli::Foreign { own, other } => foreign(&own, &other),
        Cli::Latency { name, op, len, mode, count, depth } => latency(&name, op, len, mode, count, depth),
        Cli::Attach { name } => attach(&name),
        Cli::Mapped { name } => mapped::run(&url()?, &name),
    }
}

fn fence(name: &str) -> Result<()> {
    let map = take(name, ClientId::from_u128(1), false)?;
    let mut old = Probe::new(&map, &map.grants[0], 1)?;
    old.fill(0x11)?;
    old.expect(0x11)?;
    let map = take(name, ClientId::from_u128(2), true)?;
    let end = old.write(0x33);
    ensure!(
        end == Err(LinkDown::Revoked),
        "the old owner's write ended with {end:?}, not with a refused access"
    );
    let mut new = Probe::new(&map, &map.grants[0], 2)?;
    new.expect(0x11).context("after a write of the old owner")?;
    new.fill(0x22)?;
    ensure!(old.write(0x33).is_err(), "the old owner's second write ended well");
    new.expect(0x22)?;
    release(name, ClientId::from_u128(2))
}

fn foreign(own: &str, other: &str) -> Result<()> {
    let (own_map, other_map) =
        (take(own, ClientId::from_u128(1), false)?, take(other, ClientId::from_u128(1), false)?);
    let pair = own_map.grants.iter().find_map(|grant| {
        other_map.grants.iter().find(|other| other.appliance == grant.appliance).map(|other| (grant, other))
    });
    let (own_grant, other_grant) = pair.context("the two allocations have no appliance in common")?;
    let mut victim = Probe::new(&other_map, other_grant, 1)?;
    victim.fill(0x44)?;
    let mut probe = Probe::new(&own_map, own_grant, 1)?;
    probe.fill(0x55)?;
    probe.link.replace_table(victim.link.table().clone());
    let end = probe.write(0x66);
    ensure!(
        end == Err(LinkDown::Revoked),
        "the write with foreign keys ended with {end:?}, not with a refused access"
    );
    victim.expect(0x44)?;
    release(own, ClientId::from_u128(1))?;
    release(other, ClientId::from_u128(1))
}

fn latency(name: &str, op: Direction, len: usize, mode: Mode, count: usize, depth: usize) -> Result<()> {
    ensure!(count > 0 && depth > 0 && len > 0 && len <= AREA / depth, "count, depth or len is out of range");
    let map = take(name, ClientId::from_u128(1), false)?;
    let mut probe = Probe::new(&map, &map.grants[0], 1)?;
    let kind = if op == Direction::Read { Kind::Read } else { Kind::Write };
    // Not counted: the first accesses find caches and page tables cold.
    probe.time(kind, len, mode, count.min(100), depth)?;
    let (mut times, all) = probe.time(kind, len, mode, count, depth)?;
    times.sort_unstable();
    let micros = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e6;
    let iops = count as f64 / all.as_secs_f64();
    println!("p50_us={:.1} p99_us={:.1} iops={iops:.0}", micros(50), micros(99));
    release(name, ClientId::from_u128(1))
}

fn attach(name: &str) -> Result<()> {
    let map = take(name, ClientId::from_u128(1), false)?;
    // A change of owner has the memory registered anew, which is not what is timed.
    for (session, grant) in (1..).zip(&map.grants) {
        link(&map, grant, session)?;
    }
    // The first finds libraries and devices, which a daemon did when it started.
    open(&map, 1)?;
    let (volume, time) = open(&map, 2)?;
    println!("attach_ms={:.2}", time.as_secs_f64() * 1e3);
    drop(volume);
    release(name, ClientId::from_u128(1))
}

/// Opens all of an allocation, and how long that took until the last link was up.
fn open(map: &Map, session: u128) -> Result<(Volume, Duration)> {
    let options = VolumeOptions {
        refusal_limit: xpm_client_core::volume::REFUSAL_LIMIT,
        visitor: None,
        held: None,
        contested: false,
        hold: Hold::Forever,
        transport: Some(TransportKind::Rdma),
        forbidden: Vec::new(),
        connect_limit: LIMIT,
        depth: 128,
        session: u128::from(std::process::id()) << 64 | session,
        generation: 0,
        host: None,
    };
    let start = Instant::now();
    let volume = Volume::open(map, options)?;
    while volume.status().links.iter().any(|link| link.state != LinkState::Up) {
        ensure!(start.elapsed() < LIMIT, "not connected: {:?}", volume.status().links);
        // Others need the processor for it.
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok((volume, start.elapsed()))
}

/// One link, and memory registered with it.
struct Probe {
    link: RdmaLink,
    buffer: IoBuf,
}

impl Probe {
    fn new(map: &Map, grant: &Grant, session: u64) -> Result<Probe> {
        let mut link = link(map, grant, session)?;
        let memory = Box::leak(vec![0_u8; AREA].into_boxed_slice());
        let start = NonNull::new(memory.as_mut_ptr()).context("no memory")?;
        // SAFETY: the memory is leaked, so it stays for ever, and no reference to it is kept.
        let buffer = unsafe { IoBuf::new(start, AREA) };
        link.register(buffer);
        Ok(Probe { link, buffer })
    }

    /// Writes a byte all over the area.
    fn fill(&mut self, byte: u8) -> Result<()> {
        Ok(self.write(byte)?)
    }

    fn write(&mut self, byte: u8) -> Result<(), LinkDown> {
        self.buffer.copy_from_slice(&vec![byte; AREA]);
        self.run(Kind::Write)
    }

    /// Every byte of the area must be this one.
    fn expect(&mut self, byte: u8) -> Result<()> {
        self.buffer.zero();
        self.run(Kind::Read)?;
        let mut found = vec![0; AREA];
        self.buffer.copy_to_slice(&mut found);
        match found.iter().position(|found| *found != byte) {
            None => Ok(()),
            Some(place) => bail!("byte {place} is {:#x}, not {byte:#x}", found[place]),
        }
    }

    /// One operation on the whole area.
    fn run(&mut self, kind: Kind) -> Result<(), LinkDown> {
        let operation = Operation { kind, offset: 0, len: AREA as u64, buf: Some(self.buffer), token: 0 };
        let start = Instant::now();
        let mut ended = Vec::with_capacity(1);
        if self.link.post(operation).is_err() {
            return Err(LinkDown::Protocol);
        }
        self.link.submit();
        while start.elapsed() < LIMIT {
            self.link.poll(&mut ended)?;
            if let Some(completion) = ended.pop() {
                return completion.result.map_err(|_| LinkDown::Protocol);
            }
            // So seldom that how the access ends is seen before other news of the revocation: the link looks
            // for these at every 256th poll only while an access is under way, and the appliance refuses
            // accesses for 2 s.
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(LinkDown::Protocol)
    }

    /// The time of each access, and of all together.
    fn time(
        &mut self,
        kind: Kind,
        len: usize,
        mode: Mode,
        count: usize,
        depth: usize,
    ) -> Result<(Vec<Duration>, Duration)> {
        let mut times = Vec::with_capacity(count);
        let mut posted_at = vec![Instant::now(); depth];
        let mut free: Vec<usize> = (0..depth).collect();
        let mut ended = Vec::with_capacity(depth);
        let (start, mut posted) = (Instant::now(), 0);
        while times.len() < count {
            while posted < count
                && let Some(slot) = free.pop()
            {
                let buf = Some(self.buffer.part(slot * len, len));
                let offset = (posted * len % AREA) as u64 / len as u64 * len as u64;
                posted_at[slot] = Instant::now();
                self.link.post(Operation { kind, offset, len: len as u64, buf, token: slot as u64 })?;
                posted += 1;
            }
            self.link.submit();
            self.link.poll(&mut ended)?;
            if ended.is_empty() {
                self.wait(mode)?;
            }
            for completion in ended.drain(..) {
                completion.result?;
                let slot = completion.token as usize;
                times.push(posted_at[slot].elapsed());
                free.push(slot);
            }
            ensure!(start.elapsed() < 12 * LIMIT, "too slow");
        }
        Ok((times, start.elapsed()))
    }

    fn wait(&mut self, mode: Mode) -> Result<()> {
        match mode {
            Mode::Spin => std::thread::yield_now(),
            Mode::Event if self.link.arm() => {}
            Mode::Event => {
                let fd = self.link.wait_fd().context("the link cannot be waited for")?;
                poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None)?;
            }
        }
        Ok(())
    }
}

/// A link to a grant, once its memory is registered.
fn link(map: &Map, grant: &Grant, session: u64) -> Result<RdmaLink> {
    let address = grant.endpoints.rdma.first().context("the appliance offers no RDMA")?;
    let nbd = grant.endpoints.nbd.first().context("the appliance offers no NBD")?;
    let id = u128::from(std::process::id()) << 64 | u128::from(session);
    let start = Instant::now();
    for generation in 1.. {
        let session = SessionTag { id, queue: 0, generation };
        let export = ExportName { key: grant.key.clone(), session: Some(session) };
        let beside = xpm_transport::nbd::client::connect(&NbdTarget::Tcp(*nbd), &export, LIMIT)?;
        let target = Target {
            address: *address,
            key: &grant.key,
            epoch: map.epoch,
            session,
            limit: LIMIT,
            depth: 128,
        };
        match connect(&target, NbdLink::new(beside, 1)?) {
            Err(ConnectError::Unreachable(error))
                if error.kind() == ErrorKind::WouldBlock && start.elapsed() < 6 * LIMIT =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return Ok(result?),
        }
    }
    bail!("never connected")
}

/// The allocator's.
fn url() -> Result<String> {
    std::env::var("XPM_ALLOCATOR").context("XPM_ALLOCATOR is not set")
}

fn allocator() -> Result<Client> {
    Ok(Client::new(&url()?, None)?)
}

fn wait_for<T>(work: impl Future<Output = T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(work))
}

/// Makes this process the allocation's owner.
fn take(name: &str, client: ClientId, force: bool) -> Result<Map> {
    let attach = Attach {
        client,
        host: HostId::from_u128(client.as_u128()),
        host_name: "probe".to_owned(),
        purpose: "probe".to_owned(),
        force,
        lose: false,
        blocks: None,
    };
    let path = format!("/v1/allocations/{name}/owner");
    wait_for(async { allocator()?.put(&path, &attach).await.context("cannot take the allocation") })?
}

fn release(name: &str, client: ClientId) -> Result<()> {
    let path = format!("/v1/allocations/{name}/owner/{client}");
    wait_for(async { allocator()?.delete(&path).await.context("cannot release the allocation") })?
}
