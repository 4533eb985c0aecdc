//! `xpm swap`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use xpm_protocol::ByteSize;

use super::alloc::positive_size;
use crate::complete::areas;

#[derive(Debug, Args)]
pub(crate) struct SwapArgs {
    /// The control socket of this host's xpm-swapd.
    #[arg(
        long,
        global = true,
        value_name = "SOCKET",
        env = "XPM_SWAPD",
        default_value = "/run/xpm/swapd.sock"
    )]
    pub(crate) swapd: PathBuf,
    #[command(subcommand)]
    pub(crate) command: SwapCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SwapCommand {
    /// Shows the areas of swap, what of them is used, the policy, and what was decided last and why.
    ///
    /// The exit status is 1 when something does not go as it should: memory that was refused, an allocation that is
    /// going to end; 2 when it is critical: memory that is lost, an xpm-blk that does not answer.
    #[command(after_help = "Example:\n  xpm swap status && echo all is well")]
    Status,
    /// Makes more swap, which stays until it is taken away by hand.
    #[command(after_help = "Example:\n  xpm swap grow 8GiB")]
    Grow {
        /// By how much, like 1GiB; rounded up to multiples of 16MiB.
        #[arg(value_parser = positive_size)]
        size: ByteSize,
    },
    /// Takes the emptiest areas away that together are no larger than SIZE.
    ///
    /// Refused where what they hold does not fit into other swap and memory. The base stays.
    #[command(after_help = "Example:\n  xpm swap shrink 8GiB")]
    Shrink {
        /// At most so much, like 1GiB.
        #[arg(value_parser = positive_size)]
        size: ByteSize,
        /// Returns when it has begun.
        #[arg(long)]
        no_wait: bool,
    },
    /// Takes areas away, one after the other, and shows how far that is.
    ///
    /// Everything that they hold is read back first; refused where that does not fit into other swap and
    /// memory. Interrupted (Ctrl-C), it is stopped, and the area goes on as swap. With --all, nothing is made again
    /// until `xpm swap resume`, or until the machine is started again.
    #[command(after_help = "\
Examples:
  xpm swap drain swap-web1-2
  xpm swap drain /dev/ublkb1
  xpm swap drain --all
  Stop what was begun:
    xpm swap drain --stop")]
    Drain(DrainAreasArgs),
    /// Has the policy followed again, after everything was drained or an area was turned off by others.
    #[command(after_help = "Example:\n  xpm swap resume")]
    Resume,
}

#[derive(Debug, Args)]
pub(crate) struct DrainAreasArgs {
    /// Areas: the names of their allocations, or their devices.
    #[arg(value_name = "AREA", add = areas(), required_unless_present_any = ["all", "stop"], conflicts_with_all = ["all", "stop"])]
    pub(crate) areas: Vec<String>,
    /// All areas of xpm-swapd.
    #[arg(long, conflicts_with = "stop")]
    pub(crate) all: bool,
    /// Stops what is being taken away; it stays.
    #[arg(long)]
    pub(crate) stop: bool,
    /// Returns when it has begun.
    #[arg(long, conflicts_with = "stop")]
    pub(crate) no_wait: bool,
}
