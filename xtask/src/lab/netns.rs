//! The network that a lab run has for itself.
//!
//! Daemons and QEMU live in a network namespace with nothing but a loopback device, so ports are
//! fixed, runs do not meet, and nothing is reachable from outside. The loopback device has an
//! address ([`HOST`]) that means the same to the guest as to the daemons: `127.0.0.1` could not do
//! that. The guest is connected by a tap device, or by QEMU's user network, some times slower, on
//! hosts without `/dev/net/tun`; its own address and its gateway are the same with both.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::util;

/// The host's address in the lab, from the block for documentation of RFC 5737.
pub(crate) const HOST: &str = "192.0.2.1";

/// The tap device of the guest.
const TAP: &str = "tap0";
/// Address and network of the guest's gateway; those of QEMU's user network.
const GATEWAY: &str = "10.0.2.2/24";

/// A network namespace; it lives as long as this value.
pub(crate) struct Netns {
    /// A process that only waits. It ends when its standard input does, so also when xtask dies.
    holder: Child,
    /// Whether a user namespace around it gives the right to make it.
    in_userns: bool,
}

impl Netns {
    /// Makes a namespace; without root, inside of a user namespace.
    pub(crate) fn new() -> Result<Netns> {
        let in_userns = !rustix::process::geteuid().is_root();
        let ip = util::find_program("ip").context("`ip` is missing; install iproute2")?;
        let ip = ip.display();
        let mut script = format!("{ip} link set lo up && {ip} addr add {HOST}/32 dev lo");
        if has_tap() {
            script += &format!(" && {ip} tuntap add {TAP} mode tap && {ip} addr add {GATEWAY} dev {TAP}");
            script += &format!(" && {ip} link set {TAP} up");
        }
        script += " && echo ready && exec cat";
        let mut unshare = util::command("unshare");
        unshare.arg("--net");
        if in_userns {
            unshare.args(["--user", "--map-root-user"]);
        }
        unshare.args(["sh", "-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut netns = Netns { holder: unshare.spawn().context("cannot run unshare")?, in_userns };
        netns.wait_ready()?;
        Ok(netns)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let stdout = self.holder.stdout.take().context("the namespace's process has no output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(
            line.trim() == "ready",
            "cannot make a network namespace; run the lab as root or allow user namespaces"
        );
        Ok(())
    }

    /// QEMU's option for the guest's network, with the id `net`.
    pub(crate) fn qemu_network(&self) -> String {
        match has_tap() {
            true => format!("tap,id=net,ifname={TAP},script=no,downscript=no"),
            false => "user,id=net,ipv6=off".to_owned(),
        }
    }

    /// A command that runs in the namespace, and is killed when xtask dies.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = util::command("nsenter");
        command.arg(format!("--target={}", self.holder.id())).arg("--net");
        if self.in_userns {
            command.args(["--user", "--preserve-credentials"]);
        }
        let file = util::find_program(program).map_or_else(|| program.into(), PathBuf::into_os_string);
        command.args(["setpriv", "--pdeathsig", "KILL"]).arg(file);
        command
    }
}

/// Whether the host has tap devices.
fn has_tap() -> bool {
    OpenOptions::new().read(true).write(true).open("/dev/net/tun").is_ok()
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Nothing can be done about a failure here, and the end of its input ends it anyway.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
