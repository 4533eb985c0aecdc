//! Ctrl-C and SIGTERM as a flag, so that the demo ends between two steps and cleans up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};

/// Whether somebody asked the demo to end. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes SIGINT, SIGTERM and SIGHUP over from their default, which would end this process with
    /// its daemons left behind. A thread waits for them until the process ends.
    pub(super) fn catch() -> Result<Interrupt> {
        let interrupt = Interrupt::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let guard = runtime.enter();
        let mut signals =
            kinds.map(signal).into_iter().collect::<Result<Vec<_>, _>>().context("cannot catch signals")?;
        drop(guard);
        let flag = interrupt.clone();
        thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async {
                let [first, second, third] = &mut signals[..] else { return };
                loop {
                    tokio::select! { _ = first.recv() => {}, _ = second.recv() => {}, _ = third.recv() => {} }
                    flag.0.store(true, Ordering::Relaxed);
                }
            });
        })?;
        Ok(interrupt)
    }

    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
