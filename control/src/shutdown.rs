//! Signals: orderly shutdown of a daemon, reload, and protection against all other signals.
//!
//! | signal | what a daemon does |
//! |---|---|
//! | SIGTERM, SIGINT | ends in an orderly way |
//! | SIGHUP | reads its token file and the log's level again, and goes on |
//! | all others that end a process by default and can be caught | nothing |
//! | SIGKILL | ends: it cannot be caught |
//! | SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGSYS, SIGTRAP | ends: they report a fault of the process |

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGIO, SIGPIPE, SIGPROF, SIGQUIT, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU, SIGXFSZ,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGSTKFLT and SIGPWR of signal(7) on the machines that xpm runs on, and the real-time signals that the C library
/// leaves to programs.
const OTHERS: [i32; 2] = [16, 30];
const REAL_TIME: std::ops::RangeInclusive<i32> = 34..=64;

/// From now on a signal ends the process only if it is meant to (see the table above), or if it reports a fault of
/// the process. Programs that the process starts are not affected. Starts no thread and opens no descriptor.
pub fn survive_signals() {
    let named =
        [SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, SIGPIPE, SIGXCPU, SIGXFSZ];
    let caught = Arc::new(AtomicBool::new(false));
    for number in named.into_iter().chain(OTHERS).chain(REAL_TIME) {
        // A handler instead of SIG_IGN, because started programs would inherit SIG_IGN.
        if let Err(error) = signal_hook::flag::register(number, Arc::clone(&caught)) {
            tracing::debug!("signal {number} keeps its effect: {error}");
        }
    }
}

/// SIGTERM and SIGINT, caught since [`Shutdown::catch`].
#[derive(Debug)]
pub struct Shutdown {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Shutdown {
    /// Catches the signals from now on; they no longer end the process. Must be called within a
    /// tokio runtime.
    pub fn catch() -> io::Result<Shutdown> {
        Ok(Shutdown {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Resolves with the signal's name when a signal arrives, or has arrived before. While this future is polled,
    /// SIGHUP makes the daemon read the token file and the log level again.
    pub async fn signalled(&mut self) -> &'static str {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return "SIGTERM",
                _ = self.interrupt.recv() => return "SIGINT",
                _ = self.hang_up.recv() => reload().await,
            }
        }
    }
}

async fn reload() {
    tracing::info!("SIGHUP: reading the token file and the log's level anew");
    let work = tokio::task::spawn_blocking(|| {
        crate::log::reload();
        crate::token::reload_all();
    });
    if let Err(error) = work.await {
        tracing::error!("cannot read them: {error}");
    }
}

/// Longest time that an ending daemon takes, whatever it waits for.
pub const END_LIMIT: Duration = Duration::from_secs(9);

/// From now on the process ends within [`END_LIMIT`], with exit status 0. Work that is unfinished by then waits for
/// something that is away, and is handled at the next start, as after a crash.
pub fn end_in_time() {
    let ended = std::thread::Builder::new().name("ending".to_owned()).spawn(|| {
        std::thread::sleep(END_LIMIT);
        tracing::warn!("something hangs: the process ends without it");
        crate::log::flush();
        std::process::exit(0);
    });
    // Without the thread, the process ends as soon as it can.
    drop(ended);
}
