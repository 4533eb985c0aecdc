//! Follows the allocator's orders for a program that uses an allocation itself: its regions move while the
//! program uses them.
//!
//! A change is not recorded on disk. A program that ends after it made a change firm had written all data to
//! both places, and writes nothing any more, so each of the two maps has all data, whichever becomes valid.

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

/// Interval of asking for orders whose events were missed.
const ASK_EVERY: Duration = Duration::from_secs(10);

/// A thread that executes the allocator's orders, until it is dropped.
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
    /// Starts following for a volume with this map.
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
            // A panic of the thread was reported already.
            let _ = thread.join();
        }
    }
}

/// Receives the news of appliances that the operator gave up. Separate from the other orders: a change that
/// waits for such an appliance continues only after this news.
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
                () = async { while !listener.hear().await.iter().any(|heard| heard.may_order(&self.name)) {} } => {}
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

/// Reports an event that may end the program: in the program's log, or on standard error if the program has no log, as
/// most programs that use the C library.
fn tell(line: &str) {
    match tracing::dispatcher::has_been_set() {
        true => tracing::error!("{line}"),
        false => eprintln!("xpm: {line}"),
    }
}

struct Follow {
    owner: Owner,
    name: Name,
    /// The client's knowledge of the allocation when it began with its first map.
    known: Known,
    /// Version of the present map.
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

    /// Waits until there may be orders for this allocation.
    async fn hear(&self, listener: &mut super::Listener) {
        loop {
            let heard = listener.hear().await;
            if heard.iter().any(|one| matches!(one, Heard::Appliance(name) if self.volume.is_on(name))) {
                self.volume.alarm().notify_one();
            }
            if heard.iter().any(|one| one.may_order(&self.name)) {
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
            // A newer map of this client wins over an allocator whose metadata are older.
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
                    // The memory of the old map must not be used for another purpose.
                    None => return,
                },
                // Dropping the change undoes it.
                Some(false) => return blocking(move || drop(under_way)).await.unwrap_or(()),
                // Either map may become valid: until the process ends, its writes go to both places.
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

    /// Copies the regions that move; afterwards writes go to both places.
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

    /// Whether a firm change is valid. None when the program ended before the allocator answered.
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

    /// Follows the valid map of the allocator when it is another one than ours and nothing has to be copied.
    async fn catch_up(&mut self) {
        let Ok(map) = self.owner.own(&self.name, "a mapping".to_owned(), false).await else { return };
        let number = map.version;
        if number < self.version() {
            return tracing::error!(
                "the allocator has an older map of allocation {}: its metadata are outdated, so ours stays",
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

/// Asks the allocator about paths that do not work, until the task is aborted.
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

/// Runs the work on a thread that may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| format!("a control task failed: {error}"))
}
