//! Measures direct mapping beside its floor, for `cargo xtask bench map`: `map_bench floor` measures faults that are
//! resolved from local memory, `map_bench URL NAME TRANSPORT MODE` everything else. `map_bench kernel PART [FILE]` touches memory that the
//! kernel takes away and brings back, anonymous or of a file, in a cgroup that lets it have PART percent. Prints a JSON object a line.

#![allow(unsafe_code)]

use std::error::Error;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use xpm_client::mapping::{Access, Advice, Budget, Faults, Mapping, Space, SpaceOptions};
use xpm_client::{AttachOptions, Attachment, Channel, Volume};
use xpm_protocol::api::blk::TransportKind;
use xpm_transport::IoBuf;
use xpm_transport::io::{Kind, Operation};

const PAGE: usize = 4096;
const MIB: u64 = 1 << 20;
/// Pages that are touched for one figure.
const TOUCHES: usize = 4000;
/// Bytes that are mapped.
const LEN: u64 = 256 * MIB;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["floor"] => floor::run(),
        ["kernel", part, ref file @ ..] => kernel(part.parse()?, file.first().copied()),
        [url, name, transport, mode] => {
            let faults = if mode == "inline" { Faults::Inline } else { Faults::Handled(1) };
            measure(url, name, transport, faults)
        }
        _ => Err("usage: map_bench floor | map_bench kernel PART [FILE] | map_bench URL NAME TRANSPORT inline|handled".into()),
    }
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

fn measure(url: &str, name: &str, transport: &str, faults: Faults) -> Outcome<()> {
    let mut options = AttachOptions::new(url.parse()?, name.parse()?);
    options.transport = Some(match transport {
        "shm" => TransportKind::Shm,
        "unix" => TransportKind::NbdUnix,
        _ => TransportKind::NbdTcp,
    });
    let (attachment, volume) = Attachment::attach(&options)?;
    raw(&volume)?;
    let before = resident()?;
    let space = Space::open(volume, &SpaceOptions { budget: Budget::Fixed(2 * LEN), faults, kept: LEN })?;
    say("open", "mib", (resident()? - before) / 1024.0);
    let mapping = space.map(0..LEN, Access::ReadWrite)?;
    words(&mapping)
        .iter()
        .step_by(PAGE / 8)
        .enumerate()
        .for_each(|(i, word)| word.store(i as u64 + 1, Ordering::Relaxed));
    mapping.advise(0..mapping.len(), Advice::DontNeed)?;
    single_faults(&mapping)?;
    threads(&mapping)?;
    scan(&mapping)?;
    scan_pressed(&space, &mapping)?;
    pressed(&space, &mapping)?;
    carve(&space)?;
    drop((mapping, space));
    Ok(attachment.detach()?)
}

fn words(mapping: &Mapping) -> &[AtomicU64] {
    // SAFETY: mapped for as long as it lives, aligned to pages; any bits are a u64, and it is accessed as atomics only.
    unsafe { std::slice::from_raw_parts(mapping.as_ptr().as_ptr().cast::<AtomicU64>(), mapping.len() / 8) }
}

fn touch(mapping: &Mapping, page: usize) {
    let seen = words(mapping)[page * PAGE / 8].load(Ordering::Relaxed);
    assert_eq!(seen, page as u64 + 1, "page {page}");
}

/// VmRSS in KiB.
fn resident() -> Outcome<f64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.split_whitespace().next().ok_or("no figure")?.parse()?)
}

/// The transport alone: reads of a page one by one, and of what the fetcher reads at once in a row.
fn raw(volume: &Volume) -> Outcome<()> {
    let mut channel = volume.channel()?;
    let mut memory = vec![0_u8; 8 << 18];
    let address = std::ptr::NonNull::new(memory.as_mut_ptr()).ok_or("no memory")?;
    // SAFETY: it outlives the operations, and nobody else uses it.
    let all = unsafe { IoBuf::new(address, memory.len()) };
    channel.register(all);
    let (mut dice, mut times) = (Dice(1), Vec::with_capacity(TOUCHES));
    for _ in 0..TOUCHES {
        let began = Instant::now();
        let offset = dice.below(LEN as usize / PAGE) as u64 * PAGE as u64;
        read(&mut channel, offset, all.part(0, PAGE), 0)?;
        times.push(began.elapsed());
    }
    say_times("raw 4 KiB", times);
    let began = Instant::now();
    let (run, mut posted, mut ended) = (1 << 18, 0_u64, Vec::new());
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

fn read(channel: &mut Channel, offset: u64, buf: IoBuf, token: u64) -> Outcome<()> {
    let len = buf.len() as u64;
    channel
        .post(Operation { kind: Kind::Read, offset, len, buf: Some(buf), token })
        .map_err(|_| "the channel is full")?;
    channel.submit();
    let mut ended = Vec::new();
    while ended.is_empty() {
        channel.poll(&mut ended);
    }
    Ok(ended[0].result?)
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

fn threads(mapping: &Mapping) -> Outcome<()> {
    for count in [1, 2, 4, 8] {
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
        say(&format!("{count} threads"), "faults_s", (each * count) as f64 / began.elapsed().as_secs_f64());
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

/// In a row, with half of it local, where each page that comes has the memory of one that leaves. Bytes are read once to get there.
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

/// With budgets of parts of it: touches in a row, twice, and at random, where a part is used much more than the rest.
fn pressed(space: &Space, mapping: &Mapping) -> Outcome<()> {
    for part in [25, 50, 75, 100] {
        mapping.advise(0..mapping.len(), Advice::DontNeed)?;
        space.set_budget(LEN * part / 100 + MIB)?;
        let pages = mapping.len() / PAGE;
        // What the kernel has to do with is in memory before, too, as far as it fits.
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

/// The same by the kernel: swap, or the pages of a file. What is in them cannot be compressed.
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
    for _ in 0..TOUCHES {
        let began = Instant::now();
        let slab = space.carve(MIB)?;
        times.push(began.elapsed());
        words(&slab)[0].store(1, Ordering::Relaxed);
        usable.push(began.elapsed());
    }
    say_times("carve", times);
    say_times("carve and first write", usable);
    Ok(())
}

/// Faults that are resolved from memory that is there, by the same means and with nothing else.
mod floor {
    use super::*;

    const PAGES: usize = 20_000;
    static UFFD: AtomicI32 = AtomicI32::new(-1);
    static SOURCE: AtomicUsize = AtomicUsize::new(0);

    #[repr(C)]
    struct Api(u64, u64, u64);
    #[repr(C)]
    struct Register(u64, u64, u64, u64);
    #[repr(C)]
    struct Copy(u64, u64, u64, u64, i64);

    pub(super) fn run() -> Outcome<()> {
        inline()?;
        handled()
    }

    /// A registered mapping of shared memory, and its descriptor.
    fn window(features: u64) -> Outcome<(i32, usize)> {
        // SAFETY: system calls on memory and descriptors of this function's own making.
        unsafe {
            let fd = libc::syscall(
                libc::SYS_userfaultfd,
                libc::O_CLOEXEC | libc::O_NONBLOCK | i32::from(features > 0),
            ) as i32;
            let mut api = Api(0xaa, features, 0);
            let file = libc::memfd_create(c"floor".as_ptr(), 0);
            let len = PAGES * PAGE;
            libc::ftruncate(file, len as i64);
            let (prot, source) = (libc::PROT_READ | libc::PROT_WRITE, vec![7_u8; PAGE]);
            let address = libc::mmap(null_mut(), len, prot, libc::MAP_SHARED, file, 0) as usize;
            SOURCE.store(source.leak().as_ptr() as usize, Ordering::SeqCst);
            let mut register = Register(address as u64, len as u64, 1, 0);
            if fd < 0
                || libc::ioctl(fd, 0xc018_aa3f, &raw mut api) < 0
                || libc::ioctl(fd, 0xc020_aa00, &raw mut register) < 0
            {
                return Err(std::io::Error::last_os_error().into());
            }
            UFFD.store(fd, Ordering::SeqCst);
            Ok((fd, address))
        }
    }

    fn copy(address: u64) {
        let mut copy =
            Copy(address & !(PAGE as u64 - 1), SOURCE.load(Ordering::Relaxed) as u64, PAGE as u64, 0, 0);
        // SAFETY: fills a missing page of the window.
        unsafe { libc::ioctl(UFFD.load(Ordering::Relaxed), 0xc028_aa03, &raw mut copy) };
    }

    fn touches(case: &str, address: usize) {
        let (mut dice, mut times, mut seen) = (Dice(3), Vec::new(), vec![false; PAGES]);
        while times.len() < TOUCHES {
            let page = dice.below(PAGES);
            if !std::mem::replace(&mut seen[page], true) {
                let began = Instant::now();
                // SAFETY: within the window.
                let byte = unsafe { ((address + page * PAGE) as *const u8).read_volatile() };
                times.push(began.elapsed());
                assert_eq!(byte, 7);
            }
        }
        say_times(case, times);
    }

    extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel gives an address for SIGBUS.
        copy(unsafe { (*info).si_addr() } as u64);
    }

    fn inline() -> Outcome<()> {
        // SAFETY: a handler that does one system call.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGBUS, &action, null_mut());
        }
        let (_, address) = window(1 << 7)?;
        touches("floor inline", address);
        Ok(())
    }

    fn handled() -> Outcome<()> {
        let (fd, address) = window(0)?;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let mut message = [0_u64; 4];
                    // SAFETY: one message, of 32 bytes.
                    if unsafe { libc::read(fd, message.as_mut_ptr().cast(), 32) } == 32 {
                        copy(message[2]);
                    } else {
                        std::thread::yield_now();
                    }
                }
            });
            touches("floor handled", address);
            stop.store(true, Ordering::Relaxed);
        });
        Ok(())
    }
}
