//! Stable names of devices: `/dev/xpm/NAME`, where NAME is the allocation's name.
//!
//! If udev runs, it creates the links, by `udev/60-xpm.rules`. The rules know of a device only the kernel's
//! information: a number (ublk), or the identifier that was given to the nbd driver. They read the rest from
//! a file of that name in [`DIRECTORY`], which exists before the device appears. If no udev runs, this module
//! creates the links. Links are optional: an error is logged, and the device works without the link.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use xpm_protocol::Name;

/// A file for each device: `XPM_NAME=NAME`.
const DIRECTORY: &str = "/run/xpm/udev";
/// The directory of the links.
const LINKS: &str = "/dev/xpm";
/// Exists while udev runs.
const UDEV: &str = "/run/udev/control";

/// The names of one device: the file for udev, and the link.
#[derive(Debug)]
pub(crate) struct Label {
    /// The number or identifier by which the rules know the device.
    key: String,
    name: Name,
}

impl Label {
    /// The label of the device that the rules know by `key`. Writes nothing yet: a device that is taken over
    /// has its files already, and a process that takes over swap must not touch a file.
    pub(crate) fn new(key: &str, name: &Name) -> Label {
        Label { key: key.to_owned(), name: name.clone() }
    }

    /// Writes the file for udev before the device appears. Blocks for a moment.
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

    /// Creates the link to the new device `/dev/DISK`.
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

    /// Removes the file and the link of a removed device.
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

/// Removes the file and the link of a removed device known by `key`, whose name is read from the file.
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
