//! Measures direct mapping beside its floor, for `cargo xtask bench map`: `map_bench memory URL NAME MODE MIB PART`
//! the memory that it takes, `map_bench URL NAME TRANSPORT MODE` everything else. `map_bench kernel PART [FILE]`
//! touches memory that the kernel takes away and brings back, anonymous or of a file, in a cgroup that lets it have
//! PART percent. Prints a JSON object a line.

#![allow(unsafe_code)]

mod floor;
mod memory;

use std::error::Error;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use xpm_client_core::Channel;
use xpm_mapping::{
    Access, Advice, AttachOptions, Attachment, Budget, Faults, Mapping, Space, SpaceOptions, Volume,
};
use xpm_protocol::api::blk::TransportKind;
use xpm_transport::IoBuf;
use xpm_transport::io::{Completion, Kind, Operation};

const PAGE: usize = 4096;
const MIB: u64 = 1 << 20;
/// Pages that are touched for one figure.
const TOUCHES: usize = 4000;
/// Threads that touch pages at a time.
const THREADS: [usize; 4] = [1, 2, 4, 8];
/// Bytes that are mapped.
const LEN: u64 = 256 * MIB;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["kernel", part, ref file @ ..] => kernel(part.parse()?, file.first().copied()),
        ["memory", url, name, mode, mib, part] => {
            memory::run(url, name, faults(mode), mib.parse()?, part.parse()?)
        }
        [url, name, transport, mode] => measure(url, name, transport, faults(mode)),
        _ => {
            Err("usage: map_bench kernel PART [FILE] | map_bench memory URL NAME inline|handled MIB PART | \
                  map_bench URL NAME TRANSPORT inline|handled"
                .into())
        }
    }
}

fn faults(mode: &str) -> Faults {
    if mode == "inline" { Faults::Inline } else { Faults::Handled(1) }
}

fn say(case: &str, metric: &str, value: f64) {
    println!(r#"{{"case":"{case}","metric":"{metric}","value":{value:.4}}}"#);
}

/// p50 and p99 of times, in microseconds.
fn say_times(case: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |part: usize| times[(times.len() - 1) * part / 100].as_nanos() as f64 / 1000.0;
    say(case, "p50", at(50));
    say(case, "p99", at(99));
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, range: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % range
    }
}

fn attach(url: &str, name: &str, transport: &str) -> Outcome<(Attachment, Volume)> {
    let mut options = AttachOptions::new(url.parse()?, name.parse()?);
    options.transport = Some(match transport {
        "shm" => TransportKind::Shm,
        "unix" => TransportKind::NbdUnix,
        _ => TransportKind::NbdTcp,
    });
    Ok(Attachment::attach(&options)?)
}

fn measure(url: &str, name: &str, transport: &str, faults: Faults) -> Outcome<()> {
    let (attachment, volume) = attach(url, name, transport)?;
    raw(&volume)?;
    let (space, mapping) = open(&volume, faults)?;
    words(&mapping)
        .iter()
        .step_by(PAGE / 8)
        .enumerate()
        .for_each(|(i, word)| word.store(i as u64 + 1, Ordering::Relaxed));
    mapping.advise(0..mapping.len(), Advice::DontNeed)?;
    single_faults(&mapping)?;
    floor::run(&volume, faults)?;
    for count in THREADS {
        threads(&mapping, count, &format!("{count} threads"))?;
    }
    scan(&mapping)?;
    scan_pressed(&space, &mapping)?;
    pressed(&space, &mapping)?;
    carve(&space)?;
    drop((mapping, space));
    if faults != Faults::Inline {
        more_handlers(&volume)?;
    }
    drop(volume);
    Ok(attachment.detach()?)
}

fn open(volume: &Volume, faults: Faults) -> Outcome<(Space, Mapping)> {
    let options = SpaceOptions { budget: Budget::Fixed(2 * LEN), faults, kept: LEN };
    let space = Space::open(volume.clone(), &options)?;
    let mapping = space.map(0..LEN, Access::ReadWrite)?;
    Ok((space, mapping))
}

/// Whether the library has shared memory behind a window that is open.
fn is_shared() -> Outcome<bool> {
    Ok(std::fs::read_to_string("/proc/self/maps")?.contains("memfd:xpm-mapping"))
}

fn words(mapping: &Mapping) -> &[AtomicU64] {
    // SAFETY: mapped for as long as it lives, aligned to pages; any bits are a u64, and it is accessed as atomics only.
    unsafe { std::slice::from_raw_parts(mapping.as_ptr().as_ptr().cast::<AtomicU64>(), mapping.len() / 8) }
}

fn touch(mapping: &Mapping, page: usize) {
    let seen = words(mapping)[page * PAGE / 8].load(Ordering::Relaxed);
    assert_eq!(seen, page as u64 + 1, "page {page}");
}

/// The transport alone: reads of a page one by one, and of what the fetcher reads at once in a row.
fn raw(volume: &Volume) -> Outcome<()> {
    let mut channel = volume.channel()?;
    let mut memory = vec![0_u8; 8 << 18];
    let address = std::ptr::NonNull::new(memory.as_mut_ptr()).ok_or("no memory")?;
    // SAFETY: it outlives the operations, and nobody else uses it.
    let all = unsafe { IoBuf::new(address, memory.len()) };
    channel.register(all);
    let (mut dice, mut times, mut ended) = (Dice(1), Vec::with_capacity(TOUCHES), Vec::with_capacity(8));
    for _ in 0..TOUCHES {
        let began = Instant::now();
        let offset = dice.below(LEN as usize / PAGE) as u64 * PAGE as u64;
        read(&mut channel, offset, all.part(0, PAGE), &mut ended)?;
        times.push(began.elapsed());
    }
    say_times("raw 4 KiB", times);
    let began = Instant::now();
    let (run, mut posted) = (1 << 18, 0_u64);
    let mut free: Vec<u64> = (0..8).collect();
    let mut left = LEN / run;
    while left > 0 {
        while let Some(place) = free.pop() {
            let buf = all.part((place * run) as usize, run as usize);
            let offset = posted * run % LEN;
            let operation = Operation { kind: Kind::Read, offset, len: run, buf: Some(buf), token: place };
            channel.post(operation).map_err(|_| "the channel is full")?;
            posted += 1;
        }
        channel.submit();
        channel.poll(&mut ended);
        for done in ended.drain(..) {
            done.result?;
            left = left.saturating_sub(1);
            free.push(done.token);
        }
    }
    say("raw sequential", "mib_s", LEN as f64 / MIB as f64 / began.elapsed().as_secs_f64());
    // Nothing of it may be in flight when the memory goes.
    while free.len() < 8 {
        channel.poll(&mut ended);
        free.extend(ended.drain(..).map(|done| done.token));
    }
    drop(channel);
    drop(memory);
    Ok(())
}

/// Posts one read, and waits for its end; no other operation is in flight. It yields while it waits, as the library
/// does, because the thread that has to answer may need this processor.
fn read(channel: &mut Channel, offset: u64, buf: IoBuf, ended: &mut Vec<Completion>) -> Outcome<()> {
    let len = buf.len() as u64;
    channel
        .post(Operation { kind: Kind::Read, offset, len, buf: Some(buf), token: 0 })
        .map_err(|_| "the channel is full")?;
    channel.submit();
    for looks in 1_u32.. {
        channel.poll(ended);
        if let Some(ended) = ended.pop() {
            return Ok(ended.result?);
        }
        if looks.is_multiple_of(16) {
            std::thread::yield_now();
        }
    }
    Err("no end".into())
}

fn single_faults(mapping: &Mapping) -> Outcome<()> {
    mapping.advise(0..mapping.len(), Advice::Random)?;
    let (mut dice, mut times) = (Dice(2), Vec::with_capacity(TOUCHES));
    let mut seen = vec![false; mapping.len() / PAGE];
    while times.len() < TOUCHES {
        let page = dice.below(seen.len());
        if !std::mem::replace(&mut seen[page], true) {
            let began = Instant::now();
            touch(mapping, page);
            times.push(began.elapsed());
        }
    }
    say_times("fault", times);
    Ok(())
}

fn threads(mapping: &Mapping, count: usize, case: &str) -> Outcome<()> {
    mapping.advise(0..mapping.len(), Advice::DontNeed)?;
    let pages = mapping.len() / PAGE;
    let (began, each) = (Instant::now(), 4 * TOUCHES / count);
    std::thread::scope(|scope| {
        for thread in 0..count {
            scope.spawn(move || {
                (0..each).for_each(|i| touch(mapping, (i * count + thread) * 7919 % pages));
            });
        }
    });
    say(case, "faults_s", (each * count) as f64 / began.elapsed().as_secs_f64());
    Ok(())
}

/// Faults of several threads, with a handler for each thread, but at most one for each processor.
fn more_handlers(volume: &Volume) -> Outcome<()> {
    let most = std::thread::available_parallelism()?.get().max(2);
    for count in THREADS.into_iter().filter(|count| *count > 1) {
        let handlers = count.min(most);
        let (_space, mapping) = open(volume, Faults::Handled(handlers))?;
        mapping.advise(0..mapping.len(), Advice::Random)?;
        threads(&mapping, count, &format!("{count} threads, {handlers} serve"))?;
    }
    Ok(())
}

fn scan(mapping: &Mapping) -> Outcome<()> {
    mapping.advise(0..mapping.len(), Advice::DontNeed)?;
    mapping.advise(0..mapping.len(), Advice::Sequential)?;
    let began = Instant::now();
    (0..mapping.len() / PAGE).for_each(|page| touch(mapping, page));
    say("sequential", "mib_s", mapping.len() as f64 / MIB as f64 / began.elapsed().as_secs_f64());
    Ok(mapping.advise(0..mapping.len(), Advice::Normal)?)
}

/// Touches pages in a row when half of them may be local, so that each page that is fetched takes the memory of one
/// that is evicted. A first scan, which is not measured, brings the memory into that state.
fn scan_pressed(space: &Space, mapping: &Mapping) -> Outcome<()> {
    mapping.advise(0..mapping.len(), Advice::DontNeed)?;
    mapping.advise(0..mapping.len(), Advice::Sequential)?;
    space.set_budget(LEN / 2)?;
    let pages = mapping.len() / PAGE;
    (0..pages).for_each(|page| touch(mapping, page));
    let began = Instant::now();
    (0..pages).for_each(|page| touch(mapping, page));
    say("sequential, half local", "mib_s", LEN as f64 / MIB as f64 / began.elapsed().as_secs_f64());
    space.set_budget(2 * LEN)?;
    Ok(mapping.advise(0..mapping.len(), Advice::Normal)?)
}

/// Touches pages with budgets of several parts of the mapping: in a row, twice; and at random, where a fifth of the
/// pages gets most touches.
fn pressed(space: &Space, mapping: &Mapping) -> Outcome<()> {
    for part in [25, 50, 75, 100] {
        mapping.advise(0..mapping.len(), Advice::DontNeed)?;
        space.set_budget(LEN * part / 100 + MIB)?;
        let pages = mapping.len() / PAGE;
        // In the measurement of the kernel, too, as many pages as fit are in memory before.
        (0..pages).for_each(|page| touch(mapping, page));
        touches(part, pages, |page| touch(mapping, page));
    }
    Ok(space.set_budget(2 * LEN)?)
}

fn touches(part: u64, pages: usize, touch: impl Fn(usize)) {
    let began = Instant::now();
    (0..2 * pages).for_each(|step| touch(step % pages));
    say(
        &format!("scan twice, {part} % local"),
        "mpages_s",
        2.0 * pages as f64 / began.elapsed().as_micros() as f64,
    );
    let (mut dice, steps) = (Dice(part), 8 * TOUCHES);
    let began = Instant::now();
    for _ in 0..steps {
        let within = if dice.below(10) < 8 { pages / 5 } else { pages };
        touch(dice.below(within));
    }
    say(
        &format!("random 80/20, {part} % local"),
        "mpages_s",
        steps as f64 / began.elapsed().as_micros() as f64,
    );
}

/// Touches the same way memory of which the kernel does the paging: swap, or the pages of a file. Their content cannot
/// be compressed.
fn kernel(part: u64, file: Option<&str>) -> Outcome<()> {
    let (prot, len) = (libc::PROT_READ | libc::PROT_WRITE, LEN as usize);
    let file = file.map(|path| std::fs::File::options().read(true).write(true).open(path)).transpose()?;
    let (flags, fd) = match &file {
        Some(file) => (libc::MAP_SHARED, std::os::fd::AsRawFd::as_raw_fd(file)),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
    };
    // SAFETY: a new mapping at an address of the kernel's choice.
    let address = unsafe { libc::mmap(null_mut(), len, prot, flags, fd, 0) };
    if address == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: mapped above until the end of the process, aligned to pages; it is accessed as atomics only.
    let words = unsafe { std::slice::from_raw_parts(address.cast::<AtomicU64>(), len / 8) };
    let mut dice = Dice(part);
    for (at, word) in words.iter().enumerate() {
        let value = if at % (PAGE / 8) == 0 {
            at / (PAGE / 8) + 1
        } else {
            dice.below(1 << 31) << 32 | dice.below(1 << 31) << 1
        };
        word.store(value as u64, Ordering::Relaxed);
    }
    if let Some(file) = file {
        file.sync_all()?;
    }
    touches(part, len / PAGE, |page| {
        assert_eq!(words[page * PAGE / 8].load(Ordering::Relaxed), page as u64 + 1, "page {page}");
    });
    Ok(())
}

fn carve(space: &Space) -> Outcome<()> {
    let (mut times, mut usable) = (Vec::new(), Vec::new());
    let before = space.stats();
    for _ in 0..TOUCHES {
        let began = Instant::now();
        let slab = space.carve(MIB)?;
        times.push(began.elapsed());
        words(&slab)[0].store(1, Ordering::Relaxed);
        usable.push(began.elapsed());
    }
    let after = space.stats();
    if (after.fetched, after.written, after.faults) != (before.fetched, before.written, before.faults) {
        return Err(format!("slabs were not local at once: {after:?} after {before:?}").into());
    }
    say_times("carve", times);
    say_times("carve and first write", usable);
    Ok(())
}
