//! What was found about each appliance, for people.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use xpm_protocol::api::decision::{ApplianceTrace, RejectedCount, Verdict};

use super::filter::{Code, Filter};
use super::score::Scorer;
use super::{Decided, Demand, Snapshot};

/// How many of the appliances that can serve and got nothing a record keeps.
const RUNNERS_UP: usize = 5;
/// How many examples of each reason a record keeps.
const EXAMPLES: usize = 3;
/// Appliances of which a record keeps all.
const ALL_UP_TO: usize = 32;

/// The appliances of a decision: those that serve, then the others by score, then those that
/// cannot. Without `all`, only some of the latter two in a large pool.
pub fn appliances(
    snapshot: &Snapshot<'_>,
    demand: &Demand,
    decided: &Decided,
    all: bool,
) -> Vec<ApplianceTrace> {
    let all = all || decided.seen.len() <= ALL_UP_TO;
    let got = regions_of(snapshot, decided);
    let mut usable: Vec<usize> = got.keys().copied().collect();
    let runners_up = if all { usize::MAX } else { RUNNERS_UP };
    usable.extend(others(decided, &got, runners_up));
    usable.sort_by_cached_key(|&at| {
        let name = snapshot.pool.cold[at].candidate.name.clone();
        (!got.contains_key(&at), Reverse(decided.seen[at].score), name)
    });
    let scorer = Scorer::with_most(snapshot, demand, decided.most_free);
    let scored = usable.iter().map(|&at| {
        let regions = got.get(&at).copied().unwrap_or(0);
        let score = u64::from(decided.seen[at].score) / 1000;
        trace(snapshot, at, Verdict::Scored { score, parts: scorer.parts(at), regions })
    });
    let mut traces: Vec<ApplianceTrace> = scored.collect();
    traces.extend(rejections(snapshot, demand, decided, all));
    traces
}

fn trace(snapshot: &Snapshot<'_>, at: usize, verdict: Verdict) -> ApplianceTrace {
    let one = &snapshot.pool.cold[at].candidate;
    ApplianceTrace { id: one.id, name: one.name.clone(), verdict }
}

/// The best of those that can serve and got nothing.
fn others(decided: &Decided, got: &BTreeMap<usize, u64>, most: usize) -> Vec<usize> {
    let mut best: BinaryHeap<Reverse<(u32, Reverse<usize>)>> = BinaryHeap::new();
    let mut least = 0;
    for (at, seen) in decided.seen.iter().enumerate() {
        let worse = best.len() >= most && seen.score <= least;
        if worse || seen.code != Code::Usable || got.contains_key(&at) {
            continue;
        }
        best.push(Reverse((seen.score, Reverse(at))));
        if best.len() > most {
            best.pop();
        }
        least = best.peek().map_or(0, |Reverse((score, _))| *score);
    }
    best.into_iter().map(|Reverse((_, Reverse(at)))| at).collect()
}

fn rejections(snapshot: &Snapshot<'_>, demand: &Demand, decided: &Decided, all: bool) -> Vec<ApplianceTrace> {
    let filter = Filter::new(snapshot, demand);
    let mut shown = [0_usize; REASONS.len()];
    let mut traces = Vec::new();
    for (at, seen) in decided.seen.iter().enumerate().filter(|(_, seen)| seen.code != Code::Usable) {
        let shown = &mut shown[seen.code.index()];
        *shown += 1;
        if !all && *shown > EXAMPLES {
            continue;
        }
        if let Some(rejection) = filter.rejection(at, seen.code, decided.region_len) {
            traces.push(trace(snapshot, at, Verdict::Rejected(rejection)));
        }
    }
    traces
}

/// What each appliance gets, by its place in the pool.
fn regions_of(snapshot: &Snapshot<'_>, decided: &Decided) -> BTreeMap<usize, u64> {
    let mut got = BTreeMap::new();
    let regions = decided.placement.iter().flat_map(|placement| &placement.regions);
    for at in regions.filter_map(|&id| snapshot.pool.at(id)) {
        *got.entry(at).or_default() += 1;
    }
    got
}

/// How many appliances were rejected for which reason, the most frequent first.
pub fn rejected(decided: &Decided) -> Vec<RejectedCount> {
    let mut counts = [0_u64; REASONS.len()];
    decided.seen.iter().for_each(|seen| counts[seen.code.index()] += 1);
    let rejected = REASONS.iter().zip(counts).skip(1).filter(|(_, appliances)| *appliances > 0);
    let count =
        |(reason, appliances): (&&str, u64)| RejectedCount { reason: (*reason).to_owned(), appliances };
    let mut counts: Vec<RejectedCount> = rejected.map(count).collect();
    counts.sort_by_key(|count| Reverse(count.appliances));
    counts
}

/// By [`Code::index`].
const REASONS: [&str; 13] = [
    "usable",
    "silent",
    "drained",
    "refused or did not answer",
    "held for a request that comes first",
    "not what a rule requires",
    "forbidden by a rule",
    "too far away",
    "round trip too long or not measured",
    "link too slow or of unknown speed",
    "link promised to others",
    "the account has its share of it",
    "full",
];

impl Code {
    fn index(self) -> usize {
        match self {
            Code::Usable => 0,
            Code::Silent => 1,
            Code::Drained => 2,
            Code::Failed => 3,
            Code::Held => 4,
            Code::NotRequired(_) => 5,
            Code::Forbidden(_) => 6,
            Code::TooFar => 7,
            Code::TooSlow => 8,
            Code::LinkTooSlow => 9,
            Code::LinkPromised => 10,
            Code::ShareUsed => 11,
            Code::Full => 12,
        }
    }
}
