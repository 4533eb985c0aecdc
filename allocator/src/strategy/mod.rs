//! Decides which appliances get the regions of an allocation: pure functions over a snapshot.
//!
//! [`merge`] combines the rules that apply to a request into [`Needs`]. Then *filter* drops the appliances that
//! cannot serve at all, *score* rates the others, and *spread* distributes the regions by score. The same snapshot
//! and seed give the same placement, so that every decision can be repeated, tried out ([`decide`] without carrying
//! it out) and explained ([`trace`], [`remedy`]).

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

/// The input of a decision, besides the demand.
#[derive(Debug, Clone, Copy)]
pub struct Snapshot<'a> {
    /// The appliances.
    pub pool: &'a Pool,
    /// Now, by the service's clock.
    pub now: Duration,
    /// Now, seconds since 1970.
    pub unix: u64,
    /// Appliances that refused or did not answer an earlier attempt at the same request.
    pub failed: &'a [ApplianceId],
    /// Appliances whose memory is kept for a request that comes first.
    pub held: &'a HashSet<ApplianceId>,
    /// Memory that the account has on each appliance already, in bytes.
    pub of_account: &'a HashMap<ApplianceId, u64>,
    /// Round-trip times from the client, in nanoseconds.
    pub round_trips: &'a HashMap<ApplianceId, u64>,
    /// Whether memory that is being cleared counts as free.
    pub with_clearing: bool,
    /// Memory that counts as free because it is going to be given back, in bytes by appliance.
    pub given_back: &'a HashMap<ApplianceId, u64>,
    /// Memory that does not count as free although everything else is given back, in bytes by appliance.
    pub kept: &'a HashMap<ApplianceId, u64>,
}

/// The demand of a request. The caller has checked it: `size` is whole pages, and `columns` and `unit` fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    /// Size of the allocation in bytes, at least one page.
    pub size: u64,
    /// Regions in a row of the layout.
    pub columns: u32,
    /// Least length of a region in bytes: the stripe unit, or 0.
    pub unit: u64,
    /// Length of a region in bytes, if the request sets it.
    pub region_len: Option<u64>,
    /// Decides between appliances of equal score.
    pub seed: u64,
    /// Appliances that have regions of the allocation already: a linear allocation prefers them to others.
    pub home: Vec<ApplianceId>,
    /// Demands of rules and profiles.
    pub needs: Needs,
}

/// Demands of rules and profiles.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// Selectors, each with its rule. An appliance must fit all of them.
    pub require: Vec<(String, Selector)>,
    /// Selectors, each with its rule. An appliance must fit none of them.
    pub forbid: Vec<(String, Selector)>,
    /// Selectors that raise an appliance's score, each with its rule.
    pub prefer: Vec<(String, Preference)>,
    /// Speed that an appliance's link must have, and must have free for the columns that it serves.
    pub link_speed: Option<LinkSpeed>,
    /// The appliance and the client must have the same label at this level or at a nearer one.
    pub within: Option<Level>,
    /// Longest round trip to an appliance, in nanoseconds.
    pub round_trip_max: Option<u64>,
    /// The account's share of an appliance.
    pub share: Option<Percent>,
    /// Weights of the parts of a score.
    pub weights: Weights,
    /// Position of the client.
    pub position: Position,
    /// Most bytes that may be taken, counted in whole regions.
    pub taken_max: Option<u64>,
    /// Whether a linear allocation is spread over as many appliances as possible, instead of lying on one that holds
    /// all of it.
    pub spread: bool,
    /// The documents that set these demands.
    pub sources: Sources,
}

/// The documents that set the single values of [`Needs`], each with the command that changes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources {
    /// Source of the link speed.
    pub link: String,
    /// Source of the demand for nearness, by labels or by round trips.
    pub locality: String,
    /// Source of the share.
    pub share: String,
}

/// A rule, written `strategy/rule`, in words with the command that changes it.
pub fn rule_source(rule: &str) -> String {
    match rule.split_once('/') {
        Some((strategy, rule)) => {
            format!("rule `{rule}` of strategy `{strategy}` (`xpm edit strategy {strategy}`)")
        }
        None => format!("rule `{rule}`"),
    }
}

impl Needs {
    /// Speed of each appliance's link that is promised to an allocation, if any: its columns work at the same time
    /// and share the demanded speed.
    pub fn link_share(&self, columns: u32) -> Option<LinkSpeed> {
        self.link_speed.map(|speed| LinkSpeed(speed.0.div_ceil(u64::from(columns.max(1)))))
    }
}

/// The appliances of the regions: whole rows, in the order of the allocation's regions.
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
    /// The allocation would need more regions than the maximum.
    TooManyRegions,
    /// The allocation would take more than a limit leaves.
    Limit {
        /// Bytes that it would take at least.
        takes: u64,
        /// Bytes that the limit leaves.
        left: u64,
    },
    /// The appliances do not have the memory.
    NoSpace {
        /// Size of the allocation in bytes.
        size: u64,
        /// Memory of the appliances that can serve, in bytes.
        free: u64,
        /// Number of these appliances.
        usable: usize,
    },
}

/// The result of a decision on a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decided {
    /// The verdict on each appliance, in the order of the pool.
    pub seen: Vec<Seen>,
    /// Length of a region in bytes that the verdicts are based on.
    pub region_len: u64,
    /// Free memory of the usable appliance that has most, in bytes: scores are relative to it.
    pub most_free: u64,
    /// The placement, or why there is none.
    pub placement: Result<Placement, NoPlace>,
}

/// The verdict on one appliance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Whether it can serve.
    pub code: Code,
    /// Its score; 0 if it cannot serve.
    pub score: u32,
}

/// Finds a place for every region. If the request leaves the length of regions open, shorter lengths are tried down
/// to the shortest, since short regions fit into small remainders. A linear allocation lies on one appliance if one
/// holds all of it at any length, since each further appliance is one more that can fail.
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

/// A method of distributing regions of one length; none if they do not fit.
type Way = fn(&Snapshot<'_>, &Demand, &mut [Seen], &filter::Rooms, u64) -> Option<Vec<ApplianceId>>;

/// An appliance that can serve.
#[derive(Debug, Clone, Copy)]
struct Room {
    /// Its index in the pool.
    at: u32,
    /// Number of regions that it has room for; at least one.
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
