//! `xpm client`.

use clap::Subcommand;
use xpm_protocol::Name;

use super::ListArgs;

#[derive(Debug, Subcommand)]
pub(crate) enum ClientCommand {
    /// Lists the clients that told the allocator about themselves.
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Tells the allocator what this host is as a client: the speed of its link and the round-trip
    /// times to the appliances.
    ///
    /// The times are those of TCP connections to the appliances, the shortest of three. They count
    /// where a strategy asks for a round-trip time, and as nearness. The allocator forgets them when it
    /// restarts; run this from a timer on hosts that need them.
    #[command(after_help = "Example:\n  xpm client report")]
    Report {
        /// The client's name. [default: this host's name]
        #[arg(long)]
        name: Option<Name>,
    },
}
