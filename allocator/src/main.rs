//! `xpm-allocator`: the daemon.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use xpm_allocator::config::Options;

fn main() -> ExitCode {
    if let Some(printed) = xpm_control::man::print_if_asked(Options::command) {
        return if printed { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let options = Options::parse();
    xpm_control::log::init();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xpm-allocator: {}", format!("{error:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> anyhow::Result<()> {
    let config = options.resolve()?;
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(xpm_allocator::run(config))
}

/// Each client that listens to events has a connection: as many descriptors as this process is allowed.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    // What cannot be raised is noticed when it is used up: further connections wait.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}
