//! The capabilities of a machine: for lending, for each form of device, for swap.

use xpm_protocol::ByteSize;

use super::machine::{Driver, Machine, Module};
use super::parse::{Limit, kernel_version};
use super::{Check, Verdict};
use crate::hibernation;

const KERNEL: &str = "This machine";
const DEVICES: &str = "Devices that it can have";
const SWAP: &str = "Serving swap safely";
const LENDING: &str = "Lending memory";

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;

/// First kernel with all of ublk that xpm-blk needs (UBLK_U_CMD_GET_FEATURES).
const UBLK_SINCE: (u32, u32) = (6, 5);
/// Later features of ublk that matter here, by the first kernel that has them.
const UBLK_FEATURES: [((u32, u32), &str); 4] = [
    ((6, 1), "user recovery"),
    ((6, 13), "fail-io"),
    ((6, 15), "zero copy"),
    ((6, 16), "resize and quiesce"),
];

/// Every check of the machine itself.
pub(super) fn checks(machine: &Machine) -> Vec<Check> {
    vec![
        kernel(machine),
        io_uring(machine),
        userfaultfd(machine),
        ublk(machine),
        nbd(machine),
        nbd_direct(machine),
        Check::ok(DEVICES, "nbd-socket", "needs nothing of the kernel"),
        Check::ok(DEVICES, "vhost-user", "needs nothing of the kernel"),
        privileges(machine),
        memory_lock(machine),
        cgroup(machine),
        page_cluster(machine),
        compressed_swap(machine),
        hibernates(machine),
        memory_to_lend(machine),
        huge_pages(machine),
        shared_memory(machine),
    ]
}

fn hibernates(machine: &Machine) -> Check {
    const ITEM: &str = "hibernation";
    const WOULD_STOP: &str =
        "swap is on a device that is served by a process: a machine that hibernates with it stops for good";
    let endangered = machine.swaps.iter().any(hibernation::is_endangered);
    match (machine.hibernation, endangered) {
        (None, _) => Check::ok(SWAP, ITEM, "this kernel does not hibernate"),
        (Some(true), _) => Check::ok(SWAP, ITEM, "refused by the service manager while swap is on a device of xpm"),
        (Some(false), false) => Check::ok(SWAP, ITEM, "possible; not with swap on a device of xpm, which there is none of"),
        (Some(false), true) => Check::warn(SWAP, ITEM, WOULD_STOP)
            .mend("boot with `nohibernate` on the kernel's command line, or install the package's drop-ins of systemd-hibernate.service"),
    }
}

fn kernel(machine: &Machine) -> Check {
    let found = format!("Linux {}", machine.release);
    match kernel_version(&machine.release) {
        Some(version) if version >= UBLK_SINCE => Check::ok(KERNEL, "kernel", found),
        Some(_) => Check::warn(KERNEL, "kernel", format!("{found}: too old for ublk, nbd works"))
            .mend(newer_kernel(machine)),
        None => Check::warn(KERNEL, "kernel", format!("{found}: the version is not understood")),
    }
}

fn newer_kernel(machine: &Machine) -> String {
    match machine.distribution.as_str() {
        "debian" => format!(
            "boot a kernel of 6.12 or later: apt-get install -t bookworm-backports linux-image-{} (Debian 13 has it), then reboot",
            machine.architecture
        ),
        "ubuntu" => {
            "boot a kernel of 6.12 or later: apt-get install linux-generic-hwe-24.04, then reboot".to_owned()
        }
        _ => "boot a kernel of 6.12 or later".to_owned(),
    }
}

fn io_uring(machine: &Machine) -> Check {
    let item = "io_uring";
    let before_the_switch = kernel_version(&machine.release).is_some_and(|version| version < (6, 6));
    match machine.io_uring_disabled {
        Some(0) => Check::ok(KERNEL, item, "allowed"),
        Some(1) => Check::warn(KERNEL, item, "allowed for privileged processes only, which xpm-blk is")
            .mend("sysctl -w kernel.io_uring_disabled=0"),
        Some(_) => Check::info(KERNEL, item, "forbidden to all processes: no ublk")
            .mend("sysctl -w kernel.io_uring_disabled=0"),
        None if before_the_switch => Check::ok(KERNEL, item, "this kernel has no switch to forbid it"),
        None => Check::info(KERNEL, item, "this kernel was built without it: no ublk")
            .mend("boot a distribution's kernel, which has CONFIG_IO_URING"),
    }
}

fn userfaultfd(machine: &Machine) -> Check {
    let item = "userfaultfd";
    match (machine.userfaultfd_device, machine.userfaultfd_unprivileged) {
        (true, _) => Check::ok(KERNEL, item, "/dev/userfaultfd is there"),
        (false, Some(1)) => Check::ok(KERNEL, item, "allowed for every process"),
        (false, Some(_)) => Check::ok(KERNEL, item, "allowed for privileged processes"),
        (false, None) => {
            Check::warn(KERNEL, item, "this kernel has none: no memory mapping, block devices work")
        }
    }
}

fn ublk(machine: &Machine) -> Check {
    let Some(version) = kernel_version(&machine.release) else {
        return Check::warn(DEVICES, "ublk", "the kernel's version is not understood");
    };
    if version < UBLK_SINCE {
        return Check::info(DEVICES, "ublk", "needs Linux 6.5").mend(newer_kernel(machine));
    }
    if matches!(machine.io_uring_disabled, Some(2..)) {
        return Check::info(DEVICES, "ublk", "needs io_uring, which is forbidden")
            .mend("sysctl -w kernel.io_uring_disabled=0");
    }
    let features: Vec<&str> =
        UBLK_FEATURES.iter().filter(|(since, _)| version >= *since).map(|(_, name)| *name).collect();
    let ready = match features[..] {
        [] => "ready".to_owned(),
        _ => format!("ready; by its version this kernel has {}", features.join(", ")),
    };
    driver(machine, "ublk", "ublk_drv", "/dev/ublk-control", machine.ublk, &ready)
}

fn nbd(machine: &Machine) -> Check {
    driver(machine, "nbd", "nbd", "/dev/nbd0", machine.nbd, "ready")
}

fn nbd_direct(machine: &Machine) -> Check {
    let ready = "ready, for an allocation on one appliance that is not striped";
    driver(machine, "nbd-direct", "nbd", "/dev/nbd0", machine.nbd, ready)
}

/// A form that needs a kernel driver.
fn driver(machine: &Machine, item: &str, module: &str, node: &str, driver: Driver, ready: &str) -> Check {
    match driver {
        Driver { module: Module::Running, node: true } => Check::ok(DEVICES, item, ready),
        Driver { module: Module::Running, node: false } => {
            Check::info(DEVICES, item, format!("{module} is loaded, but {node} is not there"))
                .mend(format!("modprobe -r {module} && modprobe {module}; in a container, pass {node} in"))
        }
        Driver { module: Module::Installed, .. } => {
            Check::info(DEVICES, item, format!("the module {module} is installed, not loaded")).mend(format!(
                "modprobe {module}; at every boot: echo {module} > /etc/modules-load.d/{module}.conf"
            ))
        }
        Driver { module: Module::Absent, .. } if !machine.loadable_modules => {
            Check::info(DEVICES, item, format!("this kernel has no {module} and loads no modules"))
                .mend("boot a distribution's kernel")
        }
        Driver { module: Module::Absent, .. } => {
            Check::info(DEVICES, item, format!("the module {module} is not installed for this kernel"))
                .mend(install_module(machine, module))
        }
    }
}

/// How to get a module that is not installed.
pub(super) fn install_module(machine: &Machine, module: &str) -> String {
    match machine.distribution.as_str() {
        "debian" => {
            format!("apt-get install linux-image-{}, reboot, modprobe {module}", machine.architecture)
        }
        "ubuntu" => format!("apt-get install linux-modules-extra-{}, modprobe {module}", machine.release),
        _ => format!(
            "install the package of your distribution with the module {module}, or boot a kernel that has it"
        ),
    }
}

fn privileges(machine: &Machine) -> Check {
    let needed = [
        ("CAP_SYS_ADMIN", CAP_SYS_ADMIN),
        ("CAP_IPC_LOCK", CAP_IPC_LOCK),
        ("CAP_SYS_RESOURCE", CAP_SYS_RESOURCE),
    ];
    let Some(held) = machine.capabilities else {
        return Check::warn(SWAP, "privileges", "/proc/self/status is not understood");
    };
    let lacking: Vec<&str> =
        needed.iter().filter(|(_, bit)| held & (1 << bit) == 0).map(|(name, _)| *name).collect();
    match lacking[..] {
        [] => Check::ok(SWAP, "privileges", "CAP_SYS_ADMIN, CAP_IPC_LOCK and CAP_SYS_RESOURCE are held"),
        _ => Check::warn(
            SWAP,
            "privileges",
            format!("this shell lacks {}, which xpm-blk needs", lacking.join(", ")),
        )
        .mend("run xpm-blk by its systemd unit, or as root; run `sudo xpm doctor` to see all"),
    }
}

fn memory_lock(machine: &Machine) -> Check {
    memlock(machine, SWAP, "too little to lock a daemon")
}

/// The limit of locked and pinned memory, and its meaning.
pub(super) fn memlock(machine: &Machine, group: &str, meaning: &str) -> Check {
    let item = "memlock limit";
    let unlimited_by_right = machine.capabilities.is_some_and(|held| held & (1 << CAP_IPC_LOCK) != 0);
    match machine.memlock {
        _ if unlimited_by_right => Check::ok(group, item, "does not apply: CAP_IPC_LOCK is held"),
        Some(Limit::Unlimited) => Check::ok(group, item, "unlimited"),
        Some(Limit::Bytes(bytes)) => {
            Check::warn(group, item, format!("{} for this user: {meaning}", ByteSize(bytes)))
                .mend("run the daemons by their systemd units, which set LimitMEMLOCK=infinity")
        }
        None => Check::warn(group, item, "/proc/self/limits is not understood"),
    }
}

fn cgroup(machine: &Machine) -> Check {
    let item = "cgroup v2";
    match &machine.controllers {
        Some(controllers) if controllers.split_whitespace().any(|name| name == "memory") => {
            Check::ok(SWAP, item, "with the memory controller: xpm-blk can be kept out of swap")
        }
        Some(_) => Check::warn(SWAP, item, "without the memory controller")
            .mend("boot with cgroup_enable=memory, and without cgroup_disable=memory"),
        None => {
            Check::warn(SWAP, item, "not mounted at /sys/fs/cgroup: xpm-blk cannot be kept out of swap by it")
                .mend("boot with systemd.unified_cgroup_hierarchy=1")
        }
    }
}

fn page_cluster(machine: &Machine) -> Check {
    let item = "page-cluster";
    match machine.page_cluster {
        Some(0) => {
            Check::warn(SWAP, item, "0: swap is read one page at a time").mend("sysctl -w vm.page-cluster=3")
        }
        Some(cluster @ 1..=5) => Check::ok(
            SWAP,
            item,
            format!("{cluster}: swap is read in runs of up to {}", ByteSize(4096 << cluster)),
        ),
        Some(cluster) => {
            Check::warn(SWAP, item, format!("{cluster}: swap is read in runs that are mostly unused"))
                .mend("sysctl -w vm.page-cluster=3")
        }
        None => Check::info(SWAP, item, "this kernel has no swap").mend("boot a kernel with CONFIG_SWAP"),
    }
}

/// Compression in front of external memory costs processor time first; it is a choice, no fault.
fn compressed_swap(machine: &Machine) -> Check {
    let zram = machine.swaps.iter().any(|swap| swap.path.starts_with("/dev/zram"));
    let found = match (machine.zswap, zram) {
        (false, false) => "neither zswap nor zram is used",
        (true, false) => "zswap compresses pages before they go to a swap device",
        (false, true) => {
            "zram is a swap of this machine: give external memory a lower priority to be used after it"
        }
        (true, true) => "zswap and zram are both used: pages are compressed twice",
    };
    match (machine.zswap, zram) {
        (true, true) => {
            Check::warn(SWAP, "zswap, zram", found).mend("echo N > /sys/module/zswap/parameters/enabled")
        }
        _ => Check::ok(SWAP, "zswap, zram", found),
    }
}

/// Below this share of its memory available, a machine has nothing to lend.
const LENDER_SHARE: u64 = 8;

fn memory_to_lend(machine: &Machine) -> Check {
    let item = "memory";
    match (machine.memory_available, machine.memory_total) {
        (Some(available), Some(total)) if available > total / LENDER_SHARE => {
            // The memory that is left to the machine holds its caches.
            let spare = (available - total / LENDER_SHARE) >> 20 << 20;
            let found = format!(
                "{} of {} is available; up to {} may be lent",
                ByteSize(available),
                ByteSize(total),
                ByteSize(spare)
            );
            Check::ok(LENDING, item, found)
        }
        (Some(available), Some(total)) => Check::warn(
            LENDING,
            item,
            format!("{} of {} is available: nothing to lend", ByteSize(available), ByteSize(total)),
        ),
        _ => Check::warn(LENDING, item, "/proc/meminfo is not understood"),
    }
}

fn huge_pages(machine: &Machine) -> Check {
    let item = "huge pages";
    match machine.huge_pages {
        Some(pages) if pages.total > 0 => Check::ok(
            LENDING,
            item,
            format!("{} of {} pages of {} are free", pages.free, pages.total, ByteSize(pages.len)),
        ),
        Some(pages) => {
            let count = (1_u64 << 30) / pages.len.max(1);
            Check::ok(
                LENDING,
                item,
                format!(
                    "none reserved: `xpm-appliance --huge` needs some; 1GiB is sysctl -w vm.nr_hugepages={count}"
                ),
            )
        }
        None => Check::ok(LENDING, item, "this kernel has none; base pages work"),
    }
}

fn shared_memory(machine: &Machine) -> Check {
    let item = "shared memory";
    match (&machine.memfd, machine.boot_id) {
        (None, true) => Check::ok(LENDING, item, "an appliance and a client on this host can share memory"),
        (Some(error), _) => {
            Check::new(LENDING, item, Verdict::Info, format!("no memfd can be made: {error}"))
                .mend("allow memfd_create in the container's or service's system call filter")
        }
        (None, false) => Check::info(
            LENDING,
            item,
            "/proc/sys/kernel/random/boot_id is not there: hosts cannot be told apart",
        )
        .mend("mount /proc in this container"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            release: "6.12.48+deb13-amd64".into(),
            architecture: "amd64",
            distribution: "debian".into(),
            loadable_modules: true,
            ublk: Driver { module: Module::Running, node: true },
            nbd: Driver { module: Module::Running, node: true },
            io_uring_disabled: Some(0),
            capabilities: Some(u64::MAX),
            controllers: Some("cpu memory io\n".into()),
            page_cluster: Some(3),
            memory_total: Some(64 << 30),
            memory_available: Some(48 << 30),
            userfaultfd_device: true,
            boot_id: true,
            ..Machine::default()
        }
    }

    fn of<'a>(checks: &'a [Check], item: &str) -> &'a Check {
        checks.iter().find(|check| check.item == item).unwrap()
    }

    #[test]
    fn a_good_machine_is_ok_throughout() {
        let checks = checks(&machine());
        assert!(
            checks.iter().all(|check| check.severity == Verdict::Ok && check.remedy.is_none()),
            "{checks:#?}"
        );
        assert!(of(&checks, "ublk").found.contains("user recovery"));
        assert!(!of(&checks, "ublk").found.contains("fail-io"), "6.12 has none");
    }

    #[test]
    fn a_report_is_as_it_was_at_80_columns() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/doctor-machine.txt");
        let mut old = Machine {
            release: "6.1.0-40-amd64".into(),
            ublk: Driver::default(),
            io_uring_disabled: None,
            page_cluster: Some(0),
            capabilities: Some(0),
            memlock: Some(Limit::Bytes(8 << 20)),
            ..machine()
        };
        old.nbd.node = false;
        let text = super::super::text_of(checks(&old));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        if std::env::var_os("XPM_WRITE_GOLDEN").is_some() {
            std::fs::write(file, &text).unwrap();
        }
        assert_eq!(text, std::fs::read_to_string(file).unwrap_or_default());
    }

    #[test]
    fn what_is_missing_comes_with_the_command_that_mends_it() {
        let mut bad = machine();
        bad.ublk = Driver { module: Module::Installed, node: false };
        bad.nbd = Driver::default();
        bad.io_uring_disabled = Some(1);
        bad.page_cluster = Some(0);
        let checks = checks(&bad);
        let remedy = |item| of(&checks, item).remedy.clone().unwrap();
        assert!(remedy("ublk").starts_with("modprobe ublk_drv"));
        assert!(remedy("nbd").contains("apt-get install linux-image-amd64"));
        assert!(remedy("io_uring").contains("kernel.io_uring_disabled=0"));
        assert_eq!(of(&checks, "nbd-direct").severity, Verdict::Info);
        assert_eq!(of(&checks, "page-cluster").severity, Verdict::Warning);
    }

    #[test]
    fn ublk_needs_io_uring_and_a_kernel_of_6_5() {
        let forbidden = Machine { io_uring_disabled: Some(2), ..machine() };
        assert_eq!(of(&checks(&forbidden), "ublk").severity, Verdict::Info);
        let old = Machine {
            release: "5.10.0-8-amd64".into(),
            ublk: Driver::default(),
            io_uring_disabled: None,
            ..machine()
        };
        assert_eq!(of(&checks(&old), "ublk").found, "needs Linux 6.5");
        assert_eq!(of(&checks(&old), "io_uring").severity, Verdict::Ok);
    }

    #[test]
    fn a_machine_of_which_nothing_can_be_read_is_judged_too() {
        let checks = checks(&Machine::default());
        assert_eq!(of(&checks, "kernel").severity, Verdict::Warning);
        assert_eq!(of(&checks, "memory").severity, Verdict::Warning);
        assert!(checks.iter().all(|check| check.severity != Verdict::Critical), "nothing is in use");
    }

    #[test]
    fn a_shell_without_rights_is_told_so() {
        let user = Machine { capabilities: Some(0), memlock: Some(Limit::Bytes(8 << 20)), ..machine() };
        let checks = checks(&user);
        assert!(of(&checks, "privileges").found.contains("CAP_IPC_LOCK"));
        assert!(of(&checks, "memlock limit").found.contains("8MiB"));
    }
}
