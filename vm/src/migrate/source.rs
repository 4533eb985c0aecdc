//! The source of a migration: `xpm vm migrate`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use xpm_control::random;
use xpm_control::token::Token;
use xpm_protocol::Name;

use crate::Error;
use crate::hot::Runs;
use crate::memory::Cache;
use crate::migrate::settle::{self, Outcome};
use crate::migrate::timeline::{Timeline, Waited};
use crate::migrate::tunnel;
use crate::migrate::wire::{Answer, Conn, Offer, Order, Purpose, STEP_LIMIT};
use crate::ownership::{Heirs, Ownership};
use crate::place::{Destination, Machine, Place, Stage};
use crate::process::Process;
use crate::qmp::Qmp;
use crate::verbs::Way;

/// How long QEMU's monitor may take to become free.
const MONITOR_LIMIT: Duration = Duration::from_secs(5);
/// How long to wait for the destination's report that its QEMU has ended. Safety does not depend on it.
const GIVE_UP_LIMIT: Duration = Duration::from_secs(5);

/// Parameters of a move.
#[derive(Debug, Clone)]
pub struct Request {
    /// Address at which `xpm vm receive` listens.
    pub to: SocketAddr,
    /// The pool's token.
    pub token: Option<Token>,
    /// Drop this host's cache before the state is sent, instead of at the same time.
    pub strict: bool,
}

/// Figures of a finished move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Time from the stop here until the machine ran there.
    pub down: Duration,
    /// Time of the whole command.
    pub total: Duration,
    /// Bytes of state that were sent.
    pub sent: u64,
    /// Rounds of write-back before the stop.
    pub rounds: u32,
    /// The steps that the machine waited for while it was stopped, in order.
    pub steps: Vec<Waited>,
}

/// Progress of a move. The reaction to a failure of the next step depends only on it.
///
/// ```text
///           stop          pre-switchover,          switch         completed,          order to run     it runs there
/// Running ───────▶ Stopped ──────────────▶ Quiet ─────────▶ Owned ──────────▶ Sent ──────────────▶ Ordered ───▶ (gone)
///    ▲                │      nothing dirty   │                │    loaded there │                     │
///    └────────────────┴──────────────────────┘                │                 │                     │ it never will
///    └──────────── cont ──────────── the RAM is taken back ───┴─────────────────┴─────────────────────┤
///                                                                                                    │ no answer
///                                                                                                    ▼
///                                                      stopped here, and `xpm vm settle` is the way out
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// The machine runs here, or is paused as its user wants.
    Running,
    /// This command has stopped the machine.
    Stopped,
    /// QEMU waits before sending the devices, and no page of the RAM is only in the cache here.
    Quiet,
    /// The destination owns the RAM.
    Owned,
    /// The destination has the whole state. QEMU is frozen here.
    Sent,
    /// The destination was ordered to run the machine, and may do so.
    Ordered,
}

/// Moves a machine away from this host. Returns when the machine runs there and its QEMU here has ended.
///
/// # Errors
/// When it could not be moved. The text states whether the machine runs on here, or what has to be done.
pub async fn migrate<O: Ownership>(
    place: &Place,
    request: &Request,
    mut ownership: O,
) -> Result<Moved, Error> {
    let begun = Instant::now();
    let _lock = place.lock_to_change()?;
    let machine = place.load_alive()?;
    if machine.stage != Stage::Here {
        return Err(Error::Machine(settle::advice(&machine)));
    }
    let process = machine.qemu.ok_or_else(|| Error::Machine("the record has no QEMU".to_owned()))?;
    let name = machine.name.clone();
    let begun_moving = Leaving::begin(place, machine, process, request, &mut ownership).await;
    let mut leaving = begun_moving.map_err(|error| as_before(&name, &error))?;
    let (down, sent, rounds) = match leaving.advance(request, &mut ownership).await {
        Ok(moved) => moved,
        Err(error) => leaving.undo(error, request, &mut ownership).await?,
    };
    let steps = leaving.timeline.steps();
    leaving.finish(&mut ownership).await?;
    Ok(Moved { down, total: begun.elapsed(), sent, rounds, steps })
}

/// Downtime, bytes of state, and rounds of write-back before the stop.
type Numbers = (Duration, u64, u32);

/// A machine that is being moved.
struct Leaving<'a> {
    place: &'a Place,
    machine: Machine,
    process: Process,
    qmp: Qmp,
    cache: Cache,
    session: String,
    control: Conn,
    step: Step,
    /// A migration was started in QEMU.
    is_sending: bool,
    /// Whether its user had paused it.
    paused: bool,
    /// Pages that this host has cached.
    hot: Vec<Runs>,
    stopped: Instant,
    timeline: Timeline,
}

impl<'a> Leaving<'a> {
    /// Makes all checks that can refuse the move, before the machine is touched.
    async fn begin(
        place: &'a Place,
        machine: Machine,
        process: Process,
        request: &Request,
        ownership: &mut impl Ownership,
    ) -> Result<Leaving<'a>, Error> {
        let mut qmp = Qmp::connect(&place.drive(), MONITOR_LIMIT).await?;
        let (name, only) = (&machine.name, ", and only one that runs or is paused can be moved");
        let paused = qmp.may_leave(&format!("migrate machine `{name}`"), name, only).await?;
        let cache = Cache::open(&machine.files)?;
        let session = format!("{:032x}", random::u128().map_err(|error| Error::Machine(error.to_string()))?);
        let offer = Offer {
            session: session.clone(),
            name: machine.name.clone(),
            size: machine.size,
            maximum: machine.maximum,
            disks: machine.disks.iter().map(|disk| disk.name.clone()).collect(),
            qemu: qmp.version(),
        };
        let mut control = Conn::open(request.to, request.token.as_ref(), Purpose::Move(offer)).await?;
        match control.receive(STEP_LIMIT).await? {
            Answer::Ready { heir, disk_heir } => {
                ownership.prepare(Heirs { ram: heir, disks: disk_heir }).await?;
            }
            Answer::Refused { why } | Answer::Never { why } => {
                return Err(Error::Peer(format!("{} does not take it: {why}", request.to)));
            }
            other => return Err(unexpected(&other)),
        }
        qmp.set_way(Way::Move, true).await?;
        Ok(Leaving {
            place,
            machine,
            process,
            qmp,
            cache,
            session,
            control,
            step: Step::Running,
            is_sending: false,
            paused,
            hot: Vec::new(),
            stopped: Instant::now(),
            timeline: Timeline::begin(),
        })
    }

    /// Carries out all steps, up to the destination's answer that the machine runs there. Returns the downtime, the
    /// bytes sent, and the rounds of write-back.
    async fn advance(&mut self, request: &Request, ownership: &mut impl Ownership) -> Result<Numbers, Error> {
        let destination = self.destination(request);
        self.set_stage(Stage::Leaving(destination))?;
        let rounds = self.cache.flush_ahead()?;
        // Advice: without it the move goes on.
        self.hot = self.cache.hot().unwrap_or_default();
        let listener = tunnel::listen(&self.place.state())?;

        self.stopped = Instant::now();
        self.timeline = Timeline::begin();
        // Set before the command: if its answer is lost, the machine may have stopped.
        self.step = Step::Stopped;
        if !self.paused {
            self.qmp.stop().await?;
        }
        self.timeline.mark("stop");
        // While QEMU connects and compares the capabilities of both sides, the last changes are written back.
        self.is_sending = true;
        self.qmp.migrate_to(&self.place.state()).await?;
        let carried = self.open_tunnel(&listener, request).await?;
        self.timeline.mark("connect");
        self.cache.flush()?;
        self.timeline.mark("write-back");
        self.qmp.migration_is("pre-switchover").await?;
        self.timeline.mark("pre-switchover");
        self.step = Step::Quiet;
        // Pages that devices wrote while they were being stopped.
        self.cache.flush()?;
        self.cache.prove_clean()?;
        self.timeline.mark("prove-clean");

        // Set before the switch, because a failed switch may have taken effect. Taking back RAM that was not given
        // changes nothing.
        self.step = Step::Owned;
        ownership.switch().await?;
        self.timeline.mark("switch");
        let (down, discarded) = if request.strict {
            ownership.discard().await?;
            self.timeline.mark("discard");
            (self.hand_over(request).await?, Ok(()))
        } else {
            let (down, discarded) = tokio::join!(self.hand_over(request), ownership.discard());
            (down?, discarded)
        };
        if let Err(error) = discarded {
            // The machine runs at its destination, which owns the RAM; the cache here is useless now.
            eprintln!("xpm: warning: {error}");
        }
        let sent = match tokio::time::timeout(GIVE_UP_LIMIT, carried).await {
            Ok(Ok(Ok((sent, _)))) => sent,
            // The machine has moved; the count is only for display.
            _ => 0,
        };
        Ok((down, sent, rounds))
    }

    /// Sends the state and orders the destination to run the machine. Returns the downtime.
    async fn hand_over(&mut self, request: &Request) -> Result<Duration, Error> {
        self.qmp.migrate_continue().await?;
        self.qmp.migration_is("completed").await?;
        // QEMU has sent everything, and must never run on RAM that another host may own.
        self.process.signal(Signal::STOP);
        self.timeline.mark("send");
        match self.control.receive(STEP_LIMIT).await? {
            Answer::Loaded => {}
            Answer::Never { why } => return Err(Error::Peer(why)),
            other => return Err(unexpected(&other)),
        }
        self.step = Step::Sent;
        self.timeline.mark("load");

        let destination = self.destination(request);
        self.set_stage(Stage::Gone(destination))?;
        // Set before the order is sent: bytes that were given to the kernel may arrive.
        self.step = Step::Ordered;
        self.control.send(&Order::Run { paused: self.paused }).await?;
        match self.control.receive(STEP_LIMIT).await? {
            Answer::Running => {}
            Answer::Never { why } => {
                self.step = Step::Sent;
                return Err(Error::Peer(why));
            }
            other => return Err(unexpected(&other)),
        }
        self.timeline.mark("run");
        let down = self.stopped.elapsed();
        for runs in std::mem::take(&mut self.hot) {
            if self.control.send(&Order::Hot(runs)).await.is_err() {
                break;
            }
        }
        Ok(down)
    }

    /// Joins QEMU's connection to a connection to the destination.
    async fn open_tunnel(
        &self,
        listener: &UnixListener,
        request: &Request,
    ) -> Result<JoinHandle<std::io::Result<(u64, u64)>>, Error> {
        let purpose = Purpose::State { session: self.session.clone() };
        let (qemu, network) = tokio::try_join!(
            tunnel::accept(listener),
            Conn::open(request.to, request.token.as_ref(), purpose)
        )?;
        let (network, early) = network.into_stream();
        Ok(tokio::spawn(async move { tunnel::carry(qemu, network, &early).await }))
    }

    /// The machine runs there: ends it here.
    async fn finish(mut self, ownership: &mut impl Ownership) -> Result<(), Error> {
        // The destination owns the RAM, whether the commit succeeds or not.
        let committed = ownership.commit().await;
        settle::end_here(self.place, &mut self.machine, self.process, Some(&mut self.qmp)).await?;
        committed.map_err(|error| {
            Error::Machine(format!(
                "the machine runs at its destination; the hand-over could not be closed: {error}"
            ))
        })
    }

    /// Goes back as far as is safe. Does nothing if the machine runs at its destination in spite of the error.
    ///
    /// # Errors
    /// The error for the user, unless the machine certainly runs there.
    async fn undo(
        &mut self,
        error: Error,
        request: &Request,
        ownership: &mut impl Ownership,
    ) -> Result<Numbers, Error> {
        let name = self.machine.name.clone();
        if self.step == Step::Ordered {
            match settle::ask(request.to, request.token.as_ref(), &self.session).await {
                Outcome::Running => return Ok((self.stopped.elapsed(), 0, 0)),
                Outcome::Never => {}
                Outcome::Unknown(why) => {
                    return Err(Error::Machine(format!(
                        "machine `{name}` was handed to {} and is stopped here; nobody answers whether it runs there ({error}; \
                         {why}): look there, then run `xpm vm settle {name} --gone` if it runs or ran there, and `xpm vm settle \
                         {name} --here` if it never did and its QEMU has ended",
                        request.to
                    )));
                }
            }
        }
        if self.control.send(&Order::GiveUp).await.is_ok() {
            // Waits only so that the QEMU there has ended when this command ends; it cannot run the machine without
            // an order.
            let _ = self.control.receive::<Answer>(GIVE_UP_LIMIT).await;
        }
        Err(match self.go_on_here(ownership).await {
            Ok(()) => as_before(&name, &error),
            Err(second) => Error::Machine(format!(
                "machine `{name}` was not moved ({error}), and it is stopped here, for it cannot go on: {second}; run \
                 `xpm vm settle {name}` when that is mended"
            )),
        })
    }

    /// Lets the machine go on here.
    async fn go_on_here(&mut self, ownership: &mut impl Ownership) -> Result<(), Error> {
        self.process.signal(Signal::CONT);
        if self.is_sending {
            self.qmp.migrate_cancel().await?;
        }
        if self.step >= Step::Owned {
            ownership.roll_back().await?;
        }
        if self.step >= Step::Stopped && !self.paused {
            self.qmp.cont().await?;
        }
        self.set_stage(Stage::Here)
    }

    fn set_stage(&mut self, stage: Stage) -> Result<(), Error> {
        self.machine.stage = stage;
        self.place.save(&self.machine)
    }

    fn destination(&self, request: &Request) -> Destination {
        Destination { to: request.to.to_string(), session: self.session.clone() }
    }
}

fn as_before(name: &Name, error: &Error) -> Error {
    Error::Machine(format!("machine `{name}` was not moved and is here as before: {error}"))
}

fn unexpected(answer: &Answer) -> Error {
    Error::Peer(format!("the other host answered {answer:?} out of turn: are both commands of one version?"))
}
