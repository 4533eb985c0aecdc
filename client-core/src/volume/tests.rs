//! Channels against links that fail, with a `Vec<u8>` as the model of the volume.

#![allow(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use rustix::event::{self, PollFd, PollFlags, Timespec};
use xpm_protocol::api::allocator::{Grant, Map, RegionSlot};
use xpm_protocol::api::appliance::Endpoints;
use xpm_protocol::api::blk::LinkState;
use xpm_protocol::{AllocationId, ApplianceId, ByteSize, Epoch, GrantId, GrantKey, HostId, Layout};
use xpm_transport::io::{Completion, IoBuf, IoError, Kind, Operation};
use xpm_transport::link::{Full, Link, LinkDown};

use super::connector::{Connector, LinkOptions};
use super::moves::{Move, Moves};
use super::orders::{NewWay, Order};
use super::port::{Bell, Delivery, Port};
use super::*;

const REGION: u64 = 16 << 20;

pub(super) fn map(layout: Layout, rows: u32, grants: u32, size: u64) -> Map {
    let regions = rows * layout.columns();
    let grant = |index: u32| Grant {
        id: GrantId::from_u128(index.into()),
        appliance: ApplianceId::from_u128(index.into()),
        appliance_name: format!("a{index}").parse().unwrap(),
        endpoints: Endpoints {
            host: HostId::from_u128(0),
            nbd: Vec::new(),
            names: Vec::new(),
            rdma: Vec::new(),
            nbd_unix: None,
            shm: None,
        },
        key: GrantKey::from_bytes([1; 32]),
        regions: (0..regions).filter(|region| region % grants == index).count() as u32,
    };
    Map {
        name: "test".parse().unwrap(),
        id: AllocationId::from_u128(1),
        epoch: Epoch::FIRST,
        version: 0,
        size: ByteSize(size),
        layout,
        region_len: ByteSize(REGION),
        grants: (0..grants).map(grant).collect(),
        regions: (0..regions)
            .map(|region| RegionSlot { grant: region % grants, slot: region / grants })
            .collect(),
        slabs: Default::default(),
        block_size: None,
    }
}

/// The memory of one grant.
type Export = Arc<Mutex<Vec<u8>>>;

/// A link whose operations take effect at some time between post and completion, in any order, and which goes
/// down after a number of polls.
struct FaultyLink {
    export: Export,
    pending: Vec<Operation>,
    depth: usize,
    polls_left: u32,
    random: u64,
}

impl FaultyLink {
    fn random(&mut self, below: usize) -> usize {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) as usize % below.max(1)
    }

    fn carry_out(&self, operation: &Operation) {
        let mut export = self.export.lock().unwrap();
        let range = operation.offset as usize..(operation.offset + operation.len) as usize;
        let bytes = &mut export[range];
        // SAFETY: the vector is locked for as long as this buffer is used.
        let memory = unsafe { IoBuf::new(NonNull::new(bytes.as_mut_ptr()).unwrap(), bytes.len()) };
        match (operation.kind, operation.buf) {
            (Kind::Read, Some(buf)) => memory.copy_to(buf),
            (Kind::Write, Some(buf)) => buf.copy_to(memory),
            _ => memory.zero(),
        }
    }
}

impl Link for FaultyLink {
    fn post(&mut self, operation: Operation) -> Result<(), Full> {
        if self.pending.len() == self.depth {
            return Err(Full);
        }
        self.pending.push(operation);
        Ok(())
    }

    fn submit(&mut self) {}

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), LinkDown> {
        if self.polls_left == 0 {
            // Some of the operations in flight took effect nevertheless.
            let happened = self.random(self.pending.len() + 1);
            self.pending.iter().take(happened).for_each(|operation| self.carry_out(operation));
            return Err(LinkDown::Broken);
        }
        self.polls_left -= 1;
        for _ in 0..self.random(4) {
            if !self.pending.is_empty() {
                let at = self.random(self.pending.len());
                let operation = self.pending.remove(at);
                self.carry_out(&operation);
                completions.push(Completion { token: operation.token, result: Ok(()) });
            }
        }
        Ok(())
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn direct(&self, _: u64, _: usize) -> Option<NonNull<u8>> {
        // The channel polls this link whenever operations are in flight; the address is not used.
        Some(NonNull::dangling())
    }
}

/// A channel whose connectors are simulated by the test.
struct Bed {
    channel: Channel,
    ports: Vec<Arc<Port>>,
    mailbox: Arc<Mailbox>,
    options: LinkOptions,
    exports: Vec<Export>,
}

impl Bed {
    fn new(map: &Map, depth: usize, hold: Option<Duration>) -> Bed {
        let plan = Arc::new(Plan::new(map).unwrap());
        let options = LinkOptions {
            visitor: None,
            held: None,
            contested: false,
            host: None,
            epoch: Epoch(1),
            transport: None,
            forbidden: Vec::new(),
            limit: Duration::ZERO,
            depth,
            session: 0,
            generation: 0,
            refusal_limit: REFUSAL_LIMIT,
            hold: None,
            alarm: Arc::default(),
        };
        let idle = |grant: &Grant| Arc::new(Connector::idle(grant.clone(), options.clone()));
        let live = Live { plan: plan.clone(), ways: Vec::new(), members: Vec::new(), change: None };
        let shared = Arc::new(Shared { live: Mutex::new(live), tallies: Mutex::default() });
        let mailbox = Arc::new(Mailbox::new(Arc::new(Bell::new().unwrap())));
        let port = |grant| (Arc::new(Port::new(0, mailbox.bell().clone())), Some(idle(grant)));
        let ports: Vec<_> = map.grants.iter().map(port).collect();
        let channel = Channel::new(plan, shared, ports.clone(), mailbox.clone(), (depth, hold)).unwrap();
        let ports = ports.into_iter().map(|(port, _)| port).collect();
        let export =
            |grant: &Grant| Arc::new(Mutex::new(vec![0; (u64::from(grant.regions) * REGION) as usize]));
        Bed { channel, ports, mailbox, options, exports: map.grants.iter().map(export).collect() }
    }

    /// Delivers a link that lasts for `polls` polls to each port that requests one.
    fn connect(&self, polls: u32, depth: usize) {
        for (port, export) in self.ports.iter().zip(&self.exports) {
            if port.is_wanted() && port.state() != LinkState::Lost {
                let link = FaultyLink {
                    export: export.clone(),
                    pending: Vec::new(),
                    depth,
                    polls_left: polls,
                    random: u64::from(polls) + port.links(),
                };
                port.deliver(Delivery::Link(Box::new(link)));
            }
        }
    }

    /// Whether a waiting thread would be woken.
    fn is_told(&mut self) -> bool {
        self.channel.arm();
        let mut waits = [PollFd::from_borrowed_fd(self.channel.wait_fd(), PollFlags::IN)];
        event::poll(&mut waits, Some(&Timespec::default())).unwrap() > 0
    }

    /// Posts the operations, and polls when there is work to do, until all have ended. Returns the results by
    /// token.
    fn run(&mut self, operations: &[Operation], mut between: impl FnMut(&Bed)) -> Vec<Result<(), IoError>> {
        let mut results: Vec<Option<Result<(), IoError>>> = vec![None; operations.len()];
        let mut completions = Vec::new();
        let mut next = 0;
        let mut told = true;
        for round in 0.. {
            assert!(round < 100_000, "operations never end");
            while next < operations.len() && self.channel.post(operations[next]).is_ok() {
                next += 1;
                told = true;
            }
            if told {
                self.channel.submit();
                self.channel.poll(&mut completions);
            }
            told = !completions.is_empty() || self.is_told();
            for completion in completions.drain(..) {
                let earlier = results[completion.token as usize].replace(completion.result);
                assert_eq!(earlier, None, "a request completes once");
            }
            if results.iter().all(Option::is_some) {
                break;
            }
            between(self);
        }
        assert_eq!(self.channel.in_flight(), 0);
        results.into_iter().flatten().collect()
    }
}

fn buffer(bytes: &mut [u8]) -> Option<IoBuf> {
    // SAFETY: the tests keep the bytes until the operation has ended, and read them only then.
    Some(unsafe { IoBuf::new(NonNull::new(bytes.as_mut_ptr()).unwrap(), bytes.len()) })
}

#[derive(Debug, Clone)]
struct Piece {
    kind: Kind,
    offset: u64,
    len: u64,
}

fn piece(size: u64) -> impl Strategy<Value = Piece> {
    let kind = prop_oneof![Just(Kind::Write), Just(Kind::Write), Just(Kind::Trim), Just(Kind::Zero)];
    (kind, 0..size, prop_oneof![1..5000_u64, 1..400_000_u64]).prop_map(move |(kind, offset, len)| Piece {
        kind,
        offset,
        len: len.min(size - offset),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_volume_on_failing_links_keeps_every_byte(
        striped: bool,
        polls in 1..30_u32,
        depth in 1..9_usize,
        batches in prop::collection::vec(prop::collection::vec(piece(2 * REGION + 12_288), 1..5), 1..8),
    ) {
        let size = 2 * REGION + 12_288;
        let layout = if striped { Layout::Striped { columns: 3, unit: 65_536 } } else { Layout::Linear };
        let mut bed = Bed::new(&map(layout, 3 / layout.columns(), 2, size), depth, None);
        let mut model = vec![0_u8; size as usize];
        for (number, batch) in batches.into_iter().enumerate() {
            // One after the other, so that overlapping operations have an order.
            for piece in &batch {
                let mut bytes = vec![number as u8 + 1; piece.len as usize];
                let buf = if piece.kind == Kind::Write { buffer(&mut bytes) } else { None };
                let operation =
                    Operation { kind: piece.kind, offset: piece.offset, len: piece.len, buf, token: 0 };
                let results = bed.run(&[operation], |bed| bed.connect(polls, depth));
                prop_assert_eq!(&results[..], &[Ok(())]);
                let value = if piece.kind == Kind::Write { number as u8 + 1 } else { 0 };
                model[piece.offset as usize..(piece.offset + piece.len) as usize].fill(value);
            }
            // Reads of the same ranges, all at once.
            let mut places: Vec<Vec<u8>> = batch.iter().map(|piece| vec![0xee; piece.len as usize]).collect();
            let reads: Vec<Operation> = (0..).zip(batch.iter().zip(&mut places)).map(|(token, (piece, bytes))| {
                Operation { kind: Kind::Read, offset: piece.offset, len: piece.len, buf: buffer(bytes), token }
            }).collect();
            let results = bed.run(&reads, |bed| bed.connect(polls, depth));
            prop_assert!(results.iter().all(Result::is_ok));
            for (piece, bytes) in batch.iter().zip(&places) {
                let expected = &model[piece.offset as usize..(piece.offset + piece.len) as usize];
                prop_assert!(bytes == expected, "read of {:?}", piece);
            }
        }
    }

    #[test]
    fn every_byte_has_exactly_one_place(
        columns in 1..5_u32,
        unit_order in 12..25_u32,
        grants in 1..4_u32,
        offset in 0..3 * REGION,
        len in 1..3 * REGION,
    ) {
        let layout = if columns == 1 { Layout::Linear } else { Layout::Striped { columns, unit: 1 << unit_order } };
        let rows = 3_u32.div_ceil(columns);
        let size = (u64::from(rows * columns) * REGION).min(3 * REGION);
        let len = len.min(size - offset);
        let plan = Plan::new(&map(layout, rows, grants, size)).unwrap();
        // The legs of a read are in order and without gaps, and each byte lies where a read of that byte
        // alone would find it.
        let mut covered = 0;
        let mut legs = plan.legs(Kind::Read, offset, len);
        let mut by_place = Vec::new();
        while let Some(leg) = legs.next(&plan) {
            prop_assert_eq!(leg.start, covered);
            for byte in [0, leg.len / 2, leg.len - 1] {
                let one = plan.first_leg(offset + leg.start + byte, 1);
                prop_assert_eq!((one.grant, one.offset), (leg.grant, leg.offset + byte));
            }
            covered += leg.len;
            by_place.push((leg.grant, leg.offset, leg.offset + leg.len));
        }
        prop_assert_eq!(covered, len);
        by_place.sort_unstable();
        prop_assert!(by_place.windows(2).all(|two| two[0].0 != two[1].0 || two[0].2 <= two[1].1), "no byte is twice");
        // The legs of a trim cover the same bytes, with few legs.
        let mut trims = Vec::new();
        let mut legs = plan.legs(Kind::Trim, offset, len);
        while let Some(leg) = legs.next(&plan) {
            trims.push((leg.grant, leg.offset, leg.offset + leg.len));
        }
        prop_assert!(trims.len() <= (rows * columns) as usize);
        trims.sort_unstable();
        prop_assert_eq!(joined(&trims), joined(&by_place));
    }
}

fn joined(ranges: &[(u32, u64, u64)]) -> Vec<(u32, u64, u64)> {
    let mut joined: Vec<(u32, u64, u64)> = Vec::new();
    for &(grant, start, end) in ranges {
        match joined.last_mut() {
            Some(last) if last.0 == grant && last.2 == start => last.2 = end,
            _ => joined.push((grant, start, end)),
        }
    }
    joined
}

#[test]
fn a_lost_grant_fails_at_once_and_comes_back() {
    let mut bed = Bed::new(&map(Layout::Linear, 2, 2, 2 * REGION), 4, None);
    bed.connect(1000, 8);
    let mut bytes = [vec![1; 8192], vec![2; 8192]];
    let writes: Vec<Operation> = (0..)
        .zip(&mut bytes)
        .map(|(token, bytes)| Operation {
            kind: Kind::Write,
            offset: token * REGION,
            len: 8192,
            buf: buffer(bytes),
            token,
        })
        .collect();
    assert_eq!(bed.run(&writes, |_| {}), [Ok(()), Ok(())]);
    bed.channel.ways_down(1);
    bed.ports[1].deliver(Delivery::Lost);
    assert_eq!(bed.run(&writes, |_| {}), [Ok(()), Err(IoError::Lost)]);
    assert_eq!(bed.ports[1].state(), LinkState::Lost);
    let link = FaultyLink {
        export: bed.exports[1].clone(),
        pending: Vec::new(),
        depth: 4,
        polls_left: 99,
        random: 1,
    };
    bed.ports[1].deliver(Delivery::Link(Box::new(link)));
    bed.channel.poll(&mut Vec::new());
    assert_eq!(bed.run(&writes, |_| {}), [Ok(()), Ok(())]);
}

#[test]
fn operations_held_too_long_fail_and_operations_outside_are_refused() {
    let mut bed = Bed::new(&map(Layout::Linear, 1, 1, REGION), 4, Some(Duration::from_millis(40)));
    let mut bytes = vec![1; 4096];
    let write = Operation { kind: Kind::Write, offset: 0, len: 4096, buf: buffer(&mut bytes), token: 0 };
    let outside = Operation { offset: REGION - 1, token: 1, ..write };
    let beyond = Operation { offset: u64::MAX, token: 2, ..write };
    let unfit = Operation { len: 4095, token: 3, ..write };
    let pause = |_: &Bed| std::thread::sleep(Duration::from_millis(1));
    let invalid = Err(IoError::Invalid);
    assert_eq!(
        bed.run(&[write, outside, beyond, unfit], pause),
        [Err(IoError::Unreachable), invalid, invalid, invalid]
    );
    bed.connect(10_000, 4);
    assert_eq!(bed.run(&[write], |_| {}), [Ok(())]);
}

#[test]
fn invalid_maps_are_refused() {
    let good = map(Layout::Striped { columns: 2, unit: 65_536 }, 2, 2, 3 * REGION);
    assert!(Plan::new(&good).is_ok());
    let check = |change: &dyn Fn(&mut Map)| {
        let mut map = good.clone();
        change(&mut map);
        Plan::new(&map).unwrap_err()
    };
    assert!(matches!(check(&|map| map.region_len = ByteSize(5)), MapError::RegionLen(5)));
    assert!(matches!(check(&|map| map.size = ByteSize(0)), MapError::Size { .. }));
    assert!(matches!(check(&|map| map.size = ByteSize(5 * REGION)), MapError::Size { .. }));
    assert!(matches!(check(&|map| map.regions.truncate(3)), MapError::Rows { .. }));
    assert!(matches!(check(&|map| map.regions[1].grant = 2), MapError::Slot(1)));
    assert!(matches!(check(&|map| map.regions[3].slot = 9), MapError::Slot(3)));
    assert!(matches!(check(&|map| map.regions[3] = map.regions[1]), MapError::Twice(3)));
    let unit = |map: &mut Map| map.layout = Layout::Striped { columns: 2, unit: 3 };
    assert!(matches!(check(&unit), MapError::Layout(_)));
}

/// A move of one region that the test performs: the old and the new place of the region.
struct Mover {
    moves: Arc<Moves>,
    progress: Progress,
    told: u64,
    step: MoverStep,
}

#[derive(Debug, PartialEq)]
enum MoverStep {
    Begin,
    Locked,
    Unlocked,
    Firm,
    Reads,
    Switched,
    Over,
}

const RUN: u64 = 4 << 20;

impl Mover {
    /// Adds a grant with one region to the bed; region 1 of the allocation moves to it.
    fn begin(bed: &mut Bed, map: &Map) -> (Mover, Arc<Plan>) {
        let mut next = map.clone();
        let number = next.grants.len() as u32;
        let mut grant = next.grants[0].clone();
        (grant.id, grant.regions) = (GrantId::from_u128(99), 1);
        let connector = Arc::new(Connector::idle(grant.clone(), bed.options.clone()));
        next.grants.push(grant);
        let to = RegionSlot { grant: number, slot: 0 };
        let one = Move { region: 1, from: std::mem::replace(&mut next.regions[1], to), to };
        let port = Arc::new(Port::new(0, bed.mailbox.bell().clone()));
        bed.ports.push(port.clone());
        bed.exports.push(Arc::new(Mutex::new(vec![0; REGION as usize])));
        let moves = Arc::new(Moves::new(next.regions.len(), vec![one]));
        let told = bed.mailbox.tell(Order::Begin(vec![NewWay { number, port, connector }]));
        let progress = Progress::new(moves.clone());
        (Mover { moves, progress, told, step: MoverStep::Begin }, Arc::new(Plan::new(&next).unwrap()))
    }

    /// Performs the next step once the last one is done.
    fn turn(&mut self, bed: &Bed, plan: &Arc<Plan>, abort_at: u64) {
        if !bed.mailbox.wait(self.told, std::time::Instant::now()) {
            return;
        }
        let (order, step) = match self.step {
            MoverStep::Locked => {
                self.copy(bed);
                self.progress.done = self.progress.locked;
                (Order::Progress(self.progress.clone()), MoverStep::Unlocked)
            }
            MoverStep::Begin | MoverStep::Unlocked if self.progress.done == abort_at => {
                (Order::Abort, MoverStep::Over)
            }
            MoverStep::Unlocked if self.progress.done == REGION => {
                (self.progress.number, self.progress.done, self.progress.locked) = (1, 0, 0);
                (Order::Progress(self.progress.clone()), MoverStep::Firm)
            }
            MoverStep::Begin | MoverStep::Unlocked => {
                self.progress.locked = self.progress.done + RUN;
                (Order::Progress(self.progress.clone()), MoverStep::Locked)
            }
            MoverStep::Firm => (Order::Firm(u64::MAX), MoverStep::Reads),
            MoverStep::Reads => (Order::Read(plan.clone()), MoverStep::Switched),
            MoverStep::Switched => {
                assert!(!self.moves.have_failed());
                (Order::Switch(plan.clone()), MoverStep::Over)
            }
            MoverStep::Over => return,
        };
        self.told = bed.mailbox.tell(order);
        self.step = step;
    }

    fn copy(&self, bed: &Bed) {
        let one = self.moves.all()[0];
        let from = bed.exports[one.from.grant as usize].lock().unwrap();
        let mut to = bed.exports[one.to.grant as usize].lock().unwrap();
        let (start, len) = (self.progress.done as usize, RUN as usize);
        let at = one.from.slot as usize * REGION as usize + start;
        to[start..start + len].copy_from_slice(&from[at..at + len]);
    }

    fn is_over(&self, bed: &Bed) -> bool {
        self.step == MoverStep::Over && bed.mailbox.wait(self.told, std::time::Instant::now())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    /// Writes to different places at once, while a region moves, or begins to move and the change is
    /// cancelled: reads return the written data, and after a move no read goes to the old place.
    #[test]
    fn a_region_moves_under_writes_on_failing_links(
        polls in 1..40_u32,
        depth in 2..9_usize,
        pace in 1..8_u32,
        abort_at in prop_oneof![3 => Just(u64::MAX), 1 => Just(0), 1 => Just(RUN), 1 => Just(3 * RUN)],
        pieces in prop::collection::vec((0..4_u64, piece(REGION)), 8..60),
    ) {
        let size = 3 * REGION;
        let map = map(Layout::Linear, 3, 2, size);
        let mut bed = Bed::new(&map, depth, None);
        let mut model = vec![0_u8; size as usize];
        let (mut mover, plan) = Mover::begin(&mut bed, &map);
        // Four lanes over the edges of the copied runs; each lane has one operation at a time.
        let lane = |number: u64, piece: &Piece| {
            let start = REGION - RUN / 4 + number * RUN;
            let offset = piece.offset % RUN;
            (start + offset, piece.len.min(RUN - offset))
        };
        let mut todo: Vec<_> = pieces.iter().enumerate().rev().collect();
        let mut buffers: Vec<Vec<u8>> =
            pieces.iter().enumerate().map(|(number, (_, piece))| vec![number as u8 + 1; piece.len as usize]).collect();
        let mut busy = [false; 4];
        let mut completions = Vec::new();
        for round in 0.. {
            prop_assert!(round < 400_000, "it never ends: {:?}", mover.step);
            if let Some(&(number, (at, piece))) = todo.last() && !busy[*at as usize] {
                let (offset, len) = lane(*at, piece);
                let value = if piece.kind == Kind::Write { number as u8 + 1 } else { 0 };
                let bytes = &mut buffers[number][..len as usize];
                let buf = if piece.kind == Kind::Write { buffer(bytes) } else { None };
                let operation = Operation { kind: piece.kind, offset, len, buf, token: *at };
                if bed.channel.post(operation).is_ok() {
                    model[offset as usize..(offset + len) as usize].fill(value);
                    busy[*at as usize] = true;
                    todo.pop();
                }
            }
            bed.channel.submit();
            bed.channel.poll(&mut completions);
            for completion in completions.drain(..) {
                prop_assert_eq!(completion.result, Ok(()));
                busy[completion.token as usize] = false;
            }
            bed.connect(polls, depth * 2);
            if round % pace == 0 {
                mover.turn(&bed, &plan, abort_at);
            }
            if todo.is_empty() && busy == [false; 4] && mover.is_over(&bed) {
                break;
            }
        }
        if abort_at == u64::MAX {
            // No channel may read from the old place any more.
            bed.exports[1].lock().unwrap()[..REGION as usize].fill(0xee);
        }
        let mut bytes = vec![0; size as usize];
        let read = Operation { kind: Kind::Read, offset: 0, len: size, buf: buffer(&mut bytes), token: 0 };
        let results = bed.run(&[read], |bed| bed.connect(polls, depth));
        prop_assert_eq!(&results[..], &[Ok(())]);
        let wrong = (0..size as usize).find(|&at| bytes[at] != model[at]);
        prop_assert_eq!(wrong, None);
    }
}

/// At the end of a change one channel is a step ahead of another for a while; each still reads the data that
/// the other one has written.
#[test]
fn channels_a_step_apart_read_each_others_writes() {
    let map = map(Layout::Linear, 3, 2, 3 * REGION);
    let mut beds = [Bed::new(&map, 8, None), Bed::new(&map, 8, None)];
    let (mover, plan) = Mover::begin(&mut beds[0], &map);
    beds[1].exports = beds[0].exports[..2].to_vec();
    Mover::begin(&mut beds[1], &map);
    beds[1].exports[2] = beds[0].exports[2].clone();
    let progress = Progress { number: 1, ..Progress::new(mover.moves) };
    let poll = |bed: &mut Bed| (0..10).for_each(|_| bed.channel.poll(&mut Vec::new()));
    for bed in &mut beds {
        poll(bed);
        bed.connect(100_000, 16);
        poll(bed);
        bed.mailbox.tell(Order::Progress(progress.clone()));
        bed.mailbox.tell(Order::Firm(u64::MAX));
        poll(bed);
    }
    let mut value = 0;
    let mut see = |beds: &mut [Bed; 2]| {
        for (writer, reader) in [(0, 1), (1, 0)] {
            value += 1;
            let (mut bytes, mut got) = (vec![value; 4096], vec![0; 4096]);
            let write =
                Operation { kind: Kind::Write, offset: REGION, len: 4096, buf: buffer(&mut bytes), token: 0 };
            assert_eq!(beds[writer].run(&[write], |_| {}), [Ok(())]);
            let read =
                Operation { kind: Kind::Read, offset: REGION, len: 4096, buf: buffer(&mut got), token: 0 };
            assert_eq!(beds[reader].run(&[read], |_| {}), [Ok(())]);
            assert_eq!((got[0], got[4095]), (value, value), "{writer} wrote");
        }
    };
    see(&mut beds);
    for order in [Order::Read(plan.clone()), Order::Switch(plan)] {
        for bed in 0..2 {
            let order = match &order {
                Order::Read(plan) => Order::Read(plan.clone()),
                Order::Switch(plan) => Order::Switch(plan.clone()),
                _ => unreachable!(),
            };
            beds[bed].mailbox.tell(order);
            poll(&mut beds[bed]);
            see(&mut beds);
        }
    }
}
