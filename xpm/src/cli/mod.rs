//! What can be typed: commands, options, their help.

mod alloc;
mod appliance;
mod blk;
mod client;
mod events;
mod fs;
mod list;
mod policy;
mod run;
mod swap;
mod vm;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use xpm_control::settings::{ALLOCATOR_VARIABLE, OutputForm, TOKEN_VARIABLE};
use xpm_protocol::Span;

pub(crate) use alloc::{AllocCommand, CreateArgs, HandoverArgs};
pub(crate) use appliance::{ApplianceCommand, DrainArgs, ForgetArgs, RebalanceArgs};
pub(crate) use blk::{AttachArgs, BlkCommand, GiveUpArgs};
pub(crate) use client::ClientCommand;
pub(crate) use events::EventsArgs;
pub(crate) use fs::{FsAttachArgs, FsCommand, FsMountArgs};
pub(crate) use list::ListArgs;
pub(crate) use policy::{ApplyArgs, DeleteArgs, EditArgs, GetArgs};
pub(crate) use run::RunArgs;
pub(crate) use swap::{DrainAreasArgs, SwapArgs, SwapCommand};
pub(crate) use vm::{
    ExecArgs, FetchArgs, MigrateArgs, QemuArgs, ReceiveArgs, SettleArgs, VmArgs, VmCommand, XmlArgs,
};

const EXAMPLES: &str = "\
Examples:
  See the whole system on one screen:
    xpm status
  Find out what this machine can do, and what is missing:
    xpm doctor
  Take 16 GiB from the pool, striped over four appliances, and use it as swap:
    xpm alloc create swap0 --size 16GiB --stripe 4
    dev=$(xpm blk attach swap0 --as ublk)
    mkswap $dev && swapon --discard $dev
  Give it back:
    swapoff $dev && xpm blk detach swap0 && xpm alloc delete swap0

Settings: /etc/xpm/xpm.toml, and ~/.config/xpm/xpm.toml, which wins; keys `allocator`, `token-file` and `output`.

Exit status: 0 on success, 1 on failure with one line on standard error, 2 for wrong usage. `status`, `doctor`,
`fsck` and `swap status` have their own: see their help.";

/// Lends and borrows memory between machines.
///
/// Memory of other machines (appliances) becomes block devices of this one, for swap and file
/// systems. This command asks the allocator for memory and this host's xpm-blk for devices.
#[derive(Debug, Parser)]
#[command(name = "xpm", version, after_long_help = EXAMPLES, subcommand_required = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command takes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Options of every command")]
pub(crate) struct Global {
    /// Prints answers and errors in this form. [default: text, or `output` in the settings]
    #[arg(long, short, global = true, value_name = "FORM")]
    pub(crate) output: Option<OutputForm>,
    /// Prints the daemons' own messages, as version 0.1 did; `-o json` has units in its keys, and times as text.
    #[arg(long, global = true, hide = true, conflicts_with = "output")]
    pub(crate) json: bool,
    /// The allocator's URL; of several allocators, all with commas in between. [default: `allocator` in the settings, or
    /// http://127.0.0.1:7700]
    #[arg(long, global = true, value_name = "URL[,URL...]", env = ALLOCATOR_VARIABLE)]
    pub(crate) allocator: Option<String>,
    /// The control socket of this host's xpm-blk.
    #[arg(long, global = true, value_name = "SOCKET", env = "XPM_BLK", default_value = "/run/xpm/blk.sock")]
    pub(crate) blk: PathBuf,
    /// The control socket of this host's xpm-fs.
    #[arg(long, global = true, value_name = "SOCKET", env = "XPM_FS", default_value = "/run/xpm/fs.sock")]
    pub(crate) fs: PathBuf,
    /// A file of mode 0600 with the token that the allocator asks for. [default: `token-file` in the settings]
    #[arg(long, global = true, value_name = "FILE", env = TOKEN_VARIABLE)]
    pub(crate) token_file: Option<PathBuf>,
    /// How long an allocator that refuses connections is asked again: it may be starting. `status` never waits.
    #[arg(long, global = true, value_name = "DURATION", env = "XPM_PATIENCE", default_value = "10s")]
    pub(crate) patience: Span,
}

/// Options of `xpm status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Goes on looking, each time after so long, until it is interrupted.
    #[arg(long, short, value_name = "DURATION", num_args = 0..=1, require_equals = true, default_missing_value = "2s")]
    pub(crate) watch: Option<Span>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Shows and forgets the machines that lend memory.
    #[command(subcommand)]
    Appliance(ApplianceCommand),
    /// Makes, shows and deletes allocations of external memory.
    #[command(subcommand)]
    Alloc(AllocCommand),
    /// Applies documents: strategies, accounts, profiles of clients and appliances.
    ///
    /// All documents of all files are checked before anything changes, and then all are applied or
    /// none. docs/strategies.md has every key; `xpm schema` prints their JSON Schema.
    #[command(after_help = "\
Examples:
  See what would change, then change it:
    xpm apply --dry-run pool.toml
    xpm apply pool.toml
  Copy one document to another allocator:
    xpm get strategy default | xpm --allocator http://10.0.0.9:7700 apply -")]
    Apply(ApplyArgs),
    /// Prints documents as a file that can be applied again.
    #[command(after_help = "Examples:\n  xpm get accounts\n  xpm get strategy default > default.toml")]
    Get(GetArgs),
    /// Opens a document in an editor ($VISUAL, $EDITOR or vi) and applies what comes out of it.
    #[command(after_help = "Example:\n  xpm edit account batch")]
    Edit(EditArgs),
    /// Deletes a document. Refused while another document names it or allocations count for it.
    #[command(visible_alias = "rm", after_help = "Example:\n  xpm delete strategy old")]
    Delete(DeleteArgs),
    /// Prints the JSON Schema of documents, for editors and checkers.
    Schema,
    /// Shows what accounts, clients and strategies have, and their limits.
    Usage(ListArgs),
    /// Prints what happened: leases that end, allocations that give way, requests that are served.
    #[command(after_help = "Examples:
  xpm events --follow
  xpm events --object swap0
  xpm events --kind lost,appliance-silent")]
    Events(EventsArgs),
    /// Moves regions from full appliances to empty ones, while they are used.
    ///
    /// The plan is made once. Of what is on its way each region is moved wholly or not at all.
    #[command(after_help = "Examples:
  xpm rebalance --dry-run
  xpm rebalance --rate 100MiB
  xpm rebalance --status")]
    Rebalance(RebalanceArgs),
    /// Writes what the allocator remembers, but for its decisions, into a new file.
    ///
    /// The file has mode 0600, for it holds the keys of all grants. `xpm-allocator restore` reads it.
    #[command(after_help = "Example:\n  xpm backup /var/backups/xpm-$(date +%F).json")]
    Backup {
        /// The file; it must not be there yet.
        file: PathBuf,
    },
    /// Checks that what the allocator has recorded and what the appliances have agree.
    ///
    /// Nothing is stopped or changed. The exit status is 2 when memory is lost, in two allocations, or in another ownership than
    /// recorded; 1 when memory is known to no record, or an appliance could not be asked; else 0.
    #[command(after_help = "Example:\n  xpm fsck")]
    Fsck,
    /// Runs a program whose large pieces of memory are external.
    ///
    /// What PROGRAM asks for in pieces of at least the threshold, by malloc or mmap, is in external memory, of which as much
    /// is local as was last used. Programs that it starts get none of it, but for those that a shell, env, nice, timeout and the like
    /// start: of these the first. PROGRAM must be linked dynamically. The exit status is the
    /// program's; 125 when it gets no external memory, 126 and 127 when it cannot be started.
    #[command(after_help = "\
Examples:
  Sort a file of 30 GB with 4 GiB of local memory:
    xpm run --size 64GiB --local 4GiB -- sort -S 40G big.txt -o sorted.txt
  The same with a quarter of the memory that is free, as long as nobody else needs it:
    xpm run --size 64GiB --local 25% -- sort -S 40G big.txt -o sorted.txt
  See how much was external:
    xpm run -v --size 8GiB --local 1GiB -- python3 analysis.py")]
    Run(RunArgs),
    /// Starts, moves and resizes virtual machines whose RAM is external.
    Vm(VmArgs),
    /// Shows clients, and tells the allocator about this one.
    #[command(subcommand)]
    Client(ClientCommand),
    /// Shows allocations as block devices of this host.
    #[command(subcommand)]
    Blk(BlkCommand),
    /// Shows allocations as files of this host: memory that programs map, and the RAM of virtual machines.
    #[command(subcommand)]
    Fs(FsCommand),
    /// Shows and changes the swap that xpm-swapd looks after on this host.
    Swap(SwapArgs),
    /// Shows the whole system on one screen, anything wrong first.
    ///
    /// Each problem has a severity and a code that docs/health.md explains. The exit status is 0 when nothing is worse than
    /// `info`, 1 when the worst is a `warning`, 2 when something is `critical`, such as an allocator that does not answer. A host
    /// without xpm-blk is fine: it just has no devices.
    #[command(after_help = "\
Examples:
  xpm status --watch
  For monitoring:
    xpm status -o json | jq -r '.problems[] | [.severity, .code, .object] | @tsv'")]
    Status(StatusArgs),
    /// Checks what this machine is fit for and whether its devices are safe.
    ///
    /// Each line is `ok`, `info` (cannot be done on this machine as it is), `warning` or `critical` (a device that is in use is
    /// unsafe), with a code that docs/health.md explains and the command that mends it. The exit status is 2 when something is
    /// critical, else 0.
    Doctor,
    /// Prints the completions of a shell.
    #[command(after_help = "Example:\n  xpm completions bash > /usr/share/bash-completion/completions/xpm")]
    Completions {
        /// The shell to complete for.
        shell: clap_complete::Shell,
    },
    /// Writes the manual pages of all commands into a directory.
    #[command(after_help = "Example:\n  xpm man /usr/local/share/man/man1")]
    Man {
        /// The directory; it is made when it is not there.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_and_option_has_help_in_sentences() {
        fn walk(command: &clap::Command) {
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            assert!(!about.is_empty(), "`{}` has no help", command.get_name());
            for arg in command.get_arguments() {
                let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
                assert!(!help.is_empty(), "`{}` of `{}` has no help", arg.get_id(), command.get_name());
            }
            command.get_subcommands().for_each(walk);
        }
        walk(&Cli::command());
    }
}
