//! The Debian packages that demo, tests, lab and benchmarks need, and their installation.

use anyhow::{Result, bail};

use crate::{apt, util};

/// A Debian package that some command of xtask needs.
pub(crate) struct Package {
    /// Its name.
    name: &'static str,
    /// A program of it, or the path of another file; the package counts as installed when this is
    /// found.
    probe: &'static str,
    /// The purpose of the package.
    purpose: &'static str,
}

const fn package(name: &'static str, probe: &'static str, purpose: &'static str) -> Package {
    Package { name, probe, purpose }
}

/// Packages that building the programs needs besides Rust; no RDMA package is among them.
const BUILD: [Package; 4] = [
    package("clang", "clang", "build: reads the headers of the RDMA libraries' binding"),
    package("cmake", "cmake", "build: of the RDMA libraries' binding"),
    package("protobuf-compiler", "protoc", "build: of etcd's client"),
    package("libprotobuf-dev", "/usr/include/google/protobuf/descriptor.proto", "build: of etcd's client"),
];

/// All others, each once.
pub(crate) const ALL: &[Package] = &[
    package("qemu-system-x86", "qemu-system-x86_64", "lab: the guest; tests: virtual machines"),
    package("qemu-system-common", "qemu-storage-daemon", "bench: vhost-user-blk by others"),
    package("busybox-static", "busybox", "lab: first process of the guest"),
    package("kmod", "depmod", "lab: order of the guest's kernel modules"),
    package("xz-utils", "xz", "lab: unpacks the guest's kernel modules"),
    package("iproute2", "ip", "lab, tests: network namespaces"),
    package("util-linux", "nsenter", "lab, tests: namespaces, swap"),
    package("systemd", "/lib/systemd/systemd", "lab: the guest's service manager"),
    package("udev", "udevadm", "lab: the guest's device manager"),
    package("dpkg-dev", "dpkg-shlibdeps", "package: what programs need of libraries"),
    package("binutils", "strip", "package: smaller programs"),
    package("lintian", "lintian", "package: whether they are as Debian wants them"),
    package("pkgconf", "pkg-config", "lab: finds libxpm as a program's build does"),
    package("shellcheck", "shellcheck", "tidy: mistakes in scripts"),
    package("jq", "jq", "lab: reads JSON"),
    package("python3", "python3", "tests: programs under xpm run"),
    package("e2fsprogs", "mkfs.ext4", "lab, demo: file systems on devices"),
    package("xfsprogs", "mkfs.xfs", "lab, demo: file systems on devices"),
    package("etcd-server", "etcd", "tests: metadata that several allocators share"),
    package("fio", "fio", "lab, tests, bench: verified load"),
    package("faketime", "faketime", "tests: a clock that can be set, for hours and leases"),
    package("nbd-client", "nbd-client", "bench: the kernel's NBD client set up by others"),
    package("nbdkit", "nbdkit", "tests, bench: an NBD server to compare with"),
    package("libnbd-bin", "nbdinfo", "demo, tests: an NBD client of another project"),
    package("python3-libnbd", "nbdsh", "tests: an NBD client that can misbehave"),
    package(
        "redis-tools",
        "redis-benchmark",
        "tests: a program whose memory is external; the server is in it, too",
    ),
    package("memcached", "memcached", "tests: programs under xpm run"),
    package("nginx-light", "nginx", "tests: the same"),
    package("postgresql", "psql", "tests: the same"),
    package("sqlite3", "sqlite3", "tests: the same"),
    package("openssh-server", "/usr/sbin/sshd", "tests: the same"),
    package("openssh-client", "ssh", "tests: the same"),
    package("git", "git", "tests: the same"),
    package("gcc", "gcc", "tests: the same, and the guest of virtual machines"),
    package("python3-numpy", "f2py3", "tests: the same"),
    package("perftest", "ib_read_lat", "lab, bench: RDMA by others; brings the libraries, Soft-RoCE's too"),
    package("rdmacm-utils", "rping", "lab: RDMA by its connection manager, by others"),
    package("qemu-utils", "qemu-img", "demo, tests, bench: an NBD client and server of another project"),
];

/// Installs what is missing of these packages and of those that building needs.
///
/// # Errors
/// When something is missing and this is not root on a Debian system; the text says what to
/// install.
pub(crate) fn run(packages: &[Package]) -> Result<()> {
    let missing: Vec<&Package> =
        BUILD.iter().chain(packages).filter(|package| util::find_program(package.probe).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    for package in &missing {
        println!("setup: {} is missing ({})", package.name, package.purpose);
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    if !rustix::process::geteuid().is_root() || util::find_program("apt-get").is_none() {
        bail!("install these packages first: apt-get install {}", names.join(" "));
    }
    install(&names)
}

/// Installs packages with apt-get; reads the package lists anew when the old ones do not do.
fn install(names: &[&str]) -> Result<()> {
    if apt_install(names).is_err() {
        apt::get(util::command("apt-get").args(["update", "-qq"]))?;
        apt_install(names)?;
    }
    Ok(())
}

fn apt_install(names: &[&str]) -> Result<()> {
    let mut apt = util::command("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    apt::get(apt.args(["install", "-y", "-qq", "--no-install-recommends"]).args(names))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_package_once() {
        let names: HashSet<_> = BUILD.iter().chain(ALL).map(|package| package.name).collect();
        assert_eq!(names.len(), BUILD.len() + ALL.len());
    }

    #[test]
    fn what_is_there_is_not_installed() {
        run(&[package("no-such-package", "sh", "test")]).unwrap();
    }
}
