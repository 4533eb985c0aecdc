//! Reading the kernel's files about RDMA devices (`Documentation/ABI/stable/sysfs-class-infiniband`). Any
//! content of a file becomes a value or none, never an error.

use std::fs::{self, OpenOptions};
use std::net::Ipv6Addr;
use std::path::Path;

use rustix::io::Errno;

use super::{
    Access, Device, Gid, GidKind, Guid, Inventory, Kernel, Libraries, LinkLayer, NoLimits, Node, Port,
    PortState,
};

/// ARPHRD_INFINIBAND (`linux/if_arp.h`): the type of a network device that is IP over InfiniBand.
const ARPHRD_INFINIBAND: &str = "32";
/// RDMA_NODE_RNIC (`rdma/ib_verbs.h`): the type of a node that speaks iWARP.
const NODE_RNIC: u8 = 4;

/// The inventory according to `sys` and `dev` below `root`. Libraries and limits are not filled in yet.
pub(super) fn read(root: &Path) -> Inventory {
    let class = root.join("sys/class");
    let nodes = nodes(root);
    let devices = names(&class.join("infiniband"));
    Inventory {
        libraries: Libraries::default(),
        kernel: Kernel {
            core: class.join("infiniband").is_dir(),
            verbs: class.join("infiniband_verbs").is_dir(),
            failed: None,
        },
        manager: node(root, "rdma_cm"),
        devices: devices.into_iter().map(|name| device(&class, name, &nodes)).collect(),
    }
}

pub(super) fn any_device(root: &Path) -> bool {
    fs::read_dir(root.join("sys/class/infiniband")).is_ok_and(|mut devices| devices.next().is_some())
}

/// The device files, each with the name of its device.
fn nodes(root: &Path) -> Vec<(String, Node)> {
    let class = root.join("sys/class/infiniband_verbs");
    let of = |name: String| Some((line(&class.join(&name).join("ibdev"))?, node(root, &name)));
    names(&class).into_iter().filter_map(of).collect()
}

fn node(root: &Path, name: &str) -> Node {
    let path = root.join("dev/infiniband").join(name);
    // Only opening the file shows whether a device rule for the process forbids it.
    let opened = OpenOptions::new().read(true).write(true).open(&path);
    let access = opened.map_or_else(|error| refusal(Errno::from_io_error(&error)), |_| Access::Usable);
    Node { path, access }
}

fn refusal(errno: Option<Errno>) -> Access {
    match errno {
        // A device file whose driver was removed, or never loaded.
        Some(Errno::NOENT | Errno::NODEV | Errno::NXIO) => Access::Missing,
        Some(Errno::ACCESS | Errno::PERM) => Access::Denied,
        other => Access::Failed(other.unwrap_or(Errno::IO)),
    }
}

fn device(class: &Path, name: String, nodes: &[(String, Node)]) -> Device {
    let directory = class.join("infiniband").join(&name);
    // Soft-RoCE names its network device in a file that no other driver has.
    let rxe = directory.join("parent").is_file();
    let driver = if rxe { Some("rxe".to_owned()) } else { driver(&directory) };
    let iwarp = line(&directory.join("node_type")).as_deref().and_then(number) == Some(NODE_RNIC);
    let mut ports: Vec<Port> =
        names(&directory.join("ports")).iter().filter_map(|number| port(&directory, number, iwarp)).collect();
    ports.sort_by_key(|port| port.number);
    Device {
        software: rxe,
        driver,
        node_guid: line(&directory.join("node_guid")).and_then(|text| guid(&text)),
        node: nodes.iter().find(|(device, _)| *device == name).map(|(_, node)| node.clone()),
        limits: Err(NoLimits::Unasked),
        ports,
        name,
    }
}

fn driver(device: &Path) -> Option<String> {
    let driver = fs::read_link(device.join("device/driver")).ok()?;
    Some(driver.file_name()?.to_str()?.to_owned())
}

fn port(device: &Path, name: &str, iwarp: bool) -> Option<Port> {
    let number = name.parse().ok().filter(|number| *number > 0)?;
    let directory = device.join("ports").join(name);
    let link_layer = match line(&directory.join("link_layer")).as_deref() {
        Some("InfiniBand") => Some(LinkLayer::InfiniBand),
        Some("Ethernet") => Some(LinkLayer::Ethernet),
        _ => None,
    };
    let gids = gids(&directory, link_layer, iwarp);
    let net_devices = match link_layer {
        Some(LinkLayer::InfiniBand) => over_infiniband(device, number),
        _ => net_devices(&gids),
    };
    Some(Port {
        number,
        state: line(&directory.join("state")).map_or(PortState::Unknown, |text| state(&text)),
        link_layer,
        mtu: None,
        rate: line(&directory.join("rate")),
        gids,
        net_devices,
    })
}

/// The addresses in use. Unused entries are zero, or their attributes cannot be read.
fn gids(port: &Path, link_layer: Option<LinkLayer>, iwarp: bool) -> Vec<Gid> {
    let mut gids: Vec<Gid> =
        names(&port.join("gids")).iter().filter_map(|name| gid(port, name, link_layer, iwarp)).collect();
    gids.sort_by_key(|gid| gid.index);
    gids
}

fn gid(port: &Path, name: &str, link_layer: Option<LinkLayer>, iwarp: bool) -> Option<Gid> {
    let index = name.parse().ok()?;
    // A table may have a thousand entries, of which few are set.
    let gid = line(&port.join("gids").join(name))?.parse().ok().filter(|gid| !is_unset(*gid))?;
    let kind = match (link_layer, iwarp) {
        (_, true) => GidKind::Iwarp,
        (Some(LinkLayer::InfiniBand), _) => GidKind::InfiniBand,
        _ => roce(&line(&port.join("gid_attrs/types").join(name))?)?,
    };
    let net_device = line(&port.join("gid_attrs/ndevs").join(name));
    Some(Gid { index, gid, kind, net_device })
}

/// An InfiniBand port shows its subnet's prefix even before it has a number of its own.
fn is_unset(gid: Ipv6Addr) -> bool {
    gid.segments()[4..] == [0; 4]
}

fn roce(kind: &str) -> Option<GidKind> {
    match kind {
        "IB/RoCE v1" => Some(GidKind::RoceV1),
        "RoCE v2" => Some(GidKind::RoceV2),
        _ => None,
    }
}

fn net_devices(gids: &[Gid]) -> Vec<String> {
    let mut found: Vec<String> = gids.iter().filter_map(|gid| gid.net_device.clone()).collect();
    found.sort();
    found.dedup();
    found
}

/// The network devices of a card that are IP over InfiniBand of this port.
fn over_infiniband(device: &Path, port: u8) -> Vec<String> {
    let directory = device.join("device/net");
    let is_of_port = |name: &String| {
        let of = |file: &str| line(&directory.join(name).join(file));
        of("type").as_deref() == Some(ARPHRD_INFINIBAND)
            && of("dev_port").and_then(|text| text.parse::<u8>().ok()) == Some(port - 1)
    };
    names(&directory).into_iter().filter(is_of_port).collect()
}

/// The port's state, written as `4: ACTIVE` (enum ib_port_state in `rdma/ib_verbs.h`).
fn state(text: &str) -> PortState {
    match number(text) {
        Some(1) => PortState::Down,
        Some(2) => PortState::Initializing,
        Some(3) => PortState::Armed,
        Some(4) => PortState::Active,
        Some(5) => PortState::ActiveDefer,
        _ => PortState::Unknown,
    }
}

/// The leading number of a text like `4: ACTIVE`.
fn number(text: &str) -> Option<u8> {
    text.split_once(':')?.0.trim().parse().ok()
}

/// Parses `0002:c903:0021:b3a0`; none for the GUID of all zeros, which means unset.
fn guid(text: &str) -> Option<Guid> {
    let mut bits = 0_u64;
    let mut parts = 0;
    for part in text.split(':') {
        let digits = part.len() == 4 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        bits = bits << 16 | u64::from(digits.then(|| u16::from_str_radix(part, 16).ok())??);
        parts += 1;
    }
    (parts == 4 && bits != 0).then_some(Guid(bits))
}

/// The entries of a directory in order; none when it cannot be read.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// A file's one line; none when it is empty or cannot be read.
fn line(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    struct Tree(TempDir);

    impl Tree {
        fn new() -> Tree {
            Tree(tempfile::tempdir().unwrap())
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn link(&self, path: &str, target: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(target, path).unwrap();
        }

        /// A port with link, and the given GIDs with their types and network devices.
        fn port(&self, port: &str, layer: &str, gids: &[(&str, &str, &str, &str)]) {
            self.write(&format!("{port}/state"), "4: ACTIVE\n");
            self.write(&format!("{port}/link_layer"), layer);
            self.write(&format!("{port}/rate"), "100 Gb/sec (4X EDR)\n");
            for (index, gid, kind, net_device) in gids {
                self.write(&format!("{port}/gids/{index}"), gid);
                if !kind.is_empty() {
                    self.write(&format!("{port}/gid_attrs/types/{index}"), kind);
                    self.write(&format!("{port}/gid_attrs/ndevs/{index}"), net_device);
                }
            }
        }

        fn read(&self) -> Inventory {
            read(self.0.path())
        }
    }

    const RXE: &str = "sys/class/infiniband/rxe0";

    fn soft_roce() -> Tree {
        let tree = Tree::new();
        tree.write(&format!("{RXE}/parent"), "eth0\n");
        tree.write(&format!("{RXE}/node_guid"), "5054:00ff:fe12:3456\n");
        tree.write(&format!("{RXE}/node_type"), "1: CA\n");
        tree.port(
            &format!("{RXE}/ports/1"),
            "Ethernet\n",
            &[
                ("0", "fe80:0000:0000:0000:5054:00ff:fe12:3456\n", "RoCE v2\n", "eth0\n"),
                ("1", "0000:0000:0000:0000:0000:ffff:0a00:020f\n", "RoCE v2\n", "eth0\n"),
                ("10", "fe80::1", "IB/RoCE v1\n", "eth1\n"),
                ("2", "0000:0000:0000:0000:0000:0000:0000:0000\n", "RoCE v2\n", "eth0\n"),
                ("3", "fe80::2", "", ""),
                ("4", "fe80::3", "RoCE v9", "eth0"),
            ],
        );
        tree.write("sys/class/infiniband_verbs/abi_version", "6\n");
        tree.write("sys/class/infiniband_verbs/uverbs0/ibdev", "rxe0\n");
        tree
    }

    #[test]
    fn a_machine_with_soft_roce() {
        let tree = soft_roce();
        tree.write("dev/infiniband/rdma_cm", "");
        let found = tree.read();
        assert_eq!(found.kernel, Kernel { core: true, verbs: true, failed: None });
        assert_eq!(found.manager.access, Access::Usable);
        assert!(any_device(tree.0.path()));
        let [device] = &found.devices[..] else { panic!("{found:?}") };
        assert_eq!((device.driver.as_deref(), device.software), (Some("rxe"), true));
        assert_eq!(device.node_guid, Some(Guid(0x5054_00ff_fe12_3456)));
        let node = device.node.as_ref().unwrap();
        assert_eq!(node.access, Access::Missing);
        assert!(node.path.ends_with("dev/infiniband/uverbs0"));

        let [port] = &device.ports[..] else { panic!("{device:?}") };
        assert_eq!((port.number, port.state), (1, PortState::Active));
        assert_eq!(
            (port.link_layer, port.rate.as_deref()),
            (Some(LinkLayer::Ethernet), Some("100 Gb/sec (4X EDR)"))
        );
        let gids: Vec<_> = port.gids.iter().map(|gid| (gid.index, gid.kind)).collect();
        assert_eq!(gids, [(0, GidKind::RoceV2), (1, GidKind::RoceV2), (10, GidKind::RoceV1)]);
        assert_eq!(port.gids[1].address(), Some([10, 0, 2, 15].into()));
        assert_eq!(port.net_devices, ["eth0", "eth1"]);
    }

    #[test]
    fn a_card_with_two_ports_of_infiniband() {
        let tree = Tree::new();
        let card = "sys/class/infiniband/mlx4_0";
        tree.link(&format!("{card}/device/driver"), "../../../bus/pci/drivers/mlx4_core");
        tree.write(&format!("{card}/node_type"), "1: CA\n");
        let gid = "fe80:0000:0000:0000:0002:c903:0021:b3a1";
        tree.port(&format!("{card}/ports/1"), "InfiniBand\n", &[("0", gid, "IB/RoCE v1", "")]);
        tree.port(&format!("{card}/ports/2"), "InfiniBand\n", &[("0", "fe80::", "IB/RoCE v1", "")]);
        tree.write(&format!("{card}/ports/2/state"), "1: DOWN\n");
        tree.write(&format!("{card}/ports/0/state"), "4: ACTIVE\n");
        for (name, kind, port) in [("ib0", "32", "0"), ("ib1", "32", "1"), ("eth4", "1", "0")] {
            tree.write(&format!("{card}/device/net/{name}/type"), kind);
            tree.write(&format!("{card}/device/net/{name}/dev_port"), port);
        }
        let device = tree.read().devices.remove(0);
        assert_eq!((device.driver.as_deref(), device.software), (Some("mlx4_core"), false));
        let [first, second] = &device.ports[..] else { panic!("{device:?}") };
        assert_eq!(
            (first.gids[0].kind, &first.net_devices[..]),
            (GidKind::InfiniBand, &["ib0".to_owned()][..])
        );
        assert_eq!(first.gids[0].address(), None);
        assert_eq!((second.state, second.gids.len()), (PortState::Down, 0), "its GID is only the subnet");
    }

    #[test]
    fn iwarp_is_distinguished_from_roce() {
        let tree = soft_roce();
        tree.write(&format!("{RXE}/node_type"), "4: RNIC\n");
        let gids = tree.read().devices.remove(0).ports.remove(0).gids;
        assert!(
            !gids.is_empty() && gids.iter().all(|gid| gid.kind == GidKind::Iwarp && gid.address().is_none())
        );
    }

    #[test]
    fn a_machine_without_rdma() {
        let found = Tree::new().read();
        assert_eq!(found.kernel, Kernel::default());
        assert_eq!((found.devices.len(), found.manager.access), (0, Access::Missing));

        let tree = Tree::new();
        fs::create_dir_all(tree.0.path().join("sys/class/infiniband")).unwrap();
        assert_eq!(tree.read().kernel, Kernel { core: true, verbs: false, failed: None });
        assert!(!any_device(tree.0.path()));
    }

    #[test]
    fn files_that_cannot_be_opened() {
        let tree = Tree::new();
        fs::create_dir_all(tree.0.path().join("dev/infiniband/rdma_cm")).unwrap();
        assert_eq!(tree.read().manager.access, Access::Failed(Errno::ISDIR));
        assert_eq!(refusal(Some(Errno::NXIO)), Access::Missing);
        assert_eq!(refusal(Some(Errno::PERM)), Access::Denied);
    }

    #[test]
    fn guids_and_states() {
        assert_eq!(guid("0002:c903:0021:b3a0"), Some(Guid(0x0002_c903_0021_b3a0)));
        for bad in [
            "",
            "0000:0000:0000:0000",
            "1:2:3:4",
            "0002:c903:0021",
            "0002:c903:0021:b3a0:0000",
            "0002:c903:+021:b3a0",
        ] {
            assert_eq!(guid(bad), None, "{bad}");
        }
        assert_eq!(state("5: ACTIVE_DEFER"), PortState::ActiveDefer);
        for bad in ["", "ACTIVE", "9: X", "256: X", "-1: X"] {
            assert_eq!(state(bad), PortState::Unknown, "{bad}");
        }
    }

    proptest! {
        // Each case creates a tree of files.
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_text_is_read(text in "[0-9a-f:.+ A-Zx\n\\PC]{0,40}") {
            let tree = soft_roce();
            for file in ["node_guid", "node_type", "ports/1/state", "ports/1/gids/0", "ports/1/gid_attrs/types/1"] {
                tree.write(&format!("{RXE}/{file}"), &text);
            }
            let device = tree.read().devices.remove(0);
            prop_assert_eq!(device.ports.len(), 1);
            prop_assert!(device.ports[0].gids.iter().any(|gid| gid.index == 10));
        }
    }
}
