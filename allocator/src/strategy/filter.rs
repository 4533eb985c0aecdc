//! The first step of a decision: which appliances can serve at all.

use std::collections::HashSet;
use std::sync::Arc;

use xpm_protocol::api::decision::Rejection;
use xpm_protocol::policy::Selector;
use xpm_protocol::{ApplianceId, ByteSize, LinkSpeed};

use super::pool::{Fixed, Hot};
use super::{Demand, Room, Seen, Snapshot};

/// The first reason for which an appliance cannot serve; or that it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Code {
    Usable,
    Silent,
    Drained,
    Failed,
    Held,
    /// Index into [`super::Needs::require`].
    NotRequired(u16),
    /// Index into [`super::Needs::forbid`].
    Forbidden(u16),
    TooFar,
    TooSlow,
    LinkTooSlow,
    LinkPromised,
    ShareUsed,
    Full,
}

/// The conditions of one decision, prepared for a walk over the pool.
#[derive(Debug)]
pub(super) struct Filter<'a> {
    snapshot: &'a Snapshot<'a>,
    demand: &'a Demand,
    /// Indices in the pool.
    failed: HashSet<usize>,
    held: HashSet<usize>,
    /// Verdict on each appliance by its lasting properties.
    fixed: Arc<[Code]>,
    /// Current time in milliseconds.
    now: u64,
    link_share: u64,
}

impl<'a> Filter<'a> {
    pub(super) fn new(snapshot: &'a Snapshot<'a>, demand: &'a Demand) -> Filter<'a> {
        let (pool, needs) = (snapshot.pool, &demand.needs);
        let selectors =
            |all: &[(String, Selector)]| all.iter().map(|(_, selector)| selector.clone()).collect();
        let fixed = Fixed {
            require: selectors(&needs.require),
            forbid: selectors(&needs.forbid),
            link_speed: needs.link_speed,
            within: needs.within.map(|within| (within, needs.position)),
        };
        Filter {
            snapshot,
            demand,
            failed: snapshot.failed.iter().filter_map(|&id| pool.at(id)).collect(),
            held: snapshot.held.iter().filter_map(|&id| pool.at(id)).collect(),
            fixed: pool.known(&fixed),
            now: snapshot.now.as_millis() as u64,
            link_share: needs.link_share(demand.columns).map_or(0, |speed| speed.0),
        }
    }

    /// Finds the appliances that can serve a region of this length.
    pub(super) fn look(&self, region_len: u64) -> (Vec<Seen>, Rooms) {
        let mut rooms = Rooms::new(self, region_len);
        let hot = self.snapshot.pool.hot.iter().zip(self.fixed.iter()).enumerate();
        let seen = hot.map(|(at, (hot, fixed))| {
            let code = match self.code(at, hot, *fixed) {
                Code::Usable => rooms.look(self, at, hot),
                code => code,
            };
            Seen { code, score: 0 }
        });
        (seen.collect(), rooms)
    }

    /// Filters again for another length, only among the appliances that lacked at most room.
    pub(super) fn look_again(&self, seen: &mut [Seen], region_len: u64) -> Rooms {
        let mut rooms = Rooms::new(self, region_len);
        for (at, (seen, hot)) in seen.iter_mut().zip(&self.snapshot.pool.hot).enumerate() {
            if matches!(seen.code, Code::Usable | Code::Full | Code::ShareUsed) {
                seen.code = rooms.look(self, at, hot);
            }
        }
        rooms
    }

    fn code(&self, at: usize, hot: &Hot, fixed: Code) -> Code {
        if hot.up_until < self.now || hot.up_until == 0 {
            return Code::Silent;
        }
        if fixed != Code::Usable {
            return fixed;
        }
        if !self.failed.is_empty() && self.failed.contains(&at) {
            return Code::Failed;
        }
        if hot.link_left < self.link_share {
            return Code::LinkPromised;
        }
        if let Some(most) = self.demand.needs.round_trip_max
            && self.round_trip(at).is_none_or(|time| time > most)
        {
            return Code::TooSlow;
        }
        if !self.held.is_empty() && self.held.contains(&at) {
            return Code::Held;
        }
        Code::Usable
    }

    fn round_trip(&self, at: usize) -> Option<u64> {
        let id = self.snapshot.pool.cold[at].candidate.id;
        self.snapshot.round_trips.get(&id).copied()
    }

    fn free(&self, at: usize) -> u64 {
        let one = &self.snapshot.pool.cold[at].candidate;
        let mut free = self.snapshot.pool.hot[at].free;
        if self.snapshot.with_clearing {
            free = free.saturating_add(one.clearing);
        }
        let back = self.snapshot.given_back.get(&one.id).copied().unwrap_or(0);
        let kept = self.snapshot.kept.get(&one.id).copied().unwrap_or(0);
        free.saturating_add(back).min(one.capacity.max(free)).saturating_sub(kept)
    }

    /// The reason in full, for people.
    pub(super) fn rejection(&self, at: usize, code: Code, region_len: u64) -> Option<Rejection> {
        let needs = &self.demand.needs;
        let one = &self.snapshot.pool.cold[at].candidate;
        let rule = |rules: &[(String, Selector)], index: u16| {
            rules.get(usize::from(index)).map(|(rule, _)| rule.clone()).unwrap_or_default()
        };
        Some(match code {
            Code::Usable => return None,
            Code::Silent => Rejection::Silent,
            Code::Drained => Rejection::Drained,
            Code::Failed => Rejection::Failed,
            Code::Held => Rejection::Held,
            Code::NotRequired(index) => Rejection::NotRequired { rule: rule(&needs.require, index) },
            Code::Forbidden(index) => Rejection::Forbidden { rule: rule(&needs.forbid, index) },
            Code::TooFar => Rejection::TooFar {
                common: self.snapshot.pool.common(at, needs.position),
                within: needs.within?,
            },
            Code::TooSlow => {
                Rejection::TooSlow { round_trip: self.round_trip(at), most: needs.round_trip_max? }
            }
            Code::LinkTooSlow => Rejection::LinkTooSlow { has: one.link_speed, asked: needs.link_speed? },
            Code::LinkPromised => Rejection::LinkPromised {
                left: LinkSpeed(self.snapshot.pool.hot[at].link_left),
                asked: LinkSpeed(self.link_share),
            },
            Code::ShareUsed => Rejection::ShareUsed {
                used: ByteSize(self.snapshot.of_account.get(&one.id).copied().unwrap_or(0)),
                most: ByteSize(needs.share?.of(one.capacity)),
            },
            Code::Full => Rejection::Full { free: ByteSize(self.free(at)), region: ByteSize(region_len) },
        })
    }
}

/// The appliances that can serve, in the order of the pool.
#[derive(Debug)]
pub(super) struct Rooms {
    /// Each of them with the number of regions that it has room for.
    pub(super) list: Vec<Room>,
    /// Sum of these numbers.
    pub(super) regions: u64,
    /// Free memory of the appliance that has most, in bytes.
    pub(super) most_free: u64,
    shift: u32,
    /// Free memory is what the appliances report: the snapshot makes no adjustment to it.
    plain: bool,
    shares: Shares,
}

impl Rooms {
    fn new(filter: &Filter<'_>, region_len: u64) -> Rooms {
        let snapshot = filter.snapshot;
        Rooms {
            list: Vec::with_capacity(snapshot.pool.len()),
            regions: 0,
            most_free: 0,
            shift: region_len.trailing_zeros(),
            plain: !snapshot.with_clearing && snapshot.given_back.is_empty() && snapshot.kept.is_empty(),
            shares: Shares::new(snapshot, filter.demand),
        }
    }

    fn look(&mut self, filter: &Filter<'_>, at: usize, hot: &Hot) -> Code {
        let free = if self.plain { hot.free } else { filter.free(at) };
        let left = self.shares.left(at);
        let regions = free.min(left) >> self.shift;
        if regions == 0 {
            return if left < free { Code::ShareUsed } else { Code::Full };
        }
        self.list.push(Room { at: at as u32, regions: u32::try_from(regions).unwrap_or(u32::MAX) });
        self.regions = self.regions.saturating_add(regions);
        self.most_free = self.most_free.max(hot.free);
        Code::Usable
    }
}

/// Remaining share of the account on each appliance, looked up in the order of the pool.
#[derive(Debug)]
struct Shares {
    shares: Option<Arc<[u64]>>,
    /// Memory of the account by pool index; the last entry is the next one to be looked up.
    used: Vec<(usize, u64)>,
}

impl Shares {
    fn new(snapshot: &Snapshot<'_>, demand: &Demand) -> Shares {
        let Some(share) = demand.needs.share else { return Shares { shares: None, used: Vec::new() } };
        let place = |(id, used): (&ApplianceId, &u64)| Some((snapshot.pool.at(*id)?, *used));
        let mut used: Vec<(usize, u64)> = snapshot.of_account.iter().filter_map(place).collect();
        used.sort_unstable_by(|a, b| b.cmp(a));
        Shares { shares: Some(snapshot.pool.shares(share)), used }
    }

    /// `at` must ascend from call to call.
    fn left(&mut self, at: usize) -> u64 {
        let Some(shares) = &self.shares else { return u64::MAX };
        while self.used.last().is_some_and(|(place, _)| *place < at) {
            self.used.pop();
        }
        match self.used.last() {
            Some((place, used)) if *place == at => shares[at].saturating_sub(*used),
            _ => shares[at],
        }
    }
}
