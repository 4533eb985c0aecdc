//! Disks of a guest that benchmarks compare, and who serves each of them on the host.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::netns::HOST;

/// Size of each disk.
pub(super) const SIZE: &str = "512M";
/// The same in bytes.
const BYTES: u64 = 512 << 20;
/// The same as xpm reads it.
pub(super) const XPM_SIZE: &str = "512MiB";
/// Queues of each disk: as many as the guest has processors.
const QUEUES: u32 = 2;
/// The guest's PCI slot of the first disk; by slot it knows them apart.
const SLOT_FIRST: usize = 0x10;
/// Port of the NBD server of other disks.
const NBD_PORT: u16 = 7790;

/// A disk, by who serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Disk {
    /// xpm-blk's vhost-user-blk, and the transport to the appliances.
    Xpm(&'static str),
    /// The vhost-user-blk of QEMU's storage daemon.
    Qsd(Storage),
    /// QEMU itself, on a file of the host, past the host's cache.
    File,
}

/// The storage of QEMU's storage daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Storage {
    /// Nothing: reads are zeros.
    Null,
    /// A file in the host's memory.
    Memory,
    /// nbdkit's memory plugin over TCP.
    NbdTcp,
    /// nbdkit's memory plugin over a unix socket.
    NbdUnix,
}

impl Disk {
    /// The name that the guest, and the benchmark, know it by.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Disk::Xpm("shm") => "vhost-shm",
            Disk::Xpm(_) => "vhost-tcp",
            Disk::Qsd(Storage::Null) => "qsd-null",
            Disk::Qsd(Storage::Memory) => "qsd-memory",
            Disk::Qsd(Storage::NbdTcp) => "qsd-nbd-tcp",
            Disk::Qsd(Storage::NbdUnix) => "qsd-nbd-unix",
            Disk::File => "virtio-file",
        }
    }

    /// Its socket, or its file.
    pub(super) fn path(self, dir: &Path) -> PathBuf {
        dir.join(format!("disk-{}", self.name()))
    }

    /// QEMU's options for it as the guest's disk of this number.
    pub(super) fn qemu_words(self, index: usize, dir: &Path) -> Vec<OsString> {
        let slot = SLOT_FIRST + index;
        let path = self.path(dir).display().to_string();
        let words = match self {
            Disk::File => [
                "-blockdev".to_owned(),
                format!("driver=file,node-name=disk{index},filename={path},cache.direct=on,discard=unmap"),
                "-device".to_owned(),
                format!("virtio-blk-pci,drive=disk{index},num-queues={QUEUES},addr={slot:#x}"),
            ],
            Disk::Xpm(_) | Disk::Qsd(_) => [
                "-chardev".to_owned(),
                format!("socket,id=disk{index},path={path}"),
                "-device".to_owned(),
                format!("vhost-user-blk-pci,chardev=disk{index},num-queues={QUEUES},addr={slot:#x}"),
            ],
        };
        words.into_iter().map(OsString::from).collect()
    }
}

impl Storage {
    /// The options of nbdkit that serve it, if it needs a server.
    pub(super) fn nbdkit_words(self, dir: &Path) -> Option<Vec<String>> {
        let way = match self {
            Storage::Null | Storage::Memory => return None,
            Storage::NbdTcp => vec!["-i".to_owned(), HOST.to_owned(), "-p".to_owned(), NBD_PORT.to_string()],
            Storage::NbdUnix => vec!["-U".to_owned(), nbd_socket(dir).display().to_string()],
        };
        let words = ["-f"].into_iter().map(str::to_owned).chain(way);
        Some(words.chain(["memory", SIZE].map(str::to_owned)).collect())
    }

    /// Adds the storage daemon's options: an I/O thread of its own, which polls before it sleeps.
    pub(super) fn add_options(self, command: &mut Command, dir: &Path) {
        let driver = match self {
            Storage::Null => format!("driver=null-co,size={BYTES},read-zeroes=on"),
            Storage::Memory => format!("driver=file,filename={},discard=unmap", memory_file(dir).display()),
            Storage::NbdTcp => {
                format!("driver=nbd,server.type=inet,server.host={HOST},server.port={NBD_PORT}")
            }
            Storage::NbdUnix => {
                format!("driver=nbd,server.type=unix,server.path={}", nbd_socket(dir).display())
            }
        };
        let socket = Disk::Qsd(self).path(dir);
        command.args(["--object", "iothread,id=thread", "--blockdev", &format!("{driver},node-name=disk")]);
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,iothread=thread,writable=on,num-queues={QUEUES},\
             addr.type=unix,addr.path={}",
            socket.display()
        ));
    }
}

fn nbd_socket(dir: &Path) -> PathBuf {
    dir.join("nbdkit.sock")
}

/// A file in the host's memory that belongs to this run.
pub(super) fn memory_file(dir: &Path) -> PathBuf {
    let run = dir.file_name().unwrap_or_default().to_string_lossy();
    Path::new("/dev/shm").join(format!("xpm-lab-{run}"))
}

/// The text for the guest: `SLOT:NAME` of each disk.
pub(super) fn list(disks: &[Disk]) -> String {
    let slots =
        disks.iter().enumerate().map(|(index, disk)| format!("{:x}:{}", SLOT_FIRST + index, disk.name()));
    slots.collect::<Vec<_>>().join(" ")
}
