//! Stable names of devices: `/dev/xpm/NAME`, NAME being the allocation's.
//!
//! Where udev runs, it makes the links, by `udev/60-xpm.rules`. Of a device that appears the rules know only what the kernel
//! says: a number (ublk), or the identifier that was given to the nbd driver. The rest they read from a file of that name in
//! [`DIRECTORY`], which is there before the device is. Where no udev runs, the links are made here. A link is a help: what
//! cannot be made is logged, and the device works without it.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use xpm_protocol::Name;

/// A file for each device: `XPM_NAME=NAME`.
const DIRECTORY: &str = "/run/xpm/udev";
/// Where the links are.
const LINKS: &str = "/dev/xpm";
/// There while udev runs.
const UDEV: &str = "/run/udev/control";

/// What names one device: the file for udev, and the link.
#[derive(Debug)]
pub(crate) struct Label {
    /// What the rules know the device by.
    key: String,
    name: Name,
}

impl Label {
    /// That of a device which is known by `key`. Nothing is written yet: a device that is taken over has all of it, and who
    /// takes over swap must not touch a file.
    pub(crate) fn new(key: &str, name: &Name) -> Label {
        Label { key: key.to_owned(), name: name.clone() }
    }

    /// Says, before the device appears, whose it is. Blocks for a moment.
    pub(crate) fn announce(&self) {
        let (file, name) = (self.file(), &self.name);
        let written = || -> io::Result<()> {
            fs::create_dir_all(DIRECTORY)?;
            let new = Path::new(DIRECTORY).join(format!(".{}", self.key));
            fs::write(&new, format!("XPM_NAME={name}\n"))?;
            fs::rename(&new, &file)
        };
        if let Err(error) = written() {
            tracing::warn!("cannot write {} ({error}): {LINKS}/{name} may be missing", file.display());
        }
    }

    /// The device is there, as `/dev/DISK`.
    pub(crate) fn link(&self, disk: &str) {
        if udev_runs() {
            return;
        }
        let link = self.place();
        let made = || -> io::Result<()> {
            fs::create_dir_all(LINKS)?;
            let _ = fs::remove_file(&link);
            symlink(format!("../{disk}"), &link)
        };
        if let Err(error) = made() {
            tracing::warn!("cannot make the link {}: {error}", link.display());
        }
    }

    /// The device is gone.
    pub(crate) fn remove(&self, disk: &str) {
        let _ = fs::remove_file(self.file());
        let link = self.place();
        let ours = fs::read_link(&link).is_ok_and(|target| target == Path::new(&format!("../{disk}")));
        if ours && !udev_runs() {
            let _ = fs::remove_file(link);
        }
    }

    fn file(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.key)
    }

    fn place(&self) -> PathBuf {
        Path::new(LINKS).join(self.name.as_str())
    }
}

/// A device that is known by `key` is gone, of which nobody remembers the name.
pub(crate) fn forget(key: &str, disk: &str) {
    let said = fs::read_to_string(Path::new(DIRECTORY).join(key)).unwrap_or_default();
    let name = said.lines().find_map(|line| line.strip_prefix("XPM_NAME=")?.parse().ok());
    if let Some(name) = name {
        Label::new(key, &name).remove(disk);
    }
}

fn udev_runs() -> bool {
    Path::new(UDEV).exists()
}
