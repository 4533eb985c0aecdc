//! The two daemons in this library. They share code and no process: a virtual machine whose memory `xpm-fs`
//! serves may have a disk that `xpm-blk` serves, and a thread of one daemon may wait for a page that the
//! other has to load.

use std::path::PathBuf;

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::blk::{Form, SafetyItem};
use xpm_safety as safety;

use crate::error::DeviceError;

/// Which daemon a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Program {
    /// `xpm-blk`: block devices and sockets.
    #[default]
    Blk,
    /// `xpm-fs`: files.
    Fs,
}

impl Program {
    /// The name of the program, of its service and of its cgroup.
    pub const fn name(self) -> &'static str {
        match self {
            Program::Blk => "xpm-blk",
            Program::Fs => "xpm-fs",
        }
    }

    /// The default path of its configuration; the file may be missing.
    pub const fn config_path(self) -> &'static str {
        match self {
            Program::Blk => "/etc/xpm/blk.toml",
            Program::Fs => "/etc/xpm/fs.toml",
        }
    }

    /// Its default control socket.
    pub(crate) fn control(self) -> PathBuf {
        match self {
            Program::Blk => "/run/xpm/blk.sock".into(),
            Program::Fs => "/run/xpm/fs.sock".into(),
        }
    }

    /// Its default state directory.
    pub(crate) fn state(self) -> PathBuf {
        match self {
            Program::Blk => "/var/lib/xpm/blk".into(),
            Program::Fs => "/var/lib/xpm/fs".into(),
        }
    }

    /// The subcommand of `xpm` that controls it: `xpm blk` or `xpm fs`.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Program::Blk => "blk",
            Program::Fs => "fs",
        }
    }

    /// Its description for the service manager.
    pub(crate) const fn purpose(self) -> &'static str {
        match self {
            Program::Blk => "Shows external memory as block devices",
            Program::Fs => "Shows external memory as files",
        }
    }

    /// Refuses a form that only the other daemon shows.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with the command for it.
    pub(crate) fn check(self, form: &Form) -> Result<(), DeviceError> {
        let what = match (self, form) {
            (Program::Blk, form) if form.is_of_files() => {
                "xpm-fs shows allocations as files, not xpm-blk: use `xpm fs attach NAME --at PATH`"
            }
            (Program::Blk, _) => return Ok(()),
            (Program::Fs, form) if form.is_of_files() => return Ok(()),
            (Program::Fs, _) => {
                "xpm-blk shows allocations as devices and sockets, not xpm-fs: use `xpm blk attach NAME --as FORM`"
            }
        };
        Err(DeviceError::new(ErrorKind::Invalid, what))
    }

    /// Makes this process fit to serve a target of memory reclaim. Must be called while the process has one
    /// thread.
    pub(crate) fn set_up(self) {
        match self {
            Program::Blk => safety::set_up(self.name()),
            Program::Fs => safety::set_up_for_files(self.name()),
        }
    }

    /// The present state in the kernel of the settings that [`Program::set_up`] made.
    pub(crate) fn safety(self) -> Vec<SafetyItem> {
        match self {
            Program::Blk => safety::items(),
            Program::Fs => safety::file_items(),
        }
    }
}
