//! What every daemon's `main` does around its work.

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{error_line, log, man, shutdown};

/// Prints the manual page where that is asked for; else reads the command line, starts the log and does the work. An error of
/// it is said in one line on standard error, behind the command's name, and makes the exit status 1. Starts no thread.
pub fn main<A: Parser, E: Into<Box<dyn Error + Send + Sync>>>(
    work: impl FnOnce(A) -> Result<(), E>,
) -> ExitCode {
    if let Some(printed) = man::print_if_asked(A::command) {
        return if printed { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let arguments = A::parse();
    log::init();
    shutdown::survive_signals();
    raise_open_files();
    match work(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {}", A::command().get_name(), error_line(error.into().as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// As many descriptors as this process is allowed: each connection takes one or two, and those that only knock at a door get
/// a part of them (`server`, and the servers of `xpm-transport`).
fn raise_open_files() {
    /// Beyond it nothing is gained, and who closes all descriptors that there can be takes long.
    const ENOUGH: u64 = 1 << 20;
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.map_or(ENOUGH, |most| most.min(ENOUGH));
    if limit.current.is_some_and(|current| current < most) {
        // What cannot be raised is noticed when it is used up: further connections wait.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(most), ..limit });
    }
}
