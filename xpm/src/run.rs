//! `xpm run`: a program whose large pieces of memory are external. It takes an allocation for it, starts it with
//! libxpm-preload.so, and gives the allocation back when it has ended.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};
use xpm_control::{host, random};
use xpm_protocol::api::allocator::{Allocation, Attach, Create, Map};
use xpm_protocol::api::run::{DESCRIPTOR, Run};
use xpm_protocol::policy::{Access, Amount};
use xpm_protocol::{ByteSize, ClientId, Name};

use crate::cli::{Global, RunArgs};
use crate::connect::{Daemon, Daemons};
use crate::output;

/// Least local memory, and least threshold.
const LOCAL_MIN: u64 = 256 << 10;
const THRESHOLD_MIN: u64 = 64 << 10;
/// What the library is called where it is built, and where it is installed, from where this command is.
const LIBRARIES: [&str; 2] = ["libxpm_preload.so", "../lib/xpm/libxpm-preload.so"];
const LIBRARY: &str = "XPM_PRELOAD";
/// How often it is looked whether the program has ended.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Exit statuses of env(1): the program cannot be started, or is not there.
const CANNOT: u8 = 126;
const NOT_THERE: u8 = 127;

/// Runs the program; its exit status is this command's.
pub(crate) async fn run(args: &RunArgs, global: &Global, daemons: &Daemons) -> anyhow::Result<ExitCode> {
    check(args)?;
    let library = library()?;
    let allocator = daemons.allocator()?;
    let name: Name = format!("run-{:08x}", random::u128()? as u32).parse()?;
    let size = ByteSize(args.size.0.next_multiple_of(16 << 20));
    let create =
        Create { account: args.account.clone(), access: Access::Mapping, ..Create::new(name.clone(), size) };
    let made: Allocation = allocator.post("/v1/allocations", &create).await.context("no external memory")?;
    made.warnings.iter().for_each(|warning| output::warn(warning));
    let client = ClientId::from_u128(random::u128()?);
    let ended = with_allocation(args, global, &allocator, (&name, client), &library).await;
    let given_back = give_back(&allocator, &name, client).await;
    let code = ended?;
    given_back.with_context(|| format!("allocation `{name}` is left: run `xpm alloc delete {name}`"))?;
    Ok(code)
}

fn check(args: &RunArgs) -> anyhow::Result<()> {
    match args.local {
        Amount::Bytes(local) if local.0 < LOCAL_MIN => {
            bail!("--local {local} is too small: choose at least {}", ByteSize(LOCAL_MIN));
        }
        Amount::Bytes(local) if local >= args.size => {
            bail!("--local {local} is not less than --size {}: nothing would be external", args.size);
        }
        Amount::Share(share) if share.get() == 0 => {
            bail!("--local {share} is nothing: choose 1% to 100% of the memory that is free");
        }
        Amount::Bytes(_) | Amount::Share(_) => {}
    }
    if args.threshold.0 < THRESHOLD_MIN {
        bail!("--threshold {} is too small: choose at least {}", args.threshold, ByteSize(THRESHOLD_MIN));
    }
    Ok(())
}

fn library() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os(LIBRARY) {
        return Ok(PathBuf::from(path));
    }
    let here = std::env::current_exe().context("cannot find out where this command is")?;
    let mut places = LIBRARIES.iter().map(|place| here.with_file_name(place));
    places.find(|place| place.exists()).with_context(|| {
        format!(
            "libxpm-preload.so is not beside {}, nor in ../lib/xpm: install it, or set {LIBRARY} to its path",
            here.display()
        )
    })
}

async fn with_allocation(
    args: &RunArgs,
    global: &Global,
    allocator: &Daemon,
    (name, client): (&Name, ClientId),
    library: &std::path::Path,
) -> anyhow::Result<ExitCode> {
    let attach = Attach {
        client,
        host: host::host_id()?,
        host_name: host::host_name()?,
        purpose: "xpm run".to_owned(),
        force: false,
    };
    let map: Map = allocator.put(&format!("/v1/allocations/{name}/owner"), &attach).await?;
    let token_file = global.token_file.as_deref().map(std::path::absolute).transpose()?;
    let run = Run {
        map,
        client,
        allocator: global.allocator.clone(),
        token_file,
        local: args.local,
        threshold: args.threshold,
        threads: args.threads.into(),
        verbose: args.verbose,
    };
    start_and_wait(&args.program[0], &args.program[1..], &run, library).await
}

async fn start_and_wait(
    program: &OsStr,
    arguments: &[std::ffi::OsString],
    run: &Run,
    library: &std::path::Path,
) -> anyhow::Result<ExitCode> {
    // Keys are in it: neither the environment nor the command line is for these. Inherited by the program.
    let mut file = File::from(
        memfd_create("xpm-run", MemfdFlags::ALLOW_SEALING).context("cannot make a file in memory")?,
    );
    file.write_all(&serde_json::to_vec(run)?).context("cannot hand the allocation over")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env(DESCRIPTOR, file.as_raw_fd().to_string())
        .env("LD_PRELOAD", preloads(library));
    // Before there is a program that could end of them.
    let mut signals = Signals::new()?;
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("xpm: cannot start {}: {error}", program.display());
            let there = error.kind() != std::io::ErrorKind::NotFound;
            return Ok(ExitCode::from(if there { CANNOT } else { NOT_THERE }));
        }
    };
    let ended = signals.wait(child).await?;
    // The library empties it.
    if file.metadata().is_ok_and(|record| record.len() > 0) {
        output::warn(&format!(
            "no program took the external memory: {} is linked statically or setuid, unset LD_PRELOAD, or is a shell that started none",
            program.display()
        ));
    }
    Ok(code_of(ended))
}

/// What is preloaded already comes behind.
fn preloads(library: &std::path::Path) -> std::ffi::OsString {
    let mut all = library.as_os_str().to_owned();
    if let Some(others) = std::env::var_os("LD_PRELOAD") {
        all.push(":");
        all.push(others);
    }
    all
}

/// Signals that are for the program. Those of a terminal reach it anyway, and must not end this command before it.
struct Signals {
    term: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
    _of_terminal: [tokio::signal::unix::Signal; 2],
}

impl Signals {
    fn new() -> anyhow::Result<Signals> {
        let listen = |kind| signal(kind).context("cannot listen to signals");
        Ok(Signals {
            term: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
            _of_terminal: [listen(SignalKind::interrupt())?, listen(SignalKind::quit())?],
        })
    }

    async fn wait(&mut self, mut child: Child) -> anyhow::Result<ExitStatus> {
        loop {
            if let Some(status) = child.try_wait().context("cannot wait for the program")? {
                return Ok(status);
            }
            let passed_on = tokio::select! {
                _ = self.term.recv() => Signal::TERM,
                _ = self.hang_up.recv() => Signal::HUP,
                () = tokio::time::sleep(LOOK_EVERY) => continue,
            };
            if let Some(pid) = Pid::from_raw(child.id() as i32) {
                // It is not waited for yet, so it is still that process.
                let _ = kill_process(pid, passed_on);
            }
        }
    }
}

/// As a shell has it: 128 and the signal, where there was one.
fn code_of(status: ExitStatus) -> ExitCode {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(code as u8)
}

async fn give_back(allocator: &Daemon, name: &Name, client: ClientId) -> anyhow::Result<()> {
    // It may not have come to that.
    let _ = allocator.delete(&format!("/v1/allocations/{name}/owner/{client}")).await;
    Ok(allocator.delete(&format!("/v1/allocations/{name}")).await?)
}
