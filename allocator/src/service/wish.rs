//! Finds a placement for a creation request.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::Create;
use xpm_protocol::api::decision::Decision;
use xpm_protocol::{ApplianceId, Percent, RequestId};

use super::asking::{self, Asked, Refusal, World};
use super::audit;
use super::early::Order;
use super::{Answer, Awaited, Call, CallError, Outcome, ReplyTo, Service};
use crate::strategy::{self, Decided, NoPlace, Snapshot, remedy};

/// How long a request waits for memory that is being cleared. With two attempts it is still answered before a client
/// with the usual time limit gives up.
const PATIENCE: Duration = Duration::from_secs(5);

/// A creation request on its way to an allocation.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    /// Requester to answer; none once the request is in the queue.
    pub(super) reply: Option<ReplyTo>,
    pub(super) create: Create,
    pub(super) attempt: u8,
    /// Appliances that failed an earlier attempt.
    pub(super) failed: Vec<ApplianceId>,
    /// Errors of the earlier attempt: they say more than "no other appliance has room".
    pub(super) earlier: Option<String>,
    /// Whether the appliances were sampled already because there seemed to be no room.
    pub(super) refreshed: bool,
    /// Until when it waits for memory that is being cleared.
    patience: Option<Duration>,
    /// Id of the request. A requester that repeats its request sends the same id.
    pub(super) request: Option<RequestId>,
    /// Appliances that already have regions of the allocation.
    pub(super) home: Vec<ApplianceId>,
    /// Only the decision is wanted, nothing is made; with `true`, the decision names every appliance.
    dry_run: Option<bool>,
}

/// A request that waits for fresh samples of the appliances.
#[derive(Debug)]
pub(super) struct Refresh {
    wish: Wish,
    open: usize,
}

/// The result of one evaluation of a request.
pub(super) struct Looked {
    pub(super) asked: Asked,
    /// None if the documents refuse the request whatever appliances there are.
    pub(super) decided: Option<Decided>,
    pub(super) refusal: Option<Refusal>,
    pub(super) decision: Decision,
    /// Appliances whose memory is kept for a request that comes first.
    pub(super) held: HashSet<ApplianceId>,
}

impl Looked {
    /// Whether room is the only thing missing.
    pub(super) fn lacks_room(&self) -> bool {
        let placement = self.decided.as_ref().map(|decided| &decided.placement);
        matches!(placement, Some(Err(NoPlace::NoSpace { .. })))
    }
}

impl Wish {
    pub(super) fn new(reply: Option<ReplyTo>, create: Create) -> Wish {
        Wish {
            reply,
            create,
            attempt: 1,
            failed: Vec::new(),
            earlier: None,
            refreshed: false,
            patience: None,
            request: None,
            home: Vec::new(),
            dry_run: None,
        }
    }
}

impl Service {
    pub(super) fn create(&mut self, reply: ReplyTo, create: Create, request: Option<RequestId>) {
        if self.is_known_request(reply, &create, request) {
            return;
        }
        self.forget_refused(&create.name);
        // Waiting requests have precedence for memory that became free a moment ago.
        self.serve_queue();
        self.place(Wish { request, ..Wish::new(Some(reply), create) });
    }

    /// Answers with the decision that a request would get, and changes nothing.
    pub(super) fn dry_run(&mut self, reply: ReplyTo, create: Create, all: bool) {
        self.place(Wish { dry_run: Some(all), ..Wish::new(Some(reply), create) });
    }

    /// Finds a placement and begins. If there seems to be no room, the appliances are sampled first, because memory
    /// given back a moment ago is in no heartbeat yet. If memory that is being cleared would suffice, the request
    /// waits for it.
    pub(super) fn place(&mut self, mut wish: Wish) {
        let named = if wish.dry_run.is_some() { Ok(()) } else { self.check_name(&wish) };
        if let Err(error) = named {
            return self.reject(&wish, error);
        }
        let looked = match self.look(&wish, wish.dry_run == Some(true)) {
            Ok(looked) => looked,
            Err(line) => return self.reject(&wish, ApiError(ErrorKind::Invalid, line)),
        };
        let no_space = looked.lacks_room();
        if looked.decided.is_some() && self.waits_for_appliances(!no_space) {
            return self.wait_for_appliances(Order::Place(wish));
        }
        match (&looked.decided, &looked.refusal) {
            (Some(Decided { placement: Ok(_), .. }), None) if wish.dry_run.is_some() => {
                self.answer_decision(&wish, looked.decision);
            }
            (Some(Decided { placement: Ok(placement), .. }), None) => {
                let placement = placement.clone();
                self.begin(wish, looked, &placement);
            }
            _ if no_space && !wish.refreshed && !self.inventory.doubtful(self.now.at).is_empty() => {
                self.refresh(wish);
            }
            _ if no_space && self.may_wait(&mut wish, &looked) => self.parked.push(wish),
            _ => self.not_placed(wish, &looked),
        }
    }

    /// Evaluates a request against the present state.
    pub(super) fn look(&mut self, wish: &Wish, all: bool) -> Result<Looked, String> {
        let asked = self.ask(wish)?;
        Ok(self.look_for(wish, asked, all))
    }

    /// The same for memory that is charged already: limits and times of the documents do not count.
    pub(super) fn look_uncharged(&mut self, wish: &Wish) -> Result<Looked, String> {
        let mut asked = self.ask(wish)?;
        asked.refusal = None;
        asked.limits.clear();
        asked.demand.needs.taken_max = None;
        Ok(self.look_for(wish, asked, false))
    }

    fn ask(&self, wish: &Wish) -> Result<Asked, String> {
        let pool_used = || self.inventory.used(self.now.at);
        asking::ask(&self.world(&pool_used), &wish.create)
    }

    /// Decides about a request. If its placement would leave too little for the first waiting request, even after all
    /// other memory is given back, the decision is made again without the memory that is kept for the first request.
    fn look_for(&mut self, wish: &Wish, mut asked: Asked, all: bool) -> Looked {
        asked.demand.seed = self.clock;
        asked.demand.home.clone_from(&wish.home);
        let (empty, mut held) = (HashMap::new(), HashSet::new());
        let mut refusal = asked.refusal.clone();
        let mut decided = None;
        if refusal.is_none() {
            let free = self.snapshot(&asked, &wish.create, &wish.failed, &held, &empty);
            let mut made = strategy::decide(&free, &asked.demand);
            if let Ok(placement) = &made.placement
                && let Some(kept) = self.kept_for_the_first(&wish.create.name, asked.priority, placement)
            {
                held = kept;
                let rest = self.snapshot(&asked, &wish.create, &wish.failed, &held, &empty);
                made = strategy::decide(&rest, &asked.demand);
            }
            decided = Some(made);
        }
        let snapshot = self.snapshot(&asked, &wish.create, &wish.failed, &held, &empty);
        if let Some(Err(no_place)) = decided.as_ref().map(|decided| &decided.placement) {
            refusal = Some(refused(no_place, &asked, &snapshot, &self.unheard_line()));
        }
        let decision = audit::decision(
            &snapshot,
            &asked,
            &wish.create,
            decided.as_ref(),
            refusal.as_ref(),
            all,
            self.policy.revision(),
        );
        Looked { asked, decided, refusal, decision, held }
    }

    fn world<'a>(&'a self, pool_used: &'a dyn Fn() -> Percent) -> World<'a> {
        World {
            policy: &self.policy,
            usage: &self.usage,
            pool: self.inventory.pool(),
            clients: &self.clients,
            unix: self.now.unix,
            pool_used,
        }
    }

    pub(super) fn snapshot<'a>(
        &'a self,
        asked: &Asked,
        create: &Create,
        failed: &'a [ApplianceId],
        held: &'a HashSet<ApplianceId>,
        given_back: &'a HashMap<ApplianceId, u64>,
    ) -> Snapshot<'a> {
        let account = asked.terms.account.as_ref();
        let client = create.client.as_ref().and_then(|name| self.clients.get(name));
        Snapshot {
            pool: self.inventory.pool(),
            now: self.now.at,
            unix: self.now.unix,
            failed,
            held,
            of_account: account.and_then(|name| self.usage.on_appliances(name)).unwrap_or(&self.nothing),
            round_trips: client.map_or(&self.nothing, |client| &client.round_trips),
            with_clearing: false,
            given_back,
            kept: &self.nothing,
        }
    }

    /// Whether the request fits once all memory that is being cleared is free, and its patience allows to wait.
    fn may_wait(&self, wish: &mut Wish, looked: &Looked) -> bool {
        let until = *wish.patience.get_or_insert(self.now.at + PATIENCE);
        if self.now.at >= until {
            return false;
        }
        let empty = HashMap::new();
        let snapshot = self.snapshot(&looked.asked, &wish.create, &wish.failed, &looked.held, &empty);
        let cleared = Snapshot { with_clearing: true, ..snapshot };
        strategy::decide(&cleared, &looked.asked.demand).placement.is_ok()
    }

    /// Queues a request that wants to wait and can be helped by waiting; refuses any other.
    fn not_placed(&mut self, wish: Wish, looked: &Looked) {
        if wish.dry_run.is_some() {
            return self.answer_decision(&wish, looked.decision.clone());
        }
        let Some(refusal) = looked.refusal.clone() else { return };
        if self.is_queued(&wish.create.name) {
            return self.still_waits(&wish.create.name, looked, refusal.line());
        }
        self.record_decision(looked.decision.clone());
        if wish.create.wait.is_some()
            && refusal.kind != ErrorKind::Invalid
            && self.could_ever(&wish.create, looked)
        {
            return self.enqueue(wish, looked, refusal.line());
        }
        let line = match &wish.earlier {
            Some(earlier) => format!("{earlier}; without those that failed, {}", refusal.line()),
            None => refusal.line(),
        };
        self.reject(&wish, ApiError(refusal.kind, line));
    }

    fn answer_decision(&mut self, wish: &Wish, decision: Decision) {
        if let Some(reply) = wish.reply {
            self.reply(reply, Ok(Outcome::Decision(Box::new(decision))));
        }
    }

    /// Whether the request would fit if all memory of the pool were free. A refusal by documents does not count here:
    /// time or other allocations may change it.
    pub(super) fn could_ever(&self, create: &Create, looked: &Looked) -> bool {
        if looked.decided.is_none()
            || !matches!(&looked.refusal, Some(refusal) if refusal.kind == ErrorKind::NoSpace)
        {
            return true;
        }
        self.fits_in_all_but(&looked.asked, create, &HashMap::new())
    }

    /// Whether a request would fit if all memory of the pool except `kept` were free.
    pub(super) fn fits_in_all_but(
        &self,
        asked: &Asked,
        create: &Create,
        kept: &HashMap<ApplianceId, u64>,
    ) -> bool {
        let nobody = HashSet::new();
        let all: HashMap<ApplianceId, u64> =
            self.inventory.pool().iter().map(|one| (one.id, one.capacity)).collect();
        let snapshot = self.snapshot(asked, create, &[], &nobody, &all);
        strategy::decide(&Snapshot { kept, ..snapshot }, &asked.demand).placement.is_ok()
    }

    /// Answers that the allocation is not made.
    pub(super) fn reject(&mut self, wish: &Wish, error: ApiError) {
        match wish.reply {
            Some(reply) => self.reply(reply, Err(error)),
            None => self.refuse_waiting(&wish.create.name, &error.1),
        }
    }

    /// Tries the requests again that wait for memory being cleared.
    pub(super) fn unpark(&mut self) {
        for wish in std::mem::take(&mut self.parked) {
            self.refresh(wish);
        }
    }

    fn check_name(&self, wish: &Wish) -> Result<(), ApiError> {
        let name = &wish.create.name;
        let waiting = wish.reply.is_some() && self.is_queued(name);
        match self.names.contains_key(name) || self.renaming.contains(name) || waiting {
            false => Ok(()),
            true => {
                let there = if waiting { "waits for its turn" } else { "is there" };
                let line = format!(
                    "an allocation named `{name}` {there} already: choose another name, or delete that one"
                );
                Err(ApiError(ErrorKind::Conflict, line))
            }
        }
    }

    fn refresh(&mut self, mut wish: Wish) {
        wish.refreshed = true;
        let doubtful = self.inventory.doubtful(self.now.at);
        if doubtful.is_empty() {
            return self.place(wish);
        }
        self.clock += 1;
        let asked = self.clock;
        self.refreshes.insert(asked, Refresh { wish, open: doubtful.len() });
        for appliance in doubtful {
            let control = self.control_of(appliance);
            self.call(appliance, control, Call::Status, Awaited::Sampled { asked, appliance });
        }
    }

    /// Asks an appliance for its status: it has changed since its last heartbeat.
    pub(super) fn sample_soon(&mut self, appliance: ApplianceId) {
        self.clock += 1;
        let (asked, control) = (self.clock, self.control_of(appliance));
        self.call(appliance, control, Call::Status, Awaited::Looked { asked, appliance });
    }

    pub(super) fn looked(&mut self, asked: u64, appliance: ApplianceId, result: Result<Answer, CallError>) {
        if let Ok(Answer::Status(status)) = result {
            self.inventory.sample(appliance, asked, self.clock, *status);
        }
    }

    pub(super) fn sampled(&mut self, asked: u64, appliance: ApplianceId, result: Result<Answer, CallError>) {
        self.looked(asked, appliance, result);
        let refresh =
            self.refreshes.get_mut(&asked).expect("a refresh stays until all its calls are answered");
        refresh.open -= 1;
        if refresh.open == 0
            && let Some(done) = self.refreshes.remove(&asked)
        {
            self.place(done.wish);
        }
    }
}

/// The refusal of a request without a placement: why, and the remedies.
fn refused(no_place: &NoPlace, asked: &Asked, snapshot: &Snapshot<'_>, unheard: &str) -> Refusal {
    let kind = match no_place {
        NoPlace::TooManyRegions => ErrorKind::Invalid,
        NoPlace::Limit { .. } => ErrorKind::Denied,
        NoPlace::NoSpace { .. } => ErrorKind::NoSpace,
    };
    let (why, remedies) = match no_place {
        NoPlace::TooManyRegions => (no_place.to_string(), Vec::new()),
        NoPlace::Limit { takes, left } => audit::over_limit(asked, *takes, *left),
        NoPlace::NoSpace { .. } => {
            let failed = audit::rejected_line(snapshot, asked);
            (format!("{no_place}{failed}{unheard}"), remedy::remedies(snapshot, &asked.demand))
        }
    };
    Refusal { kind, why, remedies }
}
