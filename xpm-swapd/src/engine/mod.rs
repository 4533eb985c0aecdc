//! The daemon: one loop that checks, decides and starts the decided action. Actions that take time run beside
//! the loop; at most one area is being made and one is being removed.
//!
//! * `look`: the present state, from the kernel, xpm-blk and the allocator.
//! * `make`: makes an area, from a name to swap that is on.
//! * `leave`: removes an area.
//! * `orders`: requests by hand.
//! * `view`: the view of the control interface.
//! * `housekeeping`: settings, control groups, the last resort.

mod housekeeping;
mod leave;
mod look;
mod make;
mod orders;
mod trouble;
mod view;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use xpm_control::client::Client;
use xpm_control::proc::Swap;
use xpm_protocol::api::allocator::Ending;
use xpm_protocol::api::blk::DeviceState;
use xpm_protocol::{HostId, Name};

use self::trouble::Troubles;
use crate::config::Config;
use crate::error::Error;
use crate::os::hand::Hand;
use crate::os::pressure::Watch;
use crate::os::table::Memory;
use crate::policy::{Action, Decision, Rules, Wish, decide, observe};
use crate::state::{Record, Stage, Store};

/// The running daemon.
pub struct Daemon {
    config: Config,
    rules: Rules,
    /// Areas are named `swap-HOST-N`.
    host: String,
    boot: HostId,
    store: Store,
    allocator: Client,
    blk: Client,
    hand: Hand,
    watch: Option<Watch>,
    notify: Arc<Notify>,
    live: Mutex<Live>,
    started: Instant,
}

/// The parts that a daemon is made of.
pub(crate) struct Parts {
    pub(crate) config: Config,
    pub(crate) host: String,
    pub(crate) boot: HostId,
    pub(crate) store: Store,
    pub(crate) allocator: Client,
    pub(crate) blk: Client,
    pub(crate) hand: Hand,
    pub(crate) watch: Option<Watch>,
    pub(crate) notify: Arc<Notify>,
}

/// The state in memory, which is determined again after a restart.
#[derive(Default)]
struct Live {
    /// The states of areas according to xpm-blk and the allocator.
    seen: BTreeMap<Name, Seen>,
    /// When they were last asked.
    asked_blk: Option<Instant>,
    asked_allocator: Option<Instant>,
    swaps: Vec<Swap>,
    memory: Memory,
    pressed: Option<Instant>,
    calm_since: Duration,
    make_not_before: Duration,
    drain_not_before: Duration,
    /// The next time to turn areas on again that were on before the machine was restarted.
    again: BTreeMap<Name, Duration>,
    making: Option<Name>,
    leaving: Option<Job>,
    /// Areas to be removed by hand, in order.
    waiting: VecDeque<Name>,
    troubles: Troubles,
    decision: Option<(Decision, Instant)>,
    settings: Vec<xpm_protocol::api::swapd::Setting>,
    kept_house: Option<Instant>,
    keeping_house: bool,
}

/// The state of an area according to xpm-blk and the allocator.
#[derive(Debug, Clone, Default)]
struct Seen {
    path: Option<String>,
    device: Option<DeviceState>,
    ending: Option<Ending>,
    /// The end for which a longer lease was requested.
    renewed: Option<u64>,
}

/// An area that is being removed.
struct Job {
    name: Name,
    why: String,
    from: u64,
    since: Instant,
    stop: Arc<AtomicBool>,
}

impl Daemon {
    pub(crate) fn new(parts: Parts) -> Daemon {
        let Parts { config, host, boot, store, allocator, blk, hand, watch, notify } = parts;
        Daemon {
            rules: config.rules(),
            config,
            host,
            boot,
            store,
            allocator,
            blk,
            hand,
            watch,
            notify,
            live: Mutex::default(),
            started: Instant::now(),
        }
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time since the daemon started, as the policy uses it.
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Makes the loop run its next turn at once.
    fn wake(&self) {
        self.notify.notify_one();
    }

    /// Ends a rest from an earlier boot: it was requested for the machine before its restart.
    ///
    /// # Errors
    /// When the change cannot be recorded.
    pub(crate) fn settle(&self) -> Result<(), Error> {
        self.store.change(|state| state.rest.take_if(|rest| rest.boot != self.boot).map(drop).unwrap_or(()))
    }

    /// Checks and acts until it is dropped.
    pub(crate) async fn run(self: Arc<Daemon>) {
        loop {
            if let Err(error) = self.turn() {
                self.trouble("itself", &error.to_string(), None);
            } else {
                self.well("itself");
            }
            tokio::select! {
                () = self.notify.notified() => {}
                () = tokio::time::sleep(self.config.look.0) => {}
            }
        }
    }

    fn turn(self: &Arc<Daemon>) -> Result<(), Error> {
        let reading = self.look()?;
        self.notice_what_others_turned_off()?;
        self.begin_housekeeping();
        self.go_on()?;
        let state = self.store.get();
        let mut standing = self.standing(&state);
        let decision = decide(&self.rules, &standing, &reading);
        observe(&self.rules, &mut standing, &reading, &decision.action);
        self.remember(&decision, standing.calm_since);
        self.tell_wish(&decision);
        if standing.next_step != state.next_step.0 {
            let (before, next) = (state.next_step, standing.next_step);
            // Skipped if a step was completed meanwhile.
            self.store.change(|state| {
                if state.next_step == before {
                    state.next_step.0 = next;
                }
            })?;
        }
        self.act(decision)
    }

    /// Clears the troubles of refused requests that are no longer wanted.
    fn tell_wish(&self, decision: &Decision) {
        const MAXIMUM: &str = "maximum";
        if decision.wish != Wish::Forbidden {
            self.well(MAXIMUM);
        }
        match decision.wish {
            Wish::None if decision.action == Action::Hold && self.live().making.is_none() => {
                self.well(make::GROW);
            }
            Wish::None | Wish::Later => {}
            Wish::Forbidden => self.trouble(MAXIMUM, &decision.reason, None),
        }
    }

    fn remember(&self, decision: &Decision, calm_since: Duration) {
        let mut live = self.live();
        live.calm_since = calm_since;
        let same = live.decision.as_ref().is_some_and(|(before, _)| before.action == decision.action);
        match live.decision.as_mut() {
            Some((before, _)) if same => before.reason.clone_from(&decision.reason),
            _ => live.decision = Some((decision.clone(), Instant::now())),
        }
    }

    fn act(self: &Arc<Daemon>, decision: Decision) -> Result<(), Error> {
        let reason = &decision.reason;
        match decision.action {
            Action::Hold => {}
            Action::Make { size, origin } => {
                let record = self.intend(size, origin)?;
                tracing::info!("{} of {} is made: {reason}", record.name, record.size);
                self.begin_make(record);
            }
            Action::Drain { name, cause } => {
                tracing::info!("{name} is taken away: {reason}");
                self.begin_leave(&name, cause, reason)?;
            }
            Action::Stay { name } => {
                tracing::info!("{reason}");
                if let Some(job) = &self.live().leaving {
                    debug_assert_eq!(job.name, name);
                    job.stop.store(true, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    /// Continues actions that an earlier life or an earlier try left incomplete.
    fn go_on(self: &Arc<Daemon>) -> Result<(), Error> {
        let state = self.store.get();
        let (now, rests) = (self.now(), state.rest.is_some());
        let (make, drain) = {
            let live = self.live();
            let make = live.making.is_none() && now >= live.make_not_before && !rests;
            (make, live.leaving.is_none() && now >= live.drain_not_before)
        };
        if make && let Some(record) = state.areas.iter().find(|area| self.is_unfinished(area)) {
            self.begin_make(record.clone());
        }
        if drain {
            let half = state.areas.iter().find(|area| matches!(area.stage, Stage::Leaving { .. }));
            match half {
                Some(record) => self.go_on_leaving(record)?,
                None if self.live().waiting.is_empty() => self.well(leave::DRAIN),
                None => self.begin_next_by_hand()?,
            }
        }
        Ok(())
    }

    /// Whether an area has to be turned on now: it never was, or the machine was restarted since.
    fn is_unfinished(&self, area: &Record) -> bool {
        let due = self.live().again.get(&area.name).is_none_or(|again| *again <= self.now());
        match &area.stage {
            Stage::Making => true,
            Stage::On { boot, .. } => *boot != self.boot && due,
            Stage::Leaving { .. } => false,
        }
    }
}
