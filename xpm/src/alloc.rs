//! `xpm alloc`: named amounts of external memory.

mod handover;
pub(crate) mod list;

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use serde::Serialize;
use xpm_protocol::api::allocator::{Allocation, Create, Owner, Rename, Renew, Transfer};
use xpm_protocol::api::decision::{Decision, DecisionOutcome};
use xpm_protocol::{ByteSize, Layout, Name};

use self::list::LISTING;
use crate::cli::{AllocCommand, CreateArgs};
use crate::connect::{Daemon, Daemons};
use crate::output::{self, Output};
use crate::table::{Table, fields};
use crate::{age, explain, life, waiting};

pub(crate) async fn run(
    command: AllocCommand,
    daemons: &Daemons,
    output: Output,
) -> anyhow::Result<ExitCode> {
    let allocator = daemons.allocator()?;
    match command {
        AllocCommand::Create(args) if args.dry_run => try_out(args, &allocator, output).await,
        command => carry_out(command, &allocator, daemons, output).await.map(|()| ExitCode::SUCCESS),
    }
}

async fn carry_out(
    command: AllocCommand,
    allocator: &Daemon,
    daemons: &Daemons,
    output: Output,
) -> anyhow::Result<()> {
    match command {
        AllocCommand::Create(args) => create(args, allocator, output).await,
        AllocCommand::Explain { name, all } => {
            let decisions = decisions(allocator, &name).await?;
            let wanted: Vec<Decision> =
                decisions.into_iter().take(if all { usize::MAX } else { 1 }).collect();
            ensure!(
                !wanted.is_empty(),
                "nothing was decided about `{name}`: `xpm alloc list` shows what there is"
            );
            output.print(&wanted, |all| all.iter().map(explain::decision).collect::<Vec<_>>().join("\n"))
        }
        AllocCommand::Renew { name, duration } => {
            let path = format!("/v1/allocations/{name}/renewal");
            let allocation: Allocation = allocator.post(&path, &Renew { duration }).await?;
            output.print(&allocation, |renewed| format!("{name}: {}\n", lease(renewed)))
        }
        AllocCommand::List(args) => LISTING.print(allocator.allocations().await?, &args, output),
        AllocCommand::Show { name } => {
            let allocation: Allocation = allocator.get(&format!("/v1/allocations/{name}")).await?;
            output.print(&allocation, show)
        }
        AllocCommand::Resize { name, size, no_wait } => {
            let allocation = life::resize(&name, size, no_wait, allocator, output).await?;
            output.print(&allocation, created)
        }
        AllocCommand::Transfer { name, to, deadline, force, lose } => {
            let allocation = life::transfer(&name, Transfer { to, deadline, force, lose }, allocator).await?;
            output.print(&allocation, |given| {
                format!("{name}: {}\n", given.owner.as_ref().map(owner).unwrap_or_default())
            })
        }
        AllocCommand::Handover(args) => handover::run(args, allocator, output).await,
        AllocCommand::Rename { name, to } => {
            let allocation: Allocation =
                allocator.put(&format!("/v1/allocations/{name}/name"), &Rename { to }).await?;
            output.print(&allocation, |renamed| format!("{name} is named {} now\n", renamed.name))
        }
        AllocCommand::Delete { name, force } => {
            if force {
                warn_of_live_device(daemons, &name).await;
            }
            delete(allocator, &name, force).await?;
            output.print(&Deleted { deleted: name }, |_| String::new())
        }
    }
}

/// What `delete --json` prints.
#[derive(Debug, Serialize)]
struct Deleted {
    deleted: Name,
}

/// A dry run: says what would become of the request. A refusal is a failure, as it would be without `--dry-run`.
async fn try_out(args: CreateArgs, allocator: &Daemon, output: Output) -> anyhow::Result<ExitCode> {
    let explained = args.explain;
    let query = if explained { "?all=true" } else { "" };
    let decision: Decision = allocator.post(&format!("/v1/decisions{query}"), &request(args)).await?;
    output.print(&decision, if explained { explain::decision } else { explain::outcome })?;
    Ok(match decision.outcome {
        DecisionOutcome::Placed { .. } => ExitCode::SUCCESS,
        DecisionOutcome::Refused { .. } => ExitCode::FAILURE,
    })
}

async fn create(args: CreateArgs, allocator: &Daemon, output: Output) -> anyhow::Result<()> {
    let explained = args.explain;
    let create = request(args);
    let name = create.name.clone();
    let made = waiting::create(allocator, create, output).await;
    if explained {
        // The requested value comes first; without it there is no explanation.
        for decision in decisions(allocator, &name).await.unwrap_or_default().iter().take(1) {
            eprint!("{}", explain::decision(decision));
        }
    }
    let allocation = made.with_context(|| format!("cannot make the allocation `{name}`"))?;
    allocation.warnings.iter().for_each(|warning| output::warn(warning));
    output.print(&allocation, created)
}

async fn decisions(allocator: &Daemon, name: &Name) -> anyhow::Result<Vec<Decision>> {
    Ok(allocator.get(&format!("/v1/allocations/{name}/decisions")).await?)
}

fn request(args: CreateArgs) -> Create {
    Create {
        stripe: args.stripe,
        stripe_unit: args.stripe_unit,
        region_len: args.region_size,
        block_size: args.block_size,
        account: args.account,
        client: args.client,
        strategy: args.strategy,
        labels: args.labels.into_iter().collect(),
        access: args.access,
        reclaimable: args.reclaimable,
        lease: args.lease,
        wait: args.wait,
        ..Create::new(args.name, args.size)
    }
}

/// The end of an allocation's lease, for people.
fn lease(allocation: &Allocation) -> String {
    match (&allocation.ending, &allocation.lease) {
        (Some(ending), _) => ending.text.clone(),
        (None, Some(lease)) => format!("lease ends {}", age::until(lease.ends)),
        (None, None) => String::new(),
    }
}

async fn delete(allocator: &Daemon, name: &Name, force: bool) -> anyhow::Result<()> {
    let query = if force { "?force=true" } else { "" };
    allocator
        .delete(&format!("/v1/allocations/{name}{query}"))
        .await
        .with_context(|| format!("cannot delete the allocation `{name}`"))
}

/// A forced deletion takes the memory from under a device. Where that is one of this host, the
/// person who typed it is told which; a host without xpm-blk has none.
async fn warn_of_live_device(daemons: &Daemons, name: &Name) {
    let Ok(blk) = daemons.blk() else { return };
    let Ok(devices) = blk.devices().await else { return };
    if let Some(device) = devices.iter().find(|device| device.name == *name) {
        let users = if device.users.is_empty() {
            "not in use".to_owned()
        } else {
            format!("in use: {}", device.users.join(", "))
        };
        output::warn(&format!(
            "{} of this host shows `{name}` ({users}): all its I/O fails from now on; remove it with \
             `xpm blk detach --force {name}`",
            device.path
        ));
    }
}

fn created(allocation: &Allocation) -> String {
    format!(
        "{}: {} in {} of {}, {}, on {}\n",
        allocation.name,
        allocation.size,
        count(allocation.regions.len(), "region"),
        allocation.region_len,
        layout(&allocation.layout),
        places(allocation).keys().cloned().collect::<Vec<_>>().join(", ")
    )
}

fn count(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

fn layout(layout: &Layout) -> String {
    match layout {
        Layout::Linear => "linear".to_owned(),
        Layout::Striped { columns, unit } => format!("striped over {columns} by {}", ByteSize(*unit)),
    }
}

fn owner(owner: &Owner) -> String {
    format!("{} ({})", owner.host_name, owner.purpose)
}

/// Regions by appliance name, in the order of the names; indices into the allocation's order.
fn places(allocation: &Allocation) -> BTreeMap<String, Vec<usize>> {
    let mut places: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (index, place) in allocation.regions.iter().enumerate() {
        places.entry(place.appliance_name.to_string()).or_default().push(index);
    }
    places
}

fn block_size(allocation: &Allocation) -> String {
    match allocation.block_size {
        Some(size) => size.to_string(),
        None => "not known: the next `xpm blk attach` has to say it (--block-size)".to_owned(),
    }
}

fn show(allocation: &Allocation) -> String {
    let owned = match &allocation.owner {
        Some(by) => format!("{}, client {}, since {}", owner(by), by.client, age::since(by.since)),
        None => "nobody".to_owned(),
    };
    let mut text = fields(&[
        ("name", allocation.name.to_string()),
        ("id", allocation.id.to_string()),
        ("size", allocation.size.to_string()),
        ("state", list::explained_state(allocation)),
        ("layout", layout(&allocation.layout)),
        ("regions", format!("{} of {}", allocation.regions.len(), allocation.region_len)),
        ("block size", block_size(allocation)),
        ("owner", owned),
        ("epoch", allocation.epoch.to_string()),
        ("created", age::since(allocation.created)),
        ("takes", allocation.taken.to_string()),
        ("account", named(&allocation.account)),
        ("client", named(&allocation.client)),
        ("strategy", named(&allocation.strategy)),
        (
            "link speed",
            allocation.link_speed.map_or_else(|| "none promised".to_owned(), |speed| speed.to_string()),
        ),
        ("reclaimable", if allocation.reclaimable { "yes" } else { "no" }.to_owned()),
        ("ends", ends(allocation)),
    ]);
    if let Some(change) = &allocation.change {
        text.push_str(&fields(&[("changes", life::change_line(change))]));
    }
    if allocation.waiting.is_some() {
        return text;
    }
    let mut table = Table::new(&["APPLIANCE", ">REGIONS", ">MEMORY", "WHICH"]);
    for (appliance, regions) in places(allocation) {
        let memory = allocation.region_len.0.saturating_mul(regions.len() as u64);
        table.row([appliance, regions.len().to_string(), ByteSize(memory).to_string(), ranges(&regions)]);
    }
    text.push('\n');
    text.push_str(&table.render());
    if !allocation.slabs.slabs.is_empty() {
        let mut table = Table::new(&["SLAB", ">LENGTH", ">AT"]);
        for (name, place) in &allocation.slabs.slabs {
            table.row([name.to_string(), place.len.to_string(), place.offset.to_string()]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    text
}

fn named(name: &Option<Name>) -> String {
    name.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string)
}

/// When it ends by itself.
fn ends(allocation: &Allocation) -> String {
    match lease(allocation) {
        text if text.is_empty() => "never".to_owned(),
        text => text,
    }
}

/// Ascending numbers as ranges: `0, 3-5`.
fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let run = |(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    runs.iter().map(run).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn region_numbers_as_ranges() {
        assert_eq!(ranges(&[0, 3, 4, 5, 9]), "0, 3-5, 9");
        assert_eq!(ranges(&[]), "");
        assert_eq!(count(1, "region"), "1 region");
        assert_eq!(count(2, "region"), "2 regions");
    }
}
