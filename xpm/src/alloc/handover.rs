//! `xpm alloc handover`: allocations in use go to a client that stands by.

use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;
use xpm_protocol::Name;
use xpm_protocol::api::allocator::{HandOverAll, Handover};

use crate::age;
use crate::cli::HandoverArgs;
use crate::connect::{Daemon, Failure};
use crate::output::Output;
use crate::table::Table;

/// Memory that was shared with a process of an appliance's host is moved, which takes a second for each GiB.
const LIMIT: Duration = Duration::from_secs(60);

pub(super) async fn run(args: HandoverArgs, allocator: &Daemon, output: Output) -> anyhow::Result<()> {
    let HandoverArgs { names, to, force, commit, rollback, list } = args;
    if list {
        let all: Vec<Handover> = allocator.get("/v1/handovers").await?;
        return output.print(&all, |all| table(all));
    }
    if let Some(which) = commit {
        return end(&which, "commit", allocator, output).await;
    }
    if let Some(which) = rollback {
        return end(&which, "rollback", allocator, output).await;
    }
    let to = to.context("say to whom, with --to CLIENT")?;
    let what = names.iter().map(Name::as_str).collect::<Vec<_>>().join(", ");
    let order = HandOverAll { names, to: to.clone(), force };
    let open: Result<Handover, Failure> = allocator.post_later("/v1/handovers", &order, LIMIT).await;
    let open = open.with_context(|| format!("cannot hand {what} over to {to}"))?;
    output.print(&open, |open| format!("{}\n", open.id))
}

#[derive(Serialize)]
struct Nothing {}

async fn end(which: &Name, how: &str, allocator: &Daemon, output: Output) -> anyhow::Result<()> {
    let path = format!("/v1/handovers/{which}/{how}");
    let over: Result<Handover, Failure> = allocator.post_later(&path, &Nothing {}, LIMIT).await;
    let over = over.with_context(|| format!("cannot {how} the hand-over {which}"))?;
    output.print(&over, |over| format!("{}: {}\n", names(over), over.state.as_str()))
}

fn names(one: &Handover) -> String {
    one.names.iter().map(Name::as_str).collect::<Vec<_>>().join(",")
}

fn table(all: &[Handover]) -> String {
    let mut table = Table::new(&["ID", "ALLOCATIONS", "FROM", "TO", "STATE", "BEGAN"]);
    for one in all {
        let state = one.state.as_str().to_owned();
        let state = one.stuck.as_ref().map_or(state, |why| format!("{}: {why}", one.state.as_str()));
        let (from, to) = (one.from.host_name.clone(), one.to.host_name.clone());
        table.row([one.id.to_string(), names(one), from, to, state, age::since(one.since)]);
    }
    table.render()
}
