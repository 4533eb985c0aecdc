//! The task that owns the service: it feeds events in and carries effects out.
//!
//! The task waits only for the next event: stores go to the writer's thread, calls to tasks of their own. When the
//! store fails, the state on disk is unknown, so the daemon exits and the next start reads the true state; the data
//! path does not need the daemon meanwhile. When the store only has no room, or waits for etcd, requesters of changes
//! get that reason as an error, although their changes are kept and may be carried out later. The service goes on to
//! answer other requests.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use xpm_control::server::ApiError;
use xpm_control::token::Token;
use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::decision::Decision;

use crate::appliances::Appliances;
use crate::service::{Effect, Event, Moment, Outcome, ReplyTo, Request, Service, Settings};
use crate::store::{Decisions, MetadataStore, StoreError, Writer};

/// Interval of the service's ticks.
const TICK: Duration = Duration::from_millis(500);
/// Most requests in the queue to the service; each takes microseconds.
const REQUESTS_MAX: usize = 1024;

/// Most decisions about one name that are shown.
const DECISIONS_MAX: usize = 100;

type Question = (Request, oneshot::Sender<Result<Outcome, ApiError>>);

/// Asks the service. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    requests: mpsc::Sender<Question>,
    decisions: Arc<dyn Decisions>,
    /// Why the service answers no more.
    over: Arc<OnceLock<String>>,
}

impl Handle {
    /// Sends a request and waits for the answer. The request is carried out even if the caller stops waiting.
    pub(crate) async fn ask(&self, request: Request) -> Result<Outcome, ApiError> {
        let (answer, answered) = oneshot::channel();
        let ending = || {
            let why = self.over.get().map_or("the allocator stops, or starts to lead", String::as_str);
            ApiError(ErrorKind::Unavailable, format!("{why}; try again soon"))
        };
        self.requests.send((request, answer)).await.map_err(|_| ending())?;
        answered.await.map_err(|_| ending())?
    }

    /// The newest decisions about a name, the newest first.
    pub(crate) async fn decisions(&self, name: Name) -> Result<Vec<Decision>, ApiError> {
        let decisions = self.decisions.clone();
        let read = tokio::task::spawn_blocking(move || decisions.about(&name, DECISIONS_MAX)).await;
        let failed = |line: String| ApiError(ErrorKind::Internal, line);
        read.map_err(|error| failed(error.to_string()))?
            .map_err(|error| failed(xpm_control::error_line(&error)))
    }
}

/// The running task. Dropping it ends the task and the calls that are under way.
#[derive(Debug)]
pub(crate) struct Driver {
    task: JoinHandle<anyhow::Error>,
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Driver {
    /// Resolves only when the service cannot go on, with the reason.
    pub(crate) async fn failed(mut self) -> anyhow::Error {
        match (&mut self.task).await {
            Ok(error) => error,
            Err(error) => anyhow::Error::new(error).context("the service broke down"),
        }
    }
}

/// Loads the stored state and starts the task. Blocks while it loads.
pub(crate) fn start(
    settings: Settings,
    token: Option<Token>,
    mut store: impl MetadataStore,
) -> anyhow::Result<(Handle, Driver)> {
    let loaded = store.load()?;
    let mut service = Service::new(settings, Box::new(xpm_control::random::fill));
    let started = Instant::now();
    if let Some(why) = store.is_read_only() {
        drop(service.handle(moment(started), Event::Writing(Some(why))));
    }
    let effects = service.restore(moment(started), loaded);
    let (requests, questions) = mpsc::channel(REQUESTS_MAX);
    let (results, events) = unbounded_channel();
    let decisions = Arc::from(store.decisions());
    let told = results.clone();
    let tell = move |why| {
        // If the daemon is ending, the receiver is gone.
        let _ = told.send(Back::Writing(why));
    };
    let writer = Writer::start(store, Box::new(tell)).context("cannot start the thread of the metadata")?;
    let over = Arc::new(OnceLock::new());
    let running = Running {
        service,
        over: over.clone(),
        started,
        writer,
        appliances: Appliances::new(token),
        waiting: HashMap::new(),
        replies: 0,
        results,
        alive: watch::Sender::new(()),
    };
    let task = tokio::spawn(running.run(effects, questions, events));
    Ok((Handle { requests, decisions, over }, Driver { task }))
}

/// Results that come back to the service; unbounded, but the service asked for each of them.
enum Back {
    Event(Event),
    Writing(Option<String>),
    StoreFailed(StoreError),
}

/// A requester that waits for an answer.
struct Asker {
    answer: oneshot::Sender<Result<Outcome, ApiError>>,
    /// The request is for a change.
    changes: bool,
}

struct Running {
    service: Service,
    over: Arc<OnceLock<String>>,
    started: Instant,
    writer: Writer,
    appliances: Appliances,
    waiting: HashMap<ReplyTo, Asker>,
    replies: u64,
    results: UnboundedSender<Back>,
    /// Calls end when this is dropped.
    alive: watch::Sender<()>,
}

impl Running {
    async fn run(
        mut self,
        first: Vec<Effect>,
        mut questions: mpsc::Receiver<Question>,
        mut events: UnboundedReceiver<Back>,
    ) -> anyhow::Error {
        self.carry_out(first);
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let event = tokio::select! {
                _ = ticks.tick() => Event::Tick,
                Some(back) = events.recv() => match back {
                    Back::Event(event) => event,
                    Back::Writing(why) => {
                        if let Some(why) = &why {
                            self.tell_those_who_wait(why);
                        }
                        Event::Writing(why)
                    }
                    Back::StoreFailed(error) => {
                        // Nothing else sets it, so this cannot fail.
                        let _ = self.over.set(xpm_control::error_line(&error));
                        return error.into();
                    }
                },
                Some((request, answer)) = questions.recv() => {
                    let asker = Asker { answer, changes: request.changes() };
                    Event::Request(self.remember(asker), request)
                }
            };
            let effects = self.service.handle(moment(self.started), event);
            self.carry_out(effects);
        }
    }

    fn remember(&mut self, asker: Asker) -> ReplyTo {
        self.replies += 1;
        let reply = ReplyTo(self.replies);
        self.waiting.insert(reply, asker);
        reply
    }

    /// Answers the requesters of changes. Their requests are kept and carried out once they can be written, but no
    /// requester waits for that.
    fn tell_those_who_wait(&mut self, why: &str) {
        for (_, asker) in self.waiting.extract_if(|_, asker| asker.changes) {
            let line = format!("{why}. What was asked may be carried out then: look before you ask again");
            // The requester may have stopped waiting.
            let _ = asker.answer.send(Err(ApiError(ErrorKind::Unavailable, line)));
        }
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Reply(reply, result) => {
                    if let Some(asker) = self.waiting.remove(&reply) {
                        // The requester may have stopped waiting.
                        let _ = asker.answer.send(result);
                    }
                }
                Effect::Store(ticket, batch) => {
                    let results = self.results.clone();
                    let done = move |result: Result<(), StoreError>| {
                        let back =
                            result.map_or_else(Back::StoreFailed, |()| Back::Event(Event::Stored(ticket)));
                        // If the daemon is ending, the receiver is gone.
                        let _ = results.send(back);
                    };
                    self.writer.write(batch, Box::new(done));
                }
                Effect::Call(ticket, target, call) => {
                    let (appliances, results) = (self.appliances.clone(), self.results.clone());
                    let mut alive = self.alive.subscribe();
                    tokio::spawn(async move {
                        tokio::select! {
                            result = appliances.call(&target, call) => {
                                let _ = results.send(Back::Event(Event::Called(ticket, result)));
                            }
                            _ = alive.changed() => {}
                        }
                    });
                }
            }
        }
    }
}

fn moment(started: Instant) -> Moment {
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Moment { at: started.elapsed(), unix }
}
