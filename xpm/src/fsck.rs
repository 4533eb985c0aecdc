//! `xpm fsck`: whether what the allocator has recorded and what the appliances have agree.
//!
//! Everything is read without stopping anything, so a thing that is on its way can look wrong: only what is wrong
//! twice, a moment apart, is.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use xpm_protocol::api::allocator::{Allocation, AllocationState, Appliance, ApplianceState, Garbage};
use xpm_protocol::api::appliance::Grant;
use xpm_protocol::api::health::{Check, Problem};
use xpm_protocol::{AllocationId, ApplianceId, Name, RegionId};

use crate::age;
use crate::connect::Daemons;
use crate::output::{Output, WIDTH, one_line, wrapped};
use crate::problems as told;

/// Time between the two looks.
const PAUSE: Duration = Duration::from_millis(1500);

/// What `fsck -o json` prints.
#[derive(Debug, Serialize)]
struct Findings {
    /// What is wrong, the worst first.
    problems: Vec<Problem>,
    /// What no record knows and is going to be freed.
    garbage: Vec<Garbage>,
    allocations: usize,
    regions: usize,
}

/// Everything at one time.
struct Snapshot {
    appliances: Vec<Appliance>,
    allocations: Vec<Allocation>,
    grants: BTreeMap<ApplianceId, Vec<Grant>>,
    garbage: Vec<Garbage>,
    unchecked: Vec<Problem>,
}

pub(crate) async fn run(daemons: &Daemons, output: Output) -> anyhow::Result<ExitCode> {
    let first = look(daemons).await?;
    let before = problems(&first);
    let now = match before.is_empty() {
        true => first,
        false => {
            tokio::time::sleep(PAUSE).await;
            look(daemons).await?
        }
    };
    let mut problems: Vec<Problem> = problems(&now).into_iter().filter(|one| before.contains(one)).collect();
    problems.extend(now.unchecked);
    told::sort(&mut problems);
    let code = told::exit(&problems);
    let regions = now.allocations.iter().map(|one| one.regions.len()).sum();
    let found = Findings { problems, garbage: now.garbage, allocations: now.allocations.len(), regions };
    output.print(&found, |found| text(found, output.is_wide()))?;
    Ok(code)
}

fn text(found: &Findings, wide: bool) -> String {
    let mut text = told::lines(&found.problems, wide);
    for one in &found.garbage {
        let line = format!(
            "{} of `{}` on appliance {} are freed {}, unless their record is found",
            one.bytes,
            one.name,
            one_line(&one.appliance_name),
            age::until(one.frees)
        );
        text.push_str(&wrapped("garbage   ", &line, if wide { usize::MAX } else { WIDTH }));
    }
    let wrong = match found.problems.len() {
        0 => "nothing is wrong".to_owned(),
        _ => told::summary(&found.problems),
    };
    text + &format!("{} allocations with {} regions: {wrong}\n", found.allocations, found.regions)
}

async fn look(daemons: &Daemons) -> anyhow::Result<Snapshot> {
    let allocator = daemons.allocator()?;
    let appliances = allocator.appliances().await?;
    let (mut grants, mut unchecked) = (BTreeMap::new(), Vec::new());
    for appliance in &appliances {
        let name = &appliance.info.name;
        if appliance.state != ApplianceState::Up {
            unchecked.push(not_asked(name, format!("appliance {name} is silent")));
            continue;
        }
        match daemons.appliance(&appliance.info.control)?.get::<Vec<Grant>>("/v1/grants").await {
            Ok(list) => drop(grants.insert(appliance.info.id, list)),
            Err(error) => {
                unchecked.push(not_asked(name, format!("appliance {name} does not answer: {error}")));
            }
        }
    }
    // After the grants: what was made meanwhile is known.
    let allocations = allocator.allocations().await?;
    let garbage = allocator.get("/v1/garbage").await?;
    Ok(Snapshot { appliances, allocations, grants, garbage, unchecked })
}

fn not_asked(appliance: &Name, summary: String) -> Problem {
    Problem::new(Check::ApplianceUnchecked, format!("appliance/{appliance}"), summary)
}

fn problems(now: &Snapshot) -> Vec<Problem> {
    let mut problems = twice(now);
    problems.extend(now.allocations.iter().flat_map(|allocation| missing(now, allocation)));
    problems.extend(unknown(now));
    problems
}

/// Regions that two allocations have.
fn twice(now: &Snapshot) -> Vec<Problem> {
    let mut owners: BTreeMap<RegionId, &Allocation> = BTreeMap::new();
    let mut problems = Vec::new();
    for allocation in now.allocations.iter().filter(|one| one.state == AllocationState::Ready) {
        for place in &allocation.regions {
            if let Some(other) = owners.insert(place.region, allocation) {
                let line =
                    format!("region {} is in `{}` and in `{}`", place.region, other.name, allocation.name);
                let object = format!("allocation/{}", allocation.name);
                problems.push(Problem::new(Check::RegionShared, object, line));
            }
        }
    }
    problems
}

/// What an allocation should have at appliances and has not, or in another ownership.
fn missing(now: &Snapshot, allocation: &Allocation) -> Vec<Problem> {
    if allocation.state != AllocationState::Ready {
        return Vec::new();
    }
    let object = format!("allocation/{}", allocation.name);
    let mut problems: Vec<Problem> = Vec::new();
    let mut found = |problem: Problem| {
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    };
    for place in &allocation.regions {
        let Some(grants) = now.grants.get(&place.appliance) else { continue };
        let with = grants.iter().filter(|grant| grant.regions.contains(&place.region));
        let of_it: Vec<&Grant> = with.filter(|grant| grant.allocation == allocation.id).collect();
        let (name, appliance) = (&allocation.name, &place.appliance_name);
        if of_it.is_empty() {
            let line = format!("`{name}` has lost memory on appliance {appliance}: its grant is not there");
            found(Problem::new(Check::AllocationLost, object.clone(), line));
        } else if of_it.iter().all(|grant| grant.epoch != allocation.epoch) {
            let epoch = of_it[0].epoch;
            let line = format!(
                "`{name}` is at epoch {} by the record, and at epoch {epoch} on appliance {appliance}",
                allocation.epoch
            );
            found(
                Problem::new(Check::EpochDiffers, object.clone(), line)
                    .with_remedy("attach it again to settle that"),
            );
        }
    }
    problems
}

/// Grants of which the allocator knows nothing. While an allocation is changed or given back, it has more than its
/// record shows.
fn unknown(now: &Snapshot) -> Vec<Problem> {
    let settled = |one: &&Allocation| one.state == AllocationState::Ready && one.change.is_none();
    let known: BTreeMap<AllocationId, &Allocation> =
        now.allocations.iter().map(|one| (one.id, one)).collect();
    let giving_back: BTreeSet<&str> =
        now.allocations.iter().filter(|one| !settled(one)).map(|one| one.name.as_str()).collect();
    let name = |id: &ApplianceId| {
        let found = now.appliances.iter().find(|one| one.info.id == *id);
        found.map_or_else(|| id.to_string(), |one| one.info.name.to_string())
    };
    let mut problems = Vec::new();
    for (id, grants) in &now.grants {
        for grant in grants.iter().filter(|grant| !giving_back.contains(grant.name.as_str())) {
            let regions = known.get(&grant.allocation).map(|one| &one.regions);
            let has =
                |region: &RegionId| regions.is_some_and(|all| all.iter().any(|one| one.region == *region));
            if grant.regions.iter().any(has) {
                continue;
            }
            let line = format!(
                "appliance {} has {} of `{}` that no record knows (grant {})",
                name(id),
                grant.len,
                grant.name,
                grant.id
            );
            problems.push(Problem::new(Check::GarbageFound, format!("appliance/{}", name(id)), line));
        }
    }
    problems
}
