//! `xpm fs`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use xpm_protocol::api::blk::{Hold, TransportKind};
use xpm_protocol::{ByteSize, Name, Span};

use super::{GiveUpArgs, ListArgs};
use crate::complete::{allocations, files};

#[derive(Debug, Subcommand)]
pub(crate) enum FsCommand {
    /// Shows an allocation as a file of this host, and prints the file's path.
    ///
    /// The kernel caches the file's pages in the memory of whoever touches them first, so a memory cgroup limits how
    /// much of it is local. The file has the size of the allocation, keeps it, and can be mapped, read and written;
    /// `fallocate --punch-hole` gives memory back. Needs Linux 6.9 or later.
    #[command(after_help = "\
Examples:
  Memory that a program maps, of which 1 GiB is local:
    file=$(xpm fs attach data)
    systemd-run --scope -p MemoryMax=1G python3 -c \"import numpy; a = numpy.memmap('$file')\"
  The RAM of a virtual machine:
    xpm fs attach vm1 --at /run/xpm/vm1
    qemu-system-x86_64 -m 4G -machine memory-backend=ram \\
      -object memory-backend-file,id=ram,size=4G,mem-path=/run/xpm/vm1,share=on ...")]
    Attach(FsAttachArgs),
    /// Mounts a tree: a directory in which each file that holds data has an allocation of its own.
    ///
    /// Creating and writing a file takes memory of the appliances, ftruncate(2) sizes it, and removing the file gives
    /// it back. The tree and its files stay when it is unmounted. Needs Linux 6.9 or later.
    #[command(after_help = "\
Examples:
  xpm fs mount /srv/far
  cp big.db /srv/far/ && df -h /srv/far
  xpm fs unmount /srv/far          # the files stay
  xpm fs mount /srv/far            # and are there again")]
    Mount(FsMountArgs),
    /// Unmounts a tree. Its files and their data stay.
    ///
    /// Refused while a program uses it, unless forced: then all I/O on it fails.
    #[command(visible_alias = "umount", after_help = "Example:\n  xpm fs unmount /srv/far")]
    Unmount {
        /// The directory, or the name of the tree.
        #[arg(value_name = "DIR|NAME", value_hint = clap::ValueHint::DirPath)]
        tree: PathBuf,
        /// Unmounts it even while it is used.
        #[arg(long)]
        force: bool,
    },
    /// Lists the files and trees of this host. `-o wide` shows more.
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Shows one file: its state, its users, and the way to each appliance.
    #[command(visible_alias = "describe", after_help = "Example:\n  xpm fs show data")]
    Show {
        /// The name of the allocation that it shows.
        #[arg(add = files())]
        name: Name,
    },
    /// Shows how much of a file this machine's kernel caches, and how much of that changed.
    ///
    /// Looking at it opens the file for a moment, and the kernel writes changed pages back when any program closes it.
    #[command(after_help = "Example:\n  xpm fs cache data --drop")]
    Cache {
        /// The name of the allocation that it shows.
        #[arg(add = files())]
        name: Name,
        /// First writes changed pages back and drops all pages that nobody uses at that moment.
        #[arg(long)]
        drop: bool,
    },
    /// Ends all I/O on a file with an error, for good, where its users hang the machine.
    ///
    /// Changed pages that were not written back are lost. `xpm fs detach` removes the file afterwards.
    #[command(after_help = "Example:\n  xpm fs abort data && xpm fs detach data")]
    Abort {
        /// The name of the allocation that it shows.
        #[arg(add = files())]
        name: Name,
    },
    /// Gives up the memory of an appliance that never comes back, for the files of this host; see `xpm blk give-up`.
    #[command(after_help = "Example:\n  xpm fs give-up rack1-a")]
    GiveUp(GiveUpArgs),
    /// Removes a file. The allocation and its data stay.
    ///
    /// Refused while a program has it open or mapped, unless forced: then all I/O to it fails.
    #[command(after_help = "Example:\n  xpm fs detach data")]
    Detach {
        /// The name of the allocation that it shows.
        #[arg(add = files())]
        name: Name,
        /// Removes it even while it is used.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct FsAttachArgs {
    /// The name of the allocation.
    #[arg(add = allocations())]
    pub(crate) name: Name,
    /// The file's path. [default: /run/xpm/fs/NAME]
    #[arg(long, value_name = "PATH")]
    pub(crate) at: Option<PathBuf>,
    /// Threads that serve it, 1 to 64. [default: one for each core, at most 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) queues: Option<u16>,
    /// Requests in flight on one thread, 1 to 1024. [default: 32]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) depth: Option<u16>,
    /// Way to the appliances: shm, rdma, nbd-unix or nbd-tcp. [default: the best for each]
    #[arg(long, value_name = "KIND")]
    pub(crate) transport: Option<TransportKind>,
    /// How long I/O waits for an appliance that cannot be reached: `forever` or like 5m. [default: the setting of
    /// xpm-fs]
    #[arg(long, value_name = "LIMIT")]
    pub(crate) hold: Option<Hold>,
    /// The kernel reads this much ahead of a program that reads the file in order, such as 128KiB; up to 16MiB. Not for
    /// RAM of virtual machines, whose accesses have no order. [default: 0B]
    #[arg(long, value_name = "SIZE")]
    pub(crate) read_ahead: Option<ByteSize>,
    /// Takes the allocation from another owner, whose I/O fails from then on.
    #[arg(long)]
    pub(crate) force: bool,
    /// With --force: takes zeros in place of memory that was shared with a process of the appliance's host and cannot
    /// be moved away from it. Without this the allocation stays with its owner.
    #[arg(long, requires = "force")]
    pub(crate) lose: bool,
    /// Stands by to take the allocation over from the client that uses it: the file is there, and its I/O waits until
    /// `xpm alloc handover` makes this client the owner.
    #[arg(long, conflicts_with_all = ["lose", "ensure"])]
    pub(crate) standby: bool,
    /// Succeeds as well when it is shown at this path already, and waits while it is being shown. For services.
    #[arg(long)]
    pub(crate) ensure: bool,
    /// With --ensure: how long it is tried again while xpm-fs, the allocator or an appliance cannot be reached.
    /// [default: 0s]
    #[arg(long, value_name = "TIME", requires = "ensure")]
    pub(crate) wait: Option<Span>,
}

#[derive(Debug, Args)]
pub(crate) struct FsMountArgs {
    /// The directory, empty or not there yet.
    #[arg(value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub(crate) directory: PathBuf,
    /// The name of the tree, up to 40 characters; allocations of its files are called NAME.NUMBER. [default: the
    /// directory's]
    #[arg(long)]
    pub(crate) name: Option<Name>,
    /// Who the memory of its files is charged to. [default: the client's account]
    #[arg(long, value_name = "NAME")]
    pub(crate) account: Option<Name>,
    /// Threads that serve it, 1 to 64. [default: one for each core, at most 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) queues: Option<u16>,
    /// Way to the appliances: shm, rdma, nbd-unix or nbd-tcp. [default: the best for each]
    #[arg(long, value_name = "KIND")]
    pub(crate) transport: Option<TransportKind>,
    /// How long I/O waits for an appliance that cannot be reached: `forever` or like 5m. [default: the setting of
    /// xpm-fs]
    #[arg(long, value_name = "LIMIT")]
    pub(crate) hold: Option<Hold>,
    /// The kernel reads this much ahead of a program that reads a file in order, such as 128KiB; up to 16MiB. Not for
    /// RAM of virtual machines, whose accesses have no order. [default: 0B]
    #[arg(long, value_name = "SIZE")]
    pub(crate) read_ahead: Option<ByteSize>,
}
