//! What every daemon's `main` does around its work.

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;

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
    match work(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {}", A::command().get_name(), error_line(error.into().as_ref()));
            ExitCode::FAILURE
        }
    }
}
