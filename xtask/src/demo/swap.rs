//! Swap on a kernel device.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::site::{NAME, Site, Undo};
use super::{Device, MIB};
use crate::util;

/// Memory that the program may have.
const LOCAL: u64 = 64 * MIB;
/// Memory that it uses.
const NEEDED: u64 = 192 * MIB;
/// Longest run of the program.
const LIMIT: Duration = Duration::from_secs(300);

/// A program that needs three times the memory that it is allowed, its rest swapped to the device.
pub(super) fn workload(site: &Site, device: &Device) -> Result<()> {
    let why = "A program gets 64 MiB by a memory cgroup and uses 192 MiB: the rest lies in the memory of the appliances. \
               Every page carries a pattern that is checked.";
    site.account.step("Use it as swap", why);
    let Some(group) = memory_group(site)? else {
        site.account.note("skipped: this machine has no cgroup v2 with the memory controller");
        return Ok(());
    };
    site.run(util::command("mkswap").arg(&device.path))?;
    // Ahead of any other swap of this machine.
    site.done(Undo::SwapOff(device.path.clone()));
    site.run(util::command("swapon").args(["--discard", "--priority", "32767", &device.path]))?;
    refuses_to_go(site)?;
    hog(site, &group)?;
    site.run(util::command("swapoff").arg(&device.path))?;
    site.undone(&Undo::SwapOff(device.path.clone()));
    site.account.check(!swaps()?.contains(&device.path), "swapoff was clean")
}

fn refuses_to_go(site: &Site) -> Result<()> {
    let finished = site.xpm_finish(&["blk", "detach", NAME])?;
    site.account.output(&finished.err);
    site.account.check(!finished.status.success(), "xpm-blk does not take away a device that is swap")?;
    let doctor = site.ask(&["doctor"]);
    let unsafe_items = |report: &Value| {
        let checks = report["checks"].as_array().into_iter().flatten();
        checks
            .filter(|check| check["severity"] == "critical")
            .map(|check| check["item"].to_string())
            .collect::<Vec<_>>()
    };
    match doctor {
        Ok(_) => site.account.note("`xpm doctor` finds nothing unsafe in use"),
        // It fails when something is unsafe, which a demo outside of the service manager may be.
        Err(_) => {
            let finished = site.xpm_finish(&["doctor", "--json"])?;
            let report: Value = serde_json::from_str(&finished.out).context("xpm doctor printed no JSON")?;
            let items = unsafe_items(&report).join(", ");
            site.account.note(&format!("`xpm doctor` warns that this is unsafe for real use here: {items}"));
        }
    }
    Ok(())
}

fn hog(site: &Site, group: &Path) -> Result<()> {
    let before = swapped_out()?;
    let memhog = site.program("memhog");
    let mut shell = util::command("sh");
    shell.arg("-c").arg(format!(
        "echo $$ > {}/cgroup.procs && exec {} {} --run 64",
        group.display(),
        memhog.get_program().to_string_lossy(),
        NEEDED / MIB
    ));
    site.account.command(&shell);
    let finished = site.runner.finish(&mut shell, LIMIT)?;
    site.account.output(&finished.out);
    site.account.check(finished.status.success(), "no page differs from what was written")?;
    let swapped = (swapped_out()? - before) / MIB;
    let enough = swapped >= (NEEDED - LOCAL) / MIB / 2;
    site.account.check(enough, &format!("{swapped} MiB were swapped out on the way"))
}

/// Bytes that this machine has swapped out since it started.
fn swapped_out() -> Result<u64> {
    let vmstat = fs::read_to_string("/proc/vmstat").context("cannot read /proc/vmstat")?;
    let pages = pages_swapped_out(&vmstat).context("/proc/vmstat does not say what was swapped out")?;
    Ok(pages * rustix::param::page_size() as u64)
}

fn pages_swapped_out(vmstat: &str) -> Option<u64> {
    vmstat.lines().find_map(|line| line.strip_prefix("pswpout ")?.trim().parse().ok())
}

fn swaps() -> Result<String> {
    fs::read_to_string("/proc/swaps").context("cannot read /proc/swaps")
}

/// A cgroup with the limit; none where this machine has no memory controller for it.
fn memory_group(site: &Site) -> Result<Option<PathBuf>> {
    let root = Path::new("/sys/fs/cgroup");
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    if !controllers.split_whitespace().any(|name| name == "memory") {
        return Ok(None);
    }
    let group = root.join(format!("xpm-demo-{}", std::process::id()));
    site.account.typed(&format!("mkdir {}", group.display()));
    fs::write(root.join("cgroup.subtree_control"), "+memory")
        .context("cannot turn the memory controller on")?;
    site.done(Undo::Cgroup(group.clone()));
    fs::create_dir(&group).with_context(|| format!("cannot make {}", group.display()))?;
    site.account.typed(&format!("echo 64M > {}/memory.max", group.display()));
    fs::write(group.join("memory.max"), LOCAL.to_string()).context("cannot limit the memory of a cgroup")?;
    Ok(Some(group))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swapped_pages() {
        assert_eq!(pages_swapped_out("pswpin 1\npswpout 23\n"), Some(23));
        assert_eq!(pages_swapped_out("pswpout\npswpout many\n"), None);
    }
}
