//! `xpm appliance`: the machines that lend memory.

use std::net::SocketAddr;

use anyhow::bail;
use serde::Serialize;
use xpm_protocol::ByteSize;
use xpm_protocol::api::allocator::{Allocation, Appliance, ApplianceState};
use xpm_protocol::api::appliance::Medium;

use crate::age;
use crate::cli::ApplianceCommand;
use crate::connect::Daemons;
use crate::listing::{Cell, Column, Listing};
use crate::output::Output;
use crate::table::{Table, fields};
use crate::{life, lost};

pub(crate) async fn run(command: ApplianceCommand, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    let allocator = daemons.allocator()?;
    let appliances = allocator.appliances().await?;
    match command {
        ApplianceCommand::List(args) => LISTING.print(by_name(appliances), &args, output),
        ApplianceCommand::Show { name } => {
            let appliance = find(&appliances, &name)?;
            let allocations = allocator.allocations().await?;
            output.print(appliance, |appliance| show(appliance, &allocations))
        }
        ApplianceCommand::Drain(args) => {
            life::drain(&args, find(&appliances, &args.name)?, &allocator, output).await
        }
        ApplianceCommand::Undrain { name } => {
            life::undrain(find(&appliances, &name)?, &allocator, output).await
        }
        ApplianceCommand::Forget(args) if args.lost => {
            lost::forget(&args, find(&appliances, &args.name)?, &allocator, output).await
        }
        ApplianceCommand::Forget(args) => {
            let appliance = find(&appliances, &args.name)?;
            allocator.delete(&format!("/v1/appliances/{}", appliance.info.id)).await?;
            output.print(&Forgotten { forgotten: appliance.info.name.to_string() }, |_| String::new())
        }
    }
}

/// What `forget --json` prints.
#[derive(Debug, Serialize)]
struct Forgotten {
    forgotten: String,
}

/// The appliance of that name or id. Names come from hosts, so that two may be the same.
fn find<'a>(appliances: &'a [Appliance], text: &str) -> anyhow::Result<&'a Appliance> {
    let matches: Vec<&Appliance> = appliances
        .iter()
        .filter(|appliance| appliance.info.name.as_str() == text || appliance.info.id.to_string() == text)
        .collect();
    match matches[..] {
        [one] => Ok(one),
        [] => bail!("the allocator knows no appliance `{text}`; see `xpm appliance list`"),
        _ => {
            let ids: Vec<String> = matches.iter().map(|appliance| appliance.info.id.to_string()).collect();
            bail!("{} appliances are named `{text}`; name one by its id: {}", ids.len(), ids.join(", "))
        }
    }
}

/// The list of all appliances.
pub(crate) const LISTING: Listing<Appliance> = Listing {
    columns: &[
        Column::text("NAME", |one| Cell::text(&one.info.name)),
        Column::text("STATE", |one| Cell::text(state(one))),
        Column::number("MEMORY", |one| size(one.status.capacity)),
        Column::number("FREE", |one| size(one.status.free)),
        Column::number("GRANTED", |one| size(one.status.granted)),
        Column::number("RESIDENT", |one| size(one.status.resident)),
        Column::wide_number("REGIONS", |one| Cell::ranked(one.regions, one.regions)),
        Column::wide_number("CLIENTS", |one| Cell::ranked(one.status.connections, one.status.connections)),
        Column::text("ADDRESS", |one| Cell::text(address(one))),
        Column::wide_text("VERSION", |one| Cell::text(&one.info.version)),
    ],
    empty: "No appliance has registered: start xpm-appliance on a machine with memory to spare.\n",
};

fn size(size: ByteSize) -> Cell {
    Cell::ranked(size, size.0)
}

/// In the order of their names.
pub(crate) fn by_name(mut appliances: Vec<Appliance>) -> Vec<Appliance> {
    appliances.sort_by(|one, other| one.info.name.cmp(&other.info.name));
    appliances
}

fn state(appliance: &Appliance) -> String {
    match (appliance.state, appliance.silent) {
        _ if appliance.given_up.is_some() => "lost".to_owned(),
        (ApplianceState::Up, _) if appliance.drain.is_some() => "draining".to_owned(),
        (ApplianceState::Up, _) => "up".to_owned(),
        (ApplianceState::Silent, Some(silent)) => format!("silent {}", age::short(silent.0)),
        (ApplianceState::Silent, None) => "silent".to_owned(),
    }
}

fn address(appliance: &Appliance) -> String {
    let endpoints = &appliance.info.endpoints;
    let unix = || endpoints.nbd_unix.as_ref().map(|path| path.display().to_string());
    endpoints.nbd.first().map(ToString::to_string).or_else(unix).unwrap_or_default()
}

fn show(appliance: &Appliance, allocations: &[Allocation]) -> String {
    let (info, status) = (&appliance.info, &appliance.status);
    let counters = &status.counters;
    let addresses = |all: &[SocketAddr]| match all {
        [] => "none".to_owned(),
        _ => all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    };
    let path = |path: &Option<std::path::PathBuf>| match path {
        Some(path) => path.display().to_string(),
        None => "none".to_owned(),
    };
    let mut text = fields(&[
        ("name", info.name.to_string()),
        ("id", info.id.to_string()),
        ("state", state(appliance)),
        ("version", info.version.clone()),
        ("up for", age::short(status.uptime.0)),
        ("control", info.control.clone()),
        (
            "labels",
            info.labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" "),
        ),
        ("link", info.link_speed.map_or_else(|| "of unknown speed".to_owned(), |speed| speed.to_string())),
        ("nbd over tcp", addresses(&info.endpoints.nbd)),
        ("rdma", addresses(&info.endpoints.rdma)),
        ("nbd over unix", path(&info.endpoints.nbd_unix)),
        ("shared memory", path(&info.endpoints.shm)),
        ("lends", format!("{} of {}", status.capacity, medium(info.medium))),
        ("free", format!("{}, of which {} is ready to use", status.free, status.ready)),
        ("granted", format!("{} in {} regions", status.granted, status.regions)),
        ("reserved", status.reserved.to_string()),
        ("resident", status.resident.to_string()),
        ("connections", status.connections.to_string()),
        ("read", format!("{} in {} requests", ByteSize(counters.read_bytes), counters.reads)),
        ("written", format!("{} in {} requests", ByteSize(counters.write_bytes), counters.writes)),
        ("trimmed", format!("{} requests", counters.trims)),
        ("errors", format!("{} requests failed, {} connections refused", counters.errors, counters.refused)),
    ]);
    if let Some(drain) = &appliance.drain {
        text.push_str(&fields(&[("drains", life::drain_line(drain))]));
    }
    text.push_str(&used_by(appliance, allocations));
    text
}

fn medium(medium: Medium) -> &'static str {
    match medium {
        Medium::Memory => "memory",
        Medium::HugePages => "huge pages",
        Medium::File => "a file or DAX device",
    }
}

fn used_by(appliance: &Appliance, allocations: &[Allocation]) -> String {
    let mut table = Table::new(&["ALLOCATION", ">REGIONS HERE", "OWNER"]);
    let mut any = false;
    for allocation in allocations {
        let here = allocation.regions.iter().filter(|place| place.appliance == appliance.info.id).count();
        if here > 0 {
            any = true;
            let owner = allocation.owner.as_ref().map(|owner| owner.host_name.clone()).unwrap_or_default();
            table.row([allocation.name.to_string(), here.to_string(), owner]);
        }
    }
    if any { format!("\n{}", table.render()) } else { String::new() }
}
