//! An appliance that does not come back: who is hit, and giving its memory up.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use anyhow::bail;
use xpm_protocol::ByteSize;
use xpm_protocol::api::allocator::{Allocation, Appliance, ApplianceState};
use xpm_protocol::api::blk::{Device, LinkState, LinkStatus};

use crate::cli::{ForgetArgs, GiveUpArgs};
use crate::connect::Daemon;
use crate::output::Output;
use crate::table::Table;

/// `xpm appliance forget NAME --lost`.
pub(crate) async fn forget(
    args: &ForgetArgs,
    appliance: &Appliance,
    allocator: &Daemon,
    output: Output,
) -> anyhow::Result<()> {
    let (id, name) = (appliance.info.id, &appliance.info.name);
    let allocations = allocator.allocations().await?;
    let hit: Vec<&Allocation> = allocations.iter().filter(|one| bytes_on(one, appliance) > 0).collect();
    if appliance.state == ApplianceState::Up {
        // The allocator refuses it, and says why.
    } else if hit.is_empty() {
        eprintln!("No allocation has memory on {name}.");
    } else {
        eprint!("These lose what they have on {name}, for good:\n{}", hit_table(&hit, appliance));
    }
    let asks = appliance.state != ApplianceState::Up && !args.yes;
    agree(&format!("Give the memory of {name} up?"), asks)?;
    let lost: Vec<Allocation> = allocator.post(&format!("/v1/appliances/{id}/loss"), &()).await?;
    output.print(&lost, |lost| {
        let lines = lost.iter().map(|one| format!("{} is lost on {name}{}\n", one.name, advice(one)));
        lines.chain([format!("{name} is given up; if it comes back, it clears its memory first\n")]).collect()
    })
}

/// The required action of its user: the kernel goes on writing to swap, in vain.
fn advice(lost: &Allocation) -> String {
    let (Some(owner), Some(used)) = (&lost.owner, &lost.used) else { return String::new() };
    match used.users.iter().any(|user| user == "swap") {
        true => format!("; run `swapoff {}` on {}", used.device, owner.host_name),
        false => String::new(),
    }
}

/// `xpm blk give-up APPLIANCE`.
pub(crate) async fn give_up(args: &GiveUpArgs, blk: &Daemon, output: Output) -> anyhow::Result<()> {
    let lender = &args.appliance;
    let devices = blk.devices().await?;
    let links = |device: &Device| {
        let of_it = |link: &LinkStatus| {
            link.appliance_name.as_str() == lender || link.appliance.to_string() == *lender
        };
        device.links.iter().filter(|link| of_it(link)).map(|link| link.state).collect::<Vec<_>>()
    };
    let hit: Vec<&Device> = devices.iter().filter(|device| !links(device).is_empty()).collect();
    // xpm-blk refuses it, and says why.
    let refused = hit.iter().any(|device| links(device).contains(&LinkState::Up));
    if hit.is_empty() {
        bail!(
            "no device here has memory on an appliance `{lender}`; `xpm blk show NAME` lists those of a device"
        );
    }
    let mut table = Table::new(&["ALLOCATION", "DEVICE", ">SIZE", "USED BY"]);
    for device in hit {
        let users = device.users.join(", ");
        table.row([device.name.to_string(), device.path.clone(), device.size.to_string(), users]);
    }
    if !refused {
        eprint!("These devices lose what they have on {lender}, for good:\n{}", table.render());
    }
    agree(&format!("Give the memory of {lender} up here?"), !refused && !args.yes)?;
    let lost: Vec<Device> = blk.put(&format!("/v1/lost/{lender}"), &()).await?;
    output.print(&lost, |lost| {
        lost.iter().map(|device| format!("{} ({}) is lost on {lender}\n", device.path, device.name)).collect()
    })
}

/// Bytes that an allocation has on an appliance.
fn bytes_on(allocation: &Allocation, appliance: &Appliance) -> u64 {
    let here = allocation.regions.iter().filter(|place| place.appliance == appliance.info.id).count();
    allocation.region_len.0.saturating_mul(here as u64)
}

fn hit_table(hit: &[&Allocation], appliance: &Appliance) -> String {
    let mut table = Table::new(&["ALLOCATION", ">MEMORY THERE", "CLIENT", "DEVICE", "USED BY"]);
    for allocation in hit {
        let owner = allocation.owner.as_ref();
        let used = allocation.used.as_ref();
        let unknown = || owner.map_or("", |owner| owner.purpose.as_str()).to_owned();
        table.row([
            allocation.name.to_string(),
            ByteSize(bytes_on(allocation, appliance)).to_string(),
            owner.map_or_else(|| "nobody".to_owned(), |owner| owner.host_name.clone()),
            used.map_or_else(unknown, |used| used.device.clone()),
            used.map_or_else(String::new, |used| used.users.join(", ")),
        ]);
    }
    table.render()
}

/// Asks whether that is meant.
fn agree(question: &str, asks: bool) -> anyhow::Result<()> {
    if !asks {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        bail!("nothing is done: there is no terminal to ask at; say --yes if it is meant");
    }
    eprint!("{question} [y/N] ");
    io::stderr().flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => bail!("nothing is done"),
    }
}
