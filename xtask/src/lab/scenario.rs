//! The scenarios: what each needs, runs and checks.

use anyhow::{Result, ensure};

use super::cluster::Cluster;
use super::disk::{Disk, Storage};

/// One thing that the lab tests. To add one, write a script in `tests/lab` and a line in [`ALL`].
#[derive(Debug)]
pub(crate) struct Scenario {
    /// Its name on the command line.
    pub(crate) name: &'static str,
    /// The property that it shows, in one line.
    pub(crate) about: &'static str,
    /// Scenarios of one group need the same guest and the same appliances, and run one after the
    /// other in one boot. After a failure the rest of the group gets a fresh one.
    pub(crate) group: &'static str,
    /// Memory of the guest in MiB.
    pub(crate) memory_mib: u32,
    /// Memory that each appliance lends; none: no allocator and no appliance.
    pub(crate) appliances: &'static [&'static str],
    /// Size of an allocation that the host's xpm-blk serves to the guest as its vhost-user-blk disk `vm`; none: there
    /// is no xpm-blk on the host.
    pub(crate) vhost: Option<&'static str>,
    /// Further disks of the guest, of different servers on the host, to be compared.
    pub(crate) disks: &'static [Disk],
    /// Whether the guest's first process is systemd, its files are on a disk, and it may restart (`tests/lab/systemd`).
    pub(crate) systemd: bool,
    /// Whether the daemons begin as programs of an earlier commit, which the script upgrades.
    pub(crate) upgrades: bool,
    /// The script in `tests/lab` that the guest runs.
    pub(crate) script: &'static str,
    /// The script's arguments.
    pub(crate) args: &'static [&'static str],
    /// How long it may take, in seconds.
    pub(crate) seconds_max: u64,
    /// Whether it measures rather than tests; such a one runs only when it is named.
    pub(crate) bench: bool,
    /// Whether no other guest runs beside its own: what it tests has limits in time.
    pub(crate) alone: bool,
    /// Whether it takes long, or others test much of the same; such a one runs only when it is named, or with `--all`.
    pub(crate) long: bool,
    /// Whether it runs programs of this project.
    pub(crate) needs_programs: bool,
    /// The condition on the host when the guest is done.
    pub(crate) check: fn(&mut Cluster<'_>) -> Result<()>,
}

/// The common settings of most scenarios.
const BASE: Scenario = Scenario {
    name: "",
    about: "",
    group: "",
    memory_mib: 512,
    appliances: &["2GiB", "2GiB"],
    vhost: None,
    disks: &[],
    systemd: false,
    upgrades: false,
    script: "",
    args: &[],
    seconds_max: 900,
    bench: false,
    alone: false,
    long: false,
    needs_programs: true,
    check: nothing_left,
};

/// The common settings of scenarios in which a small guest has swap on each form of device.
const SWAP: Scenario = Scenario { group: "swap", memory_mib: 256, ..BASE };

/// The common settings of scenarios in which daemons on the host are replaced under a guest that is short of memory.
const RESTART: Scenario = Scenario { group: "restart", memory_mib: 256, seconds_max: 900, ..BASE };

/// The common settings of scenarios in which xpm-blk is replaced too; only the memory cgroup of the load is short.
const NBD: Scenario = Scenario { group: "nbd", seconds_max: 900, ..BASE };

/// The common settings of both lengths of the loop of kills.
const KILL_LOOP: Scenario =
    Scenario { group: "kill-loop", memory_mib: 256, script: "kill-loop.sh", seconds_max: 1200, ..BASE };

/// The common settings of scenarios with RDMA: both ends are in the guest.
const RDMA: Scenario = Scenario {
    group: "rdma",
    alone: true,
    memory_mib: 2560,
    appliances: &[],
    seconds_max: 900,
    check: daemons_live,
    ..BASE
};

/// The common settings of scenarios with xpm-swapd: a small guest, and a pool that can be filled. They run when they
/// are named: a program of three times the memory takes minutes in an emulated guest.
const SWAPD: Scenario = Scenario {
    group: "swapd",
    memory_mib: 384,
    appliances: &["1GiB", "1GiB"],
    script: "swapd.sh",
    seconds_max: 1800,
    long: true,
    ..BASE
};

/// The common settings of scenarios with systemd. They run only when they are named, for the time they take.
/// Emulated, systemd and dpkg take minutes: a start with what is done after it 5 on a quiet machine, the first one 8.
const BOOT: Scenario =
    Scenario { group: "boot", memory_mib: 768, systemd: true, seconds_max: 1500, long: true, ..BASE };

/// All scenarios, in the order in which they run.
pub(crate) const ALL: &[Scenario] = &[
    Scenario {
        name: "smoke",
        about: "the lab itself: modules, devices, the host's root, the network",
        group: "smoke",
        appliances: &[],
        script: "smoke.sh",
        seconds_max: 60,
        needs_programs: false,
        check: daemons_live,
        ..BASE
    },
    Scenario {
        name: "swap-ublk",
        about: "more patterned memory than a guest of 256 MB has, swap on ublk",
        script: "swap.sh",
        args: &["ublk"],
        ..SWAP
    },
    Scenario {
        name: "swap-nbd",
        long: true,
        about: "the same, on the kernel's nbd served by xpm-blk",
        script: "swap.sh",
        args: &["nbd"],
        ..SWAP
    },
    Scenario {
        name: "swap-nbd-direct",
        long: true,
        about: "the same, on the kernel's nbd connected to the appliance itself",
        script: "swap.sh",
        args: &["nbd-direct"],
        ..SWAP
    },
    Scenario {
        name: "fs",
        about: "ext4 and xfs on devices: verified load, trim gives memory back, checks are clean",
        group: "fs",
        script: "fs.sh",
        ..BASE
    },
    Scenario {
        name: "file",
        long: true,
        about: "a mapped file of external memory in a small memory cgroup, while its server is killed, stopped and replaced",
        group: "fs",
        script: "file.sh",
        args: &["3"],
        ..BASE
    },
    Scenario {
        name: "file-50",
        long: true,
        about: "the same, 50 times",
        group: "fs",
        script: "file.sh",
        args: &["50"],
        seconds_max: 3600,
        ..BASE
    },
    Scenario {
        name: "detach-open",
        about: "devices that a program has open, or that are under a loop device with a file system, are not detached",
        group: "fs",
        script: "detach-open.sh",
        ..BASE
    },
    Scenario {
        name: "lender-gone",
        about: "swap on ublk, whose appliance goes for good: given up, the machine is usable, and the appliance returns cleared",
        group: "lender-gone",
        script: "lender-gone.sh",
        args: &["ublk"],
        ..BASE
    },
    Scenario {
        name: "lender-gone-nbd-direct",
        long: true,
        about: "the same, with swap on the kernel's nbd connected to the appliance itself",
        group: "lender-gone",
        script: "lender-gone.sh",
        args: &["nbd-direct"],
        ..BASE
    },
    Scenario {
        name: "tmpfs",
        long: true,
        about: "a tmpfs larger than memory, whose pages go to swap",
        script: "tmpfs.sh",
        ..SWAP
    },
    Scenario {
        name: "drain-swap",
        about: "appliances that hold active swap are emptied, under a program that verifies its pages",
        script: "drain-swap.sh",
        ..SWAP
    },
    Scenario {
        name: "swapd",
        about: "xpm-swapd follows a program up to three times the memory and down; drained, refused, killed while it grows",
        ..SWAPD
    },
    Scenario {
        name: "swapd-kills",
        about: "the same, and xpm-swapd is killed 30 times while it grows",
        args: &["30"],
        seconds_max: 2700,
        ..SWAPD
    },
    Scenario {
        name: "resize",
        long: true,
        about: "ext4 on the kernel's nbd grows and shrinks with its allocation, mounted and under load",
        group: "fs",
        script: "resize.sh",
        ..BASE
    },
    Scenario {
        name: "vhost",
        about: "a vhost-user-blk disk of QEMU's: ext4 and swap, while its xpm-blk on the host is killed again and again",
        group: "vhost",
        memory_mib: 256,
        vhost: Some("1GiB"),
        script: "vhost.sh",
        check: disk_served,
        ..BASE
    },
    Scenario {
        name: "boot",
        about: "systemd: devices, swap and mounts by units, restart of the machine and of daemons, nothing lost",
        script: "boot.sh",
        args: &["1"],
        ..BOOT
    },
    Scenario {
        name: "packages",
        about: "the Debian packages: installed, used, upgraded under a mounted file system, removed without a trace",
        script: "packages.sh",
        ..BOOT
    },
    Scenario {
        name: "boot-10",
        about: "the same, with ten restarts of the machine under memory pressure",
        group: "boot-10",
        script: "boot.sh",
        args: &["10"],
        seconds_max: 5400,
        ..BOOT
    },
    Scenario {
        name: "appliance-restart",
        long: true,
        about: "200 MB of swap on ublk, while the appliances that hold it and the allocator are killed and restarted",
        script: "appliance-restart.sh",
        args: &["ublk", "1"],
        ..RESTART
    },
    Scenario {
        name: "appliance-restart-nbd",
        about: "the same, on the kernel's nbd connected to the appliance itself",
        script: "appliance-restart.sh",
        args: &["nbd-direct", "1"],
        ..RESTART
    },
    Scenario {
        name: "appliance-restart-long",
        about: "appliance-restart with 40 lives of appliances and 10 of the allocator",
        script: "appliance-restart.sh",
        args: &["ublk", "10"],
        seconds_max: 1800,
        long: true,
        ..RESTART
    },
    Scenario {
        name: "appliance-restart-nbd-long",
        about: "appliance-restart-nbd with 20 lives of the appliance and 10 of the allocator",
        script: "appliance-restart.sh",
        args: &["nbd-direct", "10"],
        seconds_max: 1800,
        long: true,
        ..RESTART
    },
    Scenario {
        name: "kill-loop",
        about: "swap on ublk under memory pressure, while processes that have to do with it are killed, or stopped",
        args: &["2"],
        ..KILL_LOOP
    },
    Scenario {
        name: "kill-loop-50",
        about: "the same, 50 times, each process in turn",
        args: &["50"],
        seconds_max: 3600,
        long: true,
        ..KILL_LOOP
    },
    Scenario {
        name: "restart-all",
        long: true,
        about: "every daemon restarted in place, xpm-blk replaced, too, under swap and a mounted file system",
        group: "restart-all",
        script: "restart-all.sh",
        args: &["1"],
        ..BASE
    },
    Scenario {
        name: "upgrade",
        long: true,
        about: "a pool of an earlier commit's programs upgraded under live swap, one daemon after the other in any order",
        group: "upgrade",
        upgrades: true,
        script: "upgrade.sh",
        ..BASE
    },
    Scenario {
        name: "nbd-restart",
        long: true,
        about: "the kernel's nbd on xpm-blk, under load and as swap, while xpm-blk and the appliance are replaced",
        script: "nbd-restart.sh",
        args: &["nbd", "1"],
        ..NBD
    },
    Scenario {
        name: "nbd-direct-restart",
        long: true,
        about: "the same, on the kernel's nbd connected to the appliance itself",
        script: "nbd-restart.sh",
        args: &["nbd-direct", "1"],
        ..NBD
    },
    Scenario {
        name: "rdma-smoke",
        about: "RDMA without xpm: Soft-RoCE, verbs and the connection manager",
        script: "rdma-smoke.sh",
        needs_programs: false,
        ..RDMA
    },
    Scenario {
        name: "rdma-swap",
        about: "swap, with and without discard, and ext4 over RDMA; appliances answer nothing",
        script: "rdma-swap.sh",
        ..RDMA
    },
    Scenario {
        name: "rdma-stopped-appliance",
        long: true,
        about: "appliances that stand still for 10 s, while verified I/O goes on",
        script: "rdma-stopped-appliance.sh",
        ..RDMA
    },
    Scenario {
        name: "rdma-fence",
        about: "old owners, and keys of other grants, reach not one byte",
        script: "rdma-fence.sh",
        ..RDMA
    },
    Scenario {
        name: "rdma-fallback",
        long: true,
        about: "no RDMA at first: TCP, and why; then all queues move to RDMA under a verified load",
        script: "rdma-fallback.sh",
        ..RDMA
    },
    Scenario {
        name: "rdma-mapping",
        long: true,
        about: "an allocation at addresses, over RDMA: pages that are touched, and calls on registered memory",
        script: "rdma-mapping.sh",
        ..RDMA
    },
    Scenario {
        name: "rdma-exchange",
        long: true,
        about: "no connection manager at the client, at both ends, at the appliances: connected over TCP",
        script: "rdma-exchange.sh",
        ..RDMA
    },
    Scenario {
        name: "rdma-kill",
        about: "an appliance killed under load: noticed in time, its memory lost and never zeros",
        script: "rdma-kill.sh",
        ..RDMA
    },
    Scenario {
        name: "rdma",
        about: "latency, rate and attaching over RDMA against perftest's programs",
        group: "rdma-bench",
        memory_mib: 4096,
        script: "bench-rdma.sh",
        seconds_max: 600,
        bench: true,
        ..RDMA
    },
    Scenario {
        name: "vhost-disks",
        about: "vhost-user-blk disks of QEMU's: xpm-blk against QEMU's storage daemon",
        group: "vhost-disks",
        memory_mib: 1024,
        appliances: &["1GiB", "1GiB"],
        disks: &[
            Disk::Xpm("nbd-tcp"),
            Disk::Xpm("shm"),
            Disk::Qsd(Storage::Null),
            Disk::Qsd(Storage::Memory),
            Disk::Qsd(Storage::NbdTcp),
            Disk::Qsd(Storage::NbdUnix),
        ],
        script: "bench-vhost.sh",
        seconds_max: 1200,
        bench: true,
        check: daemons_live,
        ..BASE
    },
    Scenario {
        name: "swap",
        about: "a program at half of its memory on swap of every kind: xpm's devices, and what one would use else",
        group: "swap-bench",
        memory_mib: 4096,
        appliances: &["1GiB", "1GiB"],
        disks: &[Disk::Xpm("nbd-tcp"), Disk::Xpm("shm"), Disk::File],
        script: "bench-swap.sh",
        seconds_max: 2400,
        bench: true,
        check: daemons_live,
        ..BASE
    },
    Scenario {
        name: "lab-blk",
        about: "ublk and nbd-direct against nbd-client with nbdkit, and nvme-tcp",
        group: "lab-blk",
        memory_mib: 4096,
        appliances: &[],
        script: "bench-blk.sh",
        seconds_max: 1200,
        bench: true,
        check: daemons_live,
        ..BASE
    },
];

/// The scenario of a name.
pub(crate) fn find(name: &str) -> Option<&'static Scenario> {
    ALL.iter().find(|scenario| scenario.name == name)
}

/// No daemon has ended.
fn daemons_live(cluster: &mut Cluster<'_>) -> Result<()> {
    cluster.check_alive()
}

/// The host's xpm-blk was killed in the middle of requests, the one that is there now served the guest to its end,
/// and nothing is left.
fn disk_served(cluster: &mut Cluster<'_>) -> Result<()> {
    let (kills, again) = (cluster.blk_lives() - 1, cluster.submitted_again());
    println!("[vhost] xpm-blk was killed {kills} times, and {again} requests were submitted again");
    ensure!(kills >= 3 && again >= 3, "that is too little for a test");
    let device = cluster.xpm(&["blk", "show", "vm"])?;
    ensure!(device["counters"]["errors"] == 0, "requests ended with errors: {device}");
    cluster.end_disk()?;
    nothing_left(cluster)
}

/// No daemon has ended, the guest's allocations are gone, and the appliances have all memory back
/// and answered no request with an error.
fn nothing_left(cluster: &mut Cluster<'_>) -> Result<()> {
    cluster.check_alive()?;
    let allocations = cluster.xpm(&["alloc", "list"])?;
    ensure!(allocations.as_array().is_some_and(Vec::is_empty), "allocations are left: {allocations}");
    let appliances = cluster.xpm(&["appliance", "list"])?;
    for appliance in appliances.as_array().map(Vec::as_slice).unwrap_or_default() {
        let status = &appliance["status"];
        ensure!(
            status["granted"] == 0,
            "{} still has regions in grants: {status}",
            appliance["info"]["name"]
        );
        ensure!(status["counters"]["errors"] == 0, "{} answered errors: {status}", appliance["info"]["name"]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::util;

    #[test]
    fn names_are_unique_and_scripts_exist() {
        let names: HashSet<_> = ALL.iter().map(|scenario| scenario.name).collect();
        assert_eq!(names.len(), ALL.len());
        for scenario in ALL {
            let script = util::repository().join("tests/lab").join(scenario.script);
            assert!(script.is_file(), "{}", script.display());
            assert!(!scenario.name.contains(char::is_whitespace));
        }
    }

    #[test]
    fn a_group_shares_what_a_boot_has() {
        for scenario in ALL {
            for other in ALL.iter().filter(|other| other.group == scenario.group) {
                assert_eq!(scenario.memory_mib, other.memory_mib, "{}", other.name);
                assert_eq!(scenario.appliances, other.appliances, "{}", other.name);
                assert_eq!(scenario.vhost, other.vhost, "{}", other.name);
                assert_eq!(scenario.disks, other.disks, "{}", other.name);
                assert_eq!(scenario.systemd, other.systemd, "{}", other.name);
                assert_eq!(scenario.upgrades, other.upgrades, "{}", other.name);
            }
        }
    }
}
