//! The daemons outside of the guest: one allocator, some appliances, and a web server for the
//! lab's own check. Their memory is the host's, which is the point of the lab: the guest can run
//! out of memory and they do not notice.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::daemon::Daemon;
use super::disk::{self, Disk, Storage};
use super::earlier::Links;
use super::netns::{HOST, Netns};
use crate::util;

const ALLOCATOR_PORT: u16 = 7700;
/// Control port of the first appliance; each one takes two ports.
const APPLIANCE_PORT: u16 = 7710;
/// Port of the web server that answers the check of the network.
pub(crate) const ECHO_PORT: u16 = 7780;
/// How long appliances may take to be ready, much of it for clearing their memory.
const READY_TIME_MAX: Duration = Duration::from_secs(60);
/// How long it is waited for that the guest has a request in flight.
const IN_FLIGHT_TIME_MAX: Duration = Duration::from_secs(2);
/// How long QEMU may take to connect to its disk again.
const FRONT_END_TIME_MAX: Duration = Duration::from_secs(30);
/// How long they may take to agree on all that there is to agree on.
const AGREEING_TIME: Duration = Duration::from_secs(1);

/// The running daemons. They are stopped when this is dropped.
pub(crate) struct Cluster<'a> {
    netns: &'a Netns,
    programs: PathBuf,
    /// By which the services are started, where they begin as earlier programs and are upgraded.
    links: Option<Links>,
    dir: PathBuf,
    daemons: Vec<Daemon>,
    /// Times that xpm-blk was started.
    blk_lives: u32,
}

impl<'a> Cluster<'a> {
    /// Starts the daemons, with an appliance for each of the given sizes of memory, and waits
    /// until the allocator hears all of them. Without appliances there is no allocator either.
    /// Logs and data go to `dir`. With `earlier`, the daemons begin as the programs in that directory.
    pub(crate) fn start(
        netns: &'a Netns,
        programs: &Path,
        earlier: Option<&Path>,
        dir: &Path,
        appliances: &[&str],
    ) -> Result<Cluster<'a>> {
        let links = earlier.map(|earlier| Links::new(dir.join("programs"), earlier)).transpose()?;
        let mut cluster = Cluster {
            netns,
            programs: programs.to_path_buf(),
            links,
            dir: dir.to_path_buf(),
            daemons: Vec::new(),
            blk_lives: 0,
        };
        cluster.start_echo()?;
        if !appliances.is_empty() {
            cluster.start_allocator()?;
            for (index, memory) in (0..).zip(appliances) {
                cluster.start_appliance(index, memory)?;
            }
            cluster.wait_ready(appliances.len())?;
        }
        Ok(cluster)
    }

    /// Where the allocator is, for host and guest alike.
    pub(crate) fn allocator_url() -> String {
        format!("http://{HOST}:{ALLOCATOR_PORT}")
    }

    /// Runs the operator's command on the host and reads the JSON that it prints.
    pub(crate) fn xpm(&self, words: &[&str]) -> Result<Value> {
        let mut command = self.command("xpm");
        command.env("XPM_ALLOCATOR", Cluster::allocator_url()).env("XPM_BLK", self.dir.join("blk.sock"));
        command.args(words).arg("--json");
        serde_json::from_str(&util::output(&mut command)?).context("xpm printed no JSON")
    }

    /// An error when a daemon has ended.
    pub(crate) fn check_alive(&mut self) -> Result<()> {
        self.daemons.iter_mut().try_for_each(Daemon::check_alive)
    }

    /// Starts an xpm-blk that serves the guest's disk, a new allocation.
    pub(crate) fn serve_disk(&mut self, size: &str) -> Result<()> {
        self.configure_blk()?;
        self.start_blk()?;
        self.xpm(&["alloc", "create", "vm", "--size", size, "--stripe", "2"])?;
        let form = format!("vhost-user={}", disk_socket(&self.dir).display());
        // Over TCP, for nothing is ever in flight where memory is shared.
        self.xpm(&["blk", "attach", "vm", "--as", &form, "--transport", "nbd-tcp"]).map(drop)
    }

    /// Starts what serves the guest's further disks.
    pub(crate) fn serve_disks(&mut self, disks: &[Disk]) -> Result<()> {
        if disks.iter().any(|disk| matches!(disk, Disk::Xpm(_))) {
            self.configure_blk()?;
            self.start_blk()?;
        }
        disks.iter().try_for_each(|disk| self.serve(*disk))
    }

    fn serve(&mut self, disk: Disk) -> Result<()> {
        let (name, path) = (disk.name(), disk.path(&self.dir));
        match disk {
            Disk::Xpm(transport) => {
                self.xpm(&["alloc", "create", name, "--size", disk::XPM_SIZE])?;
                let form = format!("vhost-user={}", path.display());
                self.xpm(&["blk", "attach", name, "--as", &form, "--transport", transport]).map(drop)
            }
            Disk::File => util::run(util::command("truncate").args(["--size", disk::SIZE]).arg(path)),
            Disk::Qsd(storage) => self.serve_by_storage_daemon(storage, &path),
        }
    }

    fn serve_by_storage_daemon(&mut self, storage: Storage, socket: &Path) -> Result<()> {
        let name = Disk::Qsd(storage).name();
        if let Some(words) = storage.nbdkit_words(&self.dir) {
            let mut command = self.netns.command("nbdkit");
            command.args(words);
            self.start_daemon(&format!("{name}-nbdkit"), command)?;
            // The storage daemon tries once.
            thread::sleep(AGREEING_TIME);
        }
        if storage == Storage::Memory {
            util::run(
                util::command("truncate").args(["--size", disk::SIZE]).arg(disk::memory_file(&self.dir)),
            )?;
        }
        let mut command = self.netns.command("qemu-storage-daemon");
        storage.add_options(&mut command, &self.dir);
        self.start_daemon(name, command)?;
        let deadline = Instant::now() + READY_TIME_MAX;
        while !socket.exists() {
            self.check_alive()?;
            ensure!(Instant::now() < deadline, "{name} does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Kills xpm-blk as `kill -9` does, with requests in flight if the guest has any: the appliances stand still
    /// meanwhile. Then starts it again.
    pub(crate) fn kill_blk(&mut self) -> Result<()> {
        self.wait_front_end()?;
        self.signal_appliances(Signal::STOP);
        let deadline = Instant::now() + IN_FLIGHT_TIME_MAX;
        while Instant::now() < deadline && self.xpm(&["blk", "show", "vm"])?["in_flight"] == 0 {
            thread::sleep(Duration::from_millis(20));
        }
        let killed = self.replace_blk();
        self.signal_appliances(Signal::CONT);
        killed
    }

    /// Waits until QEMU has its disk again: QEMU 7.2 connects no more to a back end that dies while they agree.
    fn wait_front_end(&self) -> Result<()> {
        let deadline = Instant::now() + FRONT_END_TIME_MAX;
        while self.xpm(&["blk", "show", "vm"])?["users"] != serde_json::json!(["a virtual machine"]) {
            if Instant::now() > deadline {
                bail!("QEMU did not connect to its disk within {FRONT_END_TIME_MAX:?}");
            }
            thread::sleep(Duration::from_millis(50));
        }
        // There is no sign of the end of that but I/O, which begins before it.
        thread::sleep(AGREEING_TIME);
        Ok(())
    }

    fn signal_appliances(&self, signal: Signal) {
        for daemon in self.daemons.iter().filter(|daemon| daemon.name.starts_with("appliance-")) {
            daemon.signal(signal);
        }
    }

    /// Requests that an xpm-blk submitted again after the death of the one before it.
    pub(crate) fn submitted_again(&self) -> usize {
        let log = |life| fs::read_to_string(self.dir.join(format!("blk-{life}.log"))).unwrap_or_default();
        let count = |line: &str| -> Option<usize> {
            let (before, _) = line.split_once(" requests of queue")?;
            before.rsplit(' ').next()?.parse().ok()
        };
        (1..=self.blk_lives).map(|life| log(life).lines().filter_map(count).sum::<usize>()).sum()
    }

    fn replace_blk(&mut self) -> Result<()> {
        let place = self.daemons.iter().position(|daemon| daemon.name.starts_with("blk-"));
        let mut blk = self.daemons.remove(place.context("there is no xpm-blk on the host")?);
        blk.kill()?;
        self.start_blk()
    }

    /// How often xpm-blk was started.
    pub(crate) const fn blk_lives(&self) -> u32 {
        self.blk_lives
    }

    /// Takes the guest's disk away, which nobody uses any more.
    pub(crate) fn end_disk(&self) -> Result<()> {
        self.xpm(&["blk", "detach", "vm"])?;
        self.xpm(&["alloc", "delete", "vm"]).map(drop)
    }

    fn configure_blk(&self) -> Result<()> {
        let config = format!(
            "allocator = \"{}\"\ncontrol = {:?}\nstate = {:?}\n",
            Cluster::allocator_url(),
            self.dir.join("blk.sock"),
            self.dir.join("blk")
        );
        fs::write(self.dir.join("blk.toml"), config).context("cannot write xpm-blk's configuration")
    }

    fn start_blk(&mut self) -> Result<()> {
        self.blk_lives += 1;
        let mut command = self.command("xpm-blk");
        command.arg("--config").arg(self.dir.join("blk.toml"));
        self.start_daemon(&format!("blk-{}", self.blk_lives), command)?;
        let deadline = Instant::now() + READY_TIME_MAX;
        while let Err(error) = self.xpm(&["blk", "list"]) {
            self.check_alive()?;
            if Instant::now() > deadline {
                return Err(error.context("the host's xpm-blk does not answer"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn start_echo(&mut self) -> Result<()> {
        let root = self.dir.join("www");
        fs::create_dir_all(&root)?;
        fs::write(root.join("index.html"), "hello from the host\n")?;
        let mut command = self.netns.command("busybox");
        command.args(["httpd", "-f", "-p", &format!("{HOST}:{ECHO_PORT}"), "-h"]).arg(root);
        self.start_daemon("httpd", command)
    }

    fn start_allocator(&mut self) -> Result<()> {
        // A quick heartbeat, so that a scenario need not wait long to see memory given back.
        let listen = format!("{HOST}:{ALLOCATOR_PORT}");
        let words = ["--insecure", "--listen", &listen, "--heartbeat", "1s", "--data"];
        let data = self.dir.join("allocator");
        let arguments: Vec<OsString> = words.map(OsString::from).into_iter().chain([data.into()]).collect();
        self.start_service("allocator", "xpm-allocator", &arguments)
    }

    fn start_appliance(&mut self, index: u16, memory: &str) -> Result<()> {
        let name = format!("appliance-{}", index + 1);
        let port = APPLIANCE_PORT + 2 * index;
        let (listen, nbd) = (format!("{HOST}:{port}"), format!("{HOST}:{}", port + 1));
        let (allocator, dir) =
            (Cluster::allocator_url(), self.dir.join(&name).to_string_lossy().into_owned());
        let words = ["--insecure", "--name", &name, "--memory", memory, "--listen", &listen, "--nbd", &nbd];
        let more = ["--allocator", &allocator, "--state", &dir, "--run-dir", &dir];
        let arguments: Vec<OsString> = words.into_iter().chain(more).map(OsString::from).collect();
        self.start_service(&name, "xpm-appliance", &arguments)
    }

    /// A command of this project, in the lab's network.
    fn command(&self, program: &str) -> Command {
        self.netns.command(&self.programs.join(program).to_string_lossy())
    }

    fn start_daemon(&mut self, name: &str, command: Command) -> Result<()> {
        self.daemons.push(Daemon::start(&self.dir, name, command)?);
        Ok(())
    }

    /// Starts a daemon of this project that scenarios may have killed and restarted.
    fn start_service(&mut self, name: &str, program: &str, arguments: &[OsString]) -> Result<()> {
        let lives = self.dir.join("share/lives");
        fs::create_dir_all(&lives)?;
        let mut command = self.command("supervise");
        let file =
            self.links.as_ref().map_or_else(|| self.programs.join(program), |links| links.path(program));
        command.arg(self.dir.join(format!("{name}.notify"))).arg(file).args(arguments);
        self.daemons.push(Daemon::start_service(&self.dir, &lives, name, command)?);
        Ok(())
    }

    /// Has the daemon of this name, `allocator` or `appliance-N`, end and start again: killed as by `kill -9`, or in
    /// order (`restart`), with so many seconds between; `upgrade` is a restart as the program of this build.
    pub(crate) fn replace(&mut self, how: &str, name: &str, seconds: &str) -> Result<()> {
        let mut how = how;
        if how == "upgrade" {
            let links = self.links.as_ref().context("the daemons are not of an earlier build")?;
            let program = if name == "allocator" { "xpm-allocator" } else { "xpm-appliance" };
            links.point(program, &self.programs)?;
            how = "restart";
        }
        let daemon = self.daemons.iter_mut().find(|daemon| daemon.name == name);
        daemon
            .with_context(|| format!("there is no {name} on the host"))?
            .replace(&format!("{how} {seconds}"))
    }

    /// Has the daemon of this name stand still, or go on.
    pub(crate) fn freeze(&mut self, name: &str, stands: bool) -> Result<()> {
        let daemon = self.daemons.iter().find(|daemon| daemon.name == name);
        let signal = if stands { Signal::STOP } else { Signal::CONT };
        daemon.with_context(|| format!("there is no {name} on the host"))?.signal(signal);
        Ok(())
    }

    /// How often the daemon of this name was started.
    pub(crate) fn lives(&self, name: &str) -> u32 {
        self.daemons.iter().find(|daemon| daemon.name == name).map_or(0, Daemon::lives)
    }

    fn wait_ready(&mut self, appliances: usize) -> Result<()> {
        let deadline = Instant::now() + READY_TIME_MAX;
        loop {
            self.check_alive()?;
            let up = self.xpm(&["appliance", "list"]).map(|list| count_up(&list));
            match up {
                Ok(count) if count == appliances => return Ok(()),
                _ if Instant::now() < deadline => thread::sleep(Duration::from_millis(100)),
                Ok(count) => bail!("{count} of {appliances} appliances are up after {READY_TIME_MAX:?}"),
                Err(error) => return Err(error.context("the allocator does not answer")),
            }
        }
    }
}

/// Where the guest's disk is served.
pub(crate) fn disk_socket(dir: &Path) -> PathBuf {
    dir.join("vhost.sock")
}

/// Appliances that are up in the answer of `xpm appliance list --json`.
fn count_up(list: &Value) -> usize {
    let appliances = list.as_array().map(Vec::as_slice).unwrap_or_default();
    appliances.iter().filter(|appliance| appliance["state"] == "up").count()
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        for daemon in self.daemons.iter_mut().rev() {
            daemon.stop();
        }
        // It is there only where the storage daemon served it.
        let _ = fs::remove_file(disk::memory_file(&self.dir));
    }
}
