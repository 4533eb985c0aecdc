//! The codes of what the doctor finds (docs/health.md): by what was looked at.

use xpm_protocol::api::health::Check as Code;

use super::{Check, Verdict};

/// Gives each check that is not as it should be its code.
pub(super) fn give(checks: &mut [Check]) {
    for check in checks.iter_mut().filter(|check| check.severity != Verdict::Ok) {
        check.code = Some(code(check).code());
    }
}

fn code(check: &Check) -> Code {
    match (check.group.as_str(), check.item.as_str()) {
        (_, "kernel") => Code::HostKernel,
        (_, "io_uring") => Code::HostIoUring,
        (_, "userfaultfd") => Code::HostUserfaultfd,
        (_, "ublk") => Code::HostUblk,
        (_, "nbd" | "nbd-direct") => Code::HostNbd,
        (_, "privileges") => Code::HostPrivileges,
        (_, "memlock limit") => Code::HostMemlock,
        (_, "cgroup v2") => Code::HostCgroup,
        (_, "page-cluster") => Code::HostPageCluster,
        (_, "zswap, zram") => Code::HostCompressedSwap,
        (_, "hibernation") => Code::HostHibernation,
        (_, "memory") => Code::HostNothingToLend,
        (_, "shared memory") => Code::HostSharedMemory,
        ("RDMA", _) => Code::HostRdma,
        ("xpm-blk", "daemon") => Code::BlkUnreachable,
        ("xpm-blk", "standby") => Code::StandbyMissing,
        ("xpm-blk", path) if path.starts_with('/') => Code::SwapOrphan,
        ("xpm-blk", _) => Code::SwapUnsafe,
        (_, "state") if check.found.starts_with("lost") => Code::DeviceLost,
        (_, "state") => Code::DeviceHolding,
        (_, "transport") => Code::DeviceSlowPath,
        (_, "scheduler" | "rotational") => Code::DeviceSettings,
        (_, "discard") => Code::DeviceNoDiscard,
        _ => Code::HostOther,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{devices, fitness, machine::Machine};
    use super::*;

    #[test]
    fn all_that_is_looked_at_has_a_code_of_its_own() {
        let mut checks = fitness::checks(&Machine::default());
        checks.extend(devices::tests::all_that_is_looked_at());
        for check in &mut checks {
            check.severity = Verdict::Warning;
        }
        give(&mut checks);
        let other: Vec<&Check> =
            checks.iter().filter(|check| check.code == Some(Code::HostOther.code())).collect();
        let without = ["nbd-socket", "vhost-user", "huge pages", "used by"];
        assert!(other.iter().all(|check| without.contains(&check.item.as_str())), "never ok: {other:#?}");
    }
}
