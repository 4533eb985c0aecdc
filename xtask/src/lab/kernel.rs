//! The guest's kernel: Debian's stock 6.12, unpacked and not installed.

use std::cmp::Reverse;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::util;

/// An unpacked kernel package.
pub(crate) struct Kernel {
    /// Where the package was unpacked.
    root: PathBuf,
    /// Its release as `uname -r` shows it.
    release: String,
}

impl Kernel {
    /// The kernel of the cache, or the newest one that apt offers, downloaded into it.
    pub(crate) fn get(cache: &Path) -> Result<Kernel> {
        let root = cache.join("kernel");
        if !root.join("complete").is_file() {
            fetch(&root).context("cannot get the guest's kernel")?;
        }
        let release = fs::read_to_string(root.join("complete"))?.trim().to_owned();
        Ok(Kernel { root, release })
    }

    /// The release as `uname -r` shows it.
    pub(crate) fn release(&self) -> &str {
        &self.release
    }

    /// The bootable image.
    pub(crate) fn image(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// The directory that is to be `/lib/modules` of the guest.
    pub(crate) fn modules(&self) -> PathBuf {
        self.root.join("lib/modules")
    }

    /// Module files that the named modules need, and their own, as paths below the release's
    /// directory and in the order in which they can be inserted.
    pub(crate) fn module_order(&self, names: &[&str]) -> Result<Vec<String>> {
        let file = self.modules().join(&self.release).join("modules.dep");
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let mut order = Vec::new();
        for name in names {
            let path =
                find_module(&text, name).with_context(|| format!("the kernel has no module {name}"))?;
            insert_after_needs(&text, path, &mut order);
        }
        Ok(order)
    }
}

/// Downloads and unpacks the newest kernel. The file `complete` is written last, so that an
/// interrupted download is not taken for a kernel.
fn fetch(root: &Path) -> Result<()> {
    fs::create_dir_all(root)?;
    let release = newest_release()?;
    println!("lab: getting Debian's kernel {release}");
    util::output(util::command("apt-get").current_dir(root).args([
        "download",
        "-qq",
        &format!("linux-image-{release}"),
    ]))?;
    let package = fs::read_dir(root)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|suffix| suffix == "deb"))
        .context("apt-get download left no package")?;
    util::run(util::command("dpkg").arg("-x").args([&package, root]))?;
    fs::remove_file(package)?;
    util::run(util::command("depmod").arg("-b").args([root]).arg(&release))?;
    fs::write(root.join("complete"), &release)?;
    Ok(())
}

/// The newest stock 6.12 kernel for Debian 12 that apt knows; not the `cloud` flavour, which lacks
/// 9p and Soft-RoCE.
fn newest_release() -> Result<String> {
    let pattern = r"^linux-image-6\.12\.[0-9]+\+deb12-amd64$";
    let search = || util::output(util::command("apt-cache").args(["search", "--names-only", pattern]));
    let mut found = search()?;
    if found.trim().is_empty() {
        util::run(util::command("apt-get").args(["update", "-qq"]))?;
        found = search()?;
    }
    let mut releases: Vec<&str> = found
        .lines()
        .filter_map(|line| line.split_whitespace().next()?.strip_prefix("linux-image-"))
        .collect();
    releases.sort_by_key(|release| Reverse(patch_level(release)));
    ensure!(
        !releases.is_empty(),
        "apt knows no linux-image-6.12.*+deb12-amd64; add Debian's bookworm-security or bookworm-backports to its sources"
    );
    Ok(releases[0].to_owned())
}

/// The third number of a release such as `6.12.117+deb12-amd64`.
fn patch_level(release: &str) -> u32 {
    let number = release.split(['.', '+']).nth(2).unwrap_or_default();
    number.parse().unwrap_or(0)
}

/// The path of a module in the text of `modules.dep`.
fn find_module<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut paths = text.lines().filter_map(|line| Some(line.split_once(':')?.0));
    paths.find(|path| module_name(path) == name)
}

/// `kernel/fs/9p/9p.ko.xz` is the module `9p`; the kernel takes `-` and `_` for the same.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// Adds a module to the order behind everything that it needs.
fn insert_after_needs(text: &str, path: &str, order: &mut Vec<String>) {
    if order.iter().any(|known| known == path) {
        return;
    }
    let needs = text.lines().filter_map(|line| line.split_once(':')).find(|(file, _)| *file == path);
    for need in needs.map(|(_, needs)| needs.split_whitespace()).into_iter().flatten() {
        insert_after_needs(text, need, order);
    }
    order.push(path.to_owned());
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/fs/9p/9p.ko.xz: kernel/fs/netfs/netfs.ko.xz kernel/net/9p/9pnet.ko.xz
kernel/net/9p/9pnet.ko.xz: kernel/fs/netfs/netfs.ko.xz
kernel/fs/netfs/netfs.ko.xz:
kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz
kernel/drivers/block/ublk-drv.ko.xz:
";

    #[test]
    fn needs_come_first_and_once() {
        let mut order = Vec::new();
        for name in ["9p", "9pnet_virtio"] {
            insert_after_needs(DEP, find_module(DEP, name).unwrap(), &mut order);
        }
        let names: Vec<_> = order.iter().map(|path| module_name(path)).collect();
        assert_eq!(names, ["netfs", "9pnet", "9p", "9pnet_virtio"]);
    }

    #[test]
    fn names_of_modules() {
        assert!(find_module(DEP, "ublk_drv").is_some());
        assert!(find_module(DEP, "netfs.ko").is_none());
    }

    #[test]
    fn newest_is_by_number() {
        assert!(patch_level("6.12.117+deb12-amd64") > patch_level("6.12.99+deb12-amd64"));
    }
}
