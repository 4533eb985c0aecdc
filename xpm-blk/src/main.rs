//! The daemon that shows allocations of external memory as block devices.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use xpm_blk::config::{Config, PATH_DEFAULT};
use xpm_blk::lifecycle;
use xpm_control::urls::Urls;

/// Shows allocations of external memory as block devices: ublk, the kernel's nbd, NBD sockets, or
/// vhost-user-blk disks of virtual machines. `xpm blk attach` tells it what to show.
#[derive(Debug, Parser)]
#[command(name = "xpm-blk", version)]
struct Args {
    /// Configuration file [default: /etc/xpm/blk.toml, if there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The control socket, in place of the configuration's
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Base URL of the allocator, in place of the configuration's; of several, all with commas in
    /// between
    #[arg(long, value_name = "URL[,URL...]")]
    allocator: Option<Urls>,
    /// Directory of what is kept across restarts, in place of the configuration's
    #[arg(long, value_name = "DIRECTORY")]
    state: Option<PathBuf>,
    /// File of mode 0600 with the token that the allocator wants
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Shows devices that can carry swap although this process is not safe for it
    #[arg(long)]
    allow_unsafe_swap: bool,
    /// Only checks the configuration
    #[arg(long)]
    check: bool,
    /// Goes on when the process at standard input dies; for xpm-blk itself
    #[arg(long, hide = true)]
    stand_by: bool,
}

fn main() -> ExitCode {
    xpm_control::daemon::main(run)
}

fn run(args: Args) -> anyhow::Result<()> {
    let (checked, stands_by) = (args.check, args.stand_by);
    let config = configure(args)?;
    config.check().map_err(anyhow::Error::msg).context("configuration")?;
    if checked {
        println!("the configuration is good");
        return Ok(());
    }
    Ok(lifecycle::run(&config, stands_by)?)
}

fn configure(args: Args) -> anyhow::Result<Config> {
    let mut config = match &args.config {
        Some(path) => Config::load(path)?,
        None => Config::load_default().with_context(|| format!("read {PATH_DEFAULT}"))?,
    };
    config.control = args.control.unwrap_or(config.control);
    config.allocator = args.allocator.unwrap_or(config.allocator);
    config.state = args.state.unwrap_or(config.state);
    config.token_file = args.token_file.or(config.token_file);
    config.allow_unsafe_swap |= args.allow_unsafe_swap;
    Ok(config)
}
