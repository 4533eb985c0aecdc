//! Changes of allocations and appliances in use: resizing, handing over, emptying,
//! rebalancing. All of it goes on when this command ends; the commands wait to tell how it ends.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde::Serialize;
use xpm_protocol::api::allocator::{
    Allocation, Appliance, ChangeState, Drain, DrainState, Pause, Rebalance, RebalancePlan, Resize, Transfer,
};
use xpm_protocol::units::PAGE_LEN;
use xpm_protocol::{ByteSize, Name};

use crate::age;
use crate::cli::{DrainArgs, RebalanceArgs};
use crate::connect::{Daemon, Daemons};
use crate::output::{self, Output, one_line};
use crate::table::Table;

/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(200);
/// Pause between two lines for who watches.
const HINT_EVERY: Duration = Duration::from_secs(2);
/// How long something may stand still before that counts as its end.
const STUCK_AFTER: Duration = Duration::from_secs(60);
/// The time that an order may take beyond its deadline.
const BEYOND_DEADLINE: Duration = Duration::from_secs(60);
/// Deadline of a hand-over where nobody says it.
const DEADLINE: Duration = Duration::from_secs(30);

/// Makes an allocation larger or smaller, and waits for the end of that.
pub(crate) async fn resize(
    name: &Name,
    size: ByteSize,
    no_wait: bool,
    allocator: &Daemon,
    output: Output,
) -> anyhow::Result<Allocation> {
    let cannot = || format!("cannot make `{name}` {size} large");
    let path = format!("/v1/allocations/{name}");
    let mut now: Allocation =
        allocator.put(&format!("{path}/size"), &Resize { size }).await.with_context(cannot)?;
    let mut hints = Hints::new(output);
    let mut moved = (Instant::now(), None);
    while let Some(change) = now.change.clone().filter(|_| !no_wait) {
        hints.tell(|| change_line(&change));
        if moved.1.as_ref() != Some(&change) {
            moved = (Instant::now(), Some(change));
        } else if moved.0.elapsed() >= STUCK_AFTER {
            bail!(
                "`{name}` stands still on its way {}; it goes on when that is there again, and is given up when another client \
                 takes `{name}`",
                change_line(&change)
            );
        }
        tokio::time::sleep(PAUSE).await;
        now = allocator.get(&path).await.with_context(cannot)?;
    }
    if let Some(refused) = now.refused.as_ref().filter(|_| now.size.0 != size.0.next_multiple_of(PAGE_LEN)) {
        return Err(anyhow::anyhow!("{}", one_line(refused))).with_context(cannot);
    }
    if let Some(followed) = &now.followed {
        output::warn(followed);
    }
    Ok(now)
}

/// How far a change is.
pub(crate) fn change_line(change: &ChangeState) -> String {
    let copied = match change.bytes.0 {
        0 => String::new(),
        bytes => format!(", {} of {} copied", change.copied, ByteSize(bytes)),
    };
    format!("to {}{copied}: {}", change.size, change.text)
}

/// Hands an allocation over, and waits until it is.
pub(crate) async fn transfer(
    name: &Name,
    transfer: Transfer,
    allocator: &Daemon,
) -> anyhow::Result<Allocation> {
    let limit = transfer.deadline.map_or(DEADLINE, |span| span.0) + BEYOND_DEADLINE;
    let path = format!("/v1/allocations/{name}/transfer");
    let handed = allocator.post_later(&path, &transfer, limit).await;
    handed.with_context(|| format!("cannot hand `{name}` over to {}", transfer.to))
}

/// Empties an appliance, and waits until it is empty.
pub(crate) async fn drain(
    args: &DrainArgs,
    appliance: &Appliance,
    allocator: &Daemon,
    output: Output,
) -> anyhow::Result<()> {
    let (id, name) = (appliance.info.id, &appliance.info.name);
    let order = Drain { rate: args.rate, paused: args.pause };
    let mut now: Appliance = allocator.post(&format!("/v1/appliances/{id}/drain"), &order).await?;
    let mut hints = Hints::new(output);
    let mut moved = (Instant::now(), u64::MAX);
    while let Some(drain) = now.drain.clone().filter(|drain| drain.left.0 > 0 && !args.no_wait && !args.pause)
    {
        hints.tell(|| drain_line(&drain));
        if drain.left.0 != moved.1 {
            moved = (Instant::now(), drain.left.0);
        }
        if let Some(why) = drain.stuck.as_ref().filter(|_| moved.0.elapsed() >= STUCK_AFTER) {
            bail!(
                "{} of {name} stay where they are: {}; it goes on by itself when that is mended",
                drain.left,
                one_line(why)
            );
        }
        tokio::time::sleep(PAUSE).await;
        let all = allocator.appliances().await?;
        let found = all.into_iter().find(|one| one.info.id == id);
        now = found.with_context(|| format!("appliance {name} is not known any more"))?;
    }
    output.print(&now, |now| match &now.drain {
        Some(drain) if drain.left.0 > 0 => format!("{name}: {}\n", drain_line(drain)),
        _ => format!("{name} is empty; `xpm appliance undrain {name}` lets it be used again\n"),
    })
}

/// How far an emptying is.
pub(crate) fn drain_line(drain: &DrainState) -> String {
    let left = match (drain.left.0, drain.paused) {
        (0, _) => return "it is empty".to_owned(),
        (_, true) => format!("{} are left, and it is paused", drain.left),
        (_, false) => format!("{} are left", drain.left),
    };
    let eta = drain.eta.map(|eta| format!(", for about {}", age::short(eta.0))).unwrap_or_default();
    let stuck = drain.stuck.as_ref().map(|why| format!("; {}", one_line(why))).unwrap_or_default();
    format!("{left}{eta}{stuck}")
}

/// What `undrain --json` prints.
#[derive(Debug, Serialize)]
struct Undrained {
    undrained: Name,
}

/// Ends the emptying of an appliance.
pub(crate) async fn undrain(appliance: &Appliance, allocator: &Daemon, output: Output) -> anyhow::Result<()> {
    allocator.delete(&format!("/v1/appliances/{}/drain", appliance.info.id)).await?;
    output.print(&Undrained { undrained: appliance.info.name.clone() }, |_| String::new())
}

/// Begins, shows, or changes a rebalancing.
pub(crate) async fn rebalance(args: &RebalanceArgs, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    const PATH: &str = "/v1/rebalance";
    let allocator = daemons.allocator()?;
    if args.abort {
        allocator.delete(PATH).await?;
    }
    let plan: RebalancePlan = match args {
        RebalanceArgs { pause: true, .. } => allocator.put(PATH, &Pause { paused: true }).await?,
        RebalanceArgs { resume: true, .. } => allocator.put(PATH, &Pause { paused: false }).await?,
        RebalanceArgs { status: true, .. } | RebalanceArgs { abort: true, .. } => allocator.get(PATH).await?,
        _ => allocator.post(PATH, &Rebalance { dry_run: args.dry_run, rate: args.rate }).await?,
    };
    ensure!(plan.moves.iter().all(|one| one.bytes.0 > 0), "the allocator answered a plan that moves nothing");
    output.print(&plan, show_plan)
}

fn show_plan(plan: &RebalancePlan) -> String {
    if plan.moves.is_empty() {
        let moved = if plan.moved.0 > 0 { format!("; {} were moved", plan.moved) } else { String::new() };
        return format!("Nothing is to be moved{moved}.\n");
    }
    let mut table = Table::new(&["ALLOCATION", "FROM", "TO", ">MEMORY"]);
    for one in &plan.moves {
        let places = [one.allocation.to_string(), one.from.to_string(), one.to.to_string()];
        let [allocation, from, to] = places;
        table.row([allocation, from, to, one.bytes.to_string()]);
    }
    let left: u64 = plan.moves.iter().map(|one| one.bytes.0).sum();
    let eta = plan.eta.map(|eta| format!(", for about {}", age::short(eta.0))).unwrap_or_default();
    let paused = if plan.paused { ", paused" } else { "" };
    format!("{}{} are left{eta}{paused}\n", table.render(), ByteSize(left))
}

/// Lines for who watches, not too many.
struct Hints {
    output: Output,
    told: Option<Instant>,
}

impl Hints {
    fn new(output: Output) -> Hints {
        Hints { output, told: None }
    }

    fn tell(&mut self, line: impl FnOnce() -> String) {
        if self.told.is_none_or(|told| told.elapsed() >= HINT_EVERY) {
            self.told = Some(Instant::now());
            self.output.hint(&line());
        }
    }
}

/// What `backup --json` prints.
#[derive(Debug, Serialize)]
struct BackedUp {
    file: PathBuf,
}

/// Writes the allocator's metadata into a new file.
pub(crate) async fn backup(file: &Path, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    let what = || format!("cannot write {}", file.display());
    let backup: serde_json::Value = daemons.allocator()?.get_later("/v1/backup").await?;
    let mut open = std::fs::OpenOptions::new();
    let mut new = open.write(true).create_new(true).mode(0o600).open(file).with_context(what)?;
    new.write_all(&serde_json::to_vec_pretty(&backup)?).with_context(what)?;
    new.sync_all().with_context(what)?;
    output.print(&BackedUp { file: file.to_owned() }, |_| String::new())
}
