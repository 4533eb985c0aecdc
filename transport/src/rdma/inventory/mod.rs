//! The RDMA devices of this machine as plain data, and the obstacles to using them.
//!
//! `sysfs` reads the kernel's files below any root directory; `query` asks the library for limits, which no
//! file contains. These functions do not change the machine.

mod query;
mod sysfs;
mod text;

use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// The RDMA equipment of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    /// The libraries that could be loaded.
    pub libraries: Libraries,
    /// The available parts of the kernel's RDMA support.
    pub kernel: Kernel,
    /// The device file of the connection manager, `/dev/infiniband/rdma_cm`.
    pub manager: Node,
    /// The devices by name.
    pub devices: Vec<Device>,
}

/// The libraries of rdma-core; a program loads them at its start if they are installed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Libraries {
    /// `libibverbs.so.1`.
    pub verbs: bool,
    /// `librdmacm.so.1`.
    pub manager: bool,
}

/// Parts of the kernel's RDMA support.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kernel {
    /// `ib_core`: the kernel knows RDMA devices.
    pub core: bool,
    /// `ib_uverbs`: processes can use them.
    pub verbs: bool,
    /// The error, other than a missing `ib_uverbs`, with which the library failed to list devices.
    pub failed: Option<Errno>,
}

/// A device file that a process opens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The expected path.
    pub path: PathBuf,
    /// The result of opening it.
    pub access: Access,
}

/// Whether this process may use a device file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It can be opened.
    Usable,
    /// The file does not exist.
    Missing,
    /// The file exists, but this process may not open it: its mode, or a device rule for the process, forbids
    /// it.
    Denied,
    /// The file cannot be opened for another reason.
    Failed(Errno),
}

/// An RDMA device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The kernel's name of the device, such as `mlx5_0`.
    pub name: String,
    /// The kernel's driver, such as `mlx5_core`, `rxe` or `siw`, where it is known.
    pub driver: Option<String>,
    /// Implemented by the processor over a network device (rxe, siw) rather than by a card.
    pub software: bool,
    /// The GUID of the node; none until it is set.
    pub node_guid: Option<Guid>,
    /// Its device file, `/dev/infiniband/uverbsN`; none while `ib_uverbs` does not show it.
    pub node: Option<Node>,
    /// The device's limits.
    pub limits: Result<Limits, NoLimits>,
    /// Its ports by number.
    pub ports: Vec<Port>,
}

/// A 64-bit name of a node, written as the kernel does: `0002:c903:0021:b3a0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Guid(pub u64);

/// The limits of a device, by `ibv_query_device(3)`. They need not be reachable all at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest memory region in bytes.
    pub max_mr_size: u64,
    /// Memory regions.
    pub max_mr: u32,
    /// Protection domains.
    pub max_pd: u32,
    /// Queue pairs.
    pub max_qp: u32,
    /// Outstanding work requests in one queue of a queue pair.
    pub max_qp_wr: u32,
    /// Completions in one completion queue.
    pub max_cqe: u32,
    /// READs that one queue pair answers concurrently.
    pub max_qp_rd_atom: u32,
    /// READs that one queue pair issues concurrently.
    pub max_qp_init_rd_atom: u32,
}

/// Why the limits of a device are not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoLimits {
    /// The library was not asked: it is missing, or cannot list devices.
    Unasked,
    /// The library has no provider for this device's driver.
    NoProvider,
    /// The kernel has the device but offers no verbs for it: the device is being removed.
    Leaving,
    /// The device could not be opened or did not answer.
    Failed(Errno),
}

/// A port of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Its number, from 1.
    pub number: u8,
    /// The state of its link.
    pub state: PortState,
    /// Its kind of network; none for a kind that this program does not know.
    pub link_layer: Option<LinkLayer>,
    /// Longest payload of a packet in bytes, 256 to 4096; none when the device was not asked.
    pub mtu: Option<u32>,
    /// The link's speed in the kernel's words, such as `100 Gb/sec (4X EDR)`.
    pub rate: Option<String>,
    /// Its addresses by index, without unused entries.
    pub gids: Vec<Gid>,
    /// The network devices over the port: those of its addresses, or those of IP over InfiniBand.
    pub net_devices: Vec<String>,
}

/// The state of a port's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortState {
    /// No link.
    Down,
    /// A link that no subnet manager has set up yet.
    Initializing,
    /// Set up by the subnet manager, which has not activated it yet.
    Armed,
    /// Data can pass.
    Active,
    /// Active, while the link is recovering.
    ActiveDefer,
    /// A state without a name.
    Unknown,
}

/// The network that a port is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkLayer {
    /// InfiniBand.
    InfiniBand,
    /// Ethernet, for RoCE or iWARP.
    Ethernet,
}

/// An address of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gid {
    /// Its index in the port's table.
    pub index: u32,
    /// The address; an IPv4 address is mapped, `::ffff:10.0.0.1`.
    pub gid: Ipv6Addr,
    /// The format of packets to it.
    pub kind: GidKind,
    /// The network device that has this address.
    pub net_device: Option<String>,
}

/// The format of packets to a [`Gid`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GidKind {
    /// InfiniBand's own.
    InfiniBand,
    /// RoCE v1: Ethernet frames of their own type, which no router passes on.
    RoceV1,
    /// RoCE v2: UDP, port 4791.
    RoceV2,
    /// iWARP: TCP.
    Iwarp,
}

/// An obstacle to RDMA on a machine. Its text is a clause that describes the obstacle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// The kernel's RDMA support is neither loaded nor built in.
    NoKernelSupport,
    /// The kernel has no RDMA device.
    NoDevice,
    /// The kernel has devices, but `ib_uverbs` is not loaded.
    NoVerbs,
    /// `libibverbs.so.1` could not be loaded.
    NoVerbsLibrary,
    /// `librdmacm.so.1` could not be loaded.
    NoManagerLibrary,
    /// The library could not list the devices.
    NotListed(Errno),
    /// A device file cannot be used; its access is never [`Access::Usable`].
    Node(Node),
    /// The library has no provider for this device.
    NoProvider(String),
    /// The kernel offers no verbs for this device: the device is being removed.
    Leaving(String),
    /// This device cannot be opened or does not answer.
    NotOpened(String, Errno),
    /// The machine has devices, but none of their ports is active.
    NoActivePort,
}

/// Whether the kernel has an RDMA device, usable or not. Reads one directory.
pub fn any_device() -> bool {
    sysfs::any_device(Path::new("/"))
}

impl Inventory {
    /// Reads the inventory of this machine. Opens each device and its connection manager and closes them
    /// again, which takes some milliseconds; not for the data path.
    pub fn read() -> Inventory {
        let mut inventory = sysfs::read(Path::new("/"));
        inventory.libraries = query::libraries();
        if inventory.libraries.verbs && inventory.kernel.verbs {
            match query::devices() {
                Ok(listed) => inventory.merge(&listed),
                Err(errno) => inventory.kernel.failed = Some(errno),
            }
        }
        inventory
    }

    /// Adds the library's answers to the devices.
    fn merge(&mut self, listed: &[query::Listed]) {
        for device in &mut self.devices {
            let listed = listed.iter().find(|listed| listed.name == device.name);
            match listed.map(|listed| &listed.answer) {
                None if device.node.is_none() => device.limits = Err(NoLimits::Leaving),
                None => device.limits = Err(NoLimits::NoProvider),
                Some(Err(errno)) => device.limits = Err(NoLimits::Failed(*errno)),
                Some(Ok(answer)) => device.learn(answer),
            }
        }
    }

    /// Whether at least one device is usable through the connection manager and has an active port.
    pub fn is_usable(&self) -> bool {
        self.libraries.manager
            && self.manager.access == Access::Usable
            && self.devices.iter().any(|device| device.limits.is_ok() && device.is_active())
    }

    /// The obstacles, in the order in which they have to be removed. Empty when there is none; one device may
    /// be usable while another has an obstacle: see [`Inventory::is_usable`].
    pub fn obstacles(&self) -> Vec<Obstacle> {
        let mut found = Vec::new();
        if !self.kernel.core {
            found.push(Obstacle::NoKernelSupport);
        } else if self.devices.is_empty() {
            found.push(Obstacle::NoDevice);
        } else if !self.kernel.verbs {
            found.push(Obstacle::NoVerbs);
        }
        if !self.libraries.verbs {
            found.push(Obstacle::NoVerbsLibrary);
        }
        if !self.libraries.manager {
            found.push(Obstacle::NoManagerLibrary);
        }
        if !self.devices.is_empty() {
            found.extend(self.obstacles_of_devices());
        }
        found
    }

    fn obstacles_of_devices(&self) -> Vec<Obstacle> {
        let mut found: Vec<Obstacle> = self.kernel.failed.map(Obstacle::NotListed).into_iter().collect();
        let nodes = self.devices.iter().filter_map(|device| device.node.as_ref()).chain([&self.manager]);
        found.extend(nodes.filter(|node| node.access != Access::Usable).cloned().map(Obstacle::Node));
        for device in &self.devices {
            let node_is_usable = device.node.as_ref().is_some_and(|node| node.access == Access::Usable);
            match device.limits {
                Err(NoLimits::NoProvider) => found.push(Obstacle::NoProvider(device.name.clone())),
                Err(NoLimits::Leaving) => found.push(Obstacle::Leaving(device.name.clone())),
                Err(NoLimits::Failed(errno)) if node_is_usable => {
                    found.push(Obstacle::NotOpened(device.name.clone(), errno));
                }
                _ => {}
            }
        }
        if !self.devices.iter().any(Device::is_active) {
            found.push(Obstacle::NoActivePort);
        }
        found
    }
}

impl Device {
    fn learn(&mut self, answer: &query::Answer) {
        self.limits = Ok(answer.limits);
        if let Some(driver) = query::software_driver(answer.vendor_id) {
            self.driver = Some(driver.to_owned());
            self.software = true;
        }
        for port in &mut self.ports {
            port.mtu = answer.mtus.get(usize::from(port.number.saturating_sub(1))).copied().flatten();
        }
    }

    /// Whether at least one of its ports is active.
    pub fn is_active(&self) -> bool {
        self.ports.iter().any(|port| port.state == PortState::Active)
    }
}

impl Gid {
    /// The IP address that the GID stands for; the connection manager uses this address. None for GIDs of
    /// InfiniBand and iWARP, which stand for no IP address.
    pub fn address(&self) -> Option<IpAddr> {
        match self.kind {
            GidKind::RoceV1 | GidKind::RoceV2 => Some(self.gid.to_canonical()),
            GidKind::InfiniBand | GidKind::Iwarp => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Inventory {
        let node =
            |name: &str| Node { path: Path::new("/dev/infiniband").join(name), access: Access::Usable };
        let port = Port {
            number: 1,
            state: PortState::Active,
            link_layer: Some(LinkLayer::Ethernet),
            mtu: None,
            rate: None,
            gids: vec![],
            net_devices: vec![],
        };
        let device = Device {
            name: "mlx5_0".into(),
            driver: Some("mlx5_core".into()),
            software: false,
            node_guid: None,
            node: Some(node("uverbs0")),
            limits: Err(NoLimits::Unasked),
            ports: vec![port],
        };
        Inventory {
            libraries: Libraries { verbs: true, manager: true },
            kernel: Kernel { core: true, verbs: true, failed: None },
            manager: node("rdma_cm"),
            devices: vec![device],
        }
    }

    fn answer(vendor_id: u32) -> query::Answer {
        let limits = Limits {
            max_mr_size: u64::MAX,
            max_mr: 1,
            max_pd: 2,
            max_qp: 3,
            max_qp_wr: 4,
            max_cqe: 5,
            max_qp_rd_atom: 6,
            max_qp_init_rd_atom: 7,
        };
        query::Answer { vendor_id, limits, mtus: vec![Some(4096)] }
    }

    fn listed(name: &str, answer: Result<query::Answer, Errno>) -> query::Listed {
        query::Listed { name: name.to_owned(), answer }
    }

    #[test]
    fn answers_are_added_to_their_devices() {
        let mut good = machine();
        good.merge(&[listed("other", Err(Errno::IO)), listed("mlx5_0", Ok(answer(0x15b3)))]);
        assert_eq!(good.devices[0].limits.map(|limits| limits.max_qp), Ok(3));
        assert_eq!(good.devices[0].ports[0].mtu, Some(4096));
        assert!(good.is_usable());
        assert_eq!(good.obstacles(), []);

        let mut soft = machine();
        soft.merge(&[listed("mlx5_0", Ok(answer(0x0062_6d74)))]);
        assert_eq!((soft.devices[0].driver.as_deref(), soft.devices[0].software), (Some("siw"), true));
    }

    #[test]
    fn a_device_that_the_library_does_not_serve_is_an_obstacle() {
        let mut unknown = machine();
        unknown.merge(&[]);
        assert_eq!(unknown.obstacles(), [Obstacle::NoProvider("mlx5_0".into())]);
        assert!(!unknown.is_usable());

        let mut leaving = machine();
        leaving.devices[0].node = None;
        leaving.merge(&[]);
        assert_eq!(leaving.obstacles(), [Obstacle::Leaving("mlx5_0".into())]);

        let mut refused = machine();
        refused.merge(&[listed("mlx5_0", Err(Errno::NOMEM))]);
        assert_eq!(refused.obstacles(), [Obstacle::NotOpened("mlx5_0".into(), Errno::NOMEM)]);

        // A device that may not be opened is reported once.
        let mut denied = machine();
        let node = Node { path: "/dev/infiniband/uverbs0".into(), access: Access::Denied };
        denied.devices[0].node = Some(node.clone());
        denied.merge(&[listed("mlx5_0", Err(Errno::ACCESS))]);
        assert_eq!(denied.obstacles(), [Obstacle::Node(node)]);
    }

    #[test]
    fn every_missing_part_is_reported() {
        let mut without_libraries = machine();
        without_libraries.libraries = Libraries::default();
        assert_eq!(without_libraries.obstacles(), [Obstacle::NoVerbsLibrary, Obstacle::NoManagerLibrary]);

        let mut without_manager = machine();
        without_manager.manager.access = Access::Missing;
        without_manager.devices[0].ports[0].state = PortState::Down;
        let text: Vec<String> = without_manager.obstacles().iter().map(ToString::to_string).collect();
        assert_eq!(text, ["/dev/infiniband/rdma_cm is not there", "no port is active"]);

        let mut without_verbs = machine();
        without_verbs.kernel.verbs = false;
        assert_eq!(without_verbs.obstacles(), [Obstacle::NoVerbs]);
    }

    /// On a machine without devices, missing device files and ports are no obstacles.
    #[test]
    fn a_machine_without_devices_has_one_obstacle() {
        let mut none = machine();
        none.devices.clear();
        none.manager.access = Access::Missing;
        assert_eq!(none.obstacles(), [Obstacle::NoDevice]);
        none.kernel = Kernel::default();
        assert_eq!(none.obstacles(), [Obstacle::NoKernelSupport]);
    }

    #[test]
    fn this_machine_can_be_read() {
        let inventory = Inventory::read();
        assert_eq!(inventory.kernel.core, Path::new("/sys/class/infiniband").exists());
        if inventory.is_usable() {
            assert!(inventory.devices.iter().any(|device| device.limits.is_ok()));
        } else {
            assert!(!inventory.obstacles().is_empty());
        }
    }

    #[test]
    fn addresses_behind_gids() {
        let gid = |gid: &str, kind| Gid { index: 0, gid: gid.parse().unwrap(), kind, net_device: None };
        assert_eq!(gid("::ffff:10.0.0.1", GidKind::RoceV2).address(), Some([10, 0, 0, 1].into()));
        assert_eq!(gid("fe80::1", GidKind::RoceV1).address(), Some("fe80::1".parse().unwrap()));
        assert_eq!(gid("fe80::1", GidKind::InfiniBand).address(), None);
    }
}
