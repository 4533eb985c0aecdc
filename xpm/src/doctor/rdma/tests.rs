//! Findings of `xpm doctor` about RDMA devices, from inventories.

use serde_json::json;
use xpm_transport::rdma::inventory::{GidKind, Guid, Kernel, Libraries};

use super::*;
use crate::doctor::parse::Limit;

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
    assert!(checks.iter().all(|check| check.group == RDMA && check.severity != Verdict::Critical));
    checks.into_iter().find(|check| check.item == item).unwrap_or_else(|| panic!("no {item}"))
}

#[test]
fn a_good_card_is_ok_throughout() {
    let inventory = with_a_card();
    let checks = checks(&inventory, &machine());
    assert!(
        checks.iter().all(|check| check.severity == Verdict::Ok && check.remedy.is_none()),
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
fn programs_are_told_in_numbers() {
    let told = serde_json::to_value(Facts::from(&with_a_card())).unwrap();
    assert_eq!((&told["usable"], &told["obstacles"]), (&json!(true), &json!([])));
    let card = &told["devices"][0];
    assert_eq!((&card["name"], &card["limits"]["max_qp"]), (&json!("mlx5_0"), &json!(131_072)));
    assert_eq!((&card["ports"][0]["mtu"], &card["ports"][0]["state"]), (&json!(4096), &json!("active")));
    let gid = json!({"index": 3, "gid": "::ffff:10.0.0.1", "address": "10.0.0.1", "type": "RoCE v2", "net_device": "eth2"});
    assert_eq!(card["ports"][0]["gids"][1], gid);
}

#[test]
fn a_machine_without_rdma_is_as_it_should_be() {
    let mut none = with_a_card();
    none.devices.clear();
    none.libraries = Libraries::default();
    none.manager.access = Access::Missing;
    let checks = checks(&none, &machine());
    let [check] = &checks[..] else { panic!("{checks:#?}") };
    assert_eq!(check.severity, Verdict::Ok);
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
    assert_eq!(check.severity, verdict, "{check:?}");
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
        Verdict::Info,
        "apt-get install ibverbs-providers librdmacm1",
    );

    let installed = Machine { rdma_ucm: Module::Installed, ..machine() };
    bad.manager.access = Access::Missing;
    assert_mended(&bad, &installed, "connections", Verdict::Info, "modprobe rdma_ucm;");
    assert_mended(&bad, &machine(), "connections", Verdict::Info, "in a container");
    bad.manager.access = Access::Denied;
    assert_mended(&bad, &machine(), "connections", Verdict::Info, "DeviceAllow=/dev/infiniband/rdma_cm rw");

    bad.kernel.verbs = false;
    let absent = Machine { ib_uverbs: Module::Absent, ..machine() };
    assert_mended(&bad, &absent, "verbs", Verdict::Info, "apt-get install linux-image-amd64");

    let user = Machine { capabilities: Some(0), memlock: Some(Limit::Bytes(8 << 20)), ..machine() };
    assert_mended(&bad, &user, "memlock limit", Verdict::Warning, "LimitMEMLOCK=infinity");
    assert!(of(&bad, &user, "memlock limit").found.starts_with("8MiB"));
}

#[test]
fn a_device_that_cannot_be_used_says_why() {
    let mut bad = with_a_card();
    bad.devices[0].limits = Err(NoLimits::NoProvider);
    assert_mended(&bad, &machine(), "mlx5_0", Verdict::Info, "apt-get install ibverbs-providers");
    bad.devices[0].limits = Err(NoLimits::Failed(rustix::io::Errno::NOMEM));
    assert_mended(&bad, &machine(), "mlx5_0", Verdict::Info, "dmesg");
    bad.devices[0].node = Some(Node { path: "/dev/infiniband/uverbs0".into(), access: Access::Denied });
    assert_mended(&bad, &machine(), "mlx5_0", Verdict::Info, "DeviceAllow=/dev/infiniband/uverbs0 rw");
}

#[test]
fn ports_that_are_down_matter_when_none_is_up() {
    let mut cards = with_a_card();
    let mut second = cards.devices[0].ports[0].clone();
    second.number = 2;
    second.state = PortState::Down;
    cards.devices[0].ports.push(second);
    assert_eq!(of(&cards, &machine(), "mlx5_0 port 2").severity, Verdict::Ok);
    cards.devices[0].ports[0].state = PortState::Down;
    assert_mended(&cards, &machine(), "mlx5_0 port 2", Verdict::Warning, "ip link set eth2 up");
    cards.devices[0].ports[0].link_layer = Some(LinkLayer::InfiniBand);
    cards.devices[0].ports[0].state = PortState::Initializing;
    assert_mended(&cards, &machine(), "mlx5_0 port 1", Verdict::Warning, "subnet manager");
}

#[test]
fn ports_without_what_clients_need() {
    let mut card = with_a_card();
    card.devices[0].ports[0].mtu = Some(1024);
    assert_mended(&card, &machine(), "mlx5_0 port 1", Verdict::Warning, "ip link set eth2 mtu 4200");
    card.devices[0].ports[0].gids.truncate(1);
    assert_mended(&card, &machine(), "mlx5_0 port 1 addresses", Verdict::Warning, "dev eth2");
    card.devices[0].software = true;
    assert_eq!(of(&card, &machine(), "mlx5_0 port 1").severity, Verdict::Ok, "a trial need not be fast");

    let port = &mut card.devices[0].ports[0];
    port.link_layer = Some(LinkLayer::InfiniBand);
    assert_eq!(of(&card, &machine(), "mlx5_0 port 1 addresses").severity, Verdict::Ok);
    card.devices[0].ports[0].net_devices.clear();
    assert_mended(&card, &machine(), "mlx5_0 port 1 addresses", Verdict::Warning, "modprobe ib_ipoib");
}
