//! A connection as the kernel's control file system (fusectl) shows it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use crate::Bdi;

const CONTROL: &str = "/sys/fs/fuse/connections";
/// FUSE_CTL_SUPER_MAGIC of the kernel.
const CONTROL_MAGIC: u64 = 0x6573_5543;

/// A mounted connection, by its device number (st_dev). Nothing here asks the server or waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Connection {
    major: u32,
    minor: u32,
}

impl Connection {
    /// That of the FUSE file system which is mounted last at this path.
    ///
    /// stat(2) would ask the server, which may hang; statx(2) with AT_STATX_DONT_SYNC does not.
    ///
    /// # Errors
    /// `NotFound` where no FUSE file system is mounted there; those of resolving the path; where the control files of
    /// FUSE cannot be mounted.
    pub fn at(path: &Path) -> io::Result<Connection> {
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let stat = rustix::fs::statx(CWD, path, flags, StatxFlags::empty())?;
        let connection = Connection { major: stat.stx_dev_major, minor: stat.stx_dev_minor };
        let is_root = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        if is_root && connection.directory()?.exists() {
            Ok(connection)
        } else {
            let message = format!("no FUSE file system is mounted at {}", path.display());
            Err(io::Error::new(io::ErrorKind::NotFound, message))
        }
    }

    /// By the parts of a device number.
    pub const fn from_device(major: u32, minor: u32) -> Connection {
        Connection { major, minor }
    }

    /// The parts of its device number, major and minor.
    pub const fn device(self) -> (u32, u32) {
        (self.major, self.minor)
    }

    /// Its number in `/sys/fs/fuse/connections`: the device number as the kernel has it, 12 bits and 20 bits.
    pub const fn number(self) -> u32 {
        self.major << 20 | self.minor
    }

    /// Settings of its page cache.
    pub const fn bdi(self) -> Bdi {
        Bdi::of_device(self.major, self.minor)
    }

    /// Requests that the kernel has and that are not answered.
    ///
    /// # Errors
    /// `NotFound` where the connection has ended; where the control files of FUSE cannot be mounted.
    pub fn waiting(self) -> io::Result<u64> {
        let text = fs::read_to_string(self.directory()?.join("waiting"))?;
        text.trim().parse().map_err(|_| io::Error::other(format!("\"waiting\" says {:?}", text.trim())))
    }

    /// Whether the last mount of it has ended, in all mount namespaces. An abort alone does not make a connection go.
    ///
    /// # Errors
    /// Where the control files of FUSE cannot be mounted.
    pub fn is_gone(self) -> io::Result<bool> {
        Ok(!self.directory()?.exists())
    }

    /// Ends the connection at once: whoever waits for an answer gets an error, data that are dirty in the page cache
    /// are lost, and every later use of the mount fails (ENOTCONN). The mount itself stays, to be unmounted.
    ///
    /// # Errors
    /// As [`waiting`](Connection::waiting).
    pub fn abort(self) -> io::Result<()> {
        fs::write(self.directory()?.join("abort"), "1")
    }

    fn directory(self) -> io::Result<PathBuf> {
        mount_control()?;
        Ok(Path::new(CONTROL).join(self.number().to_string()))
    }
}

/// Mounts the control file system of FUSE where it belongs, unless it is mounted there, as systemd does.
fn mount_control() -> io::Result<()> {
    let fail = |errno: Errno| {
        let message = format!("the control files of FUSE cannot be mounted at {CONTROL}: {errno}");
        io::Error::new(io::Error::from(errno).kind(), message)
    };
    let mounted = rustix::fs::statfs(CONTROL).map_err(fail)?;
    if mounted.f_type as u64 == CONTROL_MAGIC {
        return Ok(());
    }
    match rustix::mount::mount("fusectl", CONTROL, "fusectl", MountFlags::empty(), None) {
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(errno) => Err(fail(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_as_the_kernel_makes_them() {
        assert_eq!(Connection::from_device(0, 45).number(), 45);
        assert_eq!(Connection::from_device(1, 2).number(), (1 << 20) | 2);
    }
}
