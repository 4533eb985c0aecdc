//! Mounting and unmounting.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::Device;

/// The kind of the root of a mount, which its mount point must have as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootKind {
    /// A directory.
    Directory,
    /// A regular file: the mount *is* the file.
    File,
}

/// How a file system is mounted. Always nosuid and nodev.
#[derive(Debug, Clone, Copy)]
pub struct Mount<'a> {
    /// Where: a directory, or a file, as `root` says.
    pub at: &'a Path,
    /// The mount's source as shown by the kernel, such as `xpm:NAME`.
    pub source: &'a str,
    /// The kind of the root. GETATTR of node 1 must say the same kind.
    pub root: RootKind,
    /// Permissions of the root until its attributes are first asked for.
    pub mode: u32,
    /// The user who may use the mount without `allow_other`.
    pub uid: u32,
    /// The group of who may.
    pub gid: u32,
    /// Other users may use it, as far as the files' permissions let them.
    pub allow_other: bool,
    /// No writes.
    pub read_only: bool,
    /// The longest READ, in bytes, at least 4096.
    pub max_read: u32,
}

/// A file system could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// There is no FUSE.
    #[error("/dev/fuse cannot be opened ({0}); load the kernel's module (modprobe fuse), and run as root")]
    Device(#[source] Errno),
    /// mount(2) refused.
    #[error("mounting at {at} failed: {errno}{hint}")]
    Mount {
        /// The mount point.
        at: PathBuf,
        /// The kernel's error.
        errno: Errno,
        /// The remedy, or empty.
        hint: &'static str,
    },
    /// umount2(2) refused.
    #[error("unmounting {at} failed: {errno}{hint}")]
    Unmount {
        /// The mount point.
        at: PathBuf,
        /// The kernel's error.
        errno: Errno,
        /// The remedy, or empty.
        hint: &'static str,
    },
}

/// Mounts a file system, by whatever process serves the device that is returned.
///
/// Does not wait for a server: the first request, INIT, can be received then. Whoever uses the mount before INIT is
/// answered waits. Permissions are checked by the kernel (`default_permissions`), by the files' modes.
///
/// # Errors
/// [`MountError`].
pub fn mount(mount: &Mount<'_>) -> Result<Device, MountError> {
    let device = Device::open().map_err(MountError::Device)?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, mount.read_only);
    let options = options(mount, device.as_fd().as_raw_fd());
    rustix::mount::mount(mount.source, mount.at, "fuse.xpm", flags, options.as_c_str()).map_err(|errno| {
        let hint = match (errno, mount.root) {
            (Errno::NOTDIR, RootKind::Directory) => "; the mount point must be a directory",
            (Errno::NOTDIR, RootKind::File) => "; the mount point must be a file",
            (Errno::NOENT, _) => "; make the mount point first",
            (Errno::PERM, _) => "; it takes CAP_SYS_ADMIN",
            _ => "",
        };
        MountError::Mount { at: mount.at.to_owned(), errno, hint }
    })?;
    Ok(device)
}

fn options(mount: &Mount<'_>, fd: i32) -> CString {
    let kind = match mount.root {
        RootKind::Directory => 0o040_000,
        RootKind::File => 0o100_000,
    };
    let mode = kind | (mount.mode & 0o7777);
    let Mount { uid, gid, max_read, .. } = mount;
    let allow_other = if mount.allow_other { ",allow_other" } else { "" };
    let options = format!(
        "fd={fd},rootmode={mode:o},user_id={uid},group_id={gid},max_read={max_read},default_permissions{allow_other}"
    );
    CString::new(options).expect("numbers contain no NUL")
}

/// Unmounts what is mounted last at this path, without following a symbolic link.
///
/// Dirty pages are written first: blocks until the server has answered.
///
/// # Errors
/// [`MountError::Unmount`], with EBUSY while files of it are open or it is somebody's directory.
pub fn unmount(at: &Path) -> Result<(), MountError> {
    unmount_with(at, UnmountFlags::NOFOLLOW)
}

/// Takes the mount out of the tree of files. The connection lives on until the last open file of it is closed, then the
/// device says [`Gone::Unmounted`](crate::Gone::Unmounted).
///
/// # Errors
/// [`MountError::Unmount`].
pub fn unmount_lazily(at: &Path) -> Result<(), MountError> {
    unmount_with(at, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
}

fn unmount_with(at: &Path, flags: UnmountFlags) -> Result<(), MountError> {
    rustix::mount::unmount(at, flags).map_err(|errno| {
        let hint = match errno {
            Errno::BUSY => "; files of it are in use: close them, or unmount lazily",
            Errno::INVAL => "; nothing is mounted there",
            _ => "",
        };
        MountError::Unmount { at: at.to_owned(), errno, hint }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_as_the_kernel_reads_them() {
        let mut mount = Mount {
            at: Path::new("/mnt"),
            source: "xpm:ram",
            root: RootKind::File,
            mode: 0o600,
            uid: 1,
            gid: 2,
            allow_other: true,
            read_only: false,
            max_read: 1 << 20,
        };
        let text =
            "fd=7,rootmode=100600,user_id=1,group_id=2,max_read=1048576,default_permissions,allow_other";
        assert_eq!(options(&mount, 7).to_str().unwrap(), text);
        mount.root = RootKind::Directory;
        mount.allow_other = false;
        let text = "fd=7,rootmode=40600,user_id=1,group_id=2,max_read=1048576,default_permissions";
        assert_eq!(options(&mount, 7).to_str().unwrap(), text);
    }
}
