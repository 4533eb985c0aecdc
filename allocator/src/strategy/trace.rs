//! Explanation of a decision: the verdict on each appliance, for people.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use xpm_protocol::api::decision::{ApplianceTrace, RejectedCount, Verdict};

use super::filter::{Code, Filter};
use super::score::Scorer;
use super::{Decided, Demand, Snapshot};

/// How many usable appliances that got nothing a record names.
const RUNNERS_UP: usize = 5;
/// How many examples of each reason a record names.
const EXAMPLES: u64 = 3;
/// Up to this number of appliances a record names all.
const ALL_UP_TO: usize = 32;

/// The appliances of a decision: first those that serve, then other usable ones by score, then those that cannot
/// serve. The last group is also counted by reason, the most frequent first. Without `all`, only some of the
/// appliances that do not serve are named in a large pool.
pub fn appliances(
    snapshot: &Snapshot<'_>,
    demand: &Demand,
    decided: &Decided,
    all: bool,
) -> (Vec<ApplianceTrace>, Vec<RejectedCount>) {
    let all = all || decided.seen.len() <= ALL_UP_TO;
    let got = regions_of(snapshot, decided);
    let walked = Walked::new(decided, &got, all);
    let mut usable: Vec<usize> = got.keys().chain(&walked.others).copied().collect();
    usable.sort_by_cached_key(|&at| {
        let name = snapshot.pool.cold[at].candidate.name.clone();
        (!got.contains_key(&at), Reverse(decided.seen[at].score), name)
    });
    let scorer = Scorer::new(snapshot, demand, decided.most_free);
    let scored = usable.iter().map(|&at| {
        let regions = got.get(&at).copied().unwrap_or(0);
        let score = u64::from(decided.seen[at].score) / 1000;
        trace(snapshot, at, Verdict::Scored { score, parts: scorer.parts(at), regions })
    });
    let mut traces: Vec<ApplianceTrace> = scored.collect();
    let filter = Filter::new(snapshot, demand);
    traces.extend(walked.rejected.iter().filter_map(|&at| {
        let rejection = filter.rejection(at, decided.seen[at].code, decided.region_len)?;
        Some(trace(snapshot, at, Verdict::Rejected(rejection)))
    }));
    (traces, walked.rejected_counts())
}

fn trace(snapshot: &Snapshot<'_>, at: usize, verdict: Verdict) -> ApplianceTrace {
    let one = &snapshot.pool.cold[at].candidate;
    ApplianceTrace { id: one.id, name: one.name.clone(), verdict }
}

/// Findings of one walk over all verdicts.
struct Walked {
    /// The best of the usable appliances that got nothing.
    others: Vec<usize>,
    /// Appliances that cannot serve, or examples of each reason.
    rejected: Vec<usize>,
    /// By [`Code::index`].
    counts: [u64; REASONS.len()],
}

impl Walked {
    fn new(decided: &Decided, got: &BTreeMap<usize, u64>, all: bool) -> Walked {
        let most = if all { usize::MAX } else { RUNNERS_UP };
        let examples = if all { u64::MAX } else { EXAMPLES };
        let mut best: BinaryHeap<Reverse<(u32, Reverse<usize>)>> = BinaryHeap::new();
        let mut least = 0;
        let mut walked = Walked { others: Vec::new(), rejected: Vec::new(), counts: [0; REASONS.len()] };
        for (at, seen) in decided.seen.iter().enumerate() {
            let count = &mut walked.counts[seen.code.index()];
            *count += 1;
            if seen.code != Code::Usable {
                if *count <= examples {
                    walked.rejected.push(at);
                }
                continue;
            }
            if (best.len() >= most && seen.score <= least) || got.contains_key(&at) {
                continue;
            }
            best.push(Reverse((seen.score, Reverse(at))));
            if best.len() > most {
                best.pop();
            }
            least = best.peek().map_or(0, |Reverse((score, _))| *score);
        }
        walked.others = best.into_iter().map(|Reverse((_, Reverse(at)))| at).collect();
        walked
    }

    /// Number of appliances rejected for each reason, the most frequent first.
    fn rejected_counts(&self) -> Vec<RejectedCount> {
        let rejected = REASONS.iter().zip(self.counts).skip(1).filter(|(_, appliances)| *appliances > 0);
        let count =
            |(reason, appliances): (&&str, u64)| RejectedCount { reason: (*reason).to_owned(), appliances };
        let mut counts: Vec<RejectedCount> = rejected.map(count).collect();
        counts.sort_by_key(|count| Reverse(count.appliances));
        counts
    }
}

/// Number of regions that each appliance gets, by pool index.
fn regions_of(snapshot: &Snapshot<'_>, decided: &Decided) -> BTreeMap<usize, u64> {
    let mut got = BTreeMap::new();
    let regions = decided.placement.iter().flat_map(|placement| &placement.regions);
    for at in regions.filter_map(|&id| snapshot.pool.at(id)) {
        *got.entry(at).or_default() += 1;
    }
    got
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
