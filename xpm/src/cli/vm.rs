//! `xpm vm`.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use xpm_protocol::{ByteSize, Name, Span};

use super::ListArgs;

/// Options of `xpm vm`.
#[derive(Debug, Args)]
pub(crate) struct VmArgs {
    /// Where the machines' directories are, with their records and QEMU's monitors.
    #[arg(long, global = true, value_name = "DIR", env = "XPM_VM_DIR", default_value = xpm_vm::place::DEFAULT)]
    pub(crate) dir: PathBuf,
    #[command(subcommand)]
    pub(crate) command: VmCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Starts a virtual machine whose RAM is an allocation, and stays with it until it ends.
    ///
    /// xpm-fs shows the allocation as a file, which QEMU maps. What this host caches of it is the machine's local memory, and --local bounds it. QEMU gets the RAM, two monitors and,
    /// with --max, a virtio-mem device added to its arguments. The exit status is QEMU's; 0 as well when the machine moved to another
    /// host or was suspended.
    #[command(after_help = "\
Example:
  xpm vm run vm1 --memory 8GiB --max 32GiB --local 2GiB -- \\
    qemu-system-x86_64 -machine q35,accel=kvm -cpu host -smp 4 -drive file=disk.img,if=virtio")]
    Run(RunMachineArgs),
    /// Waits for a virtual machine of another host, takes it over and stays with it until it ends.
    ///
    /// QEMU is started with the same arguments as there, and the same RAM file. The machine runs here only by the order of the
    /// other host's `xpm vm migrate`; when that one fails or ends before, QEMU is ended here.
    #[command(after_help = "\
Example:
  xpm vm receive vm1 --listen 10.0.0.2:7710 --memory 8GiB --file /mnt/ram/vm1 -- qemu-system-x86_64 ...")]
    Receive(ReceiveArgs),
    /// Moves a virtual machine to the host where `xpm vm receive` waits, without its RAM.
    ///
    /// Only the state of its devices is sent. When something fails the machine goes on here, or the command says where it is and
    /// what to do.
    #[command(after_help = "Example:\n  xpm vm migrate vm1 --to 10.0.0.2:7710")]
    Migrate(MigrateArgs),
    /// Finishes a move whose command ended in between: the machine goes on here, or has ended here when it runs at its
    /// destination.
    ///
    /// The destination is asked where that is needed. When it does not answer, --gone or --here must say what you know. A machine
    /// that ran there, if only for a moment, has changed its RAM and can not go on here, also when it has ended there.
    #[command(after_help = "Example:\n  xpm vm settle vm1")]
    Settle(SettleArgs),
    /// Stops a virtual machine and writes the state of its devices to a new file. The RAM stays where it is.
    #[command(after_help = "Example:\n  xpm vm suspend vm1 --to /var/lib/vm1.state")]
    Suspend {
        /// The machine.
        name: Name,
        /// The file; it must not be there yet.
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
    },
    /// Starts a suspended virtual machine where it was, and stays with it until it ends.
    ///
    /// Before it runs, the state file is renamed to FILE.resumed, for its RAM changes then and the state no longer fits.
    #[command(after_help = "\
Example:
  xpm vm resume vm1 --from /var/lib/vm1.state -- qemu-system-x86_64 ...")]
    Resume(ResumeArgs),
    /// Changes how much RAM a virtual machine has that was started with --max, and says how much it has then.
    ///
    /// The guest needs a driver for virtio-mem (Linux 5.8 or later). The exit status is 1 when the guest does not follow in time; it is
    /// still asked then.
    #[command(after_help = "Example:\n  xpm vm resize vm1 12GiB")]
    Resize {
        /// The machine.
        name: Name,
        /// RAM that it is to have in all.
        #[arg(value_name = "SIZE")]
        size: ByteSize,
        /// How long the guest is waited for.
        #[arg(long, value_name = "TIME", default_value = "30s")]
        wait: Span,
    },
    /// Lists the virtual machines of this host that were started by `xpm vm`.
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Shows one virtual machine: its state, its memory, its files and its monitors.
    #[command(visible_alias = "describe", after_help = "Example:\n  xpm vm show vm1")]
    Show {
        /// The machine.
        name: Name,
    },
    /// Prints the parts of a libvirt domain that make its RAM a shared file, and what has to be set beside.
    #[command(after_help = "Example:\n  xpm vm xml vm1 --memory 8GiB --local 2GiB")]
    Xml(XmlArgs),
    /// Runs a program that cannot ask for huge pages, in the place of this command. For the `<emulator>` of libvirt.
    ///
    /// QEMU asks for huge pages for all RAM. For a file that is not cached, each access then reads megabytes. The program's request is
    /// answered as if it were done.
    #[command(after_help = "Example:\n  xpm vm exec -- qemu-system-x86_64 ...")]
    Exec(ExecArgs),
    /// Fetches pages of files into this host's cache, as the lists at standard input say. `xpm vm receive` starts it.
    #[command(hide = true)]
    Fetch(FetchArgs),
}

/// What RAM a machine has.
#[derive(Debug, Args)]
pub(crate) struct MemoryArgs {
    /// RAM that the machine starts with.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: ByteSize,
    /// RAM that it can have in all, by `xpm vm resize`. [default: what it starts with]
    #[arg(long, value_name = "SIZE")]
    pub(crate) max: Option<ByteSize>,
}

/// How a machine's QEMU is started.
#[derive(Debug, Args)]
pub(crate) struct QemuArgs {
    /// An ordinary file that is the machine's RAM in the place of an allocation; it is made when it is not there. With --max, the file
    /// beside it with `.plugged` at its end is what can be plugged. [default: the allocation NAME, and NAME-plugged, which are made
    /// when they are not there]
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// An allocation that is a virtio-blk disk of the machine, by an NBD socket of this host's xpm-blk. It moves with
    /// the machine, and has to be there. Can be given several times; in the same order at both ends of a move.
    #[arg(long = "disk", value_name = "ALLOCATION", conflicts_with = "file")]
    pub(crate) disks: Vec<Name>,
    /// Local memory that the machine's RAM may take. [default: what this host has free]
    #[arg(long, value_name = "SIZE")]
    pub(crate) local: Option<ByteSize>,
    /// With --local: what QEMU itself may take beside.
    #[arg(long, value_name = "SIZE", default_value_t = xpm_vm::machine::OVERHEAD)]
    pub(crate) overhead: ByteSize,
    /// Lets QEMU ask for huge pages: faster where RAM is read from one end to the other, much slower where it is not.
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// QEMU, and its arguments without those for RAM.
    #[arg(value_name = "QEMU", required = true, last = true)]
    pub(crate) program: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct RunMachineArgs {
    /// The machine's name.
    pub(crate) name: Name,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
    #[command(flatten)]
    pub(crate) qemu: QemuArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// The machine's name, as at the other host.
    pub(crate) name: Name,
    /// Where the other host reaches this command. Beyond this machine it needs a token.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) listen: SocketAddr,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
    #[command(flatten)]
    pub(crate) qemu: QemuArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    /// The machine's name, as it was suspended.
    pub(crate) name: Name,
    /// The file with its state.
    #[arg(long, value_name = "FILE")]
    pub(crate) from: PathBuf,
    #[command(flatten)]
    pub(crate) qemu: QemuArgs,
}

#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// The machine.
    pub(crate) name: Name,
    /// Where `xpm vm receive` listens.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) to: SocketAddr,
    /// Drops what this host has cached of the RAM before the state is sent. The machine is down for longer.
    #[arg(long)]
    pub(crate) strict: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SettleArgs {
    /// The machine.
    pub(crate) name: Name,
    /// It never ran at its destination, and its QEMU there has ended: it goes on here.
    #[arg(long, conflicts_with = "gone")]
    pub(crate) here: bool,
    /// It runs at its destination, or ran there: it ends here.
    #[arg(long)]
    pub(crate) gone: bool,
}

#[derive(Debug, Args)]
pub(crate) struct XmlArgs {
    /// The machine's name.
    pub(crate) name: Name,
    /// Its RAM.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: ByteSize,
    /// Local memory that the machine's RAM may take.
    #[arg(long, value_name = "SIZE")]
    pub(crate) local: Option<ByteSize>,
    /// With --local: what QEMU itself may take beside.
    #[arg(long, value_name = "SIZE", default_value_t = xpm_vm::machine::OVERHEAD)]
    pub(crate) overhead: ByteSize,
    /// The directory below which libvirt makes files of RAM.
    #[arg(long, value_name = "DIR", default_value = "/run/xpm/ram")]
    pub(crate) backing: PathBuf,
    /// The file that starts QEMU by `xpm vm exec`.
    #[arg(long, value_name = "FILE", default_value = "/usr/local/bin/qemu-external")]
    pub(crate) emulator: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct FetchArgs {
    /// The memory cgroup that it enters.
    #[arg(long, value_name = "DIR")]
    pub(crate) cgroup: Option<PathBuf>,
    /// The files.
    #[arg(value_name = "FILE", required = true, last = true)]
    pub(crate) files: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// The memory cgroup that it enters.
    #[arg(long, value_name = "DIR")]
    pub(crate) cgroup: Option<PathBuf>,
    /// Lets it ask for huge pages.
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// The program, and its arguments.
    #[arg(value_name = "PROGRAM", required = true, last = true)]
    pub(crate) program: Vec<OsString>,
}
