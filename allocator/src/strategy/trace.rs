//! What was found about each appliance, for people.

use std::collections::BTreeMap;

use xpm_protocol::ApplianceId;
use xpm_protocol::api::decision::{ApplianceTrace, RejectedCount, Verdict};

use super::filter::{Code, Filter};
use super::score::Scorer;
use super::{Decided, Demand, Room, Snapshot};

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
    let got = regions_of(decided);
    let all = all || decided.seen.len() <= ALL_UP_TO;
    let (mut usable, rejected): (Vec<usize>, Vec<usize>) =
        (0..decided.seen.len()).partition(|&at| decided.seen[at].code == Code::Usable);
    let id = |at: usize| snapshot.pool.cold[at].candidate.id;
    let count = |at: usize| got.get(&id(at)).copied().unwrap_or(0);
    if !all {
        usable = best(&usable, decided, |at| count(at) > 0, got.len() + RUNNERS_UP);
    }
    usable.sort_by_cached_key(|&at| {
        (
            count(at) == 0,
            std::cmp::Reverse(decided.seen[at].score),
            snapshot.pool.cold[at].candidate.name.clone(),
        )
    });
    let scorer = Scorer::new(snapshot, demand, &rooms(decided));
    let scored = usable.iter().map(|&at| {
        let verdict = Verdict::Scored {
            score: u64::from(decided.seen[at].score) / 1000,
            parts: scorer.parts(at),
            regions: count(at),
        };
        trace(snapshot, at, verdict)
    });
    let mut traces: Vec<ApplianceTrace> = scored.collect();
    traces.extend(rejections(snapshot, demand, decided, &rejected, all));
    traces
}

fn trace(snapshot: &Snapshot<'_>, at: usize, verdict: Verdict) -> ApplianceTrace {
    let one = &snapshot.pool.cold[at].candidate;
    ApplianceTrace { id: one.id, name: one.name.clone(), verdict }
}

/// Those that serve, and the best of the others.
fn best(usable: &[usize], decided: &Decided, serves: impl Fn(usize) -> bool, most: usize) -> Vec<usize> {
    let (mut kept, mut others): (Vec<usize>, Vec<usize>) = usable.iter().partition(|&&at| serves(at));
    let more = most.saturating_sub(kept.len()).min(others.len());
    if more > 0 {
        others.select_nth_unstable_by_key(more - 1, |&at| std::cmp::Reverse(decided.seen[at].score));
        kept.extend(&others[..more]);
    }
    kept
}

fn rejections(
    snapshot: &Snapshot<'_>,
    demand: &Demand,
    decided: &Decided,
    rejected: &[usize],
    all: bool,
) -> Vec<ApplianceTrace> {
    let filter = Filter::new(snapshot, demand);
    let mut examples: BTreeMap<&'static str, usize> = BTreeMap::new();
    let mut traces = Vec::new();
    for &at in rejected {
        let code = decided.seen[at].code;
        let shown = examples.entry(words(code)).or_default();
        *shown += 1;
        if !all && *shown > EXAMPLES {
            continue;
        }
        if let Some(rejection) = filter.rejection(at, code, decided.region_len) {
            traces.push(trace(snapshot, at, Verdict::Rejected(rejection)));
        }
    }
    traces
}

fn rooms(decided: &Decided) -> Vec<Room> {
    let usable = decided.seen.iter().enumerate().filter(|(_, seen)| seen.code == Code::Usable);
    usable.map(|(at, _)| Room { at: at as u32, regions: 1 }).collect()
}

fn regions_of(decided: &Decided) -> BTreeMap<ApplianceId, u64> {
    let mut got = BTreeMap::new();
    for &id in decided.placement.iter().flat_map(|placement| &placement.regions) {
        *got.entry(id).or_default() += 1;
    }
    got
}

/// How many appliances were rejected for which reason, the most frequent first.
pub fn rejected(decided: &Decided) -> Vec<RejectedCount> {
    let mut counts: BTreeMap<&'static str, u64> = BTreeMap::new();
    for seen in decided.seen.iter().filter(|seen| seen.code != Code::Usable) {
        *counts.entry(words(seen.code)).or_default() += 1;
    }
    let count = |(reason, appliances): (&str, u64)| RejectedCount { reason: reason.to_owned(), appliances };
    let mut counts: Vec<RejectedCount> = counts.into_iter().map(count).collect();
    counts.sort_by_key(|count| std::cmp::Reverse(count.appliances));
    counts
}

fn words(code: Code) -> &'static str {
    match code {
        Code::Usable => "usable",
        Code::Silent => "silent",
        Code::Drained => "drained",
        Code::Failed => "refused or did not answer",
        Code::Held => "held for a request that comes first",
        Code::NotRequired(_) => "not what a rule requires",
        Code::Forbidden(_) => "forbidden by a rule",
        Code::TooFar => "too far away",
        Code::TooSlow => "round trip too long or not measured",
        Code::LinkTooSlow => "link too slow or of unknown speed",
        Code::LinkPromised => "link promised to others",
        Code::ShareUsed => "the account has its share of it",
        Code::Full => "full",
    }
}
