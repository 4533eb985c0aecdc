//! Changing a volume while it is used: it grows, shrinks, or some of its regions move.
//!
//! The caller performs a change in steps, and the channels follow:
//!
//! 1. [`Volume::change`]: the channels receive paths to the new grants.
//! 2. [`Change::copy`]: regions that move are copied, run by run. Writes to the run that is being copied
//!    wait, writes to bytes that are copied already go to both places.
//! 3. [`Change::firm`]: all bytes are copied; from now on a write ends only when both places have it. Now the
//!    change may be recorded as done.
//! 4. [`Change::switch`]: reads go to the new places, and no I/O goes to the old ones.
//!
//! Until the last step the change can be dropped, which restores the state before it. No step delays I/O,
//! except for writes to the run that is being copied.

use std::sync::Arc;
use std::time::{Duration, Instant};

use xpm_protocol::GrantId;
use xpm_protocol::api::allocator::{Map, RegionSlot};

use super::connector::Connector;
use super::moves::{Move, Moves, Progress};
use super::orders::{Mailbox, NewWay, Order};
use super::plan::{MapError, Plan};
use super::port::Port;
use super::{Live, Underway, Volume};

/// Time limit of the channels for one step.
const STEP_LIMIT: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Why a change failed. The volume is as before the change, unless the variant says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The new map is invalid.
    #[error("the map to change to cannot be used: {0}")]
    Map(#[from] MapError),
    /// The new map has another layout, or moves regions that the order does not name.
    #[error("the new map does not fit the present one: {0}")]
    Unfit(String),
    /// No thread could be started.
    #[error("cannot start a thread that connects to an appliance: {0}")]
    Thread(std::io::Error),
    /// A new appliance cannot be reached.
    #[error("appliance `{appliance}` is not connected: {reason}")]
    NotReady {
        /// The appliance.
        appliance: String,
        /// The error of the last attempt.
        reason: String,
    },
    /// Operations in flight did not end in time, so that the change could not continue.
    #[error(
        "operations in flight did not end within {0:?}, so the change was not continued: an appliance may \
         be out of reach, or a client of a socket slow"
    )]
    Stuck(Duration),
    /// A run could not be copied.
    #[error("{0}")]
    Copy(String),
    /// A write to a new place failed.
    #[error("a write to the new place failed")]
    NewPlace,
}

/// A run of a region that is to be copied, with its old and new place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The region, by its place in the allocation.
    pub region: u32,
    /// The grant that the run lies in, and the run's first byte in the grant's export.
    pub from: (GrantId, u64),
    /// The grant that the run goes to, and the run's first byte in the grant's export.
    pub to: (GrantId, u64),
    /// Bytes.
    pub len: u64,
}

/// A change in progress. Dropping it before [`Change::switch`] undoes it.
pub struct Change {
    volume: Volume,
    plan: Arc<Plan>,
    moves: Arc<Moves>,
    /// Numbers of the new paths.
    added: Vec<u32>,
    /// Grants by the numbers of their paths.
    grants: Vec<Option<GrantId>>,
    switched: bool,
}

impl std::fmt::Debug for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Change").field("moves", &self.moves.all()).finish_non_exhaustive()
    }
}

impl Volume {
    /// Begins a change to `next`, a map of the same allocation: `moved` are the regions that lie at another
    /// place in `next` and have to be copied. Waits until new appliances are connected, for at most `limit`.
    ///
    /// # Errors
    /// See [`ChangeError`]; [`ChangeError::Unfit`] also while another change is in progress.
    pub fn change(&self, next: &Map, moved: &[u32], limit: Duration) -> Result<Change, ChangeError> {
        let until = Instant::now() + limit;
        let plan = Plan::new(next)?;
        *self.inner.probe() = None;
        let (change, mailboxes) = self.begin(next, plan, moved)?;
        wait_all(&mailboxes)?;
        change.wait_links(until)?;
        let progress = Progress::new(change.moves.clone());
        change.tell(|| Order::Progress(progress.clone()))?;
        Ok(change)
    }

    /// Resumes a change that was firm when the volume was closed. To be called before a channel exists; from
    /// the first write on, writes go to both places.
    ///
    /// # Errors
    /// See [`ChangeError`].
    pub fn resume(&self, next: &Map, moved: &[u32]) -> Result<Change, ChangeError> {
        *self.inner.probe() = None;
        let (change, _) = self.begin(next, Plan::new(next)?, moved)?;
        let progress = Progress { number: moved.len() as u32, ..Progress::new(change.moves.clone()) };
        change.live().change =
            Some(Underway { progress: Some(progress), firm: Some(change.plan.size()), reads: None });
        Ok(change)
    }

    /// Adds the new paths, and sends the channels their orders.
    fn begin(&self, next: &Map, plan: Plan, moved: &[u32]) -> Result<(Change, Vec<Told>), ChangeError> {
        let shared = &self.inner.shared;
        let mut live = shared.live();
        if live.change.is_some() {
            return Err(ChangeError::Unfit("another change is being carried out".to_owned()));
        }
        let (numbers, new) = number_ways(&live, next);
        let plan = Arc::new(plan.renumbered(&numbers));
        let moves = Arc::new(moves(&live.plan, &plan, moved)?);
        let links = super::LinkOptions {
            epoch: next.epoch,
            held: None,
            contested: false,
            ..self.inner.links.clone()
        };
        let connectors = start_all(next, &new, &links)?;
        let mut added = Vec::with_capacity(new.len());
        for (&(number, _), connector) in new.iter().zip(connectors) {
            match live.ways.get_mut(number as usize) {
                Some(place) => *place = Some(connector),
                None => live.ways.push(Some(connector)),
            }
            added.push(number);
        }
        live.change = Some(Underway::default());
        let grants = live.ways.iter().map(|way| Some(way.as_ref()?.grant().id)).collect();
        let told = live.tell_begin(&added);
        drop(live);
        let change = Change { volume: self.clone(), plan, moves, added, grants, switched: false };
        Ok((change, told))
    }
}

type Told = (Arc<Mailbox>, u64);

impl Live {
    fn tell_begin(&mut self, added: &[u32]) -> Vec<Told> {
        self.members.retain(|member| !member.mailbox.is_closed());
        let mut told = Vec::with_capacity(self.members.len());
        for member in &self.members {
            let new = |&number: &u32| {
                let connector = self.ways[number as usize].clone()?;
                let port = Arc::new(Port::new(member.queue, member.mailbox.bell().clone()));
                Some(NewWay { number, port, connector })
            };
            let ways: Vec<NewWay> = added.iter().filter_map(new).collect();
            let ports: Vec<_> = ways.iter().map(|way| (way.connector.clone(), way.port.clone())).collect();
            let number = member.mailbox.tell(Order::Begin(ways));
            ports.into_iter().for_each(|(connector, port)| connector.add(port));
            told.push((member.mailbox.clone(), number));
        }
        told
    }

    fn tell(&mut self, order: impl Fn() -> Order) -> Vec<Told> {
        self.members.retain(|member| !member.mailbox.is_closed());
        self.members.iter().map(|member| (member.mailbox.clone(), member.mailbox.tell(order()))).collect()
    }
}

impl Change {
    /// The regions that move, by their places in the allocation.
    pub fn moved(&self) -> impl Iterator<Item = u32> + '_ {
        self.moves.all().iter().map(|one| one.region)
    }

    /// Copies every region that moves, in runs of at most `run_len` bytes. `copy` is called for each run; it
    /// blocks until the run is copied, or returns why it could not be copied; meanwhile, writes to the run
    /// wait. `between` is called after each run, with the number of bytes copied so far and the total; it may
    /// sleep, and returns an error to cancel the change.
    ///
    /// # Errors
    /// The error of `copy` or `between`, or [`ChangeError::Stuck`].
    pub fn copy(
        &self,
        run_len: u64,
        mut copy: impl FnMut(&Run) -> Result<(), String>,
        mut between: impl FnMut(u64, u64) -> Result<(), String>,
    ) -> Result<(), ChangeError> {
        let region_len = self.plan.region_len();
        let all = self.moves.all().len() as u64 * region_len;
        let mut copied = 0;
        let mut progress = Progress::new(self.moves.clone());
        for (number, one) in (0..).zip(self.moves.all()) {
            (progress.number, progress.done, progress.locked) = (number, 0, 0);
            while progress.done < region_len {
                let len = run_len.min(region_len - progress.done);
                progress.locked = progress.done + len;
                self.progress(&progress)?;
                copy(&self.run(one, progress.done, len)).map_err(ChangeError::Copy)?;
                progress.done = progress.locked;
                copied += len;
                self.progress(&progress)?;
                if self.moves.have_failed() {
                    return Err(ChangeError::NewPlace);
                }
                between(copied, all).map_err(ChangeError::Copy)?;
            }
        }
        (progress.number, progress.done, progress.locked) = (self.moves.all().len() as u32, 0, 0);
        self.progress(&progress)
    }

    fn run(&self, one: &Move, start: u64, len: u64) -> Run {
        let place = |slot: RegionSlot| {
            let grant = self.grants[slot.grant as usize].unwrap_or(GrantId::from_u128(0));
            (grant, u64::from(slot.slot) * self.plan.region_len() + start)
        };
        Run { region: one.region, from: place(one.from), to: place(one.to), len }
    }

    fn progress(&self, progress: &Progress) -> Result<(), ChangeError> {
        self.live().change = Some(Underway { progress: Some(progress.clone()), firm: None, reads: None });
        self.tell(|| Order::Progress(progress.clone()))
    }

    /// Makes the change firm, after all bytes are copied: from now on a write ends only when both places have
    /// it, and no I/O goes beyond the new size.
    ///
    /// # Errors
    /// When a write failed at the new place: the change has to be dropped.
    pub fn firm(&self) -> Result<(), ChangeError> {
        if let Some(change) = &mut self.live().change {
            change.firm = Some(self.plan.size());
        }
        self.tell(|| Order::Firm(self.plan.size()))?;
        match self.moves.have_failed() {
            true => Err(ChangeError::NewPlace),
            false => Ok(()),
        }
    }

    /// Ends the change: the new places are valid. Blocks until every channel reads there, and then until no
    /// operation is in flight at the old places, however long that takes: only then may their memory be used
    /// for another purpose.
    pub fn switch(mut self) {
        self.switched = true;
        let plan = self.plan.clone();
        // All channels must read at the new places before one of them may write to these only; else another
        // channel would read stale data at the old place.
        let mut live = self.live();
        if let Some(change) = &mut live.change {
            change.reads = Some(plan.clone());
        }
        let told = live.tell(|| Order::Read(plan.clone()));
        drop(live);
        wait_long(&told);
        let mut live = self.live();
        live.plan = plan.clone();
        if let Some(change) = &mut live.change {
            change.reads = None;
        }
        let told = live.tell(|| Order::Switch(plan.clone()));
        drop(live);
        wait_long(&told);
        self.end(&plan);
    }

    /// Stops the paths to grants without regions in `plan`.
    fn end(&self, plan: &Plan) {
        let used = |number: usize| plan.slots().iter().any(|slot| slot.grant as usize == number);
        let mut live = self.live();
        for (number, way) in live.ways.iter_mut().enumerate() {
            if !used(number)
                && let Some(connector) = way.take()
            {
                connector.stop();
            }
        }
        live.change = None;
        drop(live);
        self.watch_again();
    }

    /// Waits until every channel has its new links.
    fn wait_links(&self, until: Instant) -> Result<(), ChangeError> {
        let connectors: Vec<Arc<Connector>> =
            self.added.iter().filter_map(|&number| self.live().ways[number as usize].clone()).collect();
        while let Some(missing) = connectors.iter().find(|connector| !connector.is_up()) {
            if Instant::now() >= until {
                let status = missing.status();
                return Err(ChangeError::NotReady {
                    appliance: status.appliance_name.to_string(),
                    reason: status.reason.unwrap_or_else(|| "no answer".to_owned()),
                });
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(())
    }

    fn live(&self) -> std::sync::MutexGuard<'_, Live> {
        self.volume.inner.shared.live()
    }

    fn tell(&self, order: impl Fn() -> Order) -> Result<(), ChangeError> {
        let told = self.live().tell(order);
        wait_all(&told)
    }

    /// Creates a probe when no channel exists, so that the state of the appliances stays known.
    fn watch_again(&self) {
        let inner = &self.volume.inner;
        if inner.shared.live().members.iter().all(|member| member.mailbox.is_closed()) {
            *inner.probe() = inner.channel().ok();
        }
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        if self.switched {
            return;
        }
        let mut live = self.live();
        live.change = None;
        let told = live.tell(|| Order::Abort);
        for &number in &self.added {
            if let Some(connector) = live.ways[number as usize].take() {
                connector.stop();
            }
        }
        drop(live);
        // The channels execute the order sooner or later, and no other work is left here.
        let _ = wait_all(&told);
        self.watch_again();
    }
}

fn wait_all(told: &[Told]) -> Result<(), ChangeError> {
    let until = Instant::now() + STEP_LIMIT;
    match told.iter().all(|(mailbox, number)| mailbox.wait(*number, until)) {
        true => Ok(()),
        false => Err(ChangeError::Stuck(STEP_LIMIT)),
    }
}

/// Waits without a limit; logs repeatedly that it still waits.
fn wait_long(told: &[Told]) {
    while let Err(error) = wait_all(told) {
        tracing::warn!("a change of a volume waits for its end: {error}");
    }
}

/// Starts connectors to the new grants: all of them, or none on an error.
fn start_all(
    next: &Map,
    new: &[(u32, usize)],
    links: &super::LinkOptions,
) -> Result<Vec<Arc<Connector>>, ChangeError> {
    let mut connectors: Vec<Arc<Connector>> = Vec::with_capacity(new.len());
    for (_, grant) in new {
        match Connector::start(next.grants[*grant].clone(), links.clone()) {
            Ok(connector) => connectors.push(connector),
            Err(error) => {
                connectors.iter().for_each(|connector| connector.stop());
                return Err(ChangeError::Thread(error));
            }
        }
    }
    Ok(connectors)
}

/// Returns the numbers of the paths to a map's grants, in their order, and for each new path its number and
/// the grant's place in the map. Free numbers are reused.
fn number_ways(live: &Live, next: &Map) -> (Vec<u32>, Vec<(u32, usize)>) {
    let mut free = live.ways.iter().enumerate().filter(|(_, way)| way.is_none()).map(|(number, _)| number);
    let mut end = live.ways.len();
    let mut new = Vec::new();
    let mut number = |(place, id): (usize, GrantId)| {
        let known = |way: &Option<Arc<Connector>>| way.as_ref().is_some_and(|way| way.grant().id == id);
        if let Some(number) = live.ways.iter().position(known) {
            return number as u32;
        }
        let number = free.next().unwrap_or_else(|| {
            end += 1;
            end - 1
        });
        new.push((number as u32, place));
        number as u32
    };
    let numbers = next.grants.iter().map(|grant| grant.id).enumerate().map(&mut number).collect();
    (numbers, new)
}

/// The moves from one plan to another.
fn moves(now: &Plan, next: &Plan, moved: &[u32]) -> Result<Moves, ChangeError> {
    if !now.has_layout_of(next) {
        return Err(ChangeError::Unfit("another layout or region size".to_owned()));
    }
    let one = |&region: &u32| {
        let at = |plan: &Plan| plan.slots().get(region as usize).copied();
        let (from, to) = at(now).zip(at(next)).filter(|(from, to)| from != to).ok_or_else(|| {
            ChangeError::Unfit(format!(
                "region {region} is listed as moved, but has the same \
                 place in the new map"
            ))
        })?;
        Ok(Move { region, from, to })
    };
    let moves = moved.iter().map(one).collect::<Result<Vec<_>, ChangeError>>()?;
    Ok(Moves::new(now.slots().len().max(next.slots().len()), moves))
}
