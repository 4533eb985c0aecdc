//! Settings of a mount's page cache: `/sys/class/bdi/MAJOR:MINOR`.

use std::fs;
use std::io;
use std::path::PathBuf;

/// The kernel's record of what backs a file system (*backing device info*): its read-ahead and its share of dirty
/// memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bdi {
    major: u32,
    minor: u32,
}

/// Settings to be made; what is None stays.
///
/// FUSE begins with `strict_limit` and a `max_ratio` of 1 %, which on a small machine throttles writers to almost
/// nothing. A *dirty budget* in bytes is `max_ratio` 100, `strict_limit` and `max_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BdiSettings {
    /// The most that is read ahead, in KiB.
    pub read_ahead_kb: Option<u32>,
    /// The limits count even while the machine as a whole has little dirty memory.
    pub strict_limit: Option<bool>,
    /// The share of the machine's limit of dirty memory, in per cent, 0 to 100.
    pub max_ratio: Option<u8>,
    /// The same in bytes. The kernel keeps it as a millionth of the machine's limit, and so rounds it. Written last,
    /// it replaces `max_ratio`.
    pub max_bytes: Option<u64>,
}

impl Bdi {
    pub(crate) const fn of_device(major: u32, minor: u32) -> Bdi {
        Bdi { major, minor }
    }

    /// Makes these settings, which takes root.
    ///
    /// # Errors
    /// `NotFound` where the mount has ended; InvalidInput where the kernel refuses a value. Values written before the
    /// error stay.
    pub fn set(&self, settings: &BdiSettings) -> io::Result<()> {
        let BdiSettings { read_ahead_kb, strict_limit, max_ratio, max_bytes } = *settings;
        self.write("read_ahead_kb", read_ahead_kb)?;
        self.write("max_ratio", max_ratio)?;
        self.write("max_bytes", max_bytes)?;
        self.write("strict_limit", strict_limit.map(u8::from))
    }

    /// The settings as the kernel has them; None where it does not have one (`strict_limit` and `max_bytes` are of
    /// Linux 6.2).
    ///
    /// # Errors
    /// `NotFound` where the mount has ended.
    pub fn settings(&self) -> io::Result<BdiSettings> {
        fs::metadata(self.directory())?;
        let read = |name| fs::read_to_string(self.directory().join(name)).ok()?.trim().parse::<u64>().ok();
        Ok(BdiSettings {
            read_ahead_kb: read("read_ahead_kb").and_then(|value| u32::try_from(value).ok()),
            strict_limit: read("strict_limit").map(|value| value != 0),
            max_ratio: read("max_ratio").and_then(|value| u8::try_from(value).ok()),
            max_bytes: read("max_bytes"),
        })
    }

    fn write(&self, name: &str, value: Option<impl ToString>) -> io::Result<()> {
        let Some(value) = value.map(|value| value.to_string()) else { return Ok(()) };
        let path = self.directory().join(name);
        fs::write(&path, &value).map_err(|error| {
            io::Error::new(error.kind(), format!("{} does not take {value}: {error}", path.display()))
        })
    }

    fn directory(&self) -> PathBuf {
        PathBuf::from(format!("/sys/class/bdi/{}:{}", self.major, self.minor))
    }
}
