//! The program `xpm-appliance`.

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use xpm_appliance::config::Cli;
use xpm_appliance::daemon;

fn main() -> ExitCode {
    if let Some(printed) = xpm_control::man::print_if_asked(Cli::command) {
        return if printed { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let cli = Cli::parse();
    xpm_control::log::init();
    match cli.settle().and_then(daemon::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xpm-appliance: {}", xpm_control::error_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
