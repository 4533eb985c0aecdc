//! `xpm appliance`.

use clap::{Args, Subcommand};
use xpm_protocol::ByteSize;

use super::ListArgs;
use crate::complete::appliances;

#[derive(Debug, Subcommand)]
pub(crate) enum ApplianceCommand {
    /// Lists the appliances that the allocator knows.
    ///
    /// FREE may still be asked for; GRANTED belongs to allocations; RESIDENT is what of it really
    /// holds data: it falls when a client discards (fstrim, swap with --discard). `-o wide` shows more.
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Shows one appliance and the allocations that have regions on it.
    #[command(visible_alias = "describe", after_help = "Example:\n  xpm appliance show rack1-a")]
    Show {
        /// Its name or its id.
        #[arg(add = appliances())]
        name: String,
    },
    /// Empties an appliance, for maintenance: its regions move to others while they are used.
    ///
    /// It gets no new regions from now on, until `xpm appliance undrain`. Without --no-wait it returns when
    /// the appliance is empty; interrupted, it goes on all the same.
    #[command(after_help = "Examples:
  xpm appliance drain rack1-a
  Slowly, so that others notice nothing:
    xpm appliance drain rack1-a --rate 100MiB")]
    Drain(DrainArgs),
    /// Ends the emptying of an appliance: it is used for new allocations again.
    #[command(after_help = "Example:\n  xpm appliance undrain rack1-a")]
    Undrain {
        /// Its name or its id.
        #[arg(add = appliances())]
        name: String,
    },
    /// Makes the allocator forget an appliance that will not come back.
    ///
    /// Refused while it holds regions of an allocation. An appliance that still runs registers
    /// again with its next heartbeat.
    ///
    /// With --lost its memory is given up, for good: I/O that waits for it ends with an error at every client,
    /// devices and allocations are `lost on` it, and if the machine comes back, it clears its memory before it lends
    /// again. For a machine that is never coming back, since nothing else ends that wait.
    #[command(after_help = "Examples:
  It is empty:
    xpm appliance forget rack1-a
  It burned down:
    xpm appliance forget rack1-a --lost")]
    Forget(ForgetArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ForgetArgs {
    /// Its name or its id.
    #[arg(add = appliances())]
    pub(crate) name: String,
    /// Its memory is lost: gives it up. Shows who is hit, and asks.
    #[arg(long)]
    pub(crate) lost: bool,
    /// Does not ask.
    #[arg(long, requires = "lost")]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// Its name or its id.
    #[arg(add = appliances())]
    pub(crate) name: String,
    /// Copies each allocation no faster than this many bytes a second.
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    pub(crate) rate: Option<ByteSize>,
    /// Begins nothing new until it is drained again without.
    #[arg(long)]
    pub(crate) pause: bool,
    /// Returns at once.
    #[arg(long)]
    pub(crate) no_wait: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RebalanceArgs {
    /// Only says what would be moved.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Copies no faster than this many bytes a second.
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    pub(crate) rate: Option<ByteSize>,
    /// Shows how far it is.
    #[arg(long, group = "order", conflicts_with_all = ["dry_run", "rate"])]
    pub(crate) status: bool,
    /// Begins no new move until it is resumed.
    #[arg(long, group = "order", conflicts_with_all = ["dry_run", "rate"])]
    pub(crate) pause: bool,
    /// Goes on with what was paused.
    #[arg(long, group = "order", conflicts_with_all = ["dry_run", "rate"])]
    pub(crate) resume: bool,
    /// Leaves what is not moved yet where it is.
    #[arg(long, group = "order", conflicts_with_all = ["dry_run", "rate"])]
    pub(crate) abort: bool,
}

fn rate(text: &str) -> Result<ByteSize, String> {
    match text.parse::<ByteSize>() {
        Ok(rate) if rate.0 >= 64 << 10 => Ok(rate),
        Ok(_) => Err("a rate is 64KiB a second or more".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
