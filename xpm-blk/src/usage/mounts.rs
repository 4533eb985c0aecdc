//! Parsing `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).

use xpm_control::proc::unescape;

use super::{DeviceNumber, parse_number};

/// A mount of a table.
pub(crate) struct Mount<'a> {
    /// Its number, as proc_pid_fdinfo(5) names it.
    pub(crate) number: &'a str,
    /// The device number of its file system.
    pub(crate) device: DeviceNumber,
    place: &'a str,
}

/// All mounts of a table; lines of another form are left out.
pub(crate) fn all(table: &str) -> impl Iterator<Item = Mount<'_>> {
    table.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let number = fields.next()?;
        let device = parse_number(fields.nth(1)?)?;
        Some(Mount { number, device, place: fields.nth(1)? })
    })
}

/// The mount points of file systems on one of these devices.
///
/// Compares the device number of the file system. btrfs shows a number of its own there, and the path of the
/// mount source is not compared either: such a device is found by its exclusive opener.
pub(super) fn of(table: &str, numbers: &[DeviceNumber]) -> Vec<String> {
    let on_these = all(table).filter(|mount| numbers.contains(&mount.device));
    on_these.map(|mount| unescape(mount.place)).collect()
}

/// The mount sources that are paths.
pub(super) fn sources(table: &str) -> impl Iterator<Item = String> {
    let source = |line: &str| line.split_once(" - ")?.1.split_ascii_whitespace().nth(1).map(unescape);
    table.lines().filter_map(source).filter(|source| source.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TABLE: &str = "22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\
                         90 22 259:3 / /mnt/x\\040y rw shared:50 - xfs /dev/ublkb0 rw\n\
                         91 22 0:5 / /proc rw - proc proc rw\n";

    #[test]
    fn by_device_number() {
        let number = |minor| DeviceNumber { major: 259, minor };
        assert_eq!(of(TABLE, &[number(3)]), ["/mnt/x y"]);
        assert_eq!(of(TABLE, &[number(1), number(3)]), ["/", "/mnt/x y"]);
        assert!(of(TABLE, &[number(4)]).is_empty());
        assert!(of(TABLE, &[]).is_empty());
    }

    #[test]
    fn by_source() {
        assert_eq!(sources(TABLE).collect::<Vec<_>>(), ["/dev/vda1", "/dev/ublkb0"]);
    }

    proptest! {
        #[test]
        fn any_table_is_parsed(table in "[0-9: /a\\\\\n-]{0,200}") {
            let _ = of(&table, &[DeviceNumber { major: 0, minor: 0 }]);
            let _ = sources(&table).count();
        }
    }
}
