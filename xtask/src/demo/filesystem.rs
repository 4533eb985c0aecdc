//! A file system on a kernel device.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::site::{Site, Undo};
use super::{Device, MIB};
use crate::util;

/// Files that are written and read back.
const FILES: u32 = 3;

/// ext4 with files, checked by their checksums, from the device rather than the page cache.
pub(super) fn workload(site: &Site, device: &Device) -> Result<()> {
    let why = "The device is a disk to the kernel. With `-o discard`, the memory of deleted files goes back to the \
               appliances.";
    site.account.step("Put a file system on it", why);
    let mount = site.dir().join("mnt");
    fs::create_dir(&mount)?;
    site.run(util::command("mkfs.ext4").args(["-q", &device.path]))?;
    site.done(Undo::Unmount(mount.clone()));
    site.run(util::command("mount").args(["-o", "discard", &device.path]).arg(&mount))?;
    let each = (site.size / 8).clamp(8 * MIB, 64 * MIB);
    let empty = site.resident()?;
    write_and_verify(site, &mount, each)?;
    let written = each * u64::from(FILES);
    let full = || Ok(site.resident()? >= empty + written / 2);
    site.wait_until("the appliances never said that they hold the files", full)?;
    delete_and_trim(site, &mount, written)?;
    site.run(util::command("umount").arg(&mount))?;
    site.undone(&Undo::Unmount(mount));
    site.run(util::command("e2fsck").args(["-f", "-n", &device.path]))?;
    site.account.check(true, "e2fsck finds the file system clean")
}

fn write_and_verify(site: &Site, mount: &Path, each: u64) -> Result<()> {
    let mib = each / MIB;
    let names: Vec<String> =
        (1..=FILES).map(|number| mount.join(format!("file{number}")).display().to_string()).collect();
    for name in &names {
        let mut dd = util::command("dd");
        dd.args(["if=/dev/urandom", &format!("of={name}"), "bs=1M", &format!("count={mib}"), "status=none"]);
        site.run(dd.arg("conv=fsync"))?;
    }
    let sums = site.run(util::command("sha256sum").args(&names))?;
    let list = site.dir().join("sums");
    fs::write(&list, sums)?;
    site.account.typed("echo 3 > /proc/sys/vm/drop_caches");
    fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the page cache")?;
    let same = site.same(util::command("sha256sum").arg("--check").arg("--quiet").arg(&list))?;
    site.account.check(same, &format!("{FILES} files of {mib} MiB are the same, read from the device"))
}

fn delete_and_trim(site: &Site, mount: &Path, written: u64) -> Result<()> {
    let before = site.resident()?;
    let files = (1..=FILES).map(|number| mount.join(format!("file{number}")));
    site.run(util::command("rm").args(files))?;
    site.run(util::command("fstrim").arg("-v").arg(mount))?;
    let free = || Ok(site.resident()? + written / 2 <= before);
    site.wait_until("the files' memory did not become free", free)?;
    let after = site.resident()?;
    site.account.output(&site.xpm(&["appliance", "list"])?);
    let what = format!("the appliances hold {} MiB instead of {} MiB", after / MIB, before / MIB);
    site.account.check(after < before, &what)
}
