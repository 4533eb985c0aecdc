//! Links of this host, as the kernel describes them in `/sys/class/net`
//! (Documentation/ABI/testing/sysfs-class-net).

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use xpm_protocol::LinkSpeed;

/// The kernel's directory of links.
const SYSFS: &str = "/sys/class/net";

/// The name of the link that has this address.
pub fn link_of(address: IpAddr) -> Option<String> {
    let links = if_addrs::get_if_addrs().ok()?;
    links.into_iter().find(|link| link.ip() == address.to_canonical()).map(|link| link.name)
}

/// The speed of the link that has this address, if there is such a link and it has a speed; loopback and links
/// between namespaces have none.
pub fn speed_of(address: IpAddr) -> Option<LinkSpeed> {
    speed(Path::new(SYSFS), &link_of(address)?)
}

/// The speed of a link. The kernel states it in Mbit/s, and as -1 if it is unknown.
fn speed(sysfs: &Path, link: &str) -> Option<LinkSpeed> {
    let text = fs::read_to_string(sysfs.join(link).join("speed")).ok()?;
    let mbits: u64 = text.trim().parse().ok().filter(|&mbits| mbits > 0)?;
    mbits.checked_mul(1_000_000).map(LinkSpeed)
}

/// Bytes received and sent over a link since it came up.
pub fn bytes(link: &str) -> Option<(u64, u64)> {
    bytes_of(Path::new(SYSFS), link)
}

fn bytes_of(sysfs: &Path, link: &str) -> Option<(u64, u64)> {
    let count = |name: &str| {
        let text = fs::read_to_string(sysfs.join(link).join("statistics").join(name)).ok()?;
        text.trim().parse().ok()
    };
    Some((count("rx_bytes")?, count("tx_bytes")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_of_the_kernel_are_parsed() {
        let sysfs = tempfile::tempdir().unwrap();
        for (link, text, speed_) in
            [("a", "10000\n", Some(10_000_000_000)), ("b", "-1\n", None), ("c", "", None), ("d", "0", None)]
        {
            fs::create_dir(sysfs.path().join(link)).unwrap();
            fs::write(sysfs.path().join(link).join("speed"), text).unwrap();
            assert_eq!(speed(sysfs.path(), link), speed_.map(LinkSpeed), "{link}");
        }
        assert_eq!(speed(sysfs.path(), "none"), None);
    }

    #[test]
    fn traffic_of_a_link_is_counted() {
        let sysfs = tempfile::tempdir().unwrap();
        let statistics = sysfs.path().join("a/statistics");
        fs::create_dir_all(&statistics).unwrap();
        fs::write(statistics.join("rx_bytes"), "5\n").unwrap();
        assert_eq!(bytes_of(sysfs.path(), "a"), None);
        fs::write(statistics.join("tx_bytes"), "7\n").unwrap();
        assert_eq!(bytes_of(sysfs.path(), "a"), Some((5, 7)));
    }

    #[test]
    fn loopback_is_a_link_without_speed() {
        assert_eq!(link_of([127, 0, 0, 1].into()).as_deref(), Some("lo"));
        assert_eq!(speed_of([127, 0, 0, 1].into()), None);
        assert!(bytes("lo").is_some());
    }
}
