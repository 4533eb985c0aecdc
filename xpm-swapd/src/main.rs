//! The daemon that manages a machine's swap on external memory.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use xpm_control::urls::Urls;
use xpm_protocol::ByteSize;
use xpm_swapd::config::{Config, PATH_DEFAULT};
use xpm_swapd::lifecycle;

/// Keeps the right amount of swap on external memory. `xpm swap status` shows what it does.
#[derive(Debug, Parser)]
#[command(name = "xpm-swapd", version)]
struct Args {
    /// Configuration file
    #[arg(long, value_name = "FILE", default_value = PATH_DEFAULT)]
    config: PathBuf,
    /// The control socket, instead of the configuration's
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// The control socket of xpm-blk, instead of the configuration's
    #[arg(long, value_name = "PATH")]
    blk: Option<PathBuf>,
    /// Base URL of the allocator, instead of the configuration's; URLs of several allocators are separated by
    /// commas
    #[arg(long, value_name = "URL[,URL...]")]
    allocator: Option<Urls>,
    /// State directory, which is kept across restarts, instead of the configuration's
    #[arg(long, value_name = "DIRECTORY")]
    state: Option<PathBuf>,
    /// File of mode 0600 with the token that the allocator requires
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Swap that exists from the start, instead of the configuration's
    #[arg(long, value_name = "SIZE")]
    base: Option<ByteSize>,
    /// Upper limit of swap, instead of the configuration's
    #[arg(long, value_name = "SIZE")]
    maximum: Option<ByteSize>,
    /// Only checks the configuration
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    xpm_control::daemon::main(run)
}

fn run(args: Args) -> anyhow::Result<()> {
    let checked = args.check;
    let config = configure(args)?;
    config.check().map_err(anyhow::Error::msg).context("configuration")?;
    if checked {
        println!("the configuration is good");
        return Ok(());
    }
    Ok(lifecycle::run(config)?)
}

fn configure(args: Args) -> anyhow::Result<Config> {
    let mut config = Config::load(&args.config)?;
    config.control = args.control.unwrap_or(config.control);
    config.blk = args.blk.unwrap_or(config.blk);
    config.allocator = args.allocator.unwrap_or(config.allocator);
    config.state = args.state.unwrap_or(config.state);
    config.token_file = args.token_file.or(config.token_file);
    config.base = args.base.unwrap_or(config.base);
    config.maximum = args.maximum.unwrap_or(config.maximum);
    Ok(config)
}
