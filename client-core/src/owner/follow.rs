//! A program that uses an allocation itself carries out what the allocator orders: its regions move while it goes on.
//!
//! Nothing of a change is written down: who ends with a change firm had written everything to both places, and
//! writes nothing any more, so whichever map holds then has it all.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::Notify;
use xpm_protocol::Name;
use xpm_protocol::api::allocator::{ChangeKind, MapChange, Report};

use super::{CONNECT_LIMIT, Guard, Guarded, Heard, Known, Mover, Owner};
use crate::volume::{Change, ChangeError, Volume};

/// How often orders are asked for that were not heard of.
const ASK_EVERY: Duration = Duration::from_secs(10);

/// A thread that carries orders out, until it is dropped.
pub(crate) struct Follower {
    ending: Arc<Ending>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Ending {
    ended: AtomicBool,
    wake: Notify,
    lost: Notify,
}

impl Follower {
    /// Follows for a volume of whose map this is known.
    pub(crate) fn new(owner: Owner, name: Name, known: Known, volume: Volume) -> io::Result<Follower> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let ending = Arc::new(Ending::default());
        let lost =
            Lost { owner: owner.clone(), name: name.clone(), volume: volume.clone(), ending: ending.clone() };
        let version = Arc::new(AtomicU64::new(known.version));
        let follow = Follow { owner, name, known, version, volume, ending: ending.clone() };
        let builder = std::thread::Builder::new().name("xpm-orders".to_owned());
        let thread = crate::signals::blocked(|| {
            builder.spawn(move || {
                runtime.block_on(async {
                    tokio::join!(follow.run(), lost.run());
                });
            })
        })?;
        Ok(Follower { ending, thread: Some(thread) })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.ending.ended.store(true, Ordering::Release);
        self.ending.wake.notify_one();
        self.ending.lost.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic of it has been told already.
            let _ = thread.join();
        }
    }
}

/// Hears of appliances that are given up. Apart from what else is ordered: a change that waits for such an appliance
/// goes on only when this is heard.
struct Lost {
    owner: Owner,
    name: Name,
    volume: Volume,
    ending: Arc<Ending>,
}

impl Lost {
    async fn run(self) {
        let mut listener = self.owner.listen();
        loop {
            self.look().await;
            tokio::select! {
                () = self.ending.lost.notified() => return,
                () = async { while !listener.hear().await.contains(&Heard::Allocation(self.name.clone())) {} } => {}
                () = tokio::time::sleep(ASK_EVERY) => {}
            }
        }
    }

    async fn look(&self) {
        let Ok(orders) = self.owner.orders(&self.name).await else { return };
        for lender in &orders.given_up {
            let why = super::lost_on(&lender.name);
            if self.volume.give_up(lender.appliance, &why) {
                tell(&format!("allocation {} is {why}; what touches it gets SIGBUS", self.name));
            }
        }
    }
}

/// Says what a program that may be ended by it has to be told: in its log, or, where it has none, as most programs that use
/// the C library, on standard error.
fn tell(line: &str) {
    match tracing::dispatcher::has_been_set() {
        true => tracing::error!("{line}"),
        false => eprintln!("xpm: {line}"),
    }
}

struct Follow {
    owner: Owner,
    name: Name,
    /// Of the map that it began with.
    known: Known,
    /// Version of the map that is used.
    version: Arc<AtomicU64>,
    volume: Volume,
    ending: Arc<Ending>,
}

impl Follow {
    async fn run(mut self) {
        let ending = self.ending.clone();
        let mut listener = self.owner.listen();
        let guard = Guard::new(self.owner.clone(), self.name.clone());
        let watch = tokio::spawn(watch(guard, self.known, self.version.clone(), self.volume.clone()));
        loop {
            self.obey().await;
            tokio::select! {
                () = ending.wake.notified() => return watch.abort(),
                () = self.hear(&mut listener) => {}
                () = tokio::time::sleep(ASK_EVERY) => {}
            }
        }
    }

    /// Until there may be orders for this allocation.
    async fn hear(&self, listener: &mut super::Listener) {
        loop {
            let heard = listener.hear().await;
            if heard.iter().any(|one| matches!(one, Heard::Appliance(name) if self.volume.is_on(name))) {
                self.volume.alarm().notify_one();
            }
            if heard.contains(&Heard::Allocation(self.name.clone())) {
                return self.volume.alarm().notify_one();
            }
        }
    }

    async fn obey(&mut self) {
        let Ok(orders) = self.owner.orders(&self.name).await else { return };
        let grants = self.volume.grants();
        let orders = self.owner.tell_keys(&self.name, self.known.epoch, &grants, orders).await;
        if orders.hand_over.is_some() {
            let why = "a program uses it at addresses: end that program, or transfer with --force".to_owned();
            let _ = self.owner.say(&self.name, &Report::Kept { why }).await;
        }
        match orders.change {
            Some(change) if !change.switched => self.carry_out(change).await,
            Some(_) => self.catch_up().await,
            // A map of ours that is newer wins over an allocator whose metadata are of yesterday.
            None if orders.version > self.version() => self.catch_up().await,
            None => {}
        }
    }

    fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    async fn carry_out(&mut self, change: MapChange) {
        let number = change.number;
        let report = match self.make_firm(&change).await {
            Ok(under_way) => match self.holds(&change).await {
                Some(true) => match self.switch(under_way, &change).await {
                    Some(report) => report,
                    // What the old map had must not be used for something else.
                    None => return,
                },
                // Dropped, it is undone.
                Some(false) => return blocking(move || drop(under_way)).await.unwrap_or(()),
                // Either map may hold: until the process ends, what is still written goes to both places.
                None => return std::mem::forget(under_way),
            },
            Err(why) => {
                tracing::warn!("allocation {} is not changed: {why}", self.name);
                Report::Refused { number, why }
            }
        };
        tokio::select! {
            _ = self.owner.say_until_heard(&self.name, &report) => {}
            () = self.ending.wake.notified() => self.ending.wake.notify_one(),
        }
    }

    /// Copies what moves; from then on writes go to both places.
    async fn make_firm(&self, change: &MapChange) -> Result<Change, String> {
        if change.kind == ChangeKind::Shrink {
            return Err(
                "a program uses it at addresses, which cannot go away: end that program first".to_owned()
            );
        }
        let (volume, owner, change) = (self.volume.clone(), self.owner.clone(), change.clone());
        let ending = self.ending.clone();
        let firm = blocking(move || {
            let under_way = volume.change(&change.next, &change.moved, CONNECT_LIMIT)?;
            Mover::new(&owner, &change).with_end(&ending.ended).copy(&under_way)?;
            under_way.firm()?;
            Ok(under_way)
        });
        firm.await?.map_err(|error: ChangeError| error.to_string())
    }

    /// Whether a firm change holds. None: the program ended before the allocator answered.
    async fn holds(&self, change: &MapChange) -> Option<bool> {
        let report = Report::Ready { number: change.number };
        tokio::select! {
            orders = self.owner.say_until_heard(&self.name, &report) => {
                Some(orders.is_some_and(|orders| orders.version == change.next.version))
            }
            () = self.ending.wake.notified() => {
                self.ending.wake.notify_one();
                None
            }
        }
    }

    async fn switch(&mut self, under_way: Change, change: &MapChange) -> Option<Report> {
        if let Err(error) = blocking(move || under_way.switch()).await {
            tracing::error!("allocation {}: {error}", self.name);
            return None;
        }
        self.version.store(change.next.version, Ordering::Release);
        let grown = change.kind == ChangeKind::Grow;
        let how = grown.then(|| "the program sees it when it opens the allocation again".to_owned());
        Some(Report::Done { number: change.number, how })
    }

    /// The map that holds is another than ours, with nothing to copy.
    async fn catch_up(&mut self) {
        let Ok(map) = self.owner.own(&self.name, "a mapping".to_owned(), false).await else { return };
        let number = map.version;
        if number < self.version() {
            return tracing::error!(
                "the allocator has an older map of allocation {}: its metadata are of yesterday; ours stays",
                self.name
            );
        }
        if number != self.version() {
            let volume = self.volume.clone();
            let turned = blocking(move || volume.change(&map, &[], CONNECT_LIMIT).map(Change::switch));
            if let Err(error) = turned.await.and_then(|turned| turned.map_err(|error| error.to_string())) {
                return tracing::error!("allocation {} cannot turn to its new map: {error}", self.name);
            }
            self.version.store(number, Ordering::Release);
        }
        let _ = self.owner.say(&self.name, &Report::Done { number, how: None }).await;
    }
}

/// Asks the allocator about paths that do not work, until it is aborted.
async fn watch(guard: Guard, known: Known, version: Arc<AtomicU64>, volume: Volume) {
    let alarm = volume.alarm();
    loop {
        let known = Known { version: version.load(Ordering::Acquire), ..known };
        let (_, again) = guard.look(known, &volume).await;
        tokio::select! {
            () = alarm.notified() => {}
            () = tokio::time::sleep(again.unwrap_or(Duration::MAX)) => {}
        }
    }
}

/// On a thread that may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| format!("a control task failed: {error}"))
}
