//! Completions: of commands and options by their definition, of names by what the daemons know.
//!
//! The script that a shell loads asks this command at each completion, with the variable `COMPLETE` set (the engine of
//! clap_complete). A daemon that does not answer at once completes nothing and says nothing.

use std::ffi::OsStr;
use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use clap::CommandFactory as _;
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};
use xpm_control::settings::Settings;
use xpm_protocol::api::allocator::Client;
use xpm_protocol::api::policy::Policy;
use xpm_protocol::policy::Kind;

use crate::cli::Cli;
use crate::connect::{self, Daemon, Daemons};
use crate::output;

/// Environment variable by which a shell asks for completions.
const VARIABLE: &str = "COMPLETE";
/// Longest time that a person waits for names.
const LIMIT: Duration = Duration::from_secs(1);

/// Where a shell asks for completions: answers, and ends the process.
pub(crate) fn answer_if_asked() {
    CompleteEnv::with_factory(Cli::command).var(VARIABLE).complete();
}

/// Prints what a shell loads to complete this command.
pub(crate) fn script(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let shells = Shells::builtins();
    let found = shells.completer(&shell.to_string());
    let found = found.ok_or_else(|| anyhow::anyhow!("there are no completions for {shell}"))?;
    let mut script = Vec::new();
    found.write_registration(VARIABLE, "xpm", "xpm", "xpm", &mut script)?;
    output::print(&String::from_utf8(script)?)
}

pub(crate) fn allocations() -> ArgValueCompleter {
    names(|daemons| async move {
        let all = daemons.allocator().ok()?.allocations().await.ok()?;
        Some(all.into_iter().map(|one| (one.name.to_string(), one.size.to_string())).collect())
    })
}

pub(crate) fn appliances() -> ArgValueCompleter {
    names(|daemons| async move {
        let all = daemons.allocator().ok()?.appliances().await.ok()?;
        Some(all.into_iter().map(|one| (one.info.name.to_string(), one.info.control)).collect())
    })
}

pub(crate) fn clients() -> ArgValueCompleter {
    names(|daemons| async move {
        let all: Vec<Client> = daemons.allocator().ok()?.get("/v1/clients").await.ok()?;
        Some(all.into_iter().map(|one| (one.name.to_string(), String::new())).collect())
    })
}

pub(crate) fn devices() -> ArgValueCompleter {
    names(|daemons| async move {
        let all = daemons.blk().ok()?.devices().await.ok()?;
        Some(all.into_iter().map(|one| (one.name.to_string(), one.path)).collect())
    })
}

pub(crate) fn files() -> ArgValueCompleter {
    names(|daemons| async move {
        let all = daemons.fs().ok()?.devices().await.ok()?;
        Some(all.into_iter().map(|one| (one.name.to_string(), one.path)).collect())
    })
}

pub(crate) fn areas() -> ArgValueCompleter {
    names(|_| async move {
        let socket = std::env::var_os("XPM_SWAPD").map_or("/run/xpm/swapd.sock".into(), PathBuf::from);
        let daemon = connect::swapd(&socket).ok()?;
        let status: xpm_protocol::api::swapd::Status = daemon.get("/v1/status").await.ok()?;
        Some(status.areas.into_iter().map(|one| (one.name.to_string(), one.size.to_string())).collect())
    })
}

pub(crate) fn accounts() -> ArgValueCompleter {
    names(|daemons| documents(daemons.allocator().ok(), Some(Kind::Account)))
}

pub(crate) fn strategies() -> ArgValueCompleter {
    names(|daemons| documents(daemons.allocator().ok(), Some(Kind::Strategy)))
}

/// Documents of all kinds: the engine does not say which kind stands before.
pub(crate) fn any_document() -> ArgValueCompleter {
    names(|daemons| documents(daemons.allocator().ok(), None))
}

type Named = Vec<(String, String)>;

async fn documents(allocator: Option<Daemon>, kind: Option<Kind>) -> Option<Named> {
    let policy: Policy = allocator?.get("/v1/policy").await.ok()?;
    let all = policy.documents.into_contents();
    let wanted = all.filter(|content| kind.is_none_or(|kind| content.kind() == kind));
    Some(wanted.map(|content| (content.name().to_string(), content.kind().to_string())).collect())
}

/// Completes by what is found within the time limit.
fn names<F>(find: fn(Daemons) -> F) -> ArgValueCompleter
where
    F: Future<Output = Option<Named>> + 'static,
{
    ArgValueCompleter::new(move |typed: &OsStr| {
        let typed = typed.to_string_lossy();
        let found = found(find).unwrap_or_default();
        let fits = found.into_iter().filter(|(name, _)| name.starts_with(&*typed));
        let candidate = |(name, help): (String, String)| {
            CompletionCandidate::new(name).help((!help.is_empty()).then(|| help.into()))
        };
        fits.map(candidate).collect()
    })
}

fn found<F: Future<Output = Option<Named>>>(find: fn(Daemons) -> F) -> Option<Named> {
    let daemons = Daemons::of_settings(Settings::load().ok()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    runtime.block_on(async { tokio::time::timeout(LIMIT, find(daemons)).await.ok().flatten() })
}
