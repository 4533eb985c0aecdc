//! A file that this process serves over the bare FUSE protocol. The root of the mount is the file itself, and the mount
//! lies on an empty regular file: so the file has a single path, and there is no directory.
//!
//! The kernel's page cache is the local memory: a page is charged to the memory cgroup of the process that touches it
//! first. A page that is not in the cache arrives by READ, and a changed page leaves by WRITE; both go to the volume.
//! Punching a hole is a TRIM.
//!
//! The mount outlives its server. All processes that may have to take over hold its descriptor: the standby, the
//! successor, and the service manager ([`crate::kept`]). The process that takes over makes the kernel send the requests
//! again that the dead process had read and not answered (`FUSE_NOTIFY_RESEND`). The channels ensure that late writes
//! of the dead process do not land behind those of the new one, as with ublk.
//!
//! * `memory.rs`: the buffers of a queue. `queue.rs`: the thread of a queue. `file.rs`: requests other than data.
//!   `users.rs`: the programs that have the file open.
//! * `tree/`: a directory in which each file has an allocation of its own.

mod file;
mod intake;
mod memory;
mod queue;
pub(crate) mod tree;
mod users;

use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};
use xpm_client_core::Volume;
use xpm_fuse::wire::{ROOT_ID, notify};
use xpm_fuse::{BdiSettings, Connection, Device, Mount, RootKind};
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::blk::{Cache, DeviceState};
use xpm_protocol::units::ByteSize;
use xpm_transport::spin::Spin;

use self::file::File;
use self::queue::QueueParts;
use super::{Health, Shape, Shown, io_len_max};
use crate::error::{DeviceError, Step};
use crate::lifecycle;
use crate::watch::Pulse;

/// Length of a page in bytes: the unit in which the appliance frees memory.
const PAGE: u64 = 4096;
/// How often the requests of a mount are counted that is about to end.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The parameters that a mount was made with. A successor needs them, because there is no second negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mounted {
    /// Most data of one request, in bytes.
    pub(crate) io_len: u32,
    /// Permissions, owner and group of the file that the mount lies on, which are those of the mounted file.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// The parameters of mounting a file.
pub(crate) struct Mounting<'a> {
    pub(crate) name: &'a str,
    pub(crate) path: &'a Path,
    /// The descriptor and the parameters of a mount that another process served.
    pub(crate) left: Option<(OwnedFd, Mounted)>,
    pub(crate) page_cache: PageCache,
}

/// Settings of the kernel's page cache of a mount.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageCache {
    /// Changed pages that the kernel keeps before their writers wait, in bytes.
    pub(crate) dirty_budget: u64,
    /// The most that is read ahead of a program, in bytes. 0: a page fault reads only the requested pages.
    pub(crate) read_ahead: u64,
}

/// A mounted file that this process serves.
pub(crate) struct FuseFile {
    path: PathBuf,
    mounted: Mounted,
    connection: Connection,
    volume: Volume,
    file: Arc<File>,
    device: Arc<Device>,
    give_up: Arc<OwnedFd>,
    /// Whether the kernel has ended the mount.
    ended: Arc<AtomicBool>,
    queues: Mutex<Vec<JoinHandle<()>>>,
}

impl FuseFile {
    /// Serves a volume as a file: by the mount that a dead process left, or by a new one. Blocks until it can be used.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the kernel has no FUSE, [`ErrorKind::Conflict`] if the path has other content.
    pub(crate) fn show(
        volume: Volume,
        shape: &Shape,
        mut mounting: Mounting<'_>,
    ) -> Result<FuseFile, DeviceError> {
        let path = mounting.path;
        let Prepared { device, mounted, connection, takes_over } =
            prepare(&mut mounting, shape, RootKind::File)?;
        let shown = FuseFile::serve(volume, shape, (path, device), mounted, connection, takes_over);
        match shown {
            Ok(shown) => {
                limit(connection, path, mounting.page_cache);
                match takes_over {
                    true => Ok(shown),
                    false => shown.begin().map(|()| shown),
                }
            }
            error => error,
        }
        .inspect_err(|_| {
            if !takes_over {
                take_off(path);
            }
        })
    }

    /// Sets size and time of a new mount's file, in the way of a program. The kernel begins with an empty file of 1970,
    /// and ignores size and time in this server's answers, because it maintains both itself while it caches written
    /// pages.
    fn begin(&self) -> Result<(), DeviceError> {
        self.set_size(self.volume.size())
    }

    fn set_size(&self, size: u64) -> Result<(), DeviceError> {
        let file = fs::OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&self.path);
        let set = file.and_then(|file| {
            file.set_len(size)?;
            file.set_modified(std::time::SystemTime::now())
        });
        set.at(format!("give {} its size", self.path.display()))
    }

    fn serve(
        volume: Volume,
        shape: &Shape,
        (path, device): (&Path, Device),
        mounted: Mounted,
        connection: Connection,
        takes_over: bool,
    ) -> Result<FuseFile, DeviceError> {
        let at = || format!("serve {}", path.display());
        let shown = FuseFile {
            path: path.to_owned(),
            mounted,
            connection,
            file: Arc::new(File::new(volume.size(), mounted)),
            volume,
            device: Arc::new(device),
            give_up: Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).at(at())?),
            ended: Arc::default(),
            queues: Mutex::default(),
        };
        if takes_over {
            resend(&shown.device, path)?;
        }
        let started: Vec<_> =
            (0..shape.queues).map(|number| shown.start(number, shape)).collect::<Result<_, _>>()?;
        for ready in started {
            ready.recv().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())).at(at())?;
        }
        Ok(shown)
    }

    fn start(&self, number: u16, shape: &Shape) -> Result<Receiver<io::Result<()>>, DeviceError> {
        let at = || format!("start queue {number} of {}", self.path.display());
        let name = format!("xpm-fs-{number}-{}", shape.name.as_str().chars().take(24).collect::<String>());
        let parts = QueueParts {
            depth: shape.depth,
            io_len: self.mounted.io_len,
            device: Arc::clone(&self.device),
            file: Arc::clone(&self.file),
            ended: Arc::clone(&self.ended),
            give_up: Arc::clone(&self.give_up),
            channel: self.volume.channel().at(at())?,
            spin: Spin::new(shape.spin),
            pulse: Pulse::new(name.clone()).at(at())?,
        };
        let (tell, told) = sync_channel(1);
        let thread = thread::Builder::new()
            .name(name)
            .stack_size(lifecycle::STACK_LEN)
            .spawn(move || queue::run(parts, &tell))
            .at(at())?;
        self.queues.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(told)
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// A mount that is about to be served.
struct Prepared {
    device: Device,
    mounted: Mounted,
    connection: Connection,
    /// Whether another process served the mount before.
    takes_over: bool,
}

/// The mount that a dead process left, or else a new one.
fn prepare(mounting: &mut Mounting<'_>, shape: &Shape, root: RootKind) -> Result<Prepared, DeviceError> {
    let path = mounting.path;
    let left = mounting.left.take().and_then(|(device, mounted)| {
        // If the mount is gone, its descriptor is useless.
        Some((device, mounted, Connection::at(path).ok()?))
    });
    let takes_over = left.is_some();
    let (device, mounted, connection) = match left {
        Some((device, mounted, connection)) => {
            tracing::info!("taking over the mount at {}", path.display());
            (Device::from_fd(device).at("take over a mount")?, mounted, connection)
        }
        None => mount(mounting.name, path, root, io_len_max(shape.buffer_len, shape.depth))?,
    };
    Ok(Prepared { device, mounted, connection, takes_over })
}

/// Makes the kernel send the requests again that a dead process had read and not answered. To be called before this
/// process reads a request, which would be sent again as well.
fn resend(device: &Device, path: &Path) -> Result<(), DeviceError> {
    let sent = device.notify(&[IoSlice::new(&notify::resend())]);
    sent.at(format!("{}: have requests sent again", path.display()))
}

/// Configures the page cache of the mount. Dirty memory has a budget of its own, because the kernel's default for FUSE
/// is 1 % of the machine's limit, which throttles writers to almost no progress.
fn limit(connection: Connection, path: &Path, PageCache { dirty_budget, read_ahead }: PageCache) {
    let settings = BdiSettings {
        read_ahead_kb: Some((read_ahead >> 10) as u32),
        strict_limit: Some(true),
        max_ratio: Some(100),
        max_bytes: Some(dirty_budget),
    };
    if let Err(error) = connection.bdi().set(&settings) {
        tracing::warn!("{}: the limits of its page cache could not be set: {error}", path.display());
    }
}

/// Mounts a file on an empty file, or a tree on an empty directory; creates that file or directory if it does not
/// exist.
fn mount(
    name: &str,
    path: &Path,
    root: RootKind,
    io_len: u32,
) -> Result<(Device, Mounted, Connection), DeviceError> {
    let at = || format!("mount {}", path.display());
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).at(format!("make {}", directory.display()))?;
    }
    if matches!(fs::symlink_metadata(path), Err(error) if error.raw_os_error() == Some(libc::ENOTCONN)) {
        tracing::warn!(
            "{}: a mount was left there that no process serves any more; it is removed",
            path.display()
        );
        xpm_fuse::unmount_lazily(path).map_err(|error| refused(&error))?;
    }
    if Connection::at(path).is_ok() {
        let what = format!(
            "{} is mounted already, by another process: give another path, or run `umount {0}` first",
            path.display()
        );
        return Err(DeviceError::new(ErrorKind::Conflict, what));
    }
    let made = match root {
        RootKind::File => {
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map(drop)
        }
        RootKind::Directory => fs::DirBuilder::new().mode(0o755).create(path),
    };
    match made {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.at(at())),
        _ => {}
    }
    let below = fs::symlink_metadata(path).at(at())?;
    let wrong = match root {
        RootKind::File => (!below.is_file() || below.len() > 0).then_some("an empty file"),
        RootKind::Directory => {
            let is_empty = || fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
            (!below.is_dir() || !is_empty()).then_some("an empty directory")
        }
    };
    if let Some(wanted) = wrong {
        let what = format!(
            "{} exists and is not {wanted}, which the mount would cover: give a path where nothing is",
            path.display()
        );
        return Err(DeviceError::new(ErrorKind::Conflict, what));
    }
    let mounted =
        Mounted { io_len, mode: below.permissions().mode() & 0o7777, uid: below.uid(), gid: below.gid() };
    let device = xpm_fuse::mount(&Mount {
        at: path,
        source: &format!("xpm:{name}"),
        root,
        mode: mounted.mode,
        uid: 0,
        gid: 0,
        allow_other: true,
        read_only: false,
        max_read: io_len,
    })
    .map_err(|error| refused(&error))?;
    match Connection::at(path) {
        Ok(connection) => Ok((device, mounted, connection)),
        Err(error) => {
            take_off(path);
            Err(error.at(at()))
        }
    }
}

/// Ends a mount. With `force`, its I/O fails, also on files that programs have open; `give_up` wakes its queues.
fn unmount_or_abort(
    path: &Path,
    connection: Connection,
    give_up: &OwnedFd,
    force: bool,
) -> Result<(), DeviceError> {
    if force {
        rustix::io::write(give_up, &1_u64.to_ne_bytes()).at("wake the queues")?;
    }
    let unmounted = match force {
        // Files that programs have open end with the connection.
        true => xpm_fuse::unmount_lazily(path),
        false => xpm_fuse::unmount(path),
    };
    // Another program may have unmounted it.
    if let Err(error) = unmounted
        && Connection::at(path).is_ok()
    {
        return Err(DeviceError::new(ErrorKind::InUse, error.to_string()));
    }
    if force {
        let _ = connection.abort();
        return Ok(());
    }
    end_copies(path, connection)
}

/// Ends the copies of a removed mount in other mount namespaces, which nobody uses. A program that makes a mount
/// namespace gets a copy of each mount (mount_namespaces(7)), and where mounts are private, a copy outlives the mount;
/// it keeps the connection, and the threads that serve it, until its namespace ends.
fn end_copies(path: &Path, connection: Connection) -> Result<(), DeviceError> {
    let at = || format!("end the copies of the mount at {}", path.display());
    if connection.is_gone().at(at())? {
        return Ok(());
    }
    let holders = users::holders(connection);
    // A changed page is written when its file is closed or unmapped (fuse_flush and fuse_vma_close of the kernel), so
    // the only changes that an abort could lose are those in requests.
    loop {
        match connection.waiting() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Ok(0) => break,
            Ok(_) => thread::sleep(LOOK_AGAIN),
            Err(error) => return Err(error.at(at())),
        }
    }
    tracing::info!(
        "{}: mount namespaces of other programs have a copy of the mount, and no file of the mount is open there: it ends \
         there as well ({})",
        path.display(),
        holders.join(", ")
    );
    match connection.abort() {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.at(at())),
        _ => Ok(()),
    }
}

/// Removes a mount that is not in use yet.
fn take_off(path: &Path) {
    if let Err(error) = xpm_fuse::unmount_lazily(path) {
        tracing::warn!("{error}");
    }
    remove_below(path);
}

/// Removes the file that a mount lay on, if the file is empty.
fn remove_below(path: &Path) {
    if fs::symlink_metadata(path).is_ok_and(|below| below.is_file() && below.len() == 0) {
        // The file may be gone already.
        let _ = fs::remove_file(path);
    }
}

fn refused(error: &xpm_fuse::MountError) -> DeviceError {
    let kind = match error {
        xpm_fuse::MountError::Device(_) => ErrorKind::Unsupported,
        _ => ErrorKind::Conflict,
    };
    DeviceError::new(kind, error.to_string())
}

/// Whether this host has FUSE.
///
/// # Errors
/// [`ErrorKind::Unsupported`] with the missing part. A kernel that is too old is found only when the file is mounted.
pub(crate) fn check_support() -> Result<(), DeviceError> {
    match Path::new("/dev/fuse").exists() {
        true => Ok(()),
        false => {
            Err(DeviceError::unsupported("there is no /dev/fuse", "load the kernel's module: modprobe fuse"))
        }
    }
}

/// Lengths of the buffers that the queues of a mount need, in bytes.
pub(crate) fn buffer_lens(shape: &Shape, mounted: &Mounted) -> impl Iterator<Item = usize> + use<> {
    let len = usize::from(shape.depth) * memory::buffer_len(mounted.io_len);
    std::iter::repeat_n(len, usize::from(shape.queues))
}

impl Shown for FuseFile {
    fn path(&self) -> String {
        self.path.display().to_string()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.device.as_fd())
    }

    fn mounted(&self) -> Option<Mounted> {
        Some(self.mounted)
    }

    fn users(&self) -> Vec<String> {
        if self.has_ended() { Vec::new() } else { users::of(&self.path, self.connection) }
    }

    fn waits_for_next_process(&self) -> bool {
        true
    }

    fn health(&self) -> Health {
        let health = Health::of(&self.volume);
        match self.has_ended() {
            true => Health { state: DeviceState::Lost, ..health },
            false => health,
        }
    }

    fn volume(&self) -> Option<&Volume> {
        Some(&self.volume)
    }

    fn abort(&self) -> Result<(), DeviceError> {
        self.connection.abort().at(format!("abort {}", self.path.display()))
    }

    fn resize(&self, size: u64) -> Result<Option<String>, DeviceError> {
        self.file.set_size(size);
        self.set_size(size).map(|()| None)
    }

    fn cache(&self, drop: bool) -> Result<Cache, DeviceError> {
        let at = || format!("look at the cache of {}", self.path.display());
        let options = fs::OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&self.path);
        let file = options.at(at())?;
        if drop {
            // Written back here in large writes; the notification would write changed pages one by one.
            file.sync_data().at(format!("write back {}", self.path.display()))?;
            self.device
                .notify(&[IoSlice::new(&notify::inval_inode(ROOT_ID, 0, 0))])
                .at(format!("drop the cache of {}", self.path.display()))?;
        }
        let stat = xpm_fuse::cachestat(&file, 0, 0).at(at())?;
        let page = rustix::param::page_size() as u64;
        Ok(Cache {
            cached: ByteSize(stat.cached * page),
            dirty: ByteSize(stat.dirty * page),
            writeback: ByteSize(stat.writeback * page),
        })
    }

    fn hide(&self, give_up: bool) -> Result<(), DeviceError> {
        unmount_or_abort(&self.path, self.connection, &self.give_up, give_up)?;
        let queues = std::mem::take(&mut *self.queues.lock().unwrap_or_else(PoisonError::into_inner));
        for queue in queues {
            if queue.join().is_err() {
                return Err(DeviceError::new(ErrorKind::Internal, "a queue of a mount failed; see the log"));
            }
        }
        remove_below(&self.path);
        Ok(())
    }
}
