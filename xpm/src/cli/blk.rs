//! `xpm blk`.

use clap::{Args, Subcommand};
use xpm_protocol::api::blk::{Form, Hold, TransportKind};
use xpm_protocol::{BlockSize, Name, Span};

use super::ListArgs;
use crate::complete::{allocations, devices};

#[derive(Debug, Subcommand)]
pub(crate) enum BlkCommand {
    /// Shows an allocation as a device of this host, and prints the device's path.
    ///
    /// Forms: `ublk` is the fastest kernel device (Linux 6.5 or later); `nbd` uses the kernel's nbd
    /// driver; `nbd-direct` lets the kernel talk to the appliance itself, for an allocation
    /// that lies on one appliance and is not striped; `nbd-socket=PATH` or `nbd-socket=ADDRESS:PORT`
    /// is an NBD server for any NBD client and needs no kernel support; `vhost-user=PATH` is a vhost-user-blk
    /// back-end for a virtual machine of QEMU.
    #[command(after_help = "\
Examples:
  Swap:
    dev=$(xpm blk attach swap0 --as ublk)
    mkswap $dev && swapon --discard $dev
  A file system that gives deleted files' memory back:
    dev=$(xpm blk attach data --as nbd)
    mkfs.ext4 $dev && mount -o discard $dev /mnt
  For any NBD client:
    xpm blk attach data --as nbd-socket=/run/xpm/data.sock
  The disk of a virtual machine, whose memory has to be shared:
    xpm blk attach data --as vhost-user=/run/xpm/vm.sock
    qemu-system-x86_64 -m 4G -object memory-backend-memfd,id=ram,size=4G,share=on \\
      -machine memory-backend=ram -chardev socket,id=disk,path=/run/xpm/vm.sock,reconnect=1 \\
      -device vhost-user-blk-pci,chardev=disk ...")]
    Attach(AttachArgs),
    /// Lists the devices of this host. `-o wide` shows more.
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Shows one device: its state, who uses it, and the way to each appliance.
    #[command(visible_alias = "describe", after_help = "Example:\n  xpm blk show swap0")]
    Show {
        /// The name of the allocation that it shows.
        #[arg(add = devices())]
        name: Name,
    },
    /// Gives up the memory of an appliance that never comes back, for the devices of this host.
    ///
    /// I/O that waits for it ends with an error, for good. It is for when the allocator cannot be reached: else
    /// `xpm appliance forget NAME --lost` does it for all clients. Shows which devices are hit, and asks.
    #[command(after_help = "Example:\n  xpm blk give-up rack1-a")]
    GiveUp(GiveUpArgs),
    /// Fails while hibernation would stop this machine for good: while there is swap on a device that a process or the
    /// network serves, both of which the kernel freezes before it writes to swap. The service manager asks it before it
    /// hibernates.
    CheckHibernation,
    /// Removes a device. The allocation and its data stay.
    ///
    /// Refused while the device is swap, mounted or held, unless forced: then all I/O to it fails.
    /// Run `swapoff` or `umount` first.
    #[command(after_help = "Example:\n  swapoff /dev/ublkb0 && xpm blk detach swap0")]
    Detach {
        /// The name of the allocation that it shows.
        #[arg(add = devices())]
        name: Name,
        /// Removes it even while it is used.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct GiveUpArgs {
    /// The appliance: its name or its id, as `xpm blk show` has it.
    pub(crate) appliance: String,
    /// Does not ask.
    #[arg(long)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// The name of the allocation.
    #[arg(add = allocations())]
    pub(crate) name: Name,
    /// The form of the device: ublk, nbd, nbd-direct, nbd-socket=/PATH, nbd-socket=ADDRESS:PORT or vhost-user=/PATH.
    #[arg(long = "as", value_name = "FORM")]
    pub(crate) form: Form,
    /// Queues, each with a thread of its own, 1 to 64. For vhost-user the most that a guest can have. [default: for
    /// ublk one for each core, at most 4; for vhost-user 16; else 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) queues: Option<u16>,
    /// Requests in flight on one queue, 1 to 1024. [default: 128]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) depth: Option<u16>,
    /// Way to the appliances: shm, rdma, nbd-unix or nbd-tcp. [default: the best for each]
    #[arg(long, value_name = "KIND")]
    pub(crate) transport: Option<TransportKind>,
    /// How long I/O waits for an appliance that cannot be reached: `forever` or like 5m. [default:
    /// the setting of xpm-blk]
    #[arg(long, value_name = "LIMIT")]
    pub(crate) hold: Option<Hold>,
    /// Logical block size in bytes, 512 or 4096: needed once for an allocation that was made before `xpm alloc create
    /// --block-size`. [default: the allocation's]
    #[arg(long, value_name = "BYTES")]
    pub(crate) block_size: Option<BlockSize>,
    /// Takes the allocation from another owner, whose I/O fails from then on.
    #[arg(long)]
    pub(crate) force: bool,
    /// With --force: takes zeros in place of memory that was shared with a process of the appliance's host and cannot
    /// be moved away from it. Without this the allocation stays with its owner.
    #[arg(long, requires = "force")]
    pub(crate) lose: bool,
    /// Stands by to take the allocation over from the client that uses it: the device is there, and its I/O waits
    /// until `xpm alloc handover` makes this client the owner. For nbd-socket and vhost-user.
    #[arg(long, conflicts_with_all = ["lose", "ensure"])]
    pub(crate) standby: bool,
    /// Succeeds as well when it is shown in this form already, and waits while it is being shown. For services.
    #[arg(long)]
    pub(crate) ensure: bool,
    /// With --ensure: how long it is tried again while xpm-blk, the allocator or an appliance cannot be reached.
    /// [default: 0s]
    #[arg(long, value_name = "TIME", requires = "ensure")]
    pub(crate) wait: Option<Span>,
}
