//! `xpm status`: the whole system on one screen, anything wrong first.

mod allocators;
mod problems;

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use xpm_protocol::api::allocator::{self, Allocation, Appliance};
use xpm_protocol::api::blk::{self, Device, StandbyState};
use xpm_protocol::api::health::Problem;
use xpm_transport::rdma::inventory::any_device;

use self::allocators::Allocator;
use crate::cli::StatusArgs;
use crate::connect::{Daemon, Daemons, Failure};
use crate::output::{self, Output, WIDTH, one_line, wrapped};
use crate::problems as told;
use crate::{age, alloc, appliance};

/// Shortest pause between two looks.
const WATCH_MIN: Duration = Duration::from_millis(100);

pub(crate) async fn run(args: &StatusArgs, daemons: &Daemons, output: Output) -> anyhow::Result<ExitCode> {
    let Some(every) = args.watch else { return Ok(look(daemons, output).await?.exit()) };
    let terminal = std::io::stdout().is_terminal();
    loop {
        if terminal {
            // Home, and nothing below: the screen of before is gone.
            output::print("\x1b[H\x1b[2J\x1b[3J")?;
        }
        look(daemons, output).await?;
        tokio::time::sleep(every.0.max(WATCH_MIN)).await;
        if !terminal {
            output.separate()?;
        }
    }
}

async fn look(daemons: &Daemons, output: Output) -> anyhow::Result<Overview> {
    let overview = Overview::read(daemons).await;
    output.print(&overview, |overview| overview.text(output.is_wide()))?;
    Ok(overview)
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

async fn read_host(daemon: Result<Daemon, Failure>) -> Result<Host, Failure> {
    let daemon = daemon?;
    Ok(Host { status: daemon.blk_status().await?, devices: daemon.devices().await? })
}

/// What `status -o json` prints. `allocator` is none when it does not answer, `blk` also when this
/// host has none.
#[derive(Debug, Serialize)]
struct Overview {
    /// `ok`, `warning` or `critical`.
    health: &'static str,
    /// The worst first.
    problems: Vec<Problem>,
    allocator: Option<allocator::Status>,
    /// What each of them does, where several are known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    allocators: Vec<Allocator>,
    appliances: Vec<Appliance>,
    allocations: Vec<Allocation>,
    blk: Option<blk::Status>,
    devices: Vec<Device>,
    /// None when this host has no xpm-fs, or it does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    fs: Option<blk::Status>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    files: Vec<Device>,
    /// Whether no xpm-blk runs on this host, rather than one that does not answer.
    #[serde(skip)]
    no_blk_here: bool,
}

impl Overview {
    async fn read(daemons: &Daemons) -> Overview {
        let (pool, host, files) =
            tokio::join!(read_pool(daemons), read_host(daemons.blk()), read_host(daemons.fs()));
        let mut overview = Overview {
            health: "ok",
            problems: Vec::new(),
            allocator: None,
            allocators: allocators::read(daemons).await,
            appliances: Vec::new(),
            allocations: Vec::new(),
            blk: None,
            devices: Vec::new(),
            fs: None,
            files: Vec::new(),
            no_blk_here: false,
        };
        match pool {
            Ok(pool) => overview.add_pool(pool),
            Err(failure) => overview.problems.push(problems::no_allocator(&failure)),
        }
        match host {
            Ok(host) => overview.add_host(host),
            Err(failure) if failure.is_not_there() => overview.no_blk_here = true,
            Err(failure) => overview.problems.push(problems::no_daemon("blk", &failure)),
        }
        match files {
            Ok(host) => overview.add_files(host),
            Err(failure) if failure.is_not_there() => {}
            Err(failure) => overview.problems.push(problems::no_daemon("fs", &failure)),
        }
        overview.problems.extend(overview.allocators.iter().filter_map(Allocator::problem));
        told::sort(&mut overview.problems);
        overview.health = told::health(&overview.problems);
        overview
    }

    fn add_pool(&mut self, pool: Pool) {
        let Pool { mut status, appliances, allocations } = pool;
        // They stand in one place, with those of this host.
        self.problems.append(&mut status.problems);
        problems::of_older_allocator(&appliances, &allocations, &mut self.problems);
        self.allocator = Some(status);
        self.appliances = appliances;
        self.allocations = allocations;
    }

    fn add_devices(&mut self, devices: &[Device]) {
        let rdma_here = any_device();
        self.problems.extend(devices.iter().filter_map(problems::of_device));
        self.problems.extend(devices.iter().flat_map(|device| problems::worse_ways(device, rdma_here)));
    }

    fn add_files(&mut self, host: Host) {
        self.add_devices(&host.devices);
        self.fs = Some(host.status);
        self.files = host.devices;
    }

    fn add_host(&mut self, host: Host) {
        let Host { status, devices } = host;
        self.add_devices(&devices);
        self.problems.extend(problems::of_safety(&status, &devices));
        self.blk = Some(status);
        self.devices = devices;
    }

    fn exit(&self) -> ExitCode {
        told::exit(&self.problems)
    }

    fn text(&self, wide: bool) -> String {
        let health = format!("Health: {}\n", told::summary(&self.problems));
        let mut blocks = vec![health + &told::lines(&self.problems, wide)];
        if let Some(status) = &self.allocator {
            blocks.push(pool_line(status, wide) + &allocators::line(&self.allocators));
            blocks.push(appliance::LISTING.text(&self.appliances, wide, true));
            blocks.push(alloc::list::LISTING.text(&self.allocations, wide, true));
        }
        match &self.blk {
            Some(status) => {
                let devices = crate::blk::LISTING.text(&self.devices, wide, true);
                blocks.push(format!("{}\n{devices}", host_line("Devices", "xpm-blk", status, wide)));
            }
            None if self.no_blk_here => {
                blocks.push("This host has no devices: xpm-blk does not run here.\n".to_owned());
            }
            None => {}
        }
        if let Some(status) = &self.fs {
            let files = crate::blk::FILES.text(&self.files, wide, true);
            blocks.push(format!("{}\n{files}", host_line("Files", "xpm-fs", status, wide)));
        }
        blocks.join("\n")
    }
}

/// Whether xpm-blk saw the device in `/proc/swaps`.
pub(crate) fn is_swap(device: &Device) -> bool {
    device.users.iter().any(|user| user == "swap")
}

fn pool_line(status: &allocator::Status, wide: bool) -> String {
    let silent = match status.appliances_silent {
        0 => String::new(),
        silent => format!(", {silent} silent"),
    };
    let line = format!(
        "{} free of {}; {} up{silent}; allocator {}, up for {}",
        status.free,
        status.capacity,
        match status.appliances_up {
            1 => "1 appliance".to_owned(),
            up => format!("{up} appliances"),
        },
        one_line(&status.version),
        age::short(status.uptime.0)
    );
    wrapped("Pool: ", &line, if wide { usize::MAX } else { WIDTH })
}

fn host_line(what: &str, daemon: &str, status: &blk::Status, wide: bool) -> String {
    let line = format!(
        "{daemon} {}, up for {}{}",
        one_line(&status.version),
        age::short(status.uptime.0),
        standby(status)
    );
    wrapped(&format!("{what} of this host: "), &line, if wide { usize::MAX } else { WIDTH })
        .trim_end()
        .to_owned()
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
