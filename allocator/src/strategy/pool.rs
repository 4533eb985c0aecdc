//! The pool: all appliances in the form that decisions read.
//!
//! The fields that every decision reads lie close together ([`Hot`]), so that a walk over ten thousand appliances
//! takes some ten microseconds; labels are represented by numbers. The owner of the inventory keeps the pool current;
//! a decision only reads it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use xpm_protocol::api::appliance::Medium;
use xpm_protocol::policy::{LEVELS, Labels, Level, Selector};
use xpm_protocol::{ApplianceId, LinkSpeed, Name, Percent};

use super::Code;

/// An appliance, as the inventory describes it to the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The appliance.
    pub id: ApplianceId,
    /// Its name.
    pub name: Name,
    /// Until when it counts as up, by the service's clock.
    pub up_until: Duration,
    /// Memory that may still be requested, in bytes: promises and head-room are deducted.
    pub free: u64,
    /// Memory of it that may be used at all, in bytes.
    pub capacity: u64,
    /// Memory that it is clearing and that will be free soon, in bytes.
    pub clearing: u64,
    /// Whether the operator is emptying it.
    pub drain: bool,
    /// Its labels, the operator's and its own.
    pub labels: Labels,
    /// Medium of its memory.
    pub medium: Medium,
    /// Whether RDMA reaches it.
    pub rdma: bool,
    /// Speed of its link, if it is known.
    pub link_speed: Option<LinkSpeed>,
    /// Speed of its link that is promised to allocations.
    pub link_promised: LinkSpeed,
    /// Idle share of its link, in thousandths.
    pub idle: u16,
    /// How free it is of recent errors, in thousandths: 1000 without errors, and 1000 / (n + 1) after n of them.
    pub health: u16,
    /// When it registered first, seconds since 1970.
    pub since: u64,
    /// How long it counts as a newcomer from then on, in seconds.
    pub ramp_up: u64,
}

/// The fields that each decision reads of each appliance: half a cache line.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hot {
    /// In milliseconds; 0: never heard.
    pub(super) up_until: u64,
    pub(super) free: u64,
    pub(super) link_left: u64,
    /// End of its time as a newcomer, seconds since 1970.
    pub(super) ramp_to: u32,
    pub(super) idle: u16,
    pub(super) health: u16,
}

/// The fields that not every decision reads.
#[derive(Debug)]
pub(super) struct Cold {
    pub(super) candidate: Candidate,
    /// Its labels as numbers.
    labels: Box<[u32]>,
    /// Numbers of its labels of the levels, from near to far; 0: none.
    place: [u32; 4],
}

/// All appliances, by index.
#[derive(Debug)]
pub struct Pool {
    pub(super) hot: Vec<Hot>,
    pub(super) ids: Vec<ApplianceId>,
    pub(super) cold: Vec<Cold>,
    index: HashMap<ApplianceId, usize>,
    numbers: HashMap<(Name, Name), u32>,
    /// Number of labels beyond which unused ones are removed.
    numbers_max: usize,
    /// Verdicts that do not change from one decision to the next. Every change of their basis clears the map.
    known: RefCell<HashMap<Fixed, Arc<[Code]>>>,
    /// Shares of the memory of each appliance, in bytes.
    shares: RefCell<HashMap<Percent, Arc<[u64]>>>,
}

/// Demands that only the lasting properties of an appliance decide, not its present state.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Fixed {
    pub(super) require: Vec<Selector>,
    pub(super) forbid: Vec<Selector>,
    pub(super) link_speed: Option<LinkSpeed>,
    pub(super) within: Option<(Level, Position)>,
}

/// Number of labels up to which unused ones are kept.
const NUMBERS_MIN: usize = 10_000;
/// Most demands whose verdicts are kept.
const KNOWN_MAX: usize = 64;

/// Position of a client: the numbers of its labels of the levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Position([u32; 4]);

/// A selector with its labels as numbers.
#[derive(Debug, Clone)]
pub(super) struct Chosen<'a> {
    selector: &'a Selector,
    /// Numbers of the selector's labels. None if there is a label among them that no appliance has.
    labels: Option<Vec<u32>>,
}

impl Default for Pool {
    fn default() -> Pool {
        Pool {
            hot: Vec::new(),
            ids: Vec::new(),
            cold: Vec::new(),
            index: HashMap::new(),
            numbers: HashMap::new(),
            numbers_max: NUMBERS_MIN,
            known: RefCell::default(),
            shares: RefCell::default(),
        }
    }
}

impl Pool {
    /// Adds or replaces an appliance.
    pub fn put(&mut self, candidate: Candidate) {
        self.forget();
        if self.numbers.len() > self.numbers_max {
            self.renumber();
        }
        let hot = Hot::of(&candidate);
        let labels = candidate.labels.iter().map(|(key, value)| self.number(key, value)).collect();
        let place = LEVELS.map(|level| {
            let found = candidate.labels.iter().find(|(key, _)| key.as_str() == level.as_str());
            found.map_or(0, |(key, value)| self.numbers[&(key.clone(), value.clone())])
        });
        let id = candidate.id;
        let cold = Cold { candidate, labels, place };
        match self.index.get(&id) {
            Some(&at) => (self.hot[at], self.cold[at]) = (hot, cold),
            None => {
                self.index.insert(id, self.hot.len());
                self.hot.push(hot);
                self.ids.push(id);
                self.cold.push(cold);
            }
        }
    }

    /// Lets the closure change an appliance's present state. It must not change lasting properties (name, labels,
    /// medium, capacity, link speed, and whether it is drained or reached by RDMA): verdicts on these are kept.
    pub fn update(&mut self, id: ApplianceId, change: impl FnOnce(&mut Candidate)) {
        if let Some(&at) = self.index.get(&id) {
            change(&mut self.cold[at].candidate);
            self.hot[at] = Hot::of(&self.cold[at].candidate);
        }
    }

    /// Removes an appliance.
    pub fn remove(&mut self, id: ApplianceId) {
        let Some(at) = self.index.remove(&id) else { return };
        self.forget();
        self.hot.swap_remove(at);
        self.ids.swap_remove(at);
        self.cold.swap_remove(at);
        if let Some(moved) = self.cold.get(at) {
            self.index.insert(moved.candidate.id, at);
        }
    }

    /// The appliances in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &Candidate> {
        self.cold.iter().map(|cold| &cold.candidate)
    }

    /// The appliance with this id.
    pub fn get(&self, id: ApplianceId) -> Option<&Candidate> {
        self.index.get(&id).map(|&at| &self.cold[at].candidate)
    }

    /// Number of appliances.
    pub fn len(&self) -> usize {
        self.hot.len()
    }

    /// Whether the pool is empty.
    pub fn is_empty(&self) -> bool {
        self.hot.is_empty()
    }

    pub(super) fn at(&self, id: ApplianceId) -> Option<usize> {
        self.index.get(&id).copied()
    }

    fn forget(&mut self) {
        self.known.get_mut().clear();
        self.shares.get_mut().clear();
    }

    /// This share of the memory of each appliance, in bytes.
    pub(super) fn shares(&self, share: Percent) -> Arc<[u64]> {
        let of = |cold: &Cold| share.of(cold.candidate.capacity);
        let mut shares = self.shares.borrow_mut();
        shares.entry(share).or_insert_with(|| self.cold.iter().map(of).collect()).clone()
    }

    /// The verdicts on all appliances for fixed demands; computed at the first use.
    pub(super) fn known(&self, fixed: &Fixed) -> Arc<[Code]> {
        let mut known = self.known.borrow_mut();
        if let Some(codes) = known.get(fixed) {
            return codes.clone();
        }
        let codes: Arc<[Code]> = self.judge(fixed);
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        known.insert(fixed.clone(), codes.clone());
        codes
    }

    fn judge(&self, fixed: &Fixed) -> Arc<[Code]> {
        let require: Vec<Chosen<'_>> = fixed.require.iter().map(|one| self.choose(one)).collect();
        let forbid: Vec<Chosen<'_>> = fixed.forbid.iter().map(|one| self.choose(one)).collect();
        let code = |at: usize| {
            let one = &self.cold[at].candidate;
            if one.drain {
                return Code::Drained;
            }
            if let Some(rule) = require.iter().position(|chosen| !self.fits(at, chosen)) {
                return Code::NotRequired(rule as u16);
            }
            if let Some(rule) = forbid.iter().position(|chosen| self.fits(at, chosen)) {
                return Code::Forbidden(rule as u16);
            }
            let near = |(within, position)| self.common(at, position).is_some_and(|common| common <= within);
            if !fixed.within.is_none_or(near) {
                return Code::TooFar;
            }
            let fast = |asked| one.link_speed.is_some_and(|has| has >= asked);
            if fixed.link_speed.is_none_or(fast) { Code::Usable } else { Code::LinkTooSlow }
        };
        (0..self.len()).map(code).collect()
    }

    /// The position that these labels describe.
    pub fn position(&self, labels: &Labels) -> Position {
        Position(LEVELS.map(|level| {
            let found = labels.iter().find(|(key, _)| key.as_str() == level.as_str());
            let number = found.and_then(|(key, value)| self.numbers.get(&(key.clone(), value.clone())));
            number.copied().unwrap_or(0)
        }))
    }

    /// The nearest level at which the appliance and a position have the same label.
    pub(super) fn common(&self, at: usize, position: Position) -> Option<Level> {
        let place = self.cold[at].place;
        let mut common = None;
        // From far to near, until the labels differ.
        for (index, level) in LEVELS.into_iter().enumerate().rev() {
            match (place[index], position.0[index]) {
                (0, _) | (_, 0) => {}
                (a, b) if a == b => common = Some(level),
                _ => break,
            }
        }
        common
    }

    pub(super) fn choose<'a>(&self, selector: &'a Selector) -> Chosen<'a> {
        let number = |(key, value): (&Name, &Name)| self.numbers.get(&(key.clone(), value.clone())).copied();
        Chosen { selector, labels: selector.labels.iter().map(number).collect() }
    }

    pub(super) fn fits(&self, at: usize, chosen: &Chosen<'_>) -> bool {
        let (cold, selector) = (&self.cold[at], chosen.selector);
        let Some(labels) = &chosen.labels else { return false };
        let one = &cold.candidate;
        labels.iter().all(|label| cold.labels.contains(label))
            && (selector.medium.is_empty() || selector.medium.contains(&one.medium))
            && selector.link_speed_min.is_none_or(|least| one.link_speed.is_some_and(|speed| speed >= least))
            && selector.rdma.is_none_or(|rdma| rdma == one.rdma)
            && (selector.appliances.is_empty() || selector.appliances.contains(&one.name))
    }

    /// Numbers all labels anew; labels without an appliance are dropped.
    fn renumber(&mut self) {
        self.numbers.clear();
        self.numbers_max = usize::MAX;
        for candidate in self.iter().cloned().collect::<Vec<_>>() {
            self.put(candidate);
        }
        self.numbers_max = (2 * self.numbers.len()).max(NUMBERS_MIN);
    }

    fn number(&mut self, key: &Name, value: &Name) -> u32 {
        let next = self.numbers.len() as u32 + 1;
        *self.numbers.entry((key.clone(), value.clone())).or_insert(next)
    }
}

impl Hot {
    fn of(candidate: &Candidate) -> Hot {
        let link = candidate.link_speed.map_or(0, |speed| speed.0);
        let ramp_to = candidate.since.saturating_add(candidate.ramp_up);
        Hot {
            up_until: millis(candidate.up_until),
            free: candidate.free,
            link_left: link.saturating_sub(candidate.link_promised.0),
            ramp_to: u32::try_from(ramp_to).unwrap_or(u32::MAX),
            idle: candidate.idle,
            health: candidate.health,
        }
    }
}

/// A moment in milliseconds. Only "never heard" is 0.
fn millis(at: Duration) -> u64 {
    match at.is_zero() {
        true => 0,
        false => (at.as_millis() as u64).max(1),
    }
}
