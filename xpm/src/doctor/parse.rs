//! Parsers of the kernel's text files. Whatever a file holds, the answer is a value or none.

/// Major and minor version of a kernel release such as `6.12.48+deb12-amd64`.
pub(super) fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Whether `/proc/modules`, `modules.dep` or `modules.builtin` names this module.
pub(super) fn lists_module(text: &str, module: &str) -> bool {
    text.lines().filter_map(|line| line.split([' ', ':']).next()).any(|path| module_name(path) == module)
}

/// `kernel/drivers/block/ublk_drv.ko.xz` is the module `ublk_drv`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// A limit on a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Limit {
    Unlimited,
    Bytes(u64),
}

/// The soft limit of this name in `/proc/PID/limits`.
pub(super) fn limit(text: &str, name: &str) -> Option<Limit> {
    let values = text.lines().find_map(|line| line.strip_prefix(name))?;
    match values.split_whitespace().next()? {
        "unlimited" => Some(Limit::Unlimited),
        bytes => bytes.parse().ok().map(Limit::Bytes),
    }
}

/// The effective capabilities in `/proc/PID/status`, one bit each.
pub(super) fn capabilities(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(value.trim(), 16).ok()
}

/// The active scheduler in `queue/scheduler`: `none` of `[none] mq-deadline`.
pub(super) fn scheduler(text: &str) -> Option<&str> {
    let text = text.trim();
    match text.split_once('[') {
        Some((_, rest)) => rest.split_once(']').map(|(name, _)| name),
        // A device without a choice writes the bare name.
        None if !text.is_empty() && !text.contains(char::is_whitespace) => Some(text),
        None => None,
    }
}

/// Completed discards in a block device's `stat`.
pub(super) fn discards(stat: &str) -> Option<u64> {
    stat.split_whitespace().nth(11)?.parse().ok()
}

/// The distribution's `ID` in `/etc/os-release`.
pub(super) fn distribution(os_release: &str) -> Option<&str> {
    os_release.lines().find_map(|line| line.strip_prefix("ID=")).map(|id| id.trim().trim_matches(['"', '\'']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions() {
        assert_eq!(kernel_version("6.12.48+deb12-amd64"), Some((6, 12)));
        assert_eq!(kernel_version("7.0-rc1"), Some((7, 0)));
        for bad in ["", "6", "six.twelve", "6.", ".6", "99999999999.1"] {
            assert_eq!(kernel_version(bad), None, "{bad}");
        }
    }

    #[test]
    fn modules_of_the_three_lists() {
        assert!(lists_module("nbd 65536 0 - Live 0x0\nublk_drv 49152 0 - Live 0x0\n", "ublk_drv"));
        assert!(lists_module("kernel/drivers/block/ublk_drv.ko.xz: kernel/a.ko\n", "ublk_drv"));
        assert!(lists_module("kernel/drivers/block/null-blk.ko\n", "null_blk"));
        assert!(!lists_module("kernel/b.ko: kernel/drivers/block/nbd.ko\n", "nbd"), "only a dependency");
        assert!(!lists_module("nbdx 1 0\n\n \n:\n", "nbd"));
    }

    #[test]
    fn limits() {
        let limits =
            "Limit  Soft  Hard\nMax locked memory         8388608              8388608              bytes\n";
        assert_eq!(limit(limits, "Max locked memory"), Some(Limit::Bytes(8 << 20)));
        assert_eq!(
            limit("Max locked memory  unlimited unlimited bytes", "Max locked memory"),
            Some(Limit::Unlimited)
        );
        assert_eq!(limit("Max locked memory", "Max locked memory"), None);
        assert_eq!(limit("", "Max locked memory"), None);
    }

    #[test]
    fn capability_sets() {
        assert_eq!(capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n"), Some(0x1ff_ffff_ffff));
        assert_eq!(capabilities("CapEff:\tzz\n"), None);
        assert_eq!(capabilities("CapPrm:\t00\n"), None);
    }

    #[test]
    fn block_settings() {
        assert_eq!(scheduler("mq-deadline [none]\n"), Some("none"));
        assert_eq!(scheduler("none\n"), Some("none"));
        for bad in ["", "[none", "a b"] {
            assert_eq!(scheduler(bad), None, "{bad}");
        }
        assert_eq!(discards("1 2 3 4 5 6 7 8 9 10 11 12 13"), Some(12));
        assert_eq!(discards("1 2 3"), None);
        assert_eq!(distribution("NAME=x\nID=\"debian\"\n"), Some("debian"));
        assert_eq!(distribution("ID_LIKE=debian\n"), None);
    }
}
