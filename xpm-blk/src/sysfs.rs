//! The kernel's files about block devices under `/sys/block`.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use xpm_protocol::api::appliance::Counters;

/// Longest useful request, in KiB: swap writes at most this much at once.
const REQUEST_KIB: u64 = 1024;

/// Configures a new disk for memory as its storage: no scheduler (there is no head to move), not rotational,
/// no entropy from it, requests of up to 1 MiB. Write throttling in favour of reads is disabled, where the
/// kernel has it (`Documentation/ABI/stable/sysfs-block`, `wbt_lat_usec`): after a pause, as when another
/// process takes a device over, the kernel would let only few writes through at a time. An error is logged:
/// the disk works without the setting.
pub(crate) fn tune(disk: &str) {
    let longest = number(disk, "queue/max_hw_sectors_kb").unwrap_or(REQUEST_KIB).min(REQUEST_KIB);
    let longest = longest.to_string();
    let settings = [
        ("scheduler", "none"),
        ("rotational", "0"),
        ("add_random", "0"),
        ("max_sectors_kb", longest.as_str()),
    ];
    for (setting, value) in settings {
        set(disk, setting, value);
    }
    if path(disk, "queue/wbt_lat_usec").exists() {
        set(disk, "wbt_lat_usec", "0");
    }
}

/// Sets how often the driver checks for unanswered requests. Requests in flight keep the previous interval.
pub(crate) fn set_look_interval(disk: &str, interval: Duration) {
    set(disk, "io_timeout", &interval.as_millis().to_string());
}

fn set(disk: &str, setting: &str, value: &str) {
    let path = path(disk, "queue").join(setting);
    if let Err(error) = fs::write(&path, value) {
        tracing::warn!("cannot set {} to {value}: {error}", path.display());
    }
}

/// Makes udev process a disk again whose node stays while its content is replaced, as with the nbd driver.
pub(crate) fn tell_change(disk: &str) {
    let path = path(disk, "uevent");
    if let Err(error) = fs::write(&path, "change") {
        tracing::warn!("cannot write to {}: {error}", path.display());
    }
}

/// A file of a disk under `/sys/block`.
pub(crate) fn path(disk: &str, file: &str) -> PathBuf {
    PathBuf::from("/sys/block").join(disk).join(file)
}

/// The text of a file of a disk, without surrounding blanks.
pub(crate) fn text(disk: &str, file: &str) -> Option<String> {
    fs::read_to_string(path(disk, file)).ok().map(|text| text.trim().to_owned())
}

/// The number in a file of a disk.
pub(crate) fn number(disk: &str, file: &str) -> Option<u64> {
    text(disk, file)?.parse().ok()
}

/// The kernel's counters of a disk (`Documentation/block/stat.rst`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Statistics {
    pub(crate) reads: u64,
    pub(crate) read_sectors: u64,
    pub(crate) writes: u64,
    pub(crate) write_sectors: u64,
    pub(crate) in_flight: u64,
    pub(crate) discards: u64,
}

impl Statistics {
    pub(crate) fn of(disk: &str) -> Statistics {
        text(disk, "stat").and_then(|text| Statistics::parse(&text)).unwrap_or_default()
    }

    /// The difference to `before`; the number of requests in flight is the present one.
    pub(crate) fn since(self, before: Statistics) -> Statistics {
        Statistics {
            reads: self.reads.saturating_sub(before.reads),
            read_sectors: self.read_sectors.saturating_sub(before.read_sectors),
            writes: self.writes.saturating_sub(before.writes),
            write_sectors: self.write_sectors.saturating_sub(before.write_sectors),
            in_flight: self.in_flight,
            discards: self.discards.saturating_sub(before.discards),
        }
    }

    /// The counters in the form of the control interface.
    pub(crate) fn counters(self) -> Counters {
        Counters {
            reads: self.reads,
            read_bytes: self.read_sectors * 512,
            writes: self.writes,
            write_bytes: self.write_sectors * 512,
            trims: self.discards,
            ..Counters::default()
        }
    }

    fn parse(text: &str) -> Option<Statistics> {
        let fields: Vec<u64> = text.split_ascii_whitespace().map_while(|field| field.parse().ok()).collect();
        Some(Statistics {
            reads: *fields.first()?,
            read_sectors: *fields.get(2)?,
            writes: *fields.get(4)?,
            write_sectors: *fields.get(6)?,
            in_flight: *fields.get(8)?,
            // Present since Linux 4.18.
            discards: fields.get(11).copied().unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_of_the_documentation() {
        let text = "  11 22 33 44 55 66 77 88 99 110 121 132 143 154 165 176 187\n";
        let expected = Statistics {
            reads: 11,
            read_sectors: 33,
            writes: 55,
            write_sectors: 77,
            in_flight: 99,
            discards: 132,
        };
        assert_eq!(Statistics::parse(text), Some(expected));
        assert_eq!(expected.since(Statistics { reads: 1, in_flight: 50, ..Statistics::default() }).reads, 10);
        assert_eq!(expected.since(expected), Statistics { in_flight: 99, ..Statistics::default() });
        assert_eq!(expected.counters().write_bytes, 77 * 512);
        assert_eq!(Statistics::parse("1 2 3"), None);
        assert_eq!(Statistics::parse(""), None);
    }
}
