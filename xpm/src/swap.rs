//! `xpm swap`: the swap that xpm-swapd looks after on this host.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::Serialize;
use xpm_protocol::api::blk::DeviceState;
use xpm_protocol::api::health::{Check, Problem};
use xpm_protocol::api::swapd::{Area, AreaState, Drain, Grow, Origin, Shrink, Status, Trouble};
use xpm_protocol::{ByteSize, Name};

use crate::age;
use crate::cli::{DrainAreasArgs, SwapArgs, SwapCommand};
use crate::connect::{self, Daemon};
use crate::output::Output;
use crate::problems as told;
use crate::table::{Table, fields};

/// How often it is looked how far the taking away of areas is.
const LOOK_EVERY: Duration = Duration::from_millis(500);

pub(crate) async fn run(args: SwapArgs, output: Output) -> anyhow::Result<ExitCode> {
    let daemon = connect::swapd(&args.swapd)?;
    match args.command {
        SwapCommand::Status => {
            let status: Status = daemon.get("/v1/status").await?;
            let problems = problems(&status);
            let shown = Shown { health: told::health(&problems), problems, status };
            output.print(&shown, |shown| show(shown, output.is_wide()))?;
            return Ok(told::exit(&shown.problems));
        }
        SwapCommand::Grow { size } => {
            let made: Area =
                daemon.post("/v1/grow", &Grow { size }).await.context("cannot make more swap")?;
            output.print(&made, |made| format!("{}: {} at {}\n", made.name, made.size, path(made)))?;
        }
        SwapCommand::Shrink { size, no_wait } => {
            let names: Vec<Name> =
                daemon.post("/v1/shrink", &Shrink { size }).await.context("cannot take swap away")?;
            leave(&daemon, names, no_wait, output).await?;
        }
        SwapCommand::Drain(args) => drain(args, &daemon, output).await?,
        SwapCommand::Resume => daemon.post("/v1/resume", &()).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn drain(args: DrainAreasArgs, daemon: &Daemon, output: Output) -> anyhow::Result<()> {
    if args.stop {
        return Ok(daemon.delete("/v1/drain").await?);
    }
    let asked = Drain { areas: args.areas, all: args.all };
    let names: Vec<Name> = daemon.post("/v1/drain", &asked).await.context("cannot take swap away")?;
    leave(daemon, names, args.no_wait, output).await
}

/// Waits until areas are off, and shows how far that is. Interrupted, it has them stay.
async fn leave(daemon: &Daemon, names: Vec<Name>, no_wait: bool, output: Output) -> anyhow::Result<()> {
    if no_wait {
        return output.print(&names, |names| lines(names, "is being taken away"));
    }
    let stayed = tokio::select! {
        stayed = watch(daemon, &names) => stayed?,
        _ = tokio::signal::ctrl_c() => {
            daemon.delete("/v1/drain").await?;
            bail!("stopped: what is not off yet stays");
        }
    };
    if stayed.is_empty() {
        return output.print(&names, |names| lines(names, "is off"));
    }
    let status: Status = daemon.get("/v1/status").await?;
    let why = status.troubles.iter().find(|trouble| trouble.what == "drain");
    let why = why.map_or("it was stopped, or the swap is needed".to_owned(), |trouble| trouble.why.clone());
    let names: Vec<&str> = stayed.iter().map(Name::as_str).collect();
    bail!("{} stays: {why}", names.join(", "))
}

/// The areas that stay, when no area is being removed any more.
async fn watch(daemon: &Daemon, names: &[Name]) -> anyhow::Result<Vec<Name>> {
    let terminal = std::io::stderr().is_terminal();
    let mut still = 0;
    loop {
        let status: Status = daemon.get("/v1/status").await?;
        let wanted = |area: &&Area| names.contains(&area.name) && area.state != AreaState::Gone;
        let left: Vec<&Area> = status.areas.iter().filter(wanted).collect();
        let moving = left.iter().find(|area| area.leaving.is_some() || area.state == AreaState::Leaving);
        if let (Some(area), true) = (moving, terminal) {
            // A progress that cannot be shown is none that matters.
            let _ = write!(std::io::stderr(), "\r{}\x1b[K", progress(area));
        }
        // Between waiting for its turn and being taken away an area is neither for a moment.
        still = if moving.is_some() { 0 } else { still + 1 };
        if left.is_empty() || still > 2 {
            if terminal {
                let _ = write!(std::io::stderr(), "\r\x1b[K");
            }
            return Ok(left.into_iter().map(|area| area.name.clone()).collect());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn lines(names: &[Name], what: &str) -> String {
    names.iter().map(|name| format!("{name} {what}\n")).collect()
}

fn progress(area: &Area) -> String {
    let Some(leaving) = &area.leaving else { return format!("{}: {} left", area.name, area.used) };
    let done = leaving.from.0.saturating_sub(area.used.0);
    let percent = (u128::from(done) * 100).checked_div(u128::from(leaving.from.0)).unwrap_or(100);
    let since = leaving.since.0;
    let since = if since.is_zero() { String::new() } else { format!(", for {}", age::short(since)) };
    format!("{}: {percent}%, {} of {} left{since}", area.name, area.used, leaving.from)
}

/// What `swap status -o json` prints.
#[derive(Debug, Serialize)]
struct Shown {
    /// `ok`, `warning` or `critical`.
    health: &'static str,
    problems: Vec<Problem>,
    #[serde(flatten)]
    status: Status,
}

/// What does not go as it should, in the words of every command.
fn problems(status: &Status) -> Vec<Problem> {
    let mut problems: Vec<Problem> = status.troubles.iter().map(|trouble| problem(trouble, status)).collect();
    told::sort(&mut problems);
    problems
}

fn problem(trouble: &Trouble, status: &Status) -> Problem {
    let (what, area) = trouble.what.split_once(" of ").unwrap_or((&trouble.what, ""));
    let lost =
        || status.areas.iter().any(|one| one.name.as_str() == area && one.device == Some(DeviceState::Lost));
    let check = match what {
        "grow" => Check::SwapNotGrown,
        "maximum" => Check::SwapAtMaximum,
        "drain" => Check::SwapNotDrained,
        "fallback" => Check::SwapNoFallback,
        "xpm-blk" => Check::BlkUnreachable,
        "device" if lost() => Check::DeviceLost,
        "device" => Check::DeviceHolding,
        "end" => Check::AllocationEnding,
        _ => Check::SwapTrouble,
    };
    let object = if area.is_empty() { "swapd".to_owned() } else { format!("allocation/{area}") };
    let again = trouble.again.map_or(String::new(), |again| format!("; again in {}", age::short(again.0)));
    let since = age::short(trouble.since.0);
    Problem::new(check, object, format!("{}: {} (for {since}{again})", trouble.what, trouble.why))
}

fn show(shown: &Shown, wide: bool) -> String {
    let status = &shown.status;
    let mut text = told::lines(&shown.problems, wide);
    if let Some(rest) = &status.rest {
        text.push_str(&fields(&[("RESTS", rest.why.clone())]));
    }
    if !text.is_empty() {
        text.push('\n');
    }
    text.push_str(&areas(status));
    text.push('\n');
    text.push_str(&summary(status));
    let wrong = status.settings.iter().filter(|setting| !setting.ok);
    for setting in wrong {
        let found = setting.found.as_deref().unwrap_or("not there");
        text.push_str(&format!(
            "setting      {}: {found}, not {}: {}\n",
            setting.path, setting.wanted, setting.note
        ));
    }
    for item in status.safety.iter().filter(|item| !item.ok) {
        let remedy = item.remedy.as_deref().unwrap_or("see the log");
        text.push_str(&format!("unfit        {}: {}; {remedy}\n", item.item, item.found));
    }
    text
}

fn areas(status: &Status) -> String {
    let mut table = Table::new(&["SWAP", "PATH", ">SIZE", ">USED", ">PRIORITY", "STATE", "ORIGIN"]);
    for area in &status.areas {
        table.row([
            area.name.to_string(),
            path(area),
            area.size.to_string(),
            area.used.to_string(),
            status.policy.priority.to_string(),
            state(area),
            origin(area.origin).to_owned(),
        ]);
    }
    for other in &status.others {
        table.row([
            "(other)".to_owned(),
            other.path.clone(),
            other.size.to_string(),
            other.used.to_string(),
            other.priority.to_string(),
            "on".to_owned(),
            String::new(),
        ]);
    }
    if let Some(fallback) = &status.fallback {
        table.row([
            "(fallback)".to_owned(),
            fallback.path.clone(),
            fallback.size.to_string(),
            fallback.used.to_string(),
            fallback.priority.to_string(),
            if fallback.on { "on" } else { "off" }.to_owned(),
            String::new(),
        ]);
    }
    table.render()
}

fn path(area: &Area) -> String {
    area.path.clone().unwrap_or_default()
}

fn state(area: &Area) -> String {
    match (area.state, &area.leaving, &area.ending) {
        (AreaState::Leaving, _, _) | (AreaState::On, Some(_), _) => format!("leaving: {}", progress(area)),
        (AreaState::On, None, Some(ending)) => format!("on; {ending}"),
        (AreaState::On, None, None) => "on".to_owned(),
        (AreaState::Making, _, _) => "being made".to_owned(),
        (AreaState::Off, _, _) => "turned off by others".to_owned(),
        (AreaState::Gone, _, _) => "off, being given back".to_owned(),
    }
}

fn origin(origin: Origin) -> &'static str {
    match origin {
        Origin::Base => "base",
        Origin::Step => "step",
        Origin::Hand => "by hand",
    }
}

fn summary(status: &Status) -> String {
    let policy = &status.policy;
    let sum = |part: fn(&Area) -> u64| ByteSize(status.areas.iter().map(part).sum());
    let pressure = match (status.pressure.told, status.pressure.last) {
        (false, _) => "not told by the kernel".to_owned(),
        (true, last) => {
            let last =
                last.map_or("not passed yet".to_owned(), |last| format!("passed {} ago", age::short(last.0)));
            let (whole, part) = (status.pressure.some_avg10 / 100, status.pressure.some_avg10 % 100);
            format!("{whole}.{part:02}% of the last 10 s; threshold {last}")
        }
    };
    let (decision, since) = (&status.decision, age::short(status.decision.since.0));
    fields(&[
        ("swap", format!("{}, {} used", sum(|area| area.size.0), sum(|area| area.used.0))),
        (
            "policy",
            format!("base {}, maximum {}, next step {}", policy.base, policy.maximum, policy.next_step),
        ),
        ("grows", format!("when less than {} is free", policy.free_below)),
        ("shrinks", format!("after {} of calm", policy.shrink_after)),
        ("memory", format!("{} of {} available", status.memory.available, status.memory.total)),
        ("pressure", pressure),
        ("decision", format!("{} (for {since}): {}", decision.action, decision.reason)),
    ])
}
