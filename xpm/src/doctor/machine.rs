//! Reading this machine. Nothing here changes it.

use std::fs;
use std::path::Path;

use xpm_control::proc::{self, Swap};

use super::parse::{self, Limit};
use crate::hibernation;

/// What was read. `None` is a file that is not there or not understood.
#[derive(Debug, Clone, Default)]
pub(super) struct Machine {
    /// The kernel's release, as `uname -r` prints it.
    pub(super) release: String,
    /// The machine's architecture in Debian's words.
    pub(super) architecture: &'static str,
    pub(super) distribution: String,
    pub(super) loadable_modules: bool,
    pub(super) ublk: Driver,
    pub(super) nbd: Driver,
    pub(super) ib_uverbs: Module,
    pub(super) rdma_ucm: Module,
    pub(super) rdma_rxe: Module,
    pub(super) crc32_generic: Module,
    /// `kernel.io_uring_disabled`: 0, 1 or 2.
    pub(super) io_uring_disabled: Option<u64>,
    pub(super) memlock: Option<Limit>,
    pub(super) capabilities: Option<u64>,
    pub(super) huge_pages: Option<HugePages>,
    /// The root cgroup's controllers, when cgroup v2 is mounted.
    pub(super) controllers: Option<String>,
    pub(super) userfaultfd_device: bool,
    /// `vm.unprivileged_userfaultfd`.
    pub(super) userfaultfd_unprivileged: Option<u64>,
    pub(super) zswap: bool,
    pub(super) page_cluster: Option<u64>,
    pub(super) swaps: Vec<Swap>,
    pub(super) memory_total: Option<u64>,
    pub(super) memory_available: Option<u64>,
    pub(super) boot_id: bool,
    /// This kernel can hibernate, and whether the service manager asks xpm before it does.
    pub(super) hibernation: Option<bool>,
    pub(super) memfd: Option<String>,
}

/// A kernel driver: whether it is there, and whether it shows its device node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Driver {
    pub(super) module: Module,
    pub(super) node: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Module {
    /// Neither in the kernel nor among the modules installed for it.
    #[default]
    Absent,
    /// Installed, not loaded.
    Installed,
    /// Loaded or built in.
    Running,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HugePages {
    pub(super) total: u64,
    pub(super) free: u64,
    /// Bytes of one page.
    pub(super) len: u64,
}

impl Machine {
    pub(super) fn read() -> Machine {
        let release = text(Path::new("/proc/sys/kernel/osrelease")).trim().to_owned();
        let meminfo = text(Path::new("/proc/meminfo"));
        let modules = Modules::read(&release);
        Machine {
            architecture: debian_architecture(),
            distribution: parse::distribution(&text(Path::new("/etc/os-release")))
                .unwrap_or_default()
                .to_owned(),
            loadable_modules: Path::new("/proc/modules").exists(),
            ublk: Driver { module: modules.state("ublk_drv"), node: Path::new("/dev/ublk-control").exists() },
            nbd: Driver { module: modules.state("nbd"), node: Path::new("/dev/nbd0").exists() },
            ib_uverbs: modules.state("ib_uverbs"),
            rdma_ucm: modules.state("rdma_ucm"),
            rdma_rxe: modules.state("rdma_rxe"),
            crc32_generic: modules.state("crc32_generic"),
            io_uring_disabled: number(Path::new("/proc/sys/kernel/io_uring_disabled")),
            memlock: parse::limit(&text(Path::new("/proc/self/limits")), "Max locked memory"),
            capabilities: parse::capabilities(&text(Path::new("/proc/self/status"))),
            huge_pages: huge_pages(&meminfo),
            controllers: fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").ok(),
            userfaultfd_device: Path::new("/dev/userfaultfd").exists(),
            userfaultfd_unprivileged: number(Path::new("/proc/sys/vm/unprivileged_userfaultfd")),
            zswap: text(Path::new("/sys/module/zswap/parameters/enabled")).trim() == "Y",
            page_cluster: number(Path::new("/proc/sys/vm/page-cluster")),
            swaps: proc::swaps().unwrap_or_default(),
            memory_total: proc::meminfo(&meminfo, "MemTotal"),
            memory_available: proc::meminfo(&meminfo, "MemAvailable"),
            hibernation: hibernation::is_possible().then(hibernation::is_guarded),
            boot_id: Path::new("/proc/sys/kernel/random/boot_id").exists(),
            memfd: memfd_error(),
            release,
        }
    }
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn number(path: &Path) -> Option<u64> {
    text(path).trim().parse().ok()
}

fn debian_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn huge_pages(meminfo: &str) -> Option<HugePages> {
    Some(HugePages {
        total: proc::meminfo(meminfo, "HugePages_Total")?,
        free: proc::meminfo(meminfo, "HugePages_Free")?,
        len: proc::meminfo(meminfo, "Hugepagesize")?,
    })
}

/// Why no memfd can be made; none when it can. A security policy may forbid it.
fn memfd_error() -> Option<String> {
    let made = rustix::fs::memfd_create("xpm-doctor", rustix::fs::MemfdFlags::CLOEXEC);
    made.err().map(|error| error.to_string())
}

/// The lists of modules of the running kernel.
struct Modules {
    loaded: String,
    built_in: String,
    installed: String,
}

impl Modules {
    fn read(release: &str) -> Modules {
        let directory = Path::new("/lib/modules").join(release);
        Modules {
            loaded: text(Path::new("/proc/modules")),
            built_in: text(&directory.join("modules.builtin")),
            installed: text(&directory.join("modules.dep")),
        }
    }

    fn state(&self, module: &str) -> Module {
        // A driver that is built into a kernel without module lists shows here all the same.
        let in_sysfs = Path::new("/sys/module").join(module).exists();
        if in_sysfs
            || parse::lists_module(&self.loaded, module)
            || parse::lists_module(&self.built_in, module)
        {
            Module::Running
        } else if parse::lists_module(&self.installed, module) {
            Module::Installed
        } else {
            Module::Absent
        }
    }
}

/// What the kernel says of one block device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct BlockSettings {
    pub(super) scheduler: Option<String>,
    pub(super) rotational: Option<u64>,
    /// Longest discard in bytes; 0: the device has none.
    pub(super) discard_max: Option<u64>,
    /// Discards that it has completed.
    pub(super) discards: Option<u64>,
}

impl BlockSettings {
    /// The settings of `/dev/NAME`; none when it is no block device of this host.
    pub(super) fn read(path: &str) -> Option<BlockSettings> {
        let name =
            path.strip_prefix("/dev/").filter(|name| !name.is_empty() && !name.contains(['/', '.']))?;
        let directory = Path::new("/sys/block").join(name);
        let queue = directory.join("queue");
        directory.exists().then(|| BlockSettings {
            scheduler: parse::scheduler(&text(&queue.join("scheduler"))).map(str::to_owned),
            rotational: number(&queue.join("rotational")),
            discard_max: number(&queue.join("discard_max_bytes")),
            discards: parse::discards(&text(&directory.join("stat"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_can_be_read() {
        let machine = Machine::read();
        assert!(parse::kernel_version(&machine.release).is_some());
        assert!(machine.memory_total > Some(0));
        assert!(machine.capabilities.is_some());
    }

    #[test]
    fn only_plain_device_names_are_looked_up() {
        for path in [
            "",
            "/dev/",
            "/dev/../etc",
            "/run/a.sock",
            "127.0.0.1:10809",
            "/dev/mapper/x",
            "/dev/no-such-device",
        ] {
            assert_eq!(BlockSettings::read(path), None, "{path}");
        }
    }
}
