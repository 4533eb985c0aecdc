//! `xpm-allocator`: the daemon.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Context as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use xpm_allocator::config::Options;

fn main() -> ExitCode {
    xpm_control::daemon::main(run)
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
