//! What is wrong with this host's devices, and with the way to the daemons. What is wrong with the pool the allocator says.

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Allocation, Appliance, ApplianceState};
use xpm_protocol::api::blk::{Device, DeviceState, LinkState, Status};
use xpm_protocol::api::health::{Check, Problem, Severity};

use super::is_swap;
use crate::connect::Failure;
use crate::{age, blk};

pub(super) fn no_allocator(failure: &Failure) -> Problem {
    let check = match failure.is(ErrorKind::NotLeader) {
        true => Check::AllocatorNoLeader,
        false => Check::AllocatorUnreachable,
    };
    Problem::new(check, "allocator", failure.to_string())
}

/// That a daemon of this host, `blk` or `fs`, gave no answer.
pub(super) fn no_daemon(word: &str, failure: &Failure) -> Problem {
    Problem::new(Check::BlkUnreachable, word, failure.to_string())
}

/// What an allocator of version 0.1 does not say.
pub(super) fn of_older_allocator(
    appliances: &[Appliance],
    allocations: &[Allocation],
    problems: &mut Vec<Problem>,
) {
    let silent = appliances.iter().filter(|one| one.state == ApplianceState::Silent).map(|one| {
        let severity = if one.regions > 0 { Severity::Critical } else { Severity::Warning };
        let name = &one.info.name;
        let summary = format!("appliance {name} is silent; {} regions of allocations are on it", one.regions);
        Problem::new(Check::ApplianceSilent, format!("appliance/{name}"), summary).with_severity(severity)
    });
    let lost = allocations.iter().filter(|one| !one.lost.is_empty()).map(|one| {
        let summary = format!("`{}` has lost what it had on {}", one.name, one.lost.join(", "));
        Problem::new(Check::AllocationLost, format!("allocation/{}", one.name), summary)
    });
    for problem in silent.chain(lost).collect::<Vec<_>>() {
        if !problems.iter().any(|one| (&one.code, &one.object) == (&problem.code, &problem.object)) {
            problems.push(problem);
        }
    }
}

pub(super) fn of_device(device: &Device) -> Option<Problem> {
    let name = &device.name;
    let word = if device.form.is_of_files() { "fs" } else { "blk" };
    let (check, what, remedy) = match device.state {
        DeviceState::Live => return None,
        DeviceState::Holding => (
            Check::DeviceHolding,
            "waits for an appliance",
            format!("bring the appliance or the network back; `xpm {word} show {name}`"),
        ),
        DeviceState::Lost => (
            Check::DeviceLost,
            "has lost memory: I/O to it fails",
            format!("stop what uses it, then `xpm {word} detach --force {name}`"),
        ),
    };
    let reasons: Vec<String> = device
        .links
        .iter()
        .filter(|link| link.state != LinkState::Up)
        .map(|link| match &link.reason {
            Some(reason) => format!("{} for {}: {reason}", link.appliance_name, age::short(link.since.0)),
            None => format!("{} for {}", link.appliance_name, age::short(link.since.0)),
        })
        .collect();
    let summary = format!("device {} ({name}) {what} ({})", device.path, reasons.join("; "));
    Some(Problem::new(check, object(device), summary).with_remedy(remedy))
}

/// The links of a device that work, but not over the best transport.
pub(super) fn worse_ways(device: &Device, rdma_here: bool) -> Vec<Problem> {
    let ways = device.links.iter().filter_map(|link| Some((link, blk::worse_way(link, rdma_here)?)));
    ways.map(|(link, reason)| {
        let summary = format!(
            "device {} ({}) reaches {} by {} for {}: {reason}",
            device.path,
            device.name,
            link.appliance_name,
            link.transport,
            age::short(link.since.0)
        );
        Problem::new(Check::DeviceSlowPath, object(device), summary)
    })
    .collect()
}

/// Items of safety matter only while something of this host swaps to a device.
pub(super) fn of_safety(status: &Status, devices: &[Device]) -> Vec<Problem> {
    let Some(device) = devices.iter().find(|device| is_swap(device)) else { return Vec::new() };
    let items = status.safety.iter().filter(|item| !item.ok);
    items
        .map(|item| {
            let summary = format!("swap is not safe: {} is {}", item.item, item.found);
            let remedy = item.remedy.clone().unwrap_or_else(|| "`xpm doctor` says more".to_owned());
            Problem::new(Check::SwapUnsafe, object(device), summary).with_remedy(remedy)
        })
        .collect()
}

fn object(device: &Device) -> String {
    format!("device/{}", device.path)
}
