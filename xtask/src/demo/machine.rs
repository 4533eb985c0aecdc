//! A virtual machine whose RAM is external memory moves from one "host" to another.
//!
//! Each host is an xpm-fs with a state directory of its own, which does not share memory with the appliances, as
//! between machines.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::MIB;
use super::child::Daemon;
use super::site::{Site, free_port};
use crate::util;

const HOSTS: [&str; 2] = ["host-a", "host-b"];
const MEMORY_MIB: u64 = 64;
/// The allocation's and the machine's name.
const NAME: &str = "vm1";

/// All of it, or a line that says why not.
pub(super) fn workload(site: &Site) -> Result<()> {
    site.account.step(
        "Move a virtual machine to another host without copying its memory",
        "The guest fills its memory, verifies every word of it for ever and rewrites a tenth of it in each pass. When the machine \
         moves, its memory stays where it is and changes its owner.",
    );
    if let Some(why) = obstacle() {
        site.account.note(&format!("left out: {why}"));
        return Ok(());
    }
    let kernel = guest(site)?;
    for host in HOSTS {
        site.start_files(host)?;
    }
    let first = start(site, HOSTS[0], &["run", NAME, "--memory", &memory()], &kernel)?;
    site.wait_until("the guest did not verify its memory", || Ok(passes(site, HOSTS[0])? > 1))?;
    let address = format!("127.0.0.1:{}", free_port()?);
    let words = ["receive", NAME, "--listen", &address, "--memory", &memory()];
    let second = start(site, HOSTS[1], &words, &kernel)?;
    let waits = || Ok(site.vm_list(HOSTS[1])?.get(0).is_some_and(|one| one["state"] == "incoming"));
    site.wait_until("the second host did not wait for the machine", waits)?;
    let said = site.vm(HOSTS[0], &["-o", "json", "migrate", NAME, "--to", &address])?;
    let moved: Value = serde_json::from_str(&said).context("xpm printed no JSON")?;
    let number = |key: &str| moved[key].as_u64().with_context(|| format!("xpm said no {key}"));
    let (sent, down) = (number("sent_bytes")?, number("down_ms")?);
    let stopped = passes(site, HOSTS[0])?;
    site.wait_until("the guest did not go on", || Ok(passes(site, HOSTS[1])? > stopped + 1))?;
    site.account.note(&format!(
        "{sent} bytes went from host to host, for a machine with {MEMORY_MIB} MiB; it was stopped for {down} ms"
    ));
    site.account.check(sent < MIB, "less than a MiB was sent")?;
    site.account.check(!found_bad(site), "the guest found each word of its memory as it was")?;
    drop((first, second));
    let is_free = || Ok(site.xpm_quietly(&["alloc", "delete", NAME]).is_ok());
    site.wait_until("the machine's memory stayed in use", is_free)?;
    site.wait_until("the appliances kept the memory", || site.all_free())?;
    site.account.check(true, "all memory is free again")
}

fn memory() -> String {
    format!("{MEMORY_MIB}MiB")
}

/// Why no machine can move here.
fn obstacle() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("without root nothing can be mounted".to_owned());
    }
    if !Path::new("/dev/fuse").exists() {
        return Some("there is no /dev/fuse (modprobe fuse)".to_owned());
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    if version(&release)? < (6, 9) {
        let release = release.trim();
        return Some(format!(
            "Linux {release} cannot show files that outlive their daemon; 6.9 and later can"
        ));
    }
    let missing = ["qemu-system-x86_64", "gcc"].into_iter().find(|name| util::find_program(name).is_none());
    missing.map(|name| format!("{name} is not installed"))
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|byte: char| !byte.is_ascii_digit()).filter_map(|word| word.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

fn guest(site: &Site) -> Result<PathBuf> {
    let kernel = site.dir().join("guest");
    let flags = "-m32 -march=i686 -O2 -ffreestanding -fno-pic -fno-stack-protector -nostdlib -static -Wl,-Ttext=0x100000 \
                 -Wl,--build-id=none";
    let mut gcc = util::command("gcc");
    gcc.args(flags.split_whitespace()).arg("-o").arg(&kernel);
    site.run(gcc.arg(util::repository().join("tests/guest/verify.c")))?;
    Ok(kernel)
}

fn serial(site: &Site, host: &str) -> PathBuf {
    site.dir().join(format!("{host}.serial"))
}

fn start(site: &Site, host: &str, words: &[&str], kernel: &Path) -> Result<Daemon> {
    let mut command = site.vm_command(host, words);
    command.args(
        "-- qemu-system-x86_64 -display none -nodefaults -vga none -accel tcg,tb-size=16 -kernel".split(' '),
    );
    command.arg(kernel).arg("-serial").arg(format!("file:{}", serial(site, host).display()));
    site.account.command(&command);
    Daemon::start(&format!("machine-{host}"), &mut command, site.dir())
}

/// The guest's output at a host, without a last line that is not whole.
fn said(site: &Site, host: &str) -> String {
    let text = fs::read_to_string(serial(site, host)).unwrap_or_default();
    text.rsplit_once('\n').map_or_else(String::new, |(whole, _)| whole.to_owned())
}

fn passes(site: &Site, host: &str) -> Result<u64> {
    let said = said(site, host);
    let Some(last) = said.lines().last() else { return Ok(0) };
    last.split(' ')
        .nth(1)
        .and_then(|pass| pass.parse().ok())
        .with_context(|| format!("the guest said {last}"))
}

/// Whether the guest has found a page that was not as it had to be.
fn found_bad(site: &Site) -> bool {
    let all = HOSTS.map(|host| said(site, host)).join("\n");
    all.lines().any(|line| !line.is_empty() && !line.ends_with(" bad 0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_the_kernel() {
        assert_eq!(version("6.12.117+deb13-amd64\n"), Some((6, 12)));
        assert_eq!(version("6.1.0-38-amd64"), Some((6, 1)));
        assert_eq!(version("none"), None);
    }
}
