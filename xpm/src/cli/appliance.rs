//! `xpm appliance`.

use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum ApplianceCommand {
    /// Lists the appliances that the allocator knows.
    ///
    /// FREE may still be asked for; GRANTED belongs to allocations; RESIDENT is what of it really
    /// holds data: it falls when a client discards (fstrim, swap with --discard).
    List,
    /// Shows one appliance and the allocations that have regions on it.
    #[command(after_help = "Example:\n  xpm appliance show rack1-a")]
    Show {
        /// Its name or its id.
        name: String,
    },
    /// Makes the allocator forget an appliance that will not come back.
    ///
    /// Refused while it holds regions of an allocation. An appliance that still runs registers
    /// again with its next heartbeat.
    #[command(after_help = "Example:\n  xpm appliance forget rack1-a")]
    Forget {
        /// Its name or its id.
        name: String,
    },
}
