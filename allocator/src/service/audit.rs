//! Decisions in the form in which they are recorded and shown.

use xpm_protocol::ByteSize;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::Create;
use xpm_protocol::api::decision::{Decision, DecisionOutcome, LimitCheck, Verdict};

use super::asking::{Asked, Refusal};
use super::{Awaited, Service};
use crate::store::Change;
use crate::strategy::{self, Decided, Needs, Snapshot, trace};

/// How many rejected appliances a refusal names.
const REJECTED_SHOWN: usize = 8;
/// Time between two deletions of old decisions, in seconds.
const PRUNE_INTERVAL: u64 = 6 * 3600;

/// The record of a decision. `all`: it names every appliance.
pub(super) fn decision(
    snapshot: &Snapshot<'_>,
    asked: &Asked,
    create: &Create,
    decided: Option<&Decided>,
    refusal: Option<&Refusal>,
    all: bool,
    revision: u64,
) -> Decision {
    let traced = decided.map(|decided| trace::appliances(snapshot, &asked.demand, decided, all));
    let (appliances, rejected) = traced.unwrap_or_default();
    Decision {
        at: snapshot.unix,
        name: create.name.clone(),
        allocation: None,
        request: request_line(create),
        size: create.size,
        seed: asked.demand.seed,
        revision,
        documents: asked.documents.clone(),
        strategy: asked.strategy.clone(),
        rules: asked.rules.clone(),
        demands: demand_lines(&asked.demand.needs),
        limits: asked.limits.clone(),
        appliances_total: snapshot.pool.len() as u64,
        appliances,
        rejected,
        outcome: outcome(decided, refusal),
        warnings: decided.map(|decided| warnings(asked, decided)).unwrap_or_default(),
    }
}

fn outcome(decided: Option<&Decided>, refusal: Option<&Refusal>) -> DecisionOutcome {
    if let Some(Refusal { kind, why, remedies }) = refusal {
        return DecisionOutcome::Refused { kind: *kind, why: why.clone(), remedies: remedies.clone() };
    }
    match decided.map(|decided| &decided.placement) {
        Some(Ok(placement)) => {
            let mut appliances = placement.regions.clone();
            appliances.sort_unstable();
            appliances.dedup();
            DecisionOutcome::Placed {
                regions: placement.regions.len() as u64,
                region_len: ByteSize(placement.region_len),
                appliances: appliances.len() as u64,
            }
        }
        _ => DecisionOutcome::Refused {
            kind: ErrorKind::Internal,
            why: "nothing was decided".to_owned(),
            remedies: Vec::new(),
        },
    }
}

/// The request in one line.
fn request_line(create: &Create) -> String {
    let mut parts = vec![create.size.to_string()];
    let mut part =
        |what: &str, value: Option<String>| parts.extend(value.map(|value| format!("{what} {value}")));
    part("striped over", create.stripe.map(|stripe| stripe.to_string()));
    part("by", create.stripe_unit.map(|unit| unit.to_string()));
    part("in regions of", create.region_len.map(|len| len.to_string()));
    part("account", create.account.as_ref().map(ToString::to_string));
    part("client", create.client.as_ref().map(ToString::to_string));
    part("strategy", create.strategy.as_ref().map(ToString::to_string));
    part("lease", create.lease.map(|lease| lease.to_string()));
    for (key, value) in &create.labels {
        parts.push(format!("{key}={value}"));
    }
    if create.reclaimable {
        parts.push("reclaimable".to_owned());
    }
    parts.join(", ")
}

/// The demands of rules and profiles, one line each.
fn demand_lines(needs: &Needs) -> Vec<String> {
    let mut lines = Vec::new();
    lines.extend(needs.link_speed.map(|speed| format!("link speed of {speed} at least, and free")));
    lines.extend(needs.within.map(|within| format!("in the same {within} as the client")));
    let micros = |nanos: u64| nanos.div_ceil(1000);
    lines.extend(needs.round_trip_max.map(|most| format!("round trip of at most {} us", micros(most))));
    lines.extend(needs.share.map(|share| format!("at most {share} of an appliance for the account")));
    lines.extend(
        needs
            .require
            .iter()
            .map(|(rule, selector)| format!("required by {rule}: {}", selector_line(selector))),
    );
    lines.extend(
        needs
            .forbid
            .iter()
            .map(|(rule, selector)| format!("forbidden by {rule}: {}", selector_line(selector))),
    );
    lines.extend(needs.prefer.iter().map(|(rule, one)| {
        format!("preferred by {rule} with {}: {}", one.weight, selector_line(&one.select))
    }));
    lines
}

fn selector_line(selector: &xpm_protocol::policy::Selector) -> String {
    let mut parts = Vec::new();
    if !selector.appliances.is_empty() {
        let names: Vec<&str> = selector.appliances.iter().map(xpm_protocol::Name::as_str).collect();
        parts.push(format!("appliance {}", names.join(" or ")));
    }
    parts.extend(selector.labels.iter().map(|(key, value)| format!("{key}={value}")));
    if !selector.medium.is_empty() {
        parts.push(format!("medium {:?}", selector.medium));
    }
    parts.extend(selector.link_speed_min.map(|speed| format!("link of {speed}")));
    parts.extend(selector.rdma.map(|rdma| if rdma { "with RDMA" } else { "without RDMA" }.to_owned()));
    match parts.is_empty() {
        true => "all appliances".to_owned(),
        false => parts.join(", "),
    }
}

/// Warnings for the requester of an allocation that is made nevertheless.
fn warnings(asked: &Asked, decided: &Decided) -> Vec<String> {
    let Ok(placement) = &decided.placement else { return Vec::new() };
    let taken = placement.regions.len() as u64 * placement.region_len;
    let over = asked.limits.iter().filter(|check| is_over_soft(check, taken));
    over.map(|check| {
        format!(
            "{} has {} with this one, beyond its soft limit of {}: the allocation may be reclaimed",
            check.of,
            ByteSize(check.used.0 + taken),
            check.soft.unwrap_or_default()
        )
    })
    .collect()
}

pub(super) fn is_over_soft(check: &LimitCheck, taken: u64) -> bool {
    check.soft.is_some_and(|soft| check.used.0.saturating_add(taken) > soft.0)
}

/// Why the request exceeds a limit, and the remedies.
pub(super) fn over_limit(asked: &Asked, takes: u64, left: u64) -> (String, Vec<String>) {
    let least = |check: &&LimitCheck| check.hard.map_or(u64::MAX, |hard| hard.0.saturating_sub(check.used.0));
    let Some(check) = asked.limits.iter().min_by_key(least) else { return (String::new(), Vec::new()) };
    let hard = check.hard.unwrap_or_default();
    let why = format!(
        "{} has {} of at most {hard}, and this takes {} in whole regions",
        check.of,
        check.used,
        ByteSize(takes)
    );
    let mut remedies = Vec::new();
    if left >= xpm_protocol::units::REGION_LEN_MIN {
        remedies.push(format!("ask for at most {}", ByteSize(left)));
    }
    remedies.push(format!("delete {} of its allocations", ByteSize(takes - left)));
    let edit = format!("`xpm edit {}`", check.of);
    remedies.push(format!("raise its hard limit to {} ({edit})", ByteSize(check.used.0 + takes)));
    (why, remedies)
}

/// The appliances that cannot serve, for a refusal.
pub(super) fn rejected_line(snapshot: &Snapshot<'_>, asked: &Asked) -> String {
    let decided = strategy::decide(snapshot, &asked.demand);
    let (traces, counts) = trace::appliances(snapshot, &asked.demand, &decided, false);
    let rejected = traces.iter().filter_map(|one| match &one.verdict {
        Verdict::Rejected(rejection) => Some(format!("; {} {rejection}", one.name)),
        Verdict::Scored { .. } => None,
    });
    let mut line: String = rejected.take(REJECTED_SHOWN).collect();
    let all: u64 = counts.iter().map(|count| count.appliances).sum();
    if let more @ 1.. = all.saturating_sub(REJECTED_SHOWN as u64) {
        line.push_str(&format!("; and {more} more cannot serve"));
    }
    line
}

impl Service {
    /// Makes a decision durable; no request waits for that.
    pub(super) fn record_decision(&mut self, decision: Decision) {
        let change = self.decision_change(decision);
        self.store(vec![change], Awaited::Nothing);
    }

    /// The change that stores a decision. Its number orders the decisions about one name by time and, within a second,
    /// by events.
    pub(super) fn decision_change(&mut self, decision: Decision) -> Change {
        let number = (self.now.unix << 20) | (self.clock & 0xf_ffff);
        Change::Decision(number, Box::new(decision))
    }

    /// Deletes old decisions every [`PRUNE_INTERVAL`].
    pub(super) fn prune_decisions(&mut self) {
        let unix = self.now.unix;
        if unix.saturating_sub(self.pruned) >= PRUNE_INTERVAL {
            self.pruned = unix;
            let before = unix.saturating_sub(self.settings.keep_decisions.as_secs());
            self.store(vec![Change::DecisionsBefore(before)], Awaited::Nothing);
        }
    }
}
