//! `xpm-allocator`: the daemon.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Context as _;
use xpm_allocator::config::Options;

fn main() -> ExitCode {
    xpm_control::daemon::main(run)
}

fn run(options: Options) -> anyhow::Result<()> {
    let config = options.resolve()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let ended = runtime.block_on(xpm_allocator::run(config));
    // The exit does not wait for a thread that waits for etcd.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    ended
}
