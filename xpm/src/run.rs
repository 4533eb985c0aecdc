//! `xpm run`: a program whose large pieces of memory are external. It takes an allocation for it, starts it with
//! libxpm-preload.so, lends the memory to whichever process of it asks first ([`landlord`]), and gives the allocation
//! back when the program has ended and no process has the memory any more.

mod landlord;
mod reach;

use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, wait};
use tokio::signal::unix::{SignalKind, signal};
use xpm_control::{host, random};
use xpm_protocol::api::allocator::{Allocation, Attach, Create, Map};
use xpm_protocol::api::run::{Account, Place, Run, VARIABLE};
use xpm_protocol::policy::{Access, Amount};
use xpm_protocol::{ByteSize, ClientId, Name};

use crate::cli::RunArgs;
use crate::connect::{Daemon, Daemons};
use crate::output;
use crate::run::landlord::{Landlord, Terms};
use crate::setup::Setup;

/// Least local memory, and least threshold.
const LOCAL_MIN: u64 = 256 << 10;
const THRESHOLD_MIN: u64 = 64 << 10;
/// The file name of the library where it is built, and its place where it is installed, relative to this command.
const LIBRARIES: [&str; 2] = ["libxpm_preload.so", "../lib/xpm/libxpm-preload.so"];
const LIBRARY: &str = "XPM_PRELOAD";
/// How often it is looked whether the program has ended.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long after the program has ended another process of it may ask for the memory, and when it is said that one
/// still has it.
const SAY_AFTER: Duration = Duration::from_secs(1);
/// Exit statuses of env(1): the program cannot be given memory, cannot be started, or is not there.
const NO_MEMORY: u8 = 125;
const CANNOT: u8 = 126;
const NOT_THERE: u8 = 127;

/// Runs the program; its exit status is this command's.
pub(crate) async fn run(args: &RunArgs, setup: &Setup, daemons: &Daemons) -> anyhow::Result<ExitCode> {
    check(args)?;
    let library = library()?;
    if !reach::may_serve_system_calls() {
        eprintln!(
            "xpm: system calls could not use external memory, for this user may not use userfaultfd for them: give the user access to \
             /dev/userfaultfd (group xpm where the package libxpm0 is installed), or set vm.unprivileged_userfaultfd to 1; in a \
             container the seccomp profile must allow it"
        );
        return Ok(ExitCode::from(NO_MEMORY));
    }
    let allocator = daemons.allocator()?;
    let name: Name = format!("run-{:08x}", random::u128()? as u32).parse()?;
    let size = ByteSize(args.size.0.next_multiple_of(16 << 20));
    let create =
        Create { account: args.account.clone(), access: Access::Mapping, ..Create::new(name.clone(), size) };
    let made: Allocation = allocator.post("/v1/allocations", &create).await.context("no external memory")?;
    made.warnings.iter().for_each(|warning| output::warn(warning));
    let ended = with_allocation(args, setup, &allocator, &name, &library).await;
    let given_back = allocator.delete(&format!("/v1/allocations/{name}")).await;
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
    setup: &Setup,
    allocator: &Daemon,
    name: &Name,
    library: &std::path::Path,
) -> anyhow::Result<ExitCode> {
    let client = ClientId::from_u128(random::u128()?);
    let attach = Attach {
        client,
        host: host::host_id()?,
        host_name: host::host_name()?,
        purpose: "xpm run".to_owned(),
        force: false,
        lose: false,
        blocks: None,
    };
    let map: Map = allocator
        .put(&format!("/v1/allocations/{name}/owner?life={}", host::life_of_kernel()?), &attach)
        .await?;
    let token_file = setup.token_file.as_deref().map(std::path::absolute).transpose()?;
    let run = Run {
        map,
        client,
        allocator: setup.allocator.clone(),
        token_file,
        local: args.local,
        threshold: args.threshold,
        threads: args.threads.into(),
        verbose: args.verbose,
        transport: args.transport,
    };
    let landlord = Landlord::start(Terms { allocator: allocator.clone(), attach, run })?;
    let ended = start_and_wait(&args.program[0], &args.program[1..], &landlord, library).await;
    let accounts = landlord.end().await;
    let ended = ended?;
    if matches!(ended, Ended::By(_)) {
        say(args, &accounts);
    }
    Ok(match ended {
        Ended::By(status) => code_of(status),
        Ended::NotStarted(code) => ExitCode::from(code),
    })
}

/// The end of the program.
enum Ended {
    By(ExitStatus),
    /// The exit status that says so.
    NotStarted(u8),
}

/// Starts the program, and waits for it and for the process that has the memory.
async fn start_and_wait(
    program: &OsStr,
    arguments: &[std::ffi::OsString],
    landlord: &Landlord,
    library: &std::path::Path,
) -> anyhow::Result<Ended> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env(VARIABLE, Place::to_text(landlord.place()))
        .env("LD_PRELOAD", preloads(library));
    // Processes that it leaves behind are this one's: whether there are any is known then.
    let _ = set_child_subreaper(Some(getpid()));
    // Before there is a program that could end of them.
    let mut signals = Signals::new()?;
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("xpm: cannot start {}: {error}", program.display());
            let there = error.kind() != std::io::ErrorKind::NotFound;
            return Ok(Ended::NotStarted(if there { CANNOT } else { NOT_THERE }));
        }
    };
    let ended = signals.wait(&mut child).await?;
    signals.wait_for_holder(landlord).await;
    Ok(Ended::By(ended))
}

/// Says what was external.
fn say(args: &RunArgs, accounts: &[(i32, Account)]) {
    let used = accounts.iter().filter(|(_, account)| account.external > 0);
    if used.clone().next().is_none() {
        output::warn(&format!(
            "nothing was external: no process asked for a private piece of {} or more and could have it (a program that is linked \
             statically or setuid, or that unset LD_PRELOAD, cannot; see docs/mapping.md)",
            args.threshold
        ));
    }
    for (id, account) in used.filter(|_| args.verbose) {
        eprintln!(
            "xpm run: {} ({id}): {}",
            output::one_line(&account.program),
            output::one_line(&account.line)
        );
    }
}

/// Libraries that are preloaded already come behind.
fn preloads(library: &std::path::Path) -> std::ffi::OsString {
    let mut all = library.as_os_str().to_owned();
    if let Some(others) = std::env::var_os("LD_PRELOAD") {
        all.push(":");
        all.push(others);
    }
    all
}

/// Signals that are for the program. Signals of a terminal reach it anyway, and must not end this command before it.
pub(crate) struct Signals {
    term: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
    _of_terminal: [tokio::signal::unix::Signal; 2],
}

impl Signals {
    pub(crate) fn new() -> anyhow::Result<Signals> {
        let listen = |kind| signal(kind).context("cannot listen to signals");
        Ok(Signals {
            term: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
            _of_terminal: [listen(SignalKind::interrupt())?, listen(SignalKind::quit())?],
        })
    }

    /// A program can leave a process behind that goes on with its memory, or asks for it soon, as daemons do.
    async fn wait_for_holder(&mut self, landlord: &Landlord) {
        let since = std::time::Instant::now();
        let mut said = false;
        loop {
            let Some(id) = landlord.holder().await else {
                if said || since.elapsed() >= SAY_AFTER || !has_descendants() {
                    return;
                }
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            };
            if !said && since.elapsed() >= SAY_AFTER {
                said = true;
                eprintln!(
                    "xpm run: the program has ended; waiting for process {id}, which has its external memory"
                );
            }
            let passed_on = tokio::select! {
                _ = self.term.recv() => Signal::TERM,
                _ = self.hang_up.recv() => Signal::HUP,
                () = landlord.changed() => continue,
            };
            landlord.signal(passed_on).await;
        }
    }

    /// Waits until this command is told to end.
    pub(crate) async fn told_to_end(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.hang_up.recv() => {}
        }
    }

    /// Waits until the program has ended, and passes on to it what this command is told.
    pub(crate) async fn wait(&mut self, child: &mut Child) -> anyhow::Result<ExitStatus> {
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

/// Whether a process is left that descends from the program.
fn has_descendants() -> bool {
    loop {
        match wait(WaitOptions::NOHANG) {
            // It has ended.
            Ok(Some(_)) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// As a shell has it: 128 and the signal, where there was one.
pub(crate) fn code_of(status: ExitStatus) -> ExitCode {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(code as u8)
}
