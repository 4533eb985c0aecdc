//! From the command line of either daemon to its running process.

use std::path::PathBuf;

use anyhow::Context as _;
use xpm_control::urls::Urls;

use crate::config::Config;
use crate::lifecycle;
use crate::program::Program;

/// The command line of either daemon.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Configuration file [default: the one in /etc/xpm, if there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The control socket, instead of the configuration's
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
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
    /// Shows devices that can carry swap, or that memory is reclaimed to, although this process is not safe
    /// for it
    #[arg(long)]
    allow_unsafe_swap: bool,
    /// Only checks the configuration
    #[arg(long)]
    check: bool,
    /// Takes over when the process at standard input dies; for the daemon itself
    #[arg(long, hide = true)]
    stand_by: bool,
}

/// Runs a daemon until it is told to end. Must be called while the process has one thread.
///
/// # Errors
/// Why it cannot start, or is not needed.
pub fn run(program: Program, options: Options) -> anyhow::Result<()> {
    let (checked, stands_by) = (options.check, options.stand_by);
    let config = configure(program, options)?;
    config.check().map_err(anyhow::Error::msg).context("configuration")?;
    if checked {
        println!("the configuration is good");
        return Ok(());
    }
    Ok(lifecycle::run(&config, stands_by)?)
}

fn configure(program: Program, options: Options) -> anyhow::Result<Config> {
    let mut config = match &options.config {
        Some(path) => Config::load(program, path)?,
        None => Config::load_default(program).with_context(|| format!("read {}", program.config_path()))?,
    };
    config.control = options.control.or(config.control);
    config.allocator = options.allocator.unwrap_or(config.allocator);
    config.state = options.state.or(config.state);
    config.token_file = options.token_file.or(config.token_file);
    config.allow_unsafe_swap |= options.allow_unsafe_swap;
    Ok(config)
}
