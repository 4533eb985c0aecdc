//! `xpm alloc`.

use clap::{Args, Subcommand};
use xpm_protocol::policy::{Access, Label};
use xpm_protocol::{BlockSize, ByteSize, Name, Span};

use super::ListArgs;
use crate::complete::{accounts, allocations, clients, strategies};

#[derive(Debug, Subcommand)]
pub(crate) enum AllocCommand {
    /// Makes an allocation: takes memory of appliances under a name.
    #[command(after_help = "\
Examples:
  1 GiB on the best appliance that holds all of it:
    xpm alloc create scratch --size 1GiB
  16 GiB striped over four appliances, for bandwidth:
    xpm alloc create swap0 --size 16GiB --stripe 4
  Find out where it would lie, and why:
    xpm alloc create swap0 --size 16GiB --account batch --dry-run --explain
  Wait for up to ten minutes until there is room:
    xpm alloc create big --size 1TiB --account batch --wait 10m")]
    Create(CreateArgs),
    /// Lists all allocations, with what state they are in and why.
    ///
    /// `-o wide` shows more: layout, appliances, owner, epoch.
    #[command(
        visible_alias = "ls",
        after_help = "\
Examples:
  xpm alloc list --sort-by=-size
  xpm alloc list -o wide
  The names alone, for a script:
    xpm alloc list -o json | jq -r '.[].name'"
    )]
    List(ListArgs),
    /// Shows one allocation: its layout, owner, epoch and regions by appliance.
    #[command(visible_alias = "describe", after_help = "Example:\n  xpm alloc show swap0")]
    Show {
        /// Its name.
        #[arg(add = allocations())]
        name: Name,
    },
    /// Says why an allocation lies where it lies, or why it was refused.
    ///
    /// Decisions are kept for a long time (xpm-allocator --keep-decisions), also when the allocation is
    /// gone.
    #[command(after_help = "Example:\n  xpm alloc explain swap0")]
    Explain {
        /// Its name.
        #[arg(add = allocations())]
        name: Name,
        /// All decisions about the name, not only the newest.
        #[arg(long)]
        all: bool,
    },
    /// Renews the lease of an allocation.
    #[command(after_help = "Example:\n  xpm alloc renew swap0 --for 2h")]
    Renew {
        /// Its name.
        #[arg(add = allocations())]
        name: Name,
        /// For this long from now. [default: as long as its lease was]
        #[arg(long = "for", value_name = "DURATION")]
        duration: Option<Span>,
    },
    /// Makes an allocation larger or smaller, in use or not.
    ///
    /// It grows by regions where its strategy puts them. It becomes smaller only when nothing is stored beyond
    /// the new size: trim that first. A device follows: the kernel's nbd at once, NBD clients when they
    /// connect again; a ublk device shows its new size when it is attached again.
    #[command(after_help = "Examples:\n  xpm alloc resize data 64GiB\n  xpm alloc resize data 16GiB")]
    Resize {
        /// Its name.
        #[arg(add = allocations())]
        name: Name,
        /// Its new size, like 64MiB, 1.5GiB or 2T; rounded up to whole pages.
        #[arg(value_parser = positive_size)]
        size: ByteSize,
        /// Returns when the change has begun.
        #[arg(long)]
        no_wait: bool,
    },
    /// Hands an allocation over to another client; its data stays where it is.
    ///
    /// The present owner is asked to write back and let go. One that is in use stays, and one that does not
    /// answer is not cut off, unless forced: then whatever it still writes lands nowhere.
    #[command(after_help = "Examples:
  xpm alloc transfer data --to host2
  The owner is dead:
    xpm alloc transfer data --to host2 --force")]
    Transfer {
        /// Its name.
        #[arg(add = allocations())]
        name: Name,
        /// The new owner: the name or the id of a client (`xpm client list`).
        #[arg(long, value_name = "CLIENT", add = clients())]
        to: String,
        /// How long the present owner has to write back what it holds; at most 50s. [default: 30s]
        #[arg(long, value_name = "DURATION", conflicts_with = "force")]
        deadline: Option<Span>,
        /// Cuts the present owner off without asking it.
        #[arg(long)]
        force: bool,
        /// With --force: where memory was shared with a process of the appliance's host and cannot be moved away from
        /// it, the new owner gets zeros in its place. Without this such a transfer is refused.
        #[arg(long, requires = "force")]
        lose: bool,
    },
    /// Hands allocations in use over to a client that stands by for them, without a detach.
    ///
    /// All of them change owner at once, or none does. The owner of before waits with its I/O, which never fails,
    /// until the hand-over is committed or rolled back: committed, its devices end; rolled back, it goes on, and the
    /// other client stands by again. Nothing but these orders ends a hand-over.
    #[command(after_help = "\
Examples:
  On host2:
    xpm blk attach ram --standby --as nbd-socket=/run/xpm/ram.sock
  Anywhere:
    id=$(xpm alloc handover ram,disk --to host2)
    xpm alloc handover --commit $id
  Or, where the old owner is to go on:
    xpm alloc handover --rollback $id")]
    Handover(HandoverArgs),
    /// Gives an allocation another name. Refused while a client uses it: devices are called by the name.
    #[command(after_help = "Example:\n  xpm alloc rename scratch data")]
    Rename {
        /// Its name.
        name: Name,
        /// Its new name.
        to: Name,
    },
    /// Deletes an allocation; its memory is cleared and lent again.
    ///
    /// Refused while a client uses it, unless forced: then all I/O of that client fails. For swap
    /// that means killed programs, so run `swapoff` and `xpm blk detach` first.
    #[command(visible_alias = "rm", after_help = "Example:\n  xpm alloc delete swap0")]
    Delete {
        /// Its name.
        #[arg(add = allocations())]
        name: Name,
        /// Deletes it even while a client uses it.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct HandoverArgs {
    /// The allocations.
    #[arg(value_name = "NAME[,NAME...]", value_delimiter = ',', add = allocations(), requires = "to", required_unless_present_any = ["commit", "rollback", "list"])]
    pub(crate) names: Vec<Name>,
    /// The new owner, which stands by for all of them: a host, or the name or the id of a client (`xpm client list`).
    #[arg(long, value_name = "CLIENT", add = clients(), requires = "names")]
    pub(crate) to: Option<String>,
    /// Also where the present owner does not answer: its I/O may fail.
    #[arg(long, requires = "names")]
    pub(crate) force: bool,
    /// The new owner has them for good: ends the devices of the old one.
    #[arg(long, value_name = "ID|NAME", conflicts_with_all = ["names", "rollback", "list"])]
    pub(crate) commit: Option<Name>,
    /// The old owner gets them back, and goes on.
    #[arg(long, value_name = "ID|NAME", conflicts_with_all = ["names", "list"])]
    pub(crate) rollback: Option<Name>,
    /// Lists the hand-overs that are not over.
    #[arg(long, conflicts_with = "names")]
    pub(crate) list: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Its name: 1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot or a dash.
    pub(crate) name: Name,
    /// Its size, like 64MiB, 1.5GiB or 2T; rounded up to whole pages.
    #[arg(long, value_parser = positive_size)]
    pub(crate) size: ByteSize,
    /// Stripes over this many regions, each on an appliance of its own while there are enough.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) stripe: Option<u32>,
    /// Bytes that lie together on one region of a stripe; a power of two from 4KiB. [default: 64KiB]
    #[arg(long, value_name = "SIZE", requires = "stripe", value_parser = positive_size)]
    pub(crate) stripe_unit: Option<ByteSize>,
    /// Size of a region: a power of two from 16MiB to 64GiB. [default: the allocator's choice]
    #[arg(long, value_name = "SIZE", value_parser = region_size)]
    pub(crate) region_size: Option<ByteSize>,
    /// Logical block size of its devices in bytes, for good: 4096, or 512 for what needs such a device, as a disk
    /// that a BIOS boots from. [default: 4096]
    #[arg(long, value_name = "BYTES")]
    pub(crate) block_size: Option<BlockSize>,
    /// The account that it is charged to. [default: that of the client, if it has one]
    #[arg(long, add = accounts())]
    pub(crate) account: Option<Name>,
    /// The client that is going to use it: where that is counts for distance and link speed.
    #[arg(long, add = clients())]
    pub(crate) client: Option<Name>,
    /// The strategy. [default: that of the account, or the one named `default`]
    #[arg(long, add = strategies())]
    pub(crate) strategy: Option<Name>,
    /// A label, for rules of strategies; can be given several times.
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub(crate) labels: Vec<Label>,
    /// How it is going to be used: block, mapping or machine.
    #[arg(long, default_value = "block", value_parser = access)]
    pub(crate) access: Access,
    /// It may be reclaimed, with notice, for requests of a higher priority.
    #[arg(long)]
    pub(crate) reclaimable: bool,
    /// A lease of this length, where strategy and account allow so much.
    #[arg(long, value_name = "DURATION")]
    pub(crate) lease: Option<Span>,
    /// Waits this long for its turn where it cannot be made now.
    #[arg(long, value_name = "DURATION", conflicts_with = "dry_run")]
    pub(crate) wait: Option<Span>,
    /// Makes nothing and says what would become of it.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Says why: each rule, limit and appliance.
    #[arg(long)]
    pub(crate) explain: bool,
}

fn access(text: &str) -> Result<Access, String> {
    match text {
        "block" => Ok(Access::Block),
        "mapping" => Ok(Access::Mapping),
        "machine" => Ok(Access::Machine),
        _ => Err("it is block, mapping or machine".to_owned()),
    }
}

pub(super) fn positive_size(text: &str) -> Result<ByteSize, String> {
    match text.parse::<ByteSize>() {
        Ok(ByteSize(0)) => Err("the size cannot be 0".to_owned()),
        Ok(size) => Ok(size),
        Err(error) => Err(error.to_string()),
    }
}

fn region_size(text: &str) -> Result<ByteSize, String> {
    let size = positive_size(text)?;
    match xpm_protocol::units::is_region_len(size.0) {
        true => Ok(size),
        false => Err("a region is a power of two from 16MiB to 64GiB".to_owned()),
    }
}
