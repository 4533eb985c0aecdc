//! `xpm vm`: virtual machines whose RAM is external. What is done is in crate `xpm-vm`; here is how it is asked for and shown.

mod memory;
mod ownership;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::Signal;
use serde::Serialize;
use xpm_control::token::Token;
use xpm_protocol::{ByteSize, Name};
use xpm_vm::arguments::Start;
use xpm_vm::machine::{Guarded, Terms};
use xpm_vm::memory::{Cache, Sizes};
use xpm_vm::migrate::destination::{self, Door};
use xpm_vm::migrate::settle::{self, Known, Settled};
use xpm_vm::migrate::source;
use xpm_vm::migrate::timeline::Waited;
use xpm_vm::ownership::Plain;
use xpm_vm::place::{self, Machine, Place, Stage};
use xpm_vm::qmp::Qmp;
use xpm_vm::{cgroup, hot, resize, suspend, xml};

use crate::cli::{
    ExecArgs, FetchArgs, ListArgs, MigrateArgs, QemuArgs, ReceiveArgs, SettleArgs, VmArgs, VmCommand, XmlArgs,
};
use crate::connect::Daemons;
use crate::listing::{Cell, Column, Listing};
use crate::output::{self, Output};
use crate::run::{Signals, code_of};
use crate::setup::Setup;
use crate::table;
use crate::vm::memory::{Ram, disks};
use crate::vm::ownership::HandOver;

/// How long QEMU's monitor for looks is waited for. Another command that looks may have it for a moment.
const LOOK_LIMIT: Duration = Duration::from_secs(2);

/// A virtual machine of this host.
#[derive(Debug, Serialize)]
struct Shown {
    /// Its name.
    name: Name,
    /// `running`, `paused` or what else QEMU says of a machine that is here; `starting`, `incoming`, `leaving` while it is on its
    /// way and stopped, `gone` when its destination was told to run it, `left` when it runs there, `ended` when its QEMU has.
    state: String,
    /// The process of QEMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<u32>,
    /// RAM that it starts with.
    size: ByteSize,
    /// RAM that it can have.
    #[serde(skip_serializing_if = "Option::is_none")]
    maximum: Option<ByteSize>,
    /// RAM that it has now, where it can be resized.
    #[serde(skip_serializing_if = "Option::is_none")]
    plugged: Option<ByteSize>,
    /// Local memory that its RAM may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    local: Option<ByteSize>,
    /// What this host has cached of its RAM.
    #[serde(skip_serializing_if = "Option::is_none")]
    cached: Option<ByteSize>,
    /// Where it goes, or went.
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    /// The files of its RAM.
    files: Vec<String>,
    /// Its memory cgroup.
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup: Option<String>,
    /// QEMU and its arguments.
    arguments: Vec<String>,
}

/// What a move came to.
#[derive(Debug, Serialize)]
struct Migration {
    /// The machine.
    name: Name,
    /// Where it is now.
    to: String,
    /// How long it was stopped, in milliseconds.
    down_ms: u64,
    /// How long the whole move took, in milliseconds.
    total_ms: u64,
    /// Bytes of its state that were sent.
    sent: ByteSize,
    /// The steps that it waited for while it was stopped, in order.
    steps: Vec<MigrationStep>,
}

/// A step of a move while the machine is stopped.
#[derive(Debug, Serialize)]
struct MigrationStep {
    /// `stop`: QEMU stops it. `connect`: QEMU reaches the destination. `write-back`, `pre-switchover`, `prove-clean`:
    /// changed pages are written back. `switch`: the RAM changes its owner. `discard`: with `--strict`, this host's
    /// cache is dropped. `send`, `load`: the state of its devices is sent, and loaded. `run`: it is ordered to run
    /// there, and does.
    step: &'static str,
    /// How long that took, in microseconds.
    took_us: u64,
}

const MACHINES: Listing<Shown> = Listing {
    columns: &[
        Column::text("NAME", |machine| Cell::text(&machine.name)),
        Column::text("STATE", |machine| Cell::text(&machine.state)),
        Column::number("MEMORY", |machine| size(Some(machine.plugged.unwrap_or(machine.size)))),
        Column::number("MAX", |machine| size(machine.maximum)),
        Column::number("LOCAL", |machine| size(machine.local)),
        Column::number("CACHED", |machine| size(machine.cached)),
        Column::number("PROCESS", |machine| {
            machine.process.map_or(Cell::none(), |id| Cell::ranked(id, id.into()))
        }),
        Column::wide_text("TO", |machine| machine.to.as_ref().map_or(Cell::none(), Cell::text)),
        Column::wide_text("FILE", |machine| machine.files.first().map_or(Cell::none(), Cell::text)),
    ],
    empty: "No virtual machine was started by `xpm vm` on this host.\n",
};

fn size(size: Option<ByteSize>) -> Cell {
    size.map_or(Cell::none(), |size| Cell::ranked(size, size.0))
}

/// Runs the command.
pub(crate) async fn run(
    args: VmArgs,
    setup: &Setup,
    daemons: &Daemons,
    output: Output,
) -> anyhow::Result<ExitCode> {
    let root = std::path::absolute(&args.dir).context("the directory of the machines cannot be used")?;
    let place = |name: &Name| Place::below(&root, name);
    match args.command {
        VmCommand::Run(args) => {
            let sizes = Sizes { memory: args.memory.memory, maximum: args.memory.max };
            let file = args.qemu.file.clone();
            let mut terms = terms(&args.name, &root, sizes, args.qemu)?;
            terms.check(Start::Boot)?;
            let ram = Ram::get(&mut terms, file.as_deref(), daemons).await?;
            let started = Guarded::start(&terms, Start::Boot).await.map(|(guarded, _)| guarded);
            ram.stay(started, output).await
        }
        VmCommand::Receive(args) => receive(args, &root, setup, daemons, output).await,
        VmCommand::Resume(args) => {
            let sizes = suspend::sizes(&args.from, &args.name)?;
            let file = args.qemu.file.clone();
            let mut terms = terms(&args.name, &root, sizes, args.qemu)?;
            terms.check(Start::Incoming)?;
            let ram = Ram::get(&mut terms, file.as_deref(), daemons).await?;
            ram.stay(suspend::resume(&terms, &args.from).await, output).await
        }
        VmCommand::Migrate(args) => migrate(&args, &place(&args.name), setup, daemons, output).await,
        VmCommand::Settle(args) => settle(&args, &place(&args.name), setup, daemons).await,
        VmCommand::Suspend { name, to } => {
            let to = std::path::absolute(&to)?;
            let len = suspend::suspend(&place(&name), &to).await?;
            output.hint(&format!(
                "`{name}` is suspended: its state has {} in {}",
                ByteSize(len),
                to.display()
            ));
            Ok(ExitCode::SUCCESS)
        }
        VmCommand::Resize { name, size, wait } => {
            let plugged = resize::resize(&place(&name), size, wait.0).await?;
            output.print(&plugged, |plugged| format!("{}\n", plugged.size))?;
            if plugged.is_done() {
                return Ok(ExitCode::SUCCESS);
            }
            output::warn(&format!(
                "the guest has {} and was asked to have {size}: it may need longer, has no free memory to give up, or no driver for \
                 virtio-mem",
                plugged.size
            ));
            Ok(ExitCode::FAILURE)
        }
        VmCommand::List(args) => list(&args, &root, output).await,
        VmCommand::Show { name } => show(&name, &place(&name), output).await,
        VmCommand::Xml(args) => print_xml(&args, &place(&args.name)),
        VmCommand::Exec(args) => exec(&args),
        VmCommand::Fetch(args) => fetch(&args),
    }
}

/// Fetches the pages that standard input lists.
pub(crate) fn fetch(args: &FetchArgs) -> anyhow::Result<ExitCode> {
    if let Some(cgroup) = &args.cgroup {
        cgroup::enter(cgroup)?;
    }
    hot::fetch(&args.files, std::io::stdin().lock())?;
    Ok(ExitCode::SUCCESS)
}

/// Replaces this command; what it returns with is an error.
pub(crate) fn exec(args: &ExecArgs) -> anyhow::Result<ExitCode> {
    Err(xpm_vm::machine::run_as(&args.program, args.cgroup.as_deref(), args.huge_pages).into())
}

fn terms(name: &Name, root: &Path, sizes: Sizes, args: QemuArgs) -> anyhow::Result<Terms> {
    Ok(Terms {
        name: name.clone(),
        root: root.to_owned(),
        sizes,
        local: args.local,
        overhead: args.overhead,
        files: Vec::new(),
        allocations: Vec::new(),
        disks: disks(&args.disks, root),
        huge_pages: args.huge_pages,
        program: args.program,
        command: std::env::current_exe().context("cannot find out where this command is")?,
    })
}

/// Stays with a machine until its QEMU ends.
async fn stay(mut guarded: Guarded, output: Output) -> anyhow::Result<ExitCode> {
    guarded.warnings.iter().for_each(|warning| output::warn(warning));
    output.hint(&format!("`{}` is here: process {}", guarded.machine.name, guarded.child.id()));
    let status = Signals::new()?.wait(&mut guarded.child).await?;
    let name = guarded.machine.name.clone();
    match guarded.end() {
        Some(Stage::Left) => {
            output.hint(&format!("`{name}` has left this host"));
            Ok(ExitCode::SUCCESS)
        }
        _ => Ok(code_of(status)),
    }
}

async fn receive(
    args: ReceiveArgs,
    root: &Path,
    setup: &Setup,
    daemons: &Daemons,
    output: Output,
) -> anyhow::Result<ExitCode> {
    let door = Door::open(args.listen, token(setup)?).await?;
    let sizes = Sizes { memory: args.memory.memory, maximum: args.memory.max };
    let file = args.qemu.file.clone();
    let mut terms = terms(&args.name, root, sizes, args.qemu)?;
    terms.check(Start::Incoming)?;
    let ram = Ram::get_to_receive(&mut terms, file.as_deref(), daemons).await?;
    let arrived = arrive(&terms, door, &ram, output).await;
    ram.stay(arrived, output).await
}

/// Waits until the machine is here.
async fn arrive(terms: &Terms, door: Door, ram: &Ram, output: Output) -> Result<Guarded, xpm_vm::Error> {
    let (guarded, qmp) = Guarded::start(terms, Start::Incoming).await?;
    let process = guarded.machine.qemu;
    let mut signals = Signals::new().map_err(|error| xpm_vm::Error::Machine(error.to_string()))?;
    let waiting = |address| output.hint(&format!("`{}` is waited for at {address}", terms.name));
    let receiving = destination::receive(guarded, qmp, door, ram.heirs(), waiting);
    tokio::pin!(receiving);
    loop {
        tokio::select! {
            guarded = &mut receiving => return guarded,
            // QEMU's end ends the rest.
            () = signals.told_to_end() => { process.map(|process| process.signal(Signal::KILL)); }
        }
    }
}

async fn migrate(
    args: &MigrateArgs,
    place: &Place,
    setup: &Setup,
    daemons: &Daemons,
    output: Output,
) -> anyhow::Result<ExitCode> {
    let request = source::Request { to: args.to, token: token(setup)?, strict: args.strict };
    let moved = match HandOver::of(place, daemons)? {
        Some(hand_over) => source::migrate(place, &request, hand_over).await?,
        None => source::migrate(place, &request, Plain).await?,
    };
    let migration = Migration {
        name: args.name.clone(),
        to: args.to.to_string(),
        down_ms: millis(moved.down),
        total_ms: millis(moved.total),
        sent: ByteSize(moved.sent),
        steps: moved.steps.iter().map(step).collect(),
    };
    output.print(&migration, |migration| {
        format!(
            "`{}` runs at {}: stopped for {} ms of {} ms, {} bytes of state sent\n",
            migration.name, migration.to, migration.down_ms, migration.total_ms, migration.sent.0
        )
    })?;
    let steps = migration.steps.iter();
    let steps: Vec<String> = steps
        .map(|step| format!("{} {}.{}", step.step, step.took_us / 1000, step.took_us / 100 % 10))
        .collect();
    output.hint(&format!("stopped for, in ms:  {}", steps.join(", ")));
    Ok(ExitCode::SUCCESS)
}

fn step(waited: &Waited) -> MigrationStep {
    let took_us = u64::try_from(waited.took.as_micros()).unwrap_or(u64::MAX);
    MigrationStep { step: waited.step, took_us }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

async fn settle(
    args: &SettleArgs,
    place: &Place,
    setup: &Setup,
    daemons: &Daemons,
) -> anyhow::Result<ExitCode> {
    let known = match (args.here, args.gone) {
        (true, _) => Some(Known::NotThere),
        (_, true) => Some(Known::Gone),
        _ => None,
    };
    let token = token(setup)?;
    let settled = match HandOver::of(place, daemons)? {
        Some(hand_over) => settle::settle(place, token.as_ref(), known, hand_over).await?,
        None => settle::settle(place, token.as_ref(), known, Plain).await?,
    };
    let text = match settled {
        Settled::Here => "is here and goes on",
        Settled::Gone => "runs at its destination and has ended here",
    };
    output::print(&format!("`{}` {text}\n", args.name))?;
    Ok(ExitCode::SUCCESS)
}

async fn list(args: &ListArgs, root: &Path, output: Output) -> anyhow::Result<ExitCode> {
    let mut shown = Vec::new();
    for machine in place::list(root)? {
        let place = Place::below(root, &machine.name);
        shown.push(look(machine, &place).await);
    }
    MACHINES.print(shown, args, output)?;
    Ok(ExitCode::SUCCESS)
}

async fn show(name: &Name, place: &Place, output: Output) -> anyhow::Result<ExitCode> {
    let machine = place.load()?.with_context(|| {
        format!(
            "there is no machine `{name}` in {}: `xpm vm list` shows those of this host",
            place.path().display()
        )
    })?;
    let shown = look(machine, place).await;
    let monitor = place.drive().display().to_string();
    output.print(&shown, |shown| {
        let text = |size: Option<ByteSize>| size.map_or("-".to_owned(), |size| size.to_string());
        table::fields(&[
            ("name", shown.name.to_string()),
            ("state", shown.state.clone()),
            ("process", shown.process.map_or("-".to_owned(), |id| id.to_string())),
            ("memory", text(Some(shown.plugged.unwrap_or(shown.size)))),
            ("max", text(shown.maximum)),
            ("local", text(shown.local)),
            ("cached", text(shown.cached)),
            ("to", shown.to.clone().unwrap_or("-".to_owned())),
            ("files", shown.files.join(" ")),
            ("cgroup", shown.cgroup.clone().unwrap_or("-".to_owned())),
            ("monitor", monitor.clone()),
            ("arguments", shown.arguments.join(" ")),
        ])
    })?;
    Ok(ExitCode::SUCCESS)
}

/// What is known of a machine, and what QEMU says of it, where it answers soon.
async fn look(machine: Machine, place: &Place) -> Shown {
    let alive = machine.is_alive();
    let mut plugged = None;
    let mut state = match &machine.stage {
        _ if !alive => "ended",
        Stage::Starting => "starting",
        Stage::Here => "here",
        Stage::Incoming => "incoming",
        Stage::Leaving(_) => "leaving",
        Stage::Gone(_) => "gone",
        Stage::Left => "left",
    }
    .to_owned();
    if alive && machine.stage == Stage::Here {
        let asked = tokio::time::timeout(LOOK_LIMIT, async {
            let mut qmp = Qmp::connect(&place.look(), LOOK_LIMIT).await?;
            let state = qmp.execute("query-status", serde_json::json!({})).await?;
            let plugged = match machine.maximum {
                Some(_) => Some(resize::plugged(&mut qmp, &machine).await?.size),
                None => None,
            };
            Ok::<_, xpm_vm::qmp::QmpError>((
                state["status"].as_str().unwrap_or("unknown").to_owned(),
                plugged,
            ))
        });
        match asked.await {
            Ok(Ok((status, size))) => (state, plugged) = (status, size),
            // A QEMU that hangs is worth to be seen.
            _ => "silent".clone_into(&mut state),
        }
    }
    let cached = Cache::open(&machine.files).and_then(|cache| cache.look()).ok();
    let page = rustix::param::page_size() as u64;
    let to = match &machine.stage {
        Stage::Leaving(destination) | Stage::Gone(destination) => Some(destination.to.clone()),
        _ => None,
    };
    Shown {
        name: machine.name,
        state,
        process: machine.qemu.map(|process| process.id),
        size: machine.size,
        maximum: machine.maximum,
        plugged,
        local: machine.local,
        cached: cached.map(|cached| ByteSize(cached.pages * page)),
        to,
        files: machine.files.iter().map(|file| file.path.display().to_string()).collect(),
        cgroup: machine.cgroup.map(|path| path.display().to_string()),
        arguments: machine.arguments,
    }
}

fn print_xml(args: &XmlArgs, place: &Place) -> anyhow::Result<ExitCode> {
    let domain = xml::Domain {
        name: &args.name,
        memory: args.memory,
        local: args.local,
        overhead: args.overhead,
        place,
        backing_directory: &args.backing,
        emulator: &args.emulator,
    };
    output::print(&xml::domain(&domain))?;
    Ok(ExitCode::SUCCESS)
}

fn token(setup: &Setup) -> anyhow::Result<Option<Token>> {
    Ok(setup.token_file.as_deref().map(Token::load).transpose()?)
}
