//! Remedies: changes that would let a refused request succeed.
//!
//! Each remedy is tried on the snapshot before it is named, and succeeds by itself. The list begins with the cheapest
//! remedy: to wait, to ask for a little less, to loosen one demand, to ask for much less, to add memory.

use std::collections::HashMap;

use xpm_protocol::policy::LEVELS;
use xpm_protocol::units::REGION_LEN_MIN;
use xpm_protocol::{ByteSize, LinkSpeed, Span};

use super::filter::Filter;
use super::{Candidate, Code, Demand, Needs, Placement, Snapshot, decide, rule_source, size};

/// The remedies, the smallest change first. Decides on the snapshot some dozen times.
pub fn remedies(snapshot: &Snapshot<'_>, demand: &Demand) -> Vec<String> {
    let mut found = Vec::new();
    found.extend(waiting(snapshot, demand));
    let less = less(snapshot, demand);
    let little = less.is_some_and(|size| size >= demand.size / 10 * 9);
    let ask = less.map(|size| format!("ask for at most {}", ByteSize(size)));
    if little {
        found.extend(ask.clone());
    }
    found.extend(loosened(snapshot, demand));
    if !little {
        found.extend(ask);
    }
    found.extend(memory(snapshot, demand));
    found
}

fn works(snapshot: &Snapshot<'_>, demand: &Demand) -> Option<Placement> {
    decide(snapshot, demand).placement.ok()
}

fn waiting(snapshot: &Snapshot<'_>, demand: &Demand) -> Option<String> {
    let cleared = Snapshot { with_clearing: true, ..*snapshot };
    if works(&cleared, demand).is_some() {
        return Some("wait until memory that was given back is cleared (`--wait 1m`)".to_owned());
    }
    let nothing = Default::default();
    let free = Snapshot { held: &nothing, ..*snapshot };
    let works = !snapshot.held.is_empty() && works(&free, demand).is_some();
    works.then(|| {
        "wait for your turn (`--wait 10m`): requests of the same or a higher priority come first".to_owned()
    })
}

/// The largest size that fits, in whole smallest regions, found by bisection: a larger size never fits where a
/// smaller one does not.
fn less(snapshot: &Snapshot<'_>, demand: &Demand) -> Option<u64> {
    let unit = demand.region_len.unwrap_or(REGION_LEN_MIN.max(demand.unit)) * u64::from(demand.columns);
    let fits = |units: u64| works(snapshot, &Demand { size: units * unit, ..demand.clone() }).is_some();
    let (mut low, mut high) = (0, demand.size.div_ceil(unit));
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match fits(middle) {
            true => low = middle,
            false => high = middle,
        }
    }
    let size = (low * unit).min(demand.size);
    (low > 0 && size < demand.size).then_some(size)
}

/// Remedies that loosen one demand each.
fn loosened(snapshot: &Snapshot<'_>, demand: &Demand) -> Vec<String> {
    let with = |change: &dyn Fn(&mut Needs)| {
        let mut demand = demand.clone();
        change(&mut demand.needs);
        works(snapshot, &demand)
    };
    let needs = &demand.needs;
    let mut found = Vec::new();
    if let Some(within) = needs.within {
        let wider = LEVELS.into_iter().filter(|&level| level > within);
        let enough =
            wider.map(Some).chain([None]).find(|&level| with(&|needs| needs.within = level).is_some());
        let of = &needs.sources.locality;
        found.extend(enough.map(|level| match level {
            Some(level) => format!("set locality.within = \"{level}\" (now \"{within}\") in {of}"),
            None => format!("take locality.within (now \"{within}\") out of {of}"),
        }));
    }
    if needs.round_trip_max.is_some()
        && let Some(placement) = with(&|needs| needs.round_trip_max = None)
    {
        found.push(slower(snapshot, &placement, &needs.sources.locality));
    }
    if let Some(asked) = needs.link_speed {
        let slower = speeds(snapshot, asked)
            .into_iter()
            .find(|&speed| with(&|needs| needs.link_speed = Some(speed)).is_some());
        let of = &needs.sources.link;
        found.extend(slower.map(|speed| format!("set link-speed = \"{speed}\" (now {asked}) in {of}")));
        if slower.is_none() && with(&|needs| needs.link_speed = None).is_some() {
            found.push(format!("take link-speed (now {asked}) out of {of}"));
        }
    }
    for (index, (rule, _)) in needs.require.iter().enumerate() {
        if with(&|needs| drop(needs.require.remove(index))).is_some() {
            found.push(format!("take what is required out of {}", rule_source(rule)));
        }
    }
    for (index, (rule, _)) in needs.forbid.iter().enumerate() {
        if with(&|needs| drop(needs.forbid.remove(index))).is_some() {
            found.push(format!("take what is forbidden out of {}", rule_source(rule)));
        }
    }
    if let Some(share) = needs.share
        && with(&|needs| needs.share = None).is_some()
    {
        let of = &needs.sources.share;
        found.push(format!("set a larger limit.appliance-share (now {share}) in {of}"));
    }
    found
}

/// Lower speeds that links have or have left, the highest first.
fn speeds(snapshot: &Snapshot<'_>, below: LinkSpeed) -> Vec<LinkSpeed> {
    let link = |one: &Candidate| one.link_speed.map_or(0, |speed| speed.0);
    let both =
        snapshot.pool.iter().flat_map(|one| [link(one), link(one).saturating_sub(one.link_promised.0)]);
    let mut speeds: Vec<LinkSpeed> =
        both.filter(|&speed| speed > 0 && speed < below.0).map(LinkSpeed).collect();
    speeds.sort_unstable_by(|a, b| b.cmp(a));
    speeds.dedup();
    speeds.truncate(16);
    speeds
}

fn slower(snapshot: &Snapshot<'_>, placement: &Placement, of: &str) -> String {
    let times: Option<Vec<u64>> =
        placement.regions.iter().map(|id| snapshot.round_trips.get(id).copied()).collect();
    match times.and_then(|times| times.into_iter().max()) {
        Some(longest) => {
            let longest = Span(std::time::Duration::from_micros(longest.div_ceil(1000)));
            format!("set locality.round-trip-max = \"{longest}\" in {of}")
        }
        None => format!(
            "measure the round-trip times (`xpm client report` on the client), or take locality.round-trip-max out of {of}"
        ),
    }
}

/// Names how much memory is missing: the size in regions of the shortest length, less the room of all usable
/// appliances. None if a limit would refuse the request anyway, or if the room of all together would suffice.
fn memory(snapshot: &Snapshot<'_>, demand: &Demand) -> Option<String> {
    let filter = Filter::new(snapshot, demand);
    let smallest = size::lengths(demand)?.last().copied()?;
    if size::taken(demand, smallest) > demand.needs.taken_max.unwrap_or(u64::MAX) {
        return None;
    }
    let (seen, rooms) = filter.look(smallest);
    let had = rooms.regions.saturating_mul(smallest);
    let missing = size::taken(demand, smallest).saturating_sub(had);
    let could = seen.iter().any(|seen| matches!(seen.code, Code::Usable | Code::Full));
    let who = if could {
        "delete allocations, or start another appliance"
    } else {
        "start an appliance that fits what is asked"
    };
    (missing > 0).then(|| format!("bring {} more memory: {who}", ByteSize(missing)))
}

/// Whether the demand would be met if memory of these appliances were given back.
pub fn with_given_back(
    snapshot: &Snapshot<'_>,
    demand: &Demand,
    back: &HashMap<xpm_protocol::ApplianceId, u64>,
) -> bool {
    works(&Snapshot { given_back: back, ..*snapshot }, demand).is_some()
}
