//! Which appliances get the regions of an allocation: pure functions over a snapshot.
//!
//! [`merge`] puts the rules that apply to a request together into [`Needs`]. Then *filter* drops
//! the appliances that cannot serve at all, *score* says how much one is wanted, and *spread* deals
//! the regions out by score. The same snapshot and seed give the same placement, so that every
//! decision can be repeated, tried out ([`decide`] without carrying it out) and explained
//! ([`trace`], [`remedy`]).

mod filter;
mod merge;
mod pool;
pub mod remedy;
mod score;
pub mod size;
mod spread;
pub mod trace;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::time::Duration;

use xpm_protocol::policy::{Level, Preference, Selector, Weights};
use xpm_protocol::{ApplianceId, ByteSize, LinkSpeed, Percent};

pub use merge::{Merged, merge};
pub use pool::{Candidate, Pool, Position};

pub use filter::Code;
use filter::Filter;

/// What a decision is made from, besides what is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Snapshot<'a> {
    /// The appliances.
    pub pool: &'a Pool,
    /// Now, by the service's clock.
    pub now: Duration,
    /// Now, seconds since 1970.
    pub unix: u64,
    /// Appliances that refused or did not answer this very request before.
    pub failed: &'a [ApplianceId],
    /// Appliances whose memory is meant for a request that comes first.
    pub held: &'a HashSet<ApplianceId>,
    /// What the account has on each appliance already, in bytes.
    pub of_account: &'a HashMap<ApplianceId, u64>,
    /// Round-trip times from the client, in nanoseconds.
    pub round_trips: &'a HashMap<ApplianceId, u64>,
    /// Memory that is being cleared counts as free.
    pub with_clearing: bool,
    /// Memory that is going to be given back counts as free, in bytes by appliance.
    pub given_back: &'a HashMap<ApplianceId, u64>,
    /// Memory that is not free although everything else is given back, in bytes by appliance.
    pub kept: &'a HashMap<ApplianceId, u64>,
}

/// What is asked for; checked before: `size` is whole pages and `columns` and `unit` fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    /// Size of the allocation in bytes, at least one page.
    pub size: u64,
    /// Regions in a row of the layout.
    pub columns: u32,
    /// Least length of a region in bytes: the stripe unit, or 0.
    pub unit: u64,
    /// Length of a region in bytes where the request says it.
    pub region_len: Option<u64>,
    /// Decides between appliances of equal score.
    pub seed: u64,
    /// Appliances that have something of the allocation already: a linear one goes there before it goes elsewhere.
    pub home: Vec<ApplianceId>,
    /// What rules and profiles ask for.
    pub needs: Needs,
}

/// What rules and profiles ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// Appliances must fit each of these; with the rule that says so.
    pub require: Vec<(String, Selector)>,
    /// Appliances may fit none of these; with the rule that says so.
    pub forbid: Vec<(String, Selector)>,
    /// Appliances that fit these are wanted more; with the rule that says so.
    pub prefer: Vec<(String, Preference)>,
    /// The speed that a link must have, and have free for the columns that it serves.
    pub link_speed: Option<LinkSpeed>,
    /// Appliances must be this near.
    pub within: Option<Level>,
    /// Appliances must answer within this, in nanoseconds.
    pub round_trip_max: Option<u64>,
    /// The account's share of an appliance.
    pub share: Option<Percent>,
    /// What counts how much.
    pub weights: Weights,
    /// Where the client is.
    pub position: Position,
    /// At most so many bytes may be taken, whole regions counted.
    pub taken_max: Option<u64>,
    /// A linear allocation goes to as many appliances as there are, rather than to one that holds all of it.
    pub spread: bool,
    /// What of this comes from where.
    pub sources: Sources,
}

/// The documents that ask for what stands once in [`Needs`], each with how to change it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources {
    /// Of the link speed.
    pub link: String,
    /// Of nearness, by labels or by round trips.
    pub locality: String,
    /// Of the share.
    pub share: String,
}

/// A rule, written `strategy/rule`, with the command that changes it.
pub fn rule_source(rule: &str) -> String {
    match rule.split_once('/') {
        Some((strategy, rule)) => {
            format!("rule `{rule}` of strategy `{strategy}` (`xpm edit strategy {strategy}`)")
        }
        None => format!("rule `{rule}`"),
    }
}

impl Needs {
    /// What of the link of each appliance is promised to an allocation, if anything: its columns
    /// work at the same time and share the speed.
    pub fn link_share(&self, columns: u32) -> Option<LinkSpeed> {
        self.link_speed.map(|speed| LinkSpeed(speed.0.div_ceil(u64::from(columns.max(1)))))
    }
}

/// Where the regions go: whole rows, in the order of the allocation's regions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Length of each region in bytes.
    pub region_len: u64,
    /// The appliance of each region.
    pub regions: Vec<ApplianceId>,
}

/// Why there is no placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoPlace {
    /// It would take more regions than an allocation may have.
    TooManyRegions,
    /// It would take more than a limit leaves.
    Limit {
        /// What it would take at least, in bytes.
        takes: u64,
        /// What may be taken, in bytes.
        left: u64,
    },
    /// The appliances do not have the memory.
    NoSpace {
        /// Size of the allocation in bytes.
        size: u64,
        /// Memory of the appliances that can serve, in bytes.
        free: u64,
        /// How many of them there are.
        usable: usize,
    },
}

/// A decision about a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decided {
    /// What was found about each appliance, in the order of the pool.
    pub seen: Vec<Seen>,
    /// Length of a region for which that is, in bytes.
    pub region_len: u64,
    /// What the appliance that can serve and has most has free, in bytes: scores are relative to it.
    pub most_free: u64,
    /// Where the regions go.
    pub placement: Result<Placement, NoPlace>,
}

/// What was found about an appliance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Whether it can serve.
    pub code: Code,
    /// How much it is wanted; 0 where it cannot serve.
    pub score: u32,
}

/// Finds a place for every region. Where the request leaves the length of regions open, smaller
/// ones are tried down to the smallest: they fit into what is left here and there. A linear allocation lies on one
/// appliance if one holds all of it at any length, since each further one is one more that can fail.
pub fn decide(snapshot: &Snapshot<'_>, demand: &Demand) -> Decided {
    let filter = Filter::new(snapshot, demand);
    let lengths = size::lengths(demand).unwrap_or_default();
    let left = demand.needs.taken_max.unwrap_or(u64::MAX);
    let allowed: Vec<u64> = lengths.iter().copied().filter(|&len| size::taken(demand, len) <= left).collect();
    let first = allowed.first().or(lengths.last()).copied().unwrap_or(1);
    let (mut seen, mut rooms) = filter.look(first);
    let mut region_len = first;
    let ways: &[Way] = match demand.columns == 1 && !demand.needs.spread {
        true => &[spread::on_one, spread::on_few],
        false => &[spread::spread],
    };
    for (way, &len) in ways.iter().flat_map(|way| allowed.iter().map(move |len| (way, len))) {
        if len != region_len {
            (rooms, region_len) = (filter.look_again(&mut seen, len), len);
        }
        if let Some(regions) = way(snapshot, demand, &mut seen, &rooms, region_len) {
            let placement = Ok(Placement { region_len, regions });
            return Decided { seen, region_len, most_free: rooms.most_free, placement };
        }
    }
    score::fill(snapshot, demand, &mut seen, &rooms);
    let no_place = match (lengths.is_empty(), allowed.is_empty()) {
        (true, _) => NoPlace::TooManyRegions,
        (_, true) => {
            let takes = lengths.iter().map(|&len| size::taken(demand, len)).min().unwrap_or_default();
            NoPlace::Limit { takes, left }
        }
        _ => NoPlace::NoSpace {
            size: demand.size,
            free: rooms.regions.saturating_mul(region_len),
            usable: rooms.list.len(),
        },
    };
    Decided { seen, region_len, most_free: rooms.most_free, placement: Err(no_place) }
}

/// Deals regions of one length out, or says that they do not fit.
type Way = fn(&Snapshot<'_>, &Demand, &mut [Seen], &filter::Rooms, u64) -> Option<Vec<ApplianceId>>;

/// An appliance that can serve.
#[derive(Debug, Clone, Copy)]
struct Room {
    /// Its place in the pool.
    at: u32,
    /// How many regions it has room for; at least one.
    regions: u32,
}

impl fmt::Display for NoPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoPlace::TooManyRegions => write!(
                f,
                "it would take more than {} regions, the most that an allocation may have; ask for longer regions, or for \
                 less",
                size::REGIONS_MAX
            ),
            NoPlace::Limit { takes, left } => {
                write!(
                    f,
                    "it takes {} in whole regions, and a limit leaves {}",
                    ByteSize(*takes),
                    ByteSize(*left)
                )
            }
            NoPlace::NoSpace { size, free, usable } => {
                let (size, free) = (ByteSize(*size), ByteSize(*free));
                match usable {
                    0 => write!(f, "{size} do not fit: no appliance can serve"),
                    1 => write!(f, "{size} do not fit: 1 appliance can serve and has {free} free"),
                    many => write!(f, "{size} do not fit: {many} appliances can serve and have {free} free"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
