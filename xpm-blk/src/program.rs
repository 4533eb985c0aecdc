//! The two daemons that this library is. They share code and no process: a virtual machine whose memory `xpm-fs` serves may
//! have a disk that `xpm-blk` serves, and a thread of the one may wait for a page that the other one has to bring.

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

    /// Where its configuration is looked for when nobody says otherwise; the file may be missing.
    pub const fn config_path(self) -> &'static str {
        match self {
            Program::Blk => "/etc/xpm/blk.toml",
            Program::Fs => "/etc/xpm/fs.toml",
        }
    }

    /// Its control socket where the configuration names none.
    pub(crate) fn control(self) -> PathBuf {
        match self {
            Program::Blk => "/run/xpm/blk.sock".into(),
            Program::Fs => "/run/xpm/fs.sock".into(),
        }
    }

    /// Its state directory where the configuration names none.
    pub(crate) fn state(self) -> PathBuf {
        match self {
            Program::Blk => "/var/lib/xpm/blk".into(),
            Program::Fs => "/var/lib/xpm/fs".into(),
        }
    }

    /// The word of the command that speaks to it: `xpm blk` or `xpm fs`.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Program::Blk => "blk",
            Program::Fs => "fs",
        }
    }

    /// What it tells the service manager of itself.
    pub(crate) const fn purpose(self) -> &'static str {
        match self {
            Program::Blk => "Shows external memory as block devices",
            Program::Fs => "Shows external memory as files",
        }
    }

    /// Refuses a form that the other daemon shows.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with the command for it.
    pub(crate) fn check(self, form: &Form) -> Result<(), DeviceError> {
        let what = match (self, form) {
            (Program::Blk, Form::File(_)) => {
                "xpm-fs shows allocations as files, not xpm-blk: use `xpm fs attach NAME --at PATH`"
            }
            (Program::Fs, Form::File(_)) | (Program::Blk, _) => return Ok(()),
            (Program::Fs, _) => {
                "xpm-blk shows allocations as devices and sockets, not xpm-fs: use `xpm blk attach NAME --as FORM`"
            }
        };
        Err(DeviceError::new(ErrorKind::Invalid, what))
    }

    /// Makes this process fit to serve what memory is reclaimed to. Must be called while the process has one thread.
    pub(crate) fn set_up(self) {
        match self {
            Program::Blk => safety::set_up(self.name()),
            Program::Fs => safety::set_up_for_files(self.name()),
        }
    }

    /// What [`Program::set_up`] did, as the kernel has it now.
    pub(crate) fn safety(self) -> Vec<SafetyItem> {
        match self {
            Program::Blk => safety::items(),
            Program::Fs => safety::file_items(),
        }
    }
}
