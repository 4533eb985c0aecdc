//! The allocator's decisions: one owner of all state, events in, effects out.
//!
//! [`Service::handle`] takes an event and returns its effects, which the caller carries out: answers to give, changes
//! to make durable, calls to appliances. The service does no I/O, reads no clock and waits for nothing; the results
//! of its effects come back as events. Each store or call is answered by exactly one event, also when it failed. So a
//! test can play every interleaving, time-out and crash, and the service never holds state while it waits for a
//! network.
//!
//! The life of an allocation: `Creating` is recorded, regions are reserved, grants committed, `Ready` recorded
//! (`commit.rs`); each change of owner after the first raises the epoch (`owner.rs`); `Deleting` or `Undoing` is
//! recorded, grants are revoked, the record is removed (`purge.rs`). `reconcile.rs` settles the steps that a restart
//! finds half done.
//!
//! A request is first evaluated under the documents (`asking.rs`), then against the appliances (`wish.rs`), and the
//! decision is recorded (`audit.rs`). A request may wait for its turn (`waiting.rs`), and an allocation may end by
//! itself (`lease.rs`).

mod asking;
mod audit;
mod change;
mod check;
mod clock;
mod commit;
mod describe;
mod documents;
mod drain;
mod early;
mod events;
mod forbear;
mod frozen;
mod garbage;
mod handover;
mod health;
mod heartbeat;
mod lease;
mod lives;
mod lost;
mod message;
mod metrics;
mod orders;
mod owner;
mod purge;
mod rebalance;
mod reconcile;
mod rename;
#[cfg(test)]
mod simulation;
mod slabs;
mod standby;
mod twins;
mod view;
mod waiting;
mod wish;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::time::Duration;

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{self as api, Behind, Client, MetadataState};
use xpm_protocol::api::event::EventKind;
use xpm_protocol::{AllocationId, ApplianceId, ClientId, GrantKey, HandoverId, Life, Name, RequestId};

use crate::inventory::Inventory;
use crate::policy::Policy;
use crate::store::{AllocationRecord, Batch, Change};
use crate::usage::Usage;
use lives::Claim;

pub use handover::Which;
pub use message::{
    Answer, Call, CallError, Effect, Event, EventQuery, Moment, Outcome, Raising, ReplyTo, Request, Target,
    Ticket,
};

/// Most requests that wait for one allocation while other work is done to it.
const QUEUE_MAX: usize = 32;
/// Longest text about an owner (host name, purpose), in bytes.
const TEXT_LEN_MAX: usize = 256;

/// Settings of the operator.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Time between heartbeats of an appliance.
    pub interval: Duration,
    /// How long appliances keep a reservation without a grant.
    pub reserve_ttl: Duration,
    /// Time of grace of an allocation that gives way to another, until its memory is freed.
    pub reclaim_grace: Duration,
    /// How long decisions are kept.
    pub keep_decisions: Duration,
    /// Time between two checks of the grants that an appliance has.
    pub reconcile: Duration,
    /// How long a grant that no record knows is kept.
    pub garbage_grace: Duration,
}

/// Fills with random bytes fit for keys.
pub type Dice = Box<dyn FnMut(&mut [u8]) -> io::Result<()> + Send>;

/// The owner of the allocator's state.
pub struct Service {
    settings: Settings,
    dice: Dice,
    inventory: Inventory,
    allocations: BTreeMap<AllocationId, Entry>,
    /// Allocations by the name that they hold.
    names: HashMap<Name, AllocationId>,
    /// New names that are taken and not durable yet.
    renaming: BTreeSet<Name>,
    /// Creations for which appliances are sampled once more before the creation is refused.
    refreshes: HashMap<u64, wish::Refresh>,
    /// Creations that wait for memory that is being cleared.
    parked: Vec<wish::Wish>,
    /// Appliances that were not heard since this process started, and orders that wait for them.
    early: early::Early,
    /// Appliances whose heartbeats are refused.
    twins: twins::Twins,
    /// Requests that wait for their turn, in the order in which they are served.
    queue: Vec<waiting::Waiter>,
    /// Cancelled requests, and until when (seconds since 1970) their clients may repeat them.
    cancelled: VecDeque<(RequestId, u64)>,
    /// Next position to try behind the head of the queue.
    queue_turn: usize,
    policy: Policy,
    usage: Usage,
    /// Facts that clients reported about themselves.
    clients: HashMap<Name, HeardClient>,
    clock_of_day: clock::Clock,
    /// When each owner was heard last, by the service's clock.
    owners_heard: HashMap<ClientId, Duration>,
    /// Announced ends that neither the owner nor one of its appliances can have heard of, and since when.
    deaf: BTreeMap<AllocationId, u64>,
    /// The newest state of the metadata that is durable; none before it is restored.
    state: Option<MetadataState>,
    /// Set once a client or an appliance reports a newer state of the metadata than ours.
    behind: Option<Behind>,
    /// Why the metadata cannot be written now, if so.
    read_only: Option<String>,
    /// Appliances whose record changed while the metadata could not be written.
    unsaved: BTreeSet<ApplianceId>,
    /// Allocations with a change that an earlier process left half done, and until when to wait for their appliances.
    unsettled: BTreeMap<AllocationId, Duration>,
    /// Allocations whose end was moved, and the move is not durable yet.
    shifted: BTreeSet<AllocationId>,
    /// When the durable note "the allocator runs" was written last, by the service's clock.
    alive_noted: Option<Duration>,
    /// The next step of each allocation that ends, with its time.
    timers: BTreeSet<(u64, AllocationId)>,
    /// Allocations whose memory is being given back.
    purging: BTreeSet<AllocationId>,
    events: events::Events,
    /// State of the appliances that are being emptied.
    drains: BTreeMap<ApplianceId, drain::Draining>,
    balancing: rebalance::Balancing,
    found: garbage::Found,
    /// When old decisions were deleted last, seconds since 1970.
    pruned: u64,
    /// Stands for the usage of an account without memory: an empty map to borrow.
    nothing: HashMap<ApplianceId, u64>,
    /// Hand-overs that this process works at.
    handovers: BTreeMap<HandoverId, handover::Handing>,
    /// Requests that wait until appliances have said which lives are connected.
    askings: HashMap<u64, lives::Asking>,
    awaited: HashMap<Ticket, Awaited>,
    effects: Vec<Effect>,
    now: Moment,
    /// Count of events and tickets: one number line, so that a later one has the larger number.
    clock: u64,
}

/// An allocation, and the work that is being done to it.
struct Entry {
    record: AllocationRecord,
    work: Work,
    /// Number of the event that made the entry; 0 for records that were loaded at the start.
    born: u64,
    /// Requests that wait until the work ends.
    queue: VecDeque<(ReplyTo, Request)>,
    /// When its next step towards its end is due.
    timer: Option<u64>,
    /// The last step towards its end that was announced.
    told: lease::Told,
    /// Time that does not count against its end and is not in the record yet.
    shift: Option<forbear::Shift>,
    /// Earliest moment of the next step of its end, and since when such a step counts as late; seconds since 1970.
    steps_from: u64,
    /// Whether the usage includes it.
    counted: bool,
    /// State of the present or the last change that is not in the record.
    side: change::Side,
    /// Set while the owner is asked to let go so that another client gets the allocation.
    hand_over: Option<orders::HandingOver>,
    /// Grants that appliances do not have any more.
    lost: garbage::Lost,
    /// Fingerprint of the descriptor that its appliances were sent last.
    described: Option<describe::Fingerprint>,
    /// When its owner was heard last, by the service's clock.
    owner_heard: Duration,
    /// The life that was refused last. An event reports each refused life once.
    refused: Option<Life>,
}

/// A client, with its round-trip times ready for decisions.
struct HeardClient {
    client: Client,
    round_trips: HashMap<ApplianceId, u64>,
}

/// At most one thing is done to an allocation at a time.
enum Work {
    Idle,
    Storing,
    Creating(Box<commit::Creation>),
    Raising(owner::Raise),
    Purging(purge::Purge),
    Changing(change::Making),
    Copying(change::Copying),
    /// Part of a hand-over, or of its rollback, together with others.
    Handing,
}

/// How to go on when a store or a call has ended.
enum Awaited {
    /// The record is durable and takes effect.
    Record(Box<AllocationRecord>, AfterStore),
    RecordGone(AllocationId),
    /// Send this answer.
    Answer(ReplyTo, Outcome),
    Nothing,
    Reserved(AllocationId, usize),
    Committed(AllocationId, usize),
    Raised(AllocationId, usize),
    /// The records of a hand-over are durable and take effect.
    Handover(HandoverId, handover::Step, Vec<AllocationRecord>),
    HandoverRaised(HandoverId, AllocationId, usize),
    Purged(AllocationId, usize),
    ChangeReserved(AllocationId, usize),
    ChangeCommitted(AllocationId, usize),
    ChangeCopied(AllocationId),
    GrantsListed(ApplianceId),
    ReturnedListed(ApplianceId),
    GivenUp(ApplianceId, ReplyTo),
    /// The result is not used.
    Ignored,
    /// The lives that are connected, for the waiting request of this number.
    Living(u64),
    Sampled {
        asked: u64,
        appliance: ApplianceId,
    },
    /// A sample that no waiting request needs.
    Looked {
        asked: u64,
        appliance: ApplianceId,
    },
    /// Answer to the question, asked after a start, whether an appliance is there.
    Greeted {
        asked: u64,
        appliance: ApplianceId,
    },
}

enum AfterStore {
    Reserve,
    Ready,
    Undo(purge::Then),
    Delete(ReplyTo),
    Raise(owner::Raise),
    Owned(ReplyTo),
    HandedOver(ReplyTo),
    StandsBy(ReplyTo),
    StandbyGone(ReplyTo),
    Noted(ReplyTo),
    /// The owner stays, for this reason.
    NotRaised(ReplyTo, String),
    KeysTold(ReplyTo),
    Disowned(ReplyTo),
    Renewed(ReplyTo),
    Slabs(ReplyTo),
    /// With the old name.
    Renamed(ReplyTo, Name),
    GivenUp(ApplianceId),
    /// Given up by the owner alone, which gets its orders as the answer.
    GaveUp(ApplianceId, ReplyTo),
    ChangePlanned,
    ChangeOpen,
    ChangeSwitched(Option<ReplyTo>),
    ChangeOver(change::Over, Option<Box<AllocationRecord>>),
    /// No request waits for it.
    Settled,
}

impl Service {
    /// A service without any state; [`Service::restore`] loads it.
    pub fn new(settings: Settings, dice: Dice) -> Service {
        Service {
            settings,
            dice,
            inventory: Inventory::new(settings.interval),
            allocations: BTreeMap::new(),
            names: HashMap::new(),
            renaming: BTreeSet::new(),
            refreshes: HashMap::new(),
            parked: Vec::new(),
            early: early::Early::default(),
            twins: twins::Twins::default(),
            queue: Vec::new(),
            cancelled: VecDeque::new(),
            queue_turn: 0,
            policy: Policy::default(),
            usage: Usage::default(),
            clients: HashMap::new(),
            clock_of_day: clock::Clock::default(),
            owners_heard: HashMap::new(),
            deaf: BTreeMap::new(),
            state: None,
            behind: None,
            read_only: None,
            unsaved: BTreeSet::new(),
            unsettled: BTreeMap::new(),
            shifted: BTreeSet::new(),
            alive_noted: None,
            timers: BTreeSet::new(),
            purging: BTreeSet::new(),
            events: events::Events::default(),
            drains: BTreeMap::new(),
            balancing: rebalance::Balancing::default(),
            found: garbage::Found::default(),
            pruned: 0,
            nothing: HashMap::new(),
            handovers: BTreeMap::new(),
            askings: HashMap::new(),
            awaited: HashMap::new(),
            effects: Vec::new(),
            now: Moment::default(),
            clock: 0,
        }
    }

    /// Handles one event and returns its effects, which have to be carried out in this order.
    pub fn handle(&mut self, now: Moment, event: Event) -> Vec<Effect> {
        self.now = now;
        self.clock += 1;
        self.now.unix = self.read_clock(now);
        match event {
            Event::Request(reply, request) => self.request(reply, request),
            Event::Stored(ticket) => self.stored(ticket),
            Event::Called(ticket, result) => self.called(ticket, result),
            Event::Writing(why) => self.writing_stopped(why),
            Event::Tick => self.tick(),
        }
        if self.serves() {
            self.start_due_purges();
            self.save_events();
        }
        debug_assert_eq!(self.check(), Ok(()));
        std::mem::take(&mut self.effects)
    }

    fn tick(&mut self) {
        for id in self.inventory.fallen_silent(self.now.at) {
            let name = self.inventory.name(id);
            let line = format!(
                "appliance {name} ({id}) is silent: it serves no new allocation until it is heard again"
            );
            self.tell_of_appliance(EventKind::ApplianceSilent, id, true, line);
        }
        self.end_event_waits();
        self.forget_old_twins();
        if !self.serves() {
            return;
        }
        self.settle_restored();
        self.wake_early();
        self.unpark();
        self.note_who_is_deaf();
        // Hand-overs run before the steps of ends: those steps make allocations busy, and a late hand-over would wait
        // for the next tick and find them busy again.
        self.run_hand_overs();
        self.run_handovers();
        self.run_timers();
        self.settle_shifts();
        self.note_alive();
        self.serve_queue();
        self.give_up_grants();
        self.run_drains();
        self.run_rebalance();
        self.look_for_garbage();
        self.prune_decisions();
    }

    fn request(&mut self, reply: ReplyTo, request: Request) {
        let (life, request) = match request {
            Request::As(life, request) => (Some(life), *request),
            request => (None, request),
        };
        if let Request::Orders { client, known, .. } = &request {
            self.hear_state(*known, &format!("client {client}"));
        }
        if let Some(refusal) = self.frozen(&request) {
            return self.reply(reply, Err(refusal));
        }
        let answer = match request {
            // Only the server wraps requests, and only once.
            Request::As(..) => {
                return self.refuse(reply, ErrorKind::Invalid, "one life at a time".to_owned());
            }
            Request::Status => Ok(Outcome::Status(Box::new(self.status()))),
            Request::Appliances => Ok(Outcome::Appliances(self.list_appliances())),
            Request::Allocations => Ok(Outcome::Allocations(self.list_allocations())),
            Request::Allocation(name) => self.show(&name).map(|shown| Outcome::Allocation(Box::new(shown))),
            Request::Heartbeat(heartbeat) => return self.heartbeat(reply, *heartbeat),
            Request::ForgetAppliance(id) => return self.forget_appliance(reply, id),
            Request::GiveUpAppliance(id) => return self.give_up_appliance(reply, id),
            Request::Create(create) => return self.create(reply, create, None),
            Request::CreateAs(request, create) => return self.create(reply, create, Some(request)),
            Request::Decide { create, all } => return self.dry_run(reply, create, all),
            Request::HandOverAll(order) => return self.hand_over_all(reply, order),
            Request::CommitHandover(which) => return self.commit_handover(reply, which),
            Request::RollBackHandover(which) => return self.roll_back_handover(reply, which),
            Request::Handovers => Ok(Outcome::Handovers(self.list_handovers())),
            Request::Usage => Ok(Outcome::Usage(self.list_usage())),
            Request::HearClient { name, facts } => return self.hear_client(reply, name, facts),
            Request::Clients => Ok(Outcome::Clients(self.list_clients())),
            Request::Events(query) => return self.ask_events(reply, query),
            Request::Metrics => Ok(Outcome::Metrics(self.metrics())),
            Request::Policy => Ok(Outcome::Policy(self.shown_policy())),
            Request::Apply(apply) => return self.apply(reply, &apply),
            Request::Orders { name, client, .. } => return self.ask_orders(reply, &name, client, life),
            Request::Doubt { name, client, refused } => {
                return self.hear_doubt(reply, &name, (client, life), &refused);
            }
            // It changes no record, so it need not wait for the work on the allocation.
            Request::Report { name, client, report: api::Report::Used(used) } => {
                return self.hear_use(reply, &name, (client, life), &used);
            }
            Request::Drain { id, drain } => return self.drain(reply, id, drain),
            Request::EndDrain(id) => return self.end_drain(reply, id),
            Request::Rebalance(rebalance) => return self.rebalance(reply, rebalance),
            Request::Backup => Ok(Outcome::Backup(Box::new(self.backup()))),
            Request::Garbage => Ok(Outcome::Garbage(self.list_garbage())),
            Request::Rebalancing => Ok(Outcome::Rebalance(self.rebalancing())),
            Request::PauseRebalance(pause) => Ok(Outcome::Rebalance(self.pause_rebalance(pause.paused))),
            Request::EndRebalance => return self.end_rebalance(reply),
            Request::RemoveDocument { name, version } => return self.remove_document(reply, &name, version),
            Request::Delete { ref name, .. } if self.cancel_waiting(name) => Ok(Outcome::Done),
            Request::Delete { ref name, .. }
            | Request::Attach { ref name, .. }
            | Request::Detach { ref name, .. }
            | Request::StandBy { ref name, .. }
            | Request::Renew { ref name, .. }
            | Request::Resize { ref name, .. }
            | Request::Transfer { ref name, .. }
            | Request::Rename { ref name, .. }
            | Request::Slabs { ref name, .. }
            | Request::Report { ref name, .. } => {
                let name = name.clone();
                return self.change(reply, &name, (life, request), None);
            }
        };
        self.reply(reply, answer);
    }

    /// Changes an allocation, or queues the request until the present work on the allocation has ended. `living`: the
    /// lives that are connected to its appliances, if these were asked.
    fn change(
        &mut self,
        reply: ReplyTo,
        name: &Name,
        (life, request): (Option<Life>, Request),
        living: Option<&[String]>,
    ) {
        let again = |request| match life {
            Some(life) => Request::As(life, Box::new(request)),
            None => request,
        };
        let Some(&id) = self.names.get(name) else { return self.change_unnamed(reply, name, &request) };
        let Some(entry) = self.allocations.get_mut(&id) else { return };
        match entry.work {
            Work::Idle => {}
            // These do not wait for the whole copy: the change is given up after the present step.
            Work::Copying(_) if matches!(request, Request::Attach { .. } | Request::Transfer { .. }) => {
                entry.queue.push_back((reply, again(request)));
                return self.stop_copying(id);
            }
            Work::Creating(_) => {
                return self.refuse(
                    reply,
                    ErrorKind::Conflict,
                    format!("`{name}` is still being made; try again soon"),
                );
            }
            _ if entry.queue.len() < QUEUE_MAX => return entry.queue.push_back((reply, again(request))),
            _ => {
                let line = format!("too many requests wait for `{name}`; try again soon");
                return self.refuse(reply, ErrorKind::Unavailable, line);
            }
        }
        let fences = match self.claim(id, &request, life, living) {
            Claim::Good => false,
            Claim::Fences => true,
            Claim::Refused(error) => return self.reply(reply, Err(error)),
            Claim::HasNothing => return self.reply(reply, Ok(Outcome::Done)),
            Claim::Ask(life) => return self.ask_living(reply, id, life, request),
        };
        if let Some(error) = self.standby_forbids(id, &request, fences) {
            return self.reply(reply, Err(error));
        }
        if self.is_in_the_way(id, &request, fences) {
            self.entry(id).queue.push_back((reply, again(request)));
            return self.settle_change(id);
        }
        match request {
            Request::Resize { resize, .. } => self.resize(reply, id, resize),
            Request::Transfer { transfer, .. } => self.transfer(reply, id, &transfer),
            Request::Report { client, report, .. } => self.report(reply, id, client, report),
            Request::Slabs { client, slabs, .. } => self.set_slabs(reply, id, client, slabs),
            Request::Delete { force, .. } => self.delete(reply, id, force),
            Request::Attach { attach, has, .. } => self.attach(reply, id, attach, (life, fences), has),
            Request::Detach { client, .. } => self.detach(reply, id, client, life),
            Request::StandBy { attach, .. } => self.stand_by(reply, id, attach, life),
            Request::Renew { renew, .. } => self.renew(reply, id, renew),
            Request::Rename { to, .. } => self.rename(reply, id, to),
            _ => unreachable!("only requests that change an allocation come here"),
        }
    }

    /// Repeating a deletion that has begun is no error: it has the result that the caller wants.
    fn change_unnamed(&mut self, reply: ReplyTo, name: &Name, request: &Request) {
        let deleting = self
            .allocations
            .values()
            .any(|entry| entry.record.name == *name && purge::is_deleting(&entry.record));
        match request {
            Request::Delete { .. } if deleting => self.reply(reply, Ok(Outcome::Done)),
            _ => self.reply(reply, Err(view::unknown(name))),
        }
    }

    fn stored(&mut self, ticket: Ticket) {
        if let Some(state) = &mut self.state {
            state.number += 1;
        }
        match self.awaited.remove(&ticket) {
            Some(Awaited::Record(record, after)) => self.record_stored(*record, after),
            Some(Awaited::RecordGone(id)) => self.record_gone(id),
            Some(Awaited::Answer(reply, outcome)) => self.reply(reply, Ok(outcome)),
            Some(Awaited::GivenUp(id, reply)) => self.appliance_given_up(id, reply),
            Some(Awaited::Handover(id, step, records)) => self.handover_stored(id, step, records),
            Some(Awaited::Nothing) => {}
            _ => unreachable!("a store is answered once, as a store"),
        }
    }

    fn record_stored(&mut self, record: AllocationRecord, after: AfterStore) {
        let id = record.id;
        let link = record.terms.link_speed == self.entry(id).record.terms.link_speed;
        debug_assert!(link, "what is promised of links does not change");
        self.replace(id, record);
        self.set_timer(id);
        self.describe_if_new(id);
        match after {
            AfterStore::Reserve => self.reserve(id),
            AfterStore::Ready => self.created(id),
            AfterStore::Undo(then) => self.purge(id, then),
            AfterStore::Delete(reply) => self.purge(id, purge::Then::Answer(reply, Ok(Outcome::Done))),
            AfterStore::Raise(raise) => self.raise(id, raise),
            AfterStore::Owned(reply) => self.owned(reply, id),
            AfterStore::HandedOver(reply) => self.handed_over_to(reply, id),
            AfterStore::StandsBy(reply) => self.stands_by(reply, id),
            AfterStore::StandbyGone(reply) => self.standby_gone(reply, id),
            AfterStore::Noted(reply) => self.standby_noted(reply, id),
            AfterStore::NotRaised(reply, line) => {
                self.refuse(reply, ErrorKind::NoSpace, line);
                self.finish_work(id);
            }
            AfterStore::KeysTold(reply) => {
                tracing::info!("the owner of `{}` has told its keys", self.entry(id).record.name);
                self.answer_orders(reply, id);
                self.finish_work(id);
            }
            AfterStore::Disowned(reply) => {
                let name = self.entry(id).record.name.clone();
                self.tell(EventKind::Detached, &name, format!("`{name}` is used by nobody"));
                self.reply(reply, Ok(Outcome::Done));
                self.finish_work(id);
            }
            AfterStore::Renewed(reply) => self.was_renewed(reply, id),
            AfterStore::Renamed(reply, old) => self.renamed(reply, id, &old),
            AfterStore::Slabs(reply) => self.answer_slabs(reply, id),
            AfterStore::GivenUp(appliance) => self.allocation_given_up(id, appliance),
            AfterStore::GaveUp(appliance, reply) => {
                self.answer_orders(reply, id);
                self.owner_gave_up(id, appliance);
            }
            AfterStore::ChangePlanned => self.make_change(id),
            AfterStore::ChangeOpen => self.change_is_open(id),
            AfterStore::ChangeSwitched(reply) => self.change_is_switched(id, reply),
            AfterStore::ChangeOver(over, rest) => self.change_is_over(id, over, rest),
            AfterStore::Settled => self.finish_work(id),
        }
    }

    fn called(&mut self, ticket: Ticket, result: Result<Answer, CallError>) {
        match self.awaited.remove(&ticket) {
            Some(Awaited::Reserved(id, grant)) => self.reserved(id, grant, result),
            Some(Awaited::Committed(id, grant)) => self.committed(id, grant, result),
            Some(Awaited::Raised(id, grant)) => self.raised(id, grant, result),
            Some(Awaited::HandoverRaised(id, member, grant)) => {
                self.handover_raised(id, (member, grant), result);
            }
            Some(Awaited::Purged(id, grant)) => self.purged(id, grant, result),
            Some(Awaited::ChangeReserved(id, grant)) => self.change_reserved(id, grant, result),
            Some(Awaited::ChangeCommitted(id, grant)) => self.change_committed(id, grant, result),
            Some(Awaited::ChangeCopied(id)) => self.change_copied(id, result),
            Some(Awaited::GrantsListed(id)) => self.grants_listed(id, result),
            Some(Awaited::ReturnedListed(id)) => self.returned_listed(id, result),
            Some(Awaited::Ignored) => {}
            Some(Awaited::Living(number)) => self.living_told(number, result),
            Some(Awaited::Sampled { asked, appliance }) => self.sampled(asked, appliance, result),
            Some(Awaited::Looked { asked, appliance }) => self.looked(asked, appliance, result),
            Some(Awaited::Greeted { asked, appliance }) => self.greeted(asked, appliance, result),
            _ => unreachable!("a call is answered once, as a call"),
        }
    }

    /// The work is done: requests that waited for its end are handled now.
    fn finish_work(&mut self, id: AllocationId) {
        self.entry(id).work = Work::Idle;
        self.release_queue(id);
    }

    fn release_queue(&mut self, id: AllocationId) {
        for (reply, request) in std::mem::take(&mut self.entry(id).queue) {
            self.request(reply, request);
        }
    }

    /// Inserts a record. If it holds its name, it counts for limits and links from now on.
    fn insert(&mut self, record: AllocationRecord, work: Work) {
        let id = record.id;
        let counted = record.holds_name();
        if counted {
            self.count(&record, false);
            self.names.insert(record.name.clone(), id);
        }
        let steps_from = self.now.unix;
        let entry = Entry {
            record,
            work,
            born: self.clock,
            queue: VecDeque::new(),
            timer: None,
            told: lease::Told::Nothing,
            shift: None,
            steps_from,
            counted,
            side: change::Side::default(),
            hand_over: None,
            lost: garbage::Lost::default(),
            described: None,
            // The owner had no chance to be heard before.
            owner_heard: self.now.at,
            refused: None,
        };
        self.allocations.insert(id, entry);
        self.set_timer(id);
    }

    /// A new record of the allocation takes effect.
    fn replace(&mut self, id: AllocationId, record: AllocationRecord) {
        let entry = self.entry(id);
        let old = std::mem::replace(&mut entry.record, record);
        self.follow_name(id, &old.name);
        let entry = self.entry(id);
        if entry.counted && (old.change.is_some() || entry.record.change.is_some()) {
            let new = entry.record.clone();
            self.count(&old, true);
            self.count(&new, false);
        }
    }

    /// The allocation counts for limits and links no longer.
    fn uncount(&mut self, id: AllocationId) {
        if std::mem::take(&mut self.entry(id).counted) {
            let record = self.entry(id).record.clone();
            self.count(&record, true);
        }
    }

    fn count(&mut self, record: &AllocationRecord, back: bool) {
        match back {
            false => self.usage.add(record),
            true => self.usage.remove(record),
        }
        if let Some(speed) = record.terms.link_speed {
            for appliance in record.appliances() {
                self.inventory.promise_link(appliance, speed, back);
            }
        }
    }

    fn record_gone(&mut self, id: AllocationId) {
        self.purging.remove(&id);
        self.deaf.remove(&id);
        self.shifted.remove(&id);
        self.allocations.remove(&id);
    }

    fn entry(&mut self, id: AllocationId) -> &mut Entry {
        self.allocations.get_mut(&id).expect("an allocation stays while something is done to it")
    }

    fn reply(&mut self, reply: ReplyTo, result: Result<Outcome, ApiError>) {
        self.effects.push(Effect::Reply(reply, result));
    }

    fn refuse(&mut self, reply: ReplyTo, kind: ErrorKind, line: String) {
        self.reply(reply, Err(ApiError(kind, line)));
    }

    fn store(&mut self, batch: Batch, awaited: Awaited) {
        let ticket = self.ticket(awaited);
        self.effects.push(Effect::Store(ticket, batch));
    }

    /// Stores the record. It takes effect once it is durable.
    fn store_record(&mut self, record: AllocationRecord, after: AfterStore) {
        let change = Change::Allocation(Box::new(record.clone()));
        self.store(vec![change], Awaited::Record(Box::new(record), after));
    }

    fn call(&mut self, appliance: ApplianceId, control: String, call: Call, awaited: Awaited) {
        let ticket = self.ticket(awaited);
        self.effects.push(Effect::Call(
            ticket,
            Target { appliance, control, metadata: self.known_state() },
            call,
        ));
    }

    /// The state of the metadata to tell others; none while ours is known to be an old one.
    fn known_state(&self) -> Option<MetadataState> {
        self.state.filter(|_| self.behind.is_none())
    }

    /// URL of the appliance's control interface. Appliances with regions are never forgotten; a URL that does not
    /// work makes the call fail, and that is handled.
    fn control_of(&self, appliance: ApplianceId) -> String {
        self.inventory.info(appliance).map(|info| info.control.clone()).unwrap_or_default()
    }

    fn ticket(&mut self, awaited: Awaited) -> Ticket {
        self.clock += 1;
        let ticket = Ticket(self.clock);
        self.awaited.insert(ticket, awaited);
        ticket
    }

    fn random_id(&mut self) -> Result<u128, ApiError> {
        self.random().map(u128::from_ne_bytes)
    }

    fn random_key(&mut self) -> Result<GrantKey, ApiError> {
        self.random().map(GrantKey::from_bytes)
    }

    fn random<const N: usize>(&mut self) -> Result<[u8; N], ApiError> {
        let mut bytes = [0; N];
        self.fill_random(&mut bytes)?;
        Ok(bytes)
    }

    fn fill_random(&mut self, bytes: &mut [u8]) -> Result<(), ApiError> {
        (self.dice)(bytes).map_err(|error| ApiError(ErrorKind::Internal, error.to_string()))
    }
}
