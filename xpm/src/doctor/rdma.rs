//! What a machine has for RDMA, and what mends what it lacks. RDMA is a choice: a machine without it is
//! as it should be, and nothing here is unsafe, for volumes go over TCP where RDMA does not work.

use xpm_protocol::ByteSize;
use xpm_transport::rdma::inventory::{
    Access, Device, Gid, Inventory, Limits, LinkLayer, NoLimits, Node, Obstacle, Port, PortState,
};

use super::fitness::{CAP_IPC_LOCK, install_module};
use super::machine::{Machine, Module};
use super::parse::Limit;
use super::{Check, Verdict};

const RDMA: &str = "RDMA";

/// Payload of the longest packets that RDMA has: a page of memory in one.
const MTU_MAX: u32 = 4096;
/// What a network device has to carry for [`MTU_MAX`], headers included.
const NET_DEVICE_MTU: u32 = 4200;

/// Every check of RDMA.
pub(super) fn checks(inventory: &Inventory, machine: &Machine) -> Vec<Check> {
    if inventory.devices.is_empty() {
        return vec![none(inventory, machine)];
    }
    let mut checks = vec![libraries(inventory, machine), verbs(inventory, machine)];
    checks.push(node(&inventory.manager, "connections", "rdma_ucm", machine.rdma_ucm, machine));
    checks.push(memory_lock(machine));
    let any_active = inventory.devices.iter().any(Device::is_active);
    for device in &inventory.devices {
        checks.push(of_device(device, machine));
        checks.extend(device.ports.iter().flat_map(|port| of_port(device, port, any_active)));
    }
    checks
}

/// A machine without RDMA devices needs nothing mended; how to get one is said all the same.
fn none(inventory: &Inventory, machine: &Machine) -> Check {
    let why = inventory.obstacles().first().map_or_else(String::new, |obstacle| format!(": {obstacle}"));
    let mut steps = Vec::new();
    if !inventory.libraries.verbs || !inventory.libraries.manager {
        steps.push(install_libraries(machine));
    }
    if machine.crc32_generic == Module::Installed {
        // Without it, the kernel refuses Soft-RoCE with ENOENT and gives no reason.
        steps.push("modprobe crc32_generic".to_owned());
    }
    if machine.rdma_rxe == Module::Absent {
        steps.push(load_module(machine, "rdma_rxe", machine.rdma_rxe));
    }
    if inventory.manager.access == Access::Missing {
        steps.push("modprobe rdma_ucm".to_owned());
    }
    steps.push("rdma link add rxe0 type rxe netdev eth0".to_owned());
    Check::ok(RDMA, "devices", format!("no RDMA{why}; the other transports need none")).mend(format!(
        "with a card: {}, and reboot; without one, to try it: {}",
        install_drivers(machine),
        steps.join("; ")
    ))
}

/// The package whose rules load the RDMA part of a card's driver, which nothing else does.
fn install_drivers(machine: &Machine) -> &'static str {
    match machine.distribution.as_str() {
        "debian" | "ubuntu" => "apt-get install rdma-core",
        "fedora" | "rhel" | "centos" | "rocky" | "almalinux" => "dnf install rdma-core",
        _ => "install rdma-core",
    }
}

fn libraries(inventory: &Inventory, machine: &Machine) -> Check {
    let item = "libraries";
    let lacking = match (inventory.libraries.verbs, inventory.libraries.manager) {
        (true, true) => return Check::ok(RDMA, item, "libibverbs and librdmacm are installed"),
        (false, true) => "libibverbs is not installed",
        (true, false) => "librdmacm is not installed",
        (false, false) => "neither libibverbs nor librdmacm is installed",
    };
    Check::missing(RDMA, item, lacking).mend(install_libraries(machine))
}

fn install_libraries(machine: &Machine) -> String {
    match machine.distribution.as_str() {
        "debian" | "ubuntu" => "apt-get install ibverbs-providers librdmacm1".to_owned(),
        "fedora" | "rhel" | "centos" | "rocky" | "almalinux" => "dnf install libibverbs librdmacm".to_owned(),
        _ => "install libibverbs with its providers, and librdmacm".to_owned(),
    }
}

fn verbs(inventory: &Inventory, machine: &Machine) -> Check {
    let item = "verbs";
    match (inventory.kernel.verbs, inventory.kernel.failed) {
        (true, None) => Check::ok(RDMA, item, "processes may use the devices (ib_uverbs)"),
        (true, Some(errno)) => Check::missing(RDMA, item, Obstacle::NotListed(errno).to_string()),
        (false, _) => Check::missing(RDMA, item, Obstacle::NoVerbs.to_string()).mend(load_module(
            machine,
            "ib_uverbs",
            machine.ib_uverbs,
        )),
    }
}

fn load_module(machine: &Machine, module: &str, state: Module) -> String {
    match state {
        Module::Absent if machine.loadable_modules => install_module(machine, module),
        Module::Absent => "boot a distribution's kernel".to_owned(),
        Module::Installed | Module::Running => {
            format!("modprobe {module}; at every boot: echo {module} > /etc/modules-load.d/{module}.conf")
        }
    }
}

/// A device file, which a kernel module makes.
fn node(node: &Node, item: &str, module: &str, state: Module, machine: &Machine) -> Check {
    let path = node.path.display();
    let found = match node.access {
        Access::Usable => return Check::ok(RDMA, item, format!("{path} is there")),
        _ => Obstacle::Node(node.clone()).to_string(),
    };
    let remedy = match (node.access, state) {
        (Access::Missing, Module::Running) => {
            format!("modprobe -r {module} && modprobe {module}; in a container, pass /dev/infiniband in")
        }
        (Access::Missing, _) => load_module(machine, module, state),
        _ => format!("run as root; in a systemd unit with DeviceAllow: DeviceAllow={path} rw"),
    };
    Check::missing(RDMA, item, found).mend(remedy)
}

/// Registered memory is pinned, and counts against the limit.
fn memory_lock(machine: &Machine) -> Check {
    let item = "memlock limit";
    let unlimited_by_right = machine.capabilities.is_some_and(|held| held & (1 << CAP_IPC_LOCK) != 0);
    match machine.memlock {
        _ if unlimited_by_right => Check::ok(RDMA, item, "does not apply: CAP_IPC_LOCK is held"),
        Some(Limit::Unlimited) => Check::ok(RDMA, item, "unlimited"),
        Some(Limit::Bytes(bytes)) => {
            let found =
                format!("{} for this user: a process registers no more memory than that", ByteSize(bytes));
            Check::warn(RDMA, item, found)
                .mend("run the daemons by their systemd units, which set LimitMEMLOCK=infinity")
        }
        None => Check::warn(RDMA, item, "/proc/self/limits is not understood"),
    }
}

fn of_device(device: &Device, machine: &Machine) -> Check {
    let name = &device.name;
    if let Some(file) = device.node.as_ref().filter(|node| node.access != Access::Usable) {
        return node(file, name, "ib_uverbs", machine.ib_uverbs, machine);
    }
    let driver = device.driver.as_deref().unwrap_or("unknown driver");
    match &device.limits {
        Ok(limits) => Check::ok(RDMA, name, format!("{}; {}", identity(device), capacity(limits))),
        Err(NoLimits::Unasked) => {
            Check::warn(RDMA, name, format!("{}; its limits are not known", identity(device)))
        }
        Err(NoLimits::NoProvider) => {
            Check::missing(RDMA, name, format!("libibverbs has no provider for it ({driver})"))
                .mend(install_libraries(machine))
        }
        Err(NoLimits::Leaving) => Check::missing(RDMA, name, Obstacle::Leaving(name.clone()).to_string())
            .mend("if that takes long: stop the processes that use it"),
        Err(NoLimits::Failed(errno)) => {
            let found = format!("cannot be used: {errno} ({driver})");
            Check::missing(RDMA, name, found).mend("dmesg may say why; run `sudo xpm doctor` to see all")
        }
    }
}

fn identity(device: &Device) -> String {
    let driver = device.driver.as_deref().unwrap_or("unknown driver");
    let kind = if device.software { ", in software: for trials" } else { "" };
    let guid = device.node_guid.map_or_else(String::new, |guid| format!(", GUID {guid}"));
    format!("{driver}{kind}{guid}")
}

fn capacity(limits: &Limits) -> String {
    let length = match limits.max_mr_size {
        u64::MAX => "of any length".to_owned(),
        bytes => format!("of up to {}", ByteSize(bytes)),
    };
    format!(
        "{} memory regions {length}, {} queue pairs, {} READs at a time on each",
        limits.max_mr, limits.max_qp, limits.max_qp_rd_atom
    )
}

fn of_port(device: &Device, port: &Port, any_active: bool) -> Vec<Check> {
    let item = format!("{} port {}", device.name, port.number);
    let words = [
        Some(port.state.to_string()),
        port.link_layer.map(|layer| layer.to_string()),
        port.rate.clone(),
        port.mtu.map(|bytes| format!("MTU {bytes}")),
    ];
    let found = words.into_iter().flatten().collect::<Vec<_>>().join(", ");
    if port.state != PortState::Active {
        // A second port that nobody plugged in is no fault.
        let verdict = if any_active { Verdict::Ok } else { Verdict::Warn };
        let check = Check::new(RDMA, &item, verdict, found);
        return vec![if any_active { check } else { check.mend(bring_up(port)) }];
    }
    let link = match short_packets(device, port) {
        Some(remedy) => {
            Check::warn(RDMA, &item, format!("{found}: a page of memory goes in several packets"))
                .mend(remedy)
        }
        None => Check::ok(RDMA, &item, found),
    };
    vec![link, addresses(&format!("{item} addresses"), port)]
}

fn bring_up(port: &Port) -> String {
    match (port.link_layer, port.state) {
        (Some(LinkLayer::InfiniBand), PortState::Initializing | PortState::Armed) => {
            "run a subnet manager somewhere in the network: apt-get install opensm".to_owned()
        }
        (Some(LinkLayer::InfiniBand), _) => "look at the cable and the switch".to_owned(),
        _ => format!("ip link set {} up; look at the cable and the switch", net_device(port)),
    }
}

/// How to get longer packets, where that is worth it.
fn short_packets(device: &Device, port: &Port) -> Option<String> {
    let short = port.mtu.is_some_and(|bytes| bytes < MTU_MAX);
    let settable = !device.software && port.link_layer == Some(LinkLayer::Ethernet);
    (short && settable).then(|| {
        format!(
            "on both ends, and on the switches between: ip link set {} mtu {NET_DEVICE_MTU}",
            net_device(port)
        )
    })
}

fn net_device(port: &Port) -> &str {
    port.net_devices.first().map_or("DEVICE", String::as_str)
}

/// The connection manager finds a peer by its IP address.
fn addresses(item: &str, port: &Port) -> Check {
    if port.link_layer == Some(LinkLayer::InfiniBand) {
        return over_infiniband(item, port);
    }
    let found = port.gids.iter().map(written).collect::<Vec<_>>().join("; ");
    if port.gids.iter().any(is_reachable) {
        return Check::ok(RDMA, item, found);
    }
    let found = if found.is_empty() { "none".to_owned() } else { found };
    Check::warn(RDMA, item, format!("{found}: no IP address that a client could connect to"))
        .mend(format!("ip address add ADDRESS/PREFIX dev {}", net_device(port)))
}

fn over_infiniband(item: &str, port: &Port) -> Check {
    let gids = port.gids.iter().map(written).collect::<Vec<_>>().join("; ");
    match &port.net_devices[..] {
        [] => {
            Check::warn(RDMA, item, format!("{gids}; no IP over InfiniBand, by which appliances are found"))
                .mend("modprobe ib_ipoib; ip address add ADDRESS/PREFIX dev ib0; ip link set ib0 up")
        }
        devices => Check::ok(RDMA, item, format!("{gids}; IP over InfiniBand is {}", devices.join(", "))),
    }
}

fn written(gid: &Gid) -> String {
    let address = gid.address().map_or_else(|| gid.gid.to_string(), |address| address.to_string());
    let over = gid.net_device.as_deref().map_or_else(String::new, |device| format!(", {device}"));
    format!("{address} (GID {}, {}{over})", gid.index, gid.kind)
}

/// Whether the address of a GID is one that others can be told: link-local ones are none.
fn is_reachable(gid: &Gid) -> bool {
    match gid.address() {
        Some(std::net::IpAddr::V6(address)) => !address.is_unicast_link_local(),
        Some(std::net::IpAddr::V4(_)) => true,
        // iWARP has no address in its GID; that of the network device serves.
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use xpm_transport::rdma::inventory::{GidKind, Guid, Kernel, Libraries};

    use super::*;

    fn machine() -> Machine {
        Machine {
            distribution: "debian".into(),
            architecture: "amd64",
            loadable_modules: true,
            capabilities: Some(u64::MAX),
            ib_uverbs: Module::Running,
            rdma_ucm: Module::Running,
            rdma_rxe: Module::Installed,
            crc32_generic: Module::Installed,
            ..Machine::default()
        }
    }

    fn usable(name: &str) -> Node {
        Node { path: format!("/dev/infiniband/{name}").into(), access: Access::Usable }
    }

    fn gid(index: u32, gid: &str) -> Gid {
        let net_device = Some("eth2".to_owned());
        Gid { index, gid: gid.parse().unwrap(), kind: GidKind::RoceV2, net_device }
    }

    fn with_a_card() -> Inventory {
        let limits = Limits {
            max_mr_size: u64::MAX,
            max_mr: 1 << 24,
            max_pd: 1 << 23,
            max_qp: 131_072,
            max_qp_wr: 32_768,
            max_cqe: 4_194_303,
            max_qp_rd_atom: 16,
            max_qp_init_rd_atom: 16,
        };
        let port = Port {
            number: 1,
            state: PortState::Active,
            link_layer: Some(LinkLayer::Ethernet),
            mtu: Some(4096),
            rate: Some("100 Gb/sec (4X EDR)".into()),
            gids: vec![gid(1, "fe80::1"), gid(3, "::ffff:10.0.0.1")],
            net_devices: vec!["eth2".into()],
        };
        let card = Device {
            name: "mlx5_0".into(),
            driver: Some("mlx5_core".into()),
            software: false,
            node_guid: Some(Guid(0x0002_c903_0021_b3a0)),
            node: Some(usable("uverbs0")),
            limits: Ok(limits),
            ports: vec![port],
        };
        Inventory {
            libraries: Libraries { verbs: true, manager: true },
            kernel: Kernel { core: true, verbs: true, failed: None },
            manager: usable("rdma_cm"),
            devices: vec![card],
        }
    }

    fn of(inventory: &Inventory, machine: &Machine, item: &str) -> Check {
        let checks = checks(inventory, machine);
        assert!(checks.iter().all(|check| check.group == RDMA && check.verdict != Verdict::Unsafe));
        checks.into_iter().find(|check| check.item == item).unwrap_or_else(|| panic!("no {item}"))
    }

    #[test]
    fn a_good_card_is_ok_throughout() {
        let inventory = with_a_card();
        let checks = checks(&inventory, &machine());
        assert!(
            checks.iter().all(|check| check.verdict == Verdict::Ok && check.remedy.is_none()),
            "{checks:#?}"
        );
        let found = |item| of(&inventory, &machine(), item).found;
        assert_eq!(
            found("mlx5_0"),
            "mlx5_core, GUID 0002:c903:0021:b3a0; 16777216 memory regions of any length, 131072 queue pairs, \
             16 READs at a time on each"
        );
        assert_eq!(found("mlx5_0 port 1"), "active, Ethernet, 100 Gb/sec (4X EDR), MTU 4096");
        assert!(found("mlx5_0 port 1 addresses").contains("10.0.0.1 (GID 3, RoCE v2, eth2)"));
    }

    #[test]
    fn a_machine_without_rdma_is_as_it_should_be() {
        let mut none = with_a_card();
        none.devices.clear();
        none.libraries = Libraries::default();
        none.manager.access = Access::Missing;
        let checks = checks(&none, &machine());
        let [check] = &checks[..] else { panic!("{checks:#?}") };
        assert_eq!(check.verdict, Verdict::Ok);
        assert!(check.found.starts_with("no RDMA: this machine has no RDMA device"), "{}", check.found);
        let remedy = check.remedy.as_deref().unwrap();
        for step in [
            "apt-get install ibverbs-providers librdmacm1",
            "modprobe crc32_generic; modprobe rdma_ucm",
            "rdma link add rxe0",
        ] {
            assert!(remedy.contains(step), "{remedy}");
        }
        let bare = Machine { rdma_rxe: Module::Absent, ..machine() };
        assert_mended(
            &none,
            &bare,
            "devices",
            Verdict::Ok,
            "apt-get install linux-image-amd64, reboot, modprobe rdma_rxe",
        );
    }

    /// The item, what it lacks, and a part of the remedy.
    fn assert_mended(inventory: &Inventory, machine: &Machine, item: &str, verdict: Verdict, remedy: &str) {
        let check = of(inventory, machine, item);
        assert_eq!(check.verdict, verdict, "{check:?}");
        assert!(check.remedy.as_deref().unwrap_or_default().contains(remedy), "{check:?}");
    }

    #[test]
    fn what_is_missing_comes_with_what_mends_it() {
        let mut bad = with_a_card();
        bad.libraries.manager = false;
        assert_mended(
            &bad,
            &machine(),
            "libraries",
            Verdict::Missing,
            "apt-get install ibverbs-providers librdmacm1",
        );

        let installed = Machine { rdma_ucm: Module::Installed, ..machine() };
        bad.manager.access = Access::Missing;
        assert_mended(&bad, &installed, "connections", Verdict::Missing, "modprobe rdma_ucm;");
        assert_mended(&bad, &machine(), "connections", Verdict::Missing, "in a container");
        bad.manager.access = Access::Denied;
        assert_mended(
            &bad,
            &machine(),
            "connections",
            Verdict::Missing,
            "DeviceAllow=/dev/infiniband/rdma_cm rw",
        );

        bad.kernel.verbs = false;
        let absent = Machine { ib_uverbs: Module::Absent, ..machine() };
        assert_mended(&bad, &absent, "verbs", Verdict::Missing, "apt-get install linux-image-amd64");

        let user = Machine { capabilities: Some(0), memlock: Some(Limit::Bytes(8 << 20)), ..machine() };
        assert_mended(&bad, &user, "memlock limit", Verdict::Warn, "LimitMEMLOCK=infinity");
        assert!(of(&bad, &user, "memlock limit").found.starts_with("8MiB"));
    }

    #[test]
    fn a_device_that_cannot_be_used_says_why() {
        let mut bad = with_a_card();
        bad.devices[0].limits = Err(NoLimits::NoProvider);
        assert_mended(&bad, &machine(), "mlx5_0", Verdict::Missing, "apt-get install ibverbs-providers");
        bad.devices[0].limits = Err(NoLimits::Failed(rustix::io::Errno::NOMEM));
        assert_mended(&bad, &machine(), "mlx5_0", Verdict::Missing, "dmesg");
        bad.devices[0].node = Some(Node { path: "/dev/infiniband/uverbs0".into(), access: Access::Denied });
        assert_mended(&bad, &machine(), "mlx5_0", Verdict::Missing, "DeviceAllow=/dev/infiniband/uverbs0 rw");
    }

    #[test]
    fn ports_that_are_down_matter_when_none_is_up() {
        let mut cards = with_a_card();
        let mut second = cards.devices[0].ports[0].clone();
        second.number = 2;
        second.state = PortState::Down;
        cards.devices[0].ports.push(second);
        assert_eq!(of(&cards, &machine(), "mlx5_0 port 2").verdict, Verdict::Ok);
        cards.devices[0].ports[0].state = PortState::Down;
        assert_mended(&cards, &machine(), "mlx5_0 port 2", Verdict::Warn, "ip link set eth2 up");
        cards.devices[0].ports[0].link_layer = Some(LinkLayer::InfiniBand);
        cards.devices[0].ports[0].state = PortState::Initializing;
        assert_mended(&cards, &machine(), "mlx5_0 port 1", Verdict::Warn, "subnet manager");
    }

    #[test]
    fn ports_without_what_clients_need() {
        let mut card = with_a_card();
        card.devices[0].ports[0].mtu = Some(1024);
        assert_mended(&card, &machine(), "mlx5_0 port 1", Verdict::Warn, "ip link set eth2 mtu 4200");
        card.devices[0].ports[0].gids.truncate(1);
        assert_mended(&card, &machine(), "mlx5_0 port 1 addresses", Verdict::Warn, "dev eth2");
        card.devices[0].software = true;
        assert_eq!(of(&card, &machine(), "mlx5_0 port 1").verdict, Verdict::Ok, "a trial need not be fast");

        let port = &mut card.devices[0].ports[0];
        port.link_layer = Some(LinkLayer::InfiniBand);
        assert_eq!(of(&card, &machine(), "mlx5_0 port 1 addresses").verdict, Verdict::Ok);
        card.devices[0].ports[0].net_devices.clear();
        assert_mended(&card, &machine(), "mlx5_0 port 1 addresses", Verdict::Warn, "modprobe ib_ipoib");
    }
}
