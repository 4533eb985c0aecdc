//! How a process comes to external memory: the first time that it wants a large piece, a thread of this library asks
//! `xpm run` for it, and then serves the process for as long as that lives.
//!
//! ```text
//!   NOBODY --(XPM_RUN is set)--> IDLE --(a large piece)--> STARTING --(all is well)--> READY
//!                                 ^                           |  |
//!                                 +--(another process has it)-+  +--(it cannot be)--> FAILED
//! ```
//!
//! A child of fork(2) is IDLE, whatever its parent was.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::futex;
use xpm_control::token::Token;
use xpm_mapping::{AttachOptions, Attachment, Budget, Faults, Space, SpaceOptions};
use xpm_protocol::api::run::{Account, Place, Run, VARIABLE};
use xpm_protocol::policy::Amount;

use crate::external::{self, External};
use crate::lease::{Lease, Terms};
use crate::{process, table, threads};

const NOBODY: u32 = 0;
const IDLE: u32 = 1;
const STARTING: u32 = 2;
const READY: u32 = 3;
const FAILED: u32 = 4;

/// How long it is until a process asks again that was refused, at first; each time twice as long, up to the most.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_DOUBLINGS: u32 = 5;
/// How long the program waits for the loader's lock to be free. A thread of the program that asks for memory while it
/// has that lock (a library's initialisation) cannot wait for a thread that needs it, too: that piece is local.
const LOADER_MAX: Duration = Duration::from_millis(500);
/// How long the program waits for the rest: longer than it may take to connect to the appliances.
const START_MAX: Duration = Duration::from_secs(20);

#[used]
#[unsafe(link_section = ".init_array")]
static AT_START: extern "C" fn() = at_start;
#[used]
#[unsafe(link_section = ".fini_array")]
static AT_END: extern "C" fn() = at_end;

static PLACE: OnceLock<Place> = OnceLock::new();
static STATE: AtomicU32 = AtomicU32::new(NOBODY);
/// The thread that asks has had the loader's lock.
static PAST_LOADER: AtomicBool = AtomicBool::new(false);
static PROCESS: AtomicI32 = AtomicI32::new(0);
/// When it may be asked again, in nanoseconds of [`since_start`].
static NEXT: AtomicU64 = AtomicU64::new(0);
/// How often it was refused.
static REFUSALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn at_start() {
    let Some(place) = std::env::var(VARIABLE).ok().and_then(|text| Place::parse(&text)) else { return };
    external::set_threshold(place.threshold as usize);
    let _ = PLACE.set(place);
    since_start();
    PROCESS.store(std::process::id() as i32, Ordering::Relaxed);
    process::begin();
    STATE.store(IDLE, Ordering::Release);
}

extern "C" fn at_end() {
    process::look();
    if let Some(external) = external::get() {
        external.service.call(|| external.say());
    }
}

/// In a new child.
pub(crate) fn forget() {
    PROCESS.store(std::process::id() as i32, Ordering::Relaxed);
    PAST_LOADER.store(false, Ordering::Relaxed);
    NEXT.store(0, Ordering::Relaxed);
    REFUSALS.store(0, Ordering::Relaxed);
    STATE.store(IDLE, Ordering::Release);
}

/// Where to ask.
pub(crate) fn place() -> Option<&'static Place> {
    PLACE.get()
}

fn since_start() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// The external memory of this process, which is requested if necessary. None where it cannot be had now.
pub(crate) fn get_or_ask() -> Option<&'static External> {
    let state = STATE.load(Ordering::Acquire);
    if state == READY {
        return external::get();
    }
    let asks = state == IDLE && since_start() >= NEXT.load(Ordering::Relaxed) || state == STARTING;
    // A child of vfork(2) uses its parent's memory for a moment, and can start no thread for it.
    if !asks || PROCESS.load(Ordering::Relaxed) != std::process::id() as i32 {
        return None;
    }
    if STATE.compare_exchange(IDLE, STARTING, Ordering::AcqRel, Ordering::Relaxed).is_ok() && !start_thread()
    {
        set(FAILED);
    }
    wait();
    external::get()
}

fn set(state: u32) {
    STATE.store(state, Ordering::Release);
    let _ = futex::wake(&STATE, futex::Flags::PRIVATE, u32::MAX);
}

fn wait() {
    let since = Instant::now();
    while STATE.load(Ordering::Acquire) == STARTING {
        let most = if PAST_LOADER.load(Ordering::Relaxed) { START_MAX } else { LOADER_MAX };
        if since.elapsed() > most {
            return;
        }
        let pause = rustix::event::Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        let _ = futex::wait(&STATE, futex::Flags::PRIVATE, STARTING, Some(&pause));
    }
}

fn start_thread() -> bool {
    let builder = std::thread::Builder::new().name("xpm-run".to_owned());
    threads::starting(|| threads::without_signals(|| builder.spawn(serve))).is_ok()
}

/// A thread of the library: asks, and serves the process for ever if it was given the memory.
fn serve() {
    // SAFETY: takes the loader's lock for a moment; loads nothing.
    unsafe { libc::dlopen(std::ptr::null(), libc::RTLD_NOW) };
    PAST_LOADER.store(true, Ordering::Relaxed);
    let served = std::panic::catch_unwind(|| match begin() {
        Begun::Yours(external) => {
            set(READY);
            external.serve()
        }
        Begun::Busy => {
            let doublings = REFUSALS.fetch_add(1, Ordering::Relaxed).min(AGAIN_DOUBLINGS);
            NEXT.store(since_start() + ((AGAIN.as_nanos() as u64) << doublings), Ordering::Relaxed);
            set(IDLE);
        }
        Begun::Never => set(FAILED),
    });
    if served.is_err() {
        // Its message was written by the panic's hook. Whoever waits for this thread would wait for ever.
        std::process::abort();
    }
}

enum Begun {
    Yours(&'static External),
    Busy,
    Never,
}

fn begin() -> Begun {
    let Some(place) = PLACE.get() else { return Begun::Never };
    if table::leave().is_err() {
        return Begun::Never;
    }
    let terms = match Lease::ask(place) {
        Ok(Some(terms)) => terms,
        Ok(None) => return Begun::Busy,
        // `xpm run` has ended.
        Err(_) => return Begun::Never,
    };
    let Terms { lease, run, messages } = terms;
    let opened = table::set_messages(&messages).map_err(|error| error.to_string()).and_then(|()| open(&run));
    match opened {
        Ok((space, attachment)) => Begun::Yours(External::install(space, attachment, lease, run.verbose)),
        Err(line) => {
            lease.say(&Account { program: external::program(), failed: Some(line), ..Account::default() });
            Begun::Never
        }
    }
}

fn open(run: &Run) -> Result<(Space, Attachment), String> {
    let urls = run.allocator.parse().map_err(|error| format!("allocator: {error}"))?;
    let mut options = AttachOptions::new(urls, run.map.name.clone());
    options.client = Some(run.client);
    options.transport = run.transport;
    let token = run.token_file.as_deref().map(Token::load).transpose();
    options.token = token.map_err(|error| error.to_string())?;
    let (attachment, volume) =
        Attachment::adopt(&options, run.map.clone()).map_err(|error| error.to_string())?;
    let budget = match run.local {
        Amount::Bytes(local) => Budget::Fixed(local.0),
        Amount::Share(share) => Budget::percent(share.get()),
    };
    let space = SpaceOptions { budget, faults: Faults::Handled(run.threads), kept: 0 };
    let space = Space::open(volume, &space).map_err(|error| error.to_string())?;
    if !space.serves_system_calls() {
        return Err(
            "system calls could not use external memory, for this process may use userfaultfd for user mode only"
                .to_owned(),
        );
    }
    Ok((space, attachment))
}
