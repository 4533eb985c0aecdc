//! How a channel follows a change of its volume.

use std::collections::VecDeque;
use std::sync::Arc;

use xpm_transport::io::{IoError, Kind};

use super::super::Underway;
use super::super::moves::{Fate, Progress};
use super::super::orders::{NewWay, Order};
use super::super::plan::{Leg, Plan};
use super::{Channel, LegState, Part, Way};

/// The channel's view of a change.
pub(super) struct Following {
    /// Whether a change is in progress: no memory is accessed in place.
    changing: bool,
    /// Whether an access that began in place is unfinished.
    pub(super) in_place: bool,
    /// The progress of copying, once it has begun.
    progress: Option<Progress>,
    /// Whether a write ends only when both places have it.
    firm: bool,
    /// No I/O goes beyond this offset.
    limit: u64,
    /// Whether the new plan is valid: results of the old places no longer count.
    switched: bool,
    /// The plan for reads, while it differs from the first of the two places that writes go to.
    pub(super) reads: Option<Arc<Plan>>,
    /// Legs that wait for the end of a lock, oldest first; of a pair of twins, the leg to the old place.
    parked: VecDeque<u32>,
    waiting: Option<Waiting>,
}

/// The condition that an order waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    /// No access in place is unfinished.
    InPlace,
    /// No write to the locked run is in flight.
    Lock,
    /// No operation is in flight beyond this offset in bytes.
    Beyond(u64),
    /// No operation is in flight on paths without regions.
    Retired,
}

impl Following {
    pub(super) fn new(legs: usize) -> Following {
        Following {
            changing: false,
            in_place: false,
            progress: None,
            firm: false,
            limit: u64::MAX,
            switched: false,
            reads: None,
            parked: VecDeque::with_capacity(legs),
            waiting: None,
        }
    }

    /// The state of a change in progress, for a channel that is created during the change.
    pub(super) fn join(&mut self, underway: Underway) {
        let Underway { progress, firm, reads } = underway;
        (self.changing, self.progress, self.firm) = (true, progress, firm.is_some());
        self.limit = firm.unwrap_or(u64::MAX);
        self.reads = reads;
    }

    /// Whether a request lies below the limit.
    pub(super) fn allows(&self, offset: u64, len: u64) -> bool {
        offset.saturating_add(len) <= self.limit
    }

    pub(super) fn is_changing(&self) -> bool {
        self.changing
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// The treatment of a leg.
    pub(super) fn fate(&self, kind: Kind, leg: &Leg, region_len: u64) -> Fate {
        match &self.progress {
            Some(progress) if kind != Kind::Read => progress.fate(leg, region_len),
            _ => Fate::Old,
        }
    }

    /// The result of a leg as it counts for its request: an error at the new place fails the change rather
    /// than the request, as long as the old place has all data.
    pub(super) fn counts(&self, part: Part, result: Result<(), IoError>) -> Result<(), IoError> {
        match (part, &self.progress) {
            (Part::New, Some(progress)) if result.is_err() && !self.firm => {
                progress.moves.fail();
                Ok(())
            }
            (Part::Old(_), _) if self.switched => Ok(()),
            _ => result,
        }
    }
}

impl Channel {
    /// Executes the channel's orders, as far as their conditions hold.
    pub(super) fn take_orders(&mut self) {
        loop {
            if let Some(waiting) = self.following.waiting {
                if !self.is_over(waiting) && !self.mailbox.is_aborted() {
                    return;
                }
                self.following.waiting = None;
                if waiting == Waiting::Retired {
                    self.end_retired();
                }
                self.mailbox.done();
            }
            let Some(order) = self.mailbox.next() else { return };
            self.following.waiting = self.take_order(order);
            if self.following.waiting.is_none() {
                self.mailbox.done();
            }
        }
    }

    fn take_order(&mut self, order: Order) -> Option<Waiting> {
        match order {
            Order::Begin(ways) => {
                self.following.changing = true;
                self.add_ways(ways);
                Some(Waiting::InPlace)
            }
            Order::Progress(progress) => {
                self.following.progress = Some(progress.unlocked());
                self.unpark();
                self.following.progress = Some(progress);
                Some(Waiting::Lock)
            }
            Order::Firm(limit) => {
                self.following.firm = true;
                self.following.limit = limit;
                Some(Waiting::Beyond(limit))
            }
            Order::Read(plan) => {
                self.following.reads = Some(plan);
                None
            }
            Order::Switch(plan) => {
                self.switch(plan);
                Some(Waiting::Retired)
            }
            Order::Abort => {
                self.abort();
                None
            }
        }
    }

    fn is_over(&mut self, waiting: Waiting) -> bool {
        match waiting {
            Waiting::InPlace => !self.following.in_place,
            Waiting::Lock => !self.writes_to_lock(),
            Waiting::Beyond(limit) => !self.requests.iter_mut().any(|(_, request)| request.end > limit),
            Waiting::Retired => {
                self.turn_to_new();
                !self.has_legs_at_retired()
            }
        }
    }

    pub(super) fn find_only(&mut self) {
        let mut with_regions = (0..self.ways.len()).filter(|&way| self.ways[way].connector.is_some());
        let first = with_regions.next();
        self.only = first.filter(|_| with_regions.next().is_none());
    }

    fn add_ways(&mut self, ways: Vec<NewWay>) {
        let legs = self.following.parked.capacity();
        for NewWay { number, port, connector } in ways {
            let way = Way::new(port, Some(connector), legs);
            match self.ways.get_mut(number as usize) {
                // The place of a path that ended.
                Some(place) => *place = way,
                None => self.ways.push(way),
            }
        }
        self.find_only();
        // Links may have been delivered already.
        self.take_deliveries();
    }

    /// Adds the twin at the new place to a leg that changes data. While the run is locked, both wait.
    pub(super) fn add_twin(&mut self, id: u32, leg: &Leg, fate: Fate) {
        let Some(request) = self.legs.get_mut(id).map(|state| state.request) else { return };
        let twin_leg = match fate {
            Fate::Both(twin) => twin,
            // The end of the lock replaces the twin's operation by the right one.
            Fate::Later | Fate::Old => *leg,
        };
        let twin = self.add_leg(request, &twin_leg, Part::New);
        if let Some(state) = self.legs.get_mut(id) {
            state.part = Part::Old(twin);
        }
        if fate == Fate::Later {
            for one in [id, twin] {
                if let Some(state) = self.legs.get_mut(one) {
                    state.parked = true;
                }
            }
            return self.following.parked.push_back(id);
        }
        self.start(id);
        self.start(twin);
    }

    /// Starts the legs that waited for the end of a lock.
    fn unpark(&mut self) {
        for _ in 0..self.following.parked.len() {
            let Some(id) = self.following.parked.pop_front() else { return };
            let Some(state) = self.legs.get_mut(id) else { continue };
            state.parked = false;
            let Part::Old(twin) = state.part else { continue };
            let (state, region_len) = (*state, self.plan.region_len());
            let leg = Leg {
                region: state.region,
                grant: state.grant,
                offset: state.operation.offset,
                len: state.operation.len,
                start: 0,
            };
            let fate = self.following.fate(state.operation.kind, &leg, region_len);
            match (fate, self.legs.get_mut(twin)) {
                (Fate::Both(new), Some(other)) => {
                    other.parked = false;
                    other.grant = new.grant;
                    other.operation.offset = new.offset;
                    other.operation.len = new.len;
                    other.operation.buf = other.operation.buf.map(|buf| buf.part(0, new.len as usize));
                    self.start(twin);
                }
                _ => self.end_leg(twin, Ok(())),
            }
            self.start(id);
        }
    }

    fn writes_to_lock(&mut self) -> bool {
        let Some(progress) = &self.following.progress else { return false };
        let region_len = self.plan.region_len();
        let touches = |leg: &LegState| {
            let start = leg.operation.offset % region_len;
            leg.operation.kind != Kind::Read
                && !leg.parked
                && progress.touches_lock(leg.region, start, leg.operation.len)
        };
        self.legs.iter_mut().any(|(_, leg)| touches(leg))
    }

    /// From now on the new plan is valid: the new places have all data of the old ones.
    fn switch(&mut self, plan: Arc<Plan>) {
        self.plan = plan;
        self.following.reads = None;
        self.unpark();
        self.following.switched = true;
        let regions = self.plan.slots();
        for (number, way) in self.ways.iter_mut().enumerate() {
            way.retired =
                way.connector.is_some() && !regions.iter().any(|slot| slot.grant as usize == number);
        }
    }

    /// Redirects the legs that were not sent to the old place of a moved region: a read is sent to the new
    /// place; a write ends, because its twin performs it at the new place.
    pub(super) fn turn_to_new(&mut self) {
        let Some(progress) = self.following.progress.clone() else { return };
        let region_len = self.plan.region_len();
        for way in 0..self.ways.len() {
            if !self.ways[way].retired {
                continue;
            }
            for _ in 0..self.ways[way].held.len() {
                let Some(id) = self.ways[way].held.pop_front() else { break };
                let Some(leg) = self.legs.get_mut(id) else { continue };
                let slot = (leg.operation.offset / region_len) as u32;
                let from = xpm_protocol::api::allocator::RegionSlot { grant: way as u32, slot };
                match (progress.moves.target(from), leg.part) {
                    (Some(_), Part::Old(_)) => self.end_leg(id, Ok(())),
                    (Some(to), _) => {
                        leg.grant = to.grant;
                        leg.operation.offset =
                            u64::from(to.slot) * region_len + leg.operation.offset % region_len;
                        self.start(id);
                    }
                    // The same memory through another grant: only the old path knows which operations have
                    // taken effect.
                    (None, _) => self.ways[way].held.push_back(id),
                }
            }
        }
    }

    fn has_legs_at_retired(&mut self) -> bool {
        let ways = &self.ways;
        self.legs.iter_mut().any(|(_, leg)| ways[leg.grant as usize].retired)
    }

    fn end_retired(&mut self) {
        for way in &mut self.ways {
            if std::mem::take(&mut way.retired) {
                way.close();
                (way.connector, way.link, way.last_direct) = (None, None, None);
            }
        }
        self.end_change();
    }

    /// Restores the state before the change.
    fn abort(&mut self) {
        self.following.progress = self.following.progress.take().map(|progress| Progress {
            number: 0,
            done: 0,
            locked: 0,
            ..progress
        });
        self.unpark();
        let regions = self.plan.slots().to_vec();
        for number in 0..self.ways.len() {
            let way = &mut self.ways[number];
            if way.connector.is_some() && !regions.iter().any(|slot| slot.grant as usize == number) {
                way.close();
                // Dropping the links releases their buffers.
                (way.connector, way.link, way.last_direct) = (None, None, None);
                way.in_flight = 0;
                way.held.clear();
            }
        }
        self.end_twins();
        self.end_change();
    }

    fn end_twins(&mut self) {
        loop {
            let at_new = self.legs.iter_mut().find(|(_, leg)| leg.part == Part::New);
            let Some((id, leg)) = at_new else { return };
            leg.posted = false;
            self.end_leg(id, Ok(()));
        }
    }

    fn end_change(&mut self) {
        self.following.changing = false;
        self.following.firm = false;
        self.following.limit = u64::MAX;
        self.following.switched = false;
        self.following.reads = None;
        self.following.progress = None;
        self.find_only();
        self.set_timer();
    }
}
