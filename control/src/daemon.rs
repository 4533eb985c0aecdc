//! The frame of every daemon's `main`: command line, log, signals, exit status.

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{error_line, log, man, shutdown};

/// Prints the manual page if that is requested. Otherwise reads the command line, starts the log and does the work.
/// An error of the work is printed on standard error in one line, after the command's name, and makes the exit status
/// 1. Starts no thread.
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

/// Raises the limit of descriptors to what this process is allowed: each connection takes one or two, and connections
/// that have not proved themselves get a part of them (`server`, and the servers of `xpm-transport`).
fn raise_open_files() {
    /// More brings nothing, and a program that closes every possible descriptor takes long with a high limit.
    const ENOUGH: u64 = 1 << 20;
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.map_or(ENOUGH, |most| most.min(ENOUGH));
    if limit.current.is_some_and(|current| current < most) {
        // If the limit cannot be raised, that shows only once it is reached: further connections wait.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(most), ..limit });
    }
}
