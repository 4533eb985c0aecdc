//! `xpm status`: the whole system on one screen, anything wrong first.

mod allocators;

use std::process::ExitCode;

use serde::Serialize;
use xpm_protocol::api::allocator::{self, Allocation, AllocationState, Appliance, ApplianceState};
use xpm_protocol::api::blk::{self, Device, DeviceState, StandbyState};
use xpm_transport::rdma::inventory::any_device;

use self::allocators::Allocator;
use crate::connect::{Daemons, Failure};
use crate::output::{Output, one_line};
use crate::{age, alloc, appliance};

pub(crate) async fn run(daemons: &Daemons, output: Output) -> anyhow::Result<ExitCode> {
    let (pool, host) = tokio::join!(read_pool(daemons), read_host(daemons));
    let code = if pool.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    let overview = Overview::new(pool, host).with_allocators(allocators::read(daemons).await);
    output.print(&overview, |overview| overview.text(output.is_wide()))?;
    Ok(code)
}

struct Pool {
    status: allocator::Status,
    appliances: Vec<Appliance>,
    allocations: Vec<Allocation>,
}

struct Host {
    status: blk::Status,
    devices: Vec<Device>,
}

async fn read_pool(daemons: &Daemons) -> Result<Pool, Failure> {
    let allocator = daemons.allocator()?;
    Ok(Pool {
        status: allocator.allocator_status().await?,
        appliances: appliance::by_name(allocator.appliances().await?),
        allocations: allocator.allocations().await?,
    })
}

async fn read_host(daemons: &Daemons) -> Result<Host, Failure> {
    let blk = daemons.blk()?;
    Ok(Host { status: blk.blk_status().await?, devices: blk.devices().await? })
}

/// What `status --json` prints. `allocator` is none when it does not answer, `blk` also when this
/// host has none.
#[derive(Debug, Serialize)]
struct Overview {
    problems: Vec<String>,
    allocator: Option<allocator::Status>,
    /// What each of them does, where several are known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    allocators: Vec<Allocator>,
    appliances: Vec<Appliance>,
    allocations: Vec<Allocation>,
    blk: Option<blk::Status>,
    devices: Vec<Device>,
    /// Whether no xpm-blk runs on this host, rather than one that does not answer.
    #[serde(skip)]
    no_blk_here: bool,
}

impl Overview {
    fn new(pool: Result<Pool, Failure>, host: Result<Host, Failure>) -> Overview {
        let mut overview = Overview {
            problems: Vec::new(),
            allocator: None,
            allocators: Vec::new(),
            appliances: Vec::new(),
            allocations: Vec::new(),
            blk: None,
            devices: Vec::new(),
            no_blk_here: false,
        };
        match pool {
            Ok(pool) => {
                overview.allocator = Some(pool.status);
                overview.appliances = pool.appliances;
                overview.allocations = pool.allocations;
            }
            Err(failure) => overview.problems.push(failure.to_string()),
        }
        match host {
            Ok(host) => {
                overview.blk = Some(host.status);
                overview.devices = host.devices;
            }
            Err(failure) if failure.is_not_there() => overview.no_blk_here = true,
            Err(failure) => overview.problems.push(failure.to_string()),
        }
        overview.problems.extend(overview.devices.iter().filter_map(device_problem));
        let rdma_here = any_device();
        overview.problems.extend(overview.devices.iter().flat_map(|device| worse_ways(device, rdma_here)));
        overview.problems.extend(overview.safety_problems());
        overview.problems.extend(overview.appliances.iter().filter_map(appliance_problem));
        overview.problems.extend(overview.allocations.iter().filter_map(allocation_problem));
        overview
    }

    fn with_allocators(mut self, allocators: Vec<Allocator>) -> Overview {
        self.problems.extend(allocators.iter().filter_map(Allocator::problem));
        self.allocators = allocators;
        self
    }

    /// Safety items matter only while something of this host swaps to a device.
    fn safety_problems(&self) -> Vec<String> {
        let swaps = self.devices.iter().any(is_swap);
        let items =
            self.blk.iter().filter(|_| swaps).flat_map(|status| &status.safety).filter(|item| !item.ok);
        items
            .map(|item| format!("swap is not safe: {} is {}; see `xpm doctor`", item.item, item.found))
            .collect()
    }

    fn text(&self, wide: bool) -> String {
        let problems: String =
            self.problems.iter().map(|line| format!("WRONG  {}\n", one_line(line))).collect();
        let mut blocks = vec![problems];
        if let Some(status) = &self.allocator {
            blocks.push(pool_line(status) + &allocators::line(&self.allocators));
            blocks.push(appliance::LISTING.text(&self.appliances, wide, true));
            blocks.push(alloc::list::LISTING.text(&self.allocations, wide, true));
        }
        match &self.blk {
            Some(status) => {
                let devices = crate::blk::LISTING.text(&self.devices, wide, true);
                blocks.push(format!("{}\n{devices}", host_line(status)));
            }
            None if self.no_blk_here => {
                blocks.push("This host has no devices: xpm-blk does not run here.\n".to_owned());
            }
            None => {}
        }
        blocks.retain(|block| !block.is_empty());
        blocks.join("\n")
    }
}

/// Whether xpm-blk saw the device in `/proc/swaps`.
pub(crate) fn is_swap(device: &Device) -> bool {
    device.users.iter().any(|user| user == "swap")
}

fn device_problem(device: &Device) -> Option<String> {
    let what = match device.state {
        DeviceState::Live => return None,
        DeviceState::Holding => "waits for an appliance",
        DeviceState::Lost => "has lost memory: I/O to it fails",
    };
    let reasons: Vec<String> = device
        .links
        .iter()
        .filter(|link| link.state != blk::LinkState::Up)
        .map(|link| match &link.reason {
            Some(reason) => format!("{} for {}: {reason}", link.appliance_name, age::short(link.since.0)),
            None => format!("{} for {}", link.appliance_name, age::short(link.since.0)),
        })
        .collect();
    Some(format!("device {} ({}) {what} ({})", device.path, device.name, reasons.join("; ")))
}

/// The links of a device that work, but not over the best transport.
fn worse_ways(device: &Device, rdma_here: bool) -> Vec<String> {
    let ways = device.links.iter().filter_map(|link| Some((link, crate::blk::worse_way(link, rdma_here)?)));
    ways.map(|(link, reason)| {
        format!(
            "device {} ({}) reaches {} by {} for {}: {reason}",
            device.path,
            device.name,
            link.appliance_name,
            link.transport,
            age::short(link.since.0)
        )
    })
    .collect()
}

fn appliance_problem(appliance: &Appliance) -> Option<String> {
    if appliance.state == ApplianceState::Up {
        return None;
    }
    let silent = match appliance.silent {
        Some(silent) => format!("has not been heard for {}", age::short(silent.0)),
        None => "has not been heard since the allocator started".to_owned(),
    };
    let at_stake = match appliance.regions {
        0 => "no allocation has memory on it".to_owned(),
        1 => "1 region of an allocation is on it".to_owned(),
        regions => format!("{regions} regions of allocations are on it"),
    };
    Some(format!("appliance {} {silent}; {at_stake}", appliance.info.name))
}

fn allocation_problem(allocation: &Allocation) -> Option<String> {
    match allocation.state {
        AllocationState::Ready => allocation.ending.as_ref().map(|ending| ending.text.clone()),
        AllocationState::Waiting => {
            let before = allocation.waiting.as_ref().and_then(|one| one.before).unwrap_or(0);
            Some(format!("`{}` waits for memory, {before} requests before it", allocation.name))
        }
        AllocationState::Refused => None,
        AllocationState::Creating => Some(format!("allocation {} is not complete yet", allocation.name)),
        AllocationState::Deleting => {
            Some(format!("allocation {} is not deleted yet: an appliance has not confirmed", allocation.name))
        }
    }
}

fn pool_line(status: &allocator::Status) -> String {
    let silent = match status.appliances_silent {
        0 => String::new(),
        silent => format!(", {silent} silent"),
    };
    format!(
        "Pool: {} free of {}; {} up{silent}; allocator {}, up for {}\n",
        status.free,
        status.capacity,
        match status.appliances_up {
            1 => "1 appliance".to_owned(),
            up => format!("{up} appliances"),
        },
        one_line(&status.version),
        age::short(status.uptime.0)
    )
}

fn host_line(status: &blk::Status) -> String {
    format!(
        "Devices of this host: xpm-blk {}, up for {}{}",
        one_line(&status.version),
        age::short(status.uptime.0),
        standby(status)
    )
}

fn standby(status: &blk::Status) -> String {
    let Some(standby) = &status.standby else { return String::new() };
    match (standby.state, standby.pid) {
        (StandbyState::Ready, Some(pid)) => {
            format!(", standby ready (process {pid}, {} locked)", standby.locked)
        }
        (StandbyState::Off, _) => ", no standby".to_owned(),
        (StandbyState::Ready | StandbyState::Starting, _) => ", standby not ready".to_owned(),
    }
}
