//! The RDMA devices of a machine, and remedies for missing parts. RDMA is a choice: a machine without it is
//! as it should be, and nothing here is unsafe, for volumes go over TCP where RDMA does not work.

mod facts;

use xpm_protocol::ByteSize;
use xpm_transport::rdma::inventory::{
    Access, Device, Gid, Inventory, Limits, LinkLayer, NoLimits, Node, Obstacle, Port, PortState,
};

use super::fitness::{install_module, memlock};
use super::machine::{Machine, Module};
use super::{Check, Verdict};

pub(super) use facts::Facts;

const RDMA: &str = "RDMA";

/// Payload of the longest packets that RDMA has: a page of memory in one.
const MTU_MAX: u32 = 4096;
/// The MTU that a network device needs for [`MTU_MAX`], headers included.
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
    Check::info(RDMA, item, lacking).mend(install_libraries(machine))
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
        (true, Some(errno)) => Check::info(RDMA, item, Obstacle::NotListed(errno).to_string()),
        (false, _) => Check::info(RDMA, item, Obstacle::NoVerbs.to_string()).mend(load_module(
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
    Check::info(RDMA, item, found).mend(remedy)
}

/// Registered memory is pinned, and counts against the limit.
fn memory_lock(machine: &Machine) -> Check {
    memlock(machine, RDMA, "a process registers no more memory than that")
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
            Check::info(RDMA, name, format!("libibverbs has no provider for it ({driver})"))
                .mend(install_libraries(machine))
        }
        Err(NoLimits::Leaving) => Check::info(RDMA, name, Obstacle::Leaving(name.clone()).to_string())
            .mend("if that takes long: stop the processes that use it"),
        Err(NoLimits::Failed(errno)) => {
            let found = format!("cannot be used: {errno} ({driver})");
            Check::info(RDMA, name, found).mend("dmesg may say why; run `sudo xpm doctor` to see all")
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
        let verdict = if any_active { Verdict::Ok } else { Verdict::Warning };
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
mod tests;
