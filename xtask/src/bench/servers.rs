//! The servers under comparison, as processes that end with their handle.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Longest wait for a server to answer.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A process that is ended, and waited for, when the handle is dropped.
pub(crate) struct Process {
    child: Child,
}

impl Process {
    /// Starts a program with its output in `log`.
    pub(crate) fn start(command: &mut Command, log: &Path) -> Result<Process> {
        let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot run {:?}", command.get_program()))?;
        Ok(Process { child })
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it ends, which has to be well.
    pub(crate) fn wait(&mut self) -> Result<()> {
        match self.child.wait()? {
            status if status.success() => Ok(()),
            status => bail!("it ended with {status}"),
        }
    }

    /// Waits until `ready`; fails when the program ends first.
    pub(crate) fn wait_for(&mut self, what: &str, mut ready: impl FnMut() -> bool) -> Result<()> {
        let start = Instant::now();
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!("{what} ended at its start: {status}");
            }
            if start.elapsed() > START_LIMIT {
                bail!("{what} was not ready after {START_LIMIT:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let asked = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && asked.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A TCP port that nobody listened on a moment ago.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// An NBD server and how fio reaches it over a unix socket or TCP.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    pub(crate) uri: String,
    _processes: Vec<Process>,
}

/// Where servers of one run keep their sockets and logs.
pub(crate) struct Bench<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) bin: &'a Path,
    /// Size of each export, as qemu and nbdkit read it (`512M`) and in bytes.
    pub(crate) size: (&'a str, u64),
}

/// The way to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Unix,
    Tcp,
}

impl Way {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Unix => "unix",
            Way::Tcp => "tcp",
        }
    }
}

impl Bench<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// nbdkit's memory plugin.
    pub(crate) fn nbdkit_memory(&self, way: Way) -> Result<Server> {
        self.nbdkit(way, "nbdkit-memory", "nbdkit memory", &["memory".to_owned(), self.size.0.to_owned()])
    }

    /// nbdkit's nbd plugin in front of another server.
    pub(crate) fn nbdkit_proxy(&self, way: Way, uri: &str) -> Result<Server> {
        self.nbdkit(way, "nbdkit-proxy", "nbdkit nbd", &["nbd".to_owned(), format!("uri={uri}")])
    }

    fn nbdkit(&self, way: Way, file: &str, name: &'static str, plugin: &[String]) -> Result<Server> {
        let mut command = Command::new("nbdkit");
        command.arg("-f");
        let uri = match way {
            Way::Unix => {
                let socket = self.path(&format!("{file}.sock"));
                command.arg("-U").arg(&socket);
                unix_uri("", &socket)
            }
            Way::Tcp => {
                let port = free_port()?;
                command.args(["-i", "127.0.0.1", "-p", &port.to_string()]);
                format!("nbd://127.0.0.1:{port}/")
            }
        };
        command.args(plugin);
        self.server(name, file, &mut command, uri)
    }

    /// qemu-nbd on a file in memory.
    pub(crate) fn qemu_nbd(&self, way: Way) -> Result<Server> {
        let disk = PathBuf::from(format!("/dev/shm/xpm-bench-{}.raw", std::process::id()));
        let file = File::create(&disk)?;
        file.set_len(self.size.1)?;
        let mut command = Command::new("qemu-nbd");
        command.args(["-f", "raw", "-t", "-e", "8", "--cache=writeback", "--discard=unmap"]);
        let uri = match way {
            Way::Unix => {
                let socket = self.path("qemu-nbd.sock");
                command.arg("-k").arg(&socket);
                unix_uri("", &socket)
            }
            Way::Tcp => {
                let port = free_port()?;
                command.args(["-b", "127.0.0.1", "-p", &port.to_string()]);
                format!("nbd://127.0.0.1:{port}/")
            }
        };
        command.arg(&disk);
        let server = self.server("qemu-nbd", "qemu-nbd", &mut command, uri);
        // The server keeps it open; the name would outlive a killed benchmark.
        std::fs::remove_file(&disk)?;
        server
    }

    fn server(&self, name: &'static str, file: &str, command: &mut Command, uri: String) -> Result<Server> {
        let mut process = Process::start(command, &self.path(&format!("{file}.log")))?;
        process.wait_for(name, || nbdinfo(&uri))?;
        Ok(Server { name, uri, _processes: vec![process] })
    }

    /// An appliance with one grant; the URIs of its sockets.
    pub(crate) fn appliance(&self) -> Result<Appliance> {
        let (control, data) = (free_port()?, free_port()?);
        let (unix, shm) = (self.path("appliance.sock"), self.path("appliance-shm.sock"));
        let mut command = Command::new(self.bin.join("xpm-appliance"));
        command
            .args(["--memory", "2GiB", "--no-lock", "--name", "bench", "--region-size", "256MiB"])
            .arg("--listen")
            .arg(format!("127.0.0.1:{control}"))
            .arg("--nbd")
            .arg(format!("127.0.0.1:{data}"))
            .arg("--unix")
            .arg(&unix)
            .arg("--shm")
            .arg(&shm)
            .arg("--state")
            .arg(self.path("appliance"));
        if let Some(allocator) = self.allocator_url() {
            command.args(["--allocator", &allocator]);
        }
        let mut process = Process::start(&mut command, &self.path("appliance.log"))?;
        process.wait_for("xpm-appliance", || http("GET", control, "/v1/status", None).is_ok())?;
        Ok(Appliance { control, data, unix, _process: process })
    }

    fn allocator_url(&self) -> Option<String> {
        std::fs::read_to_string(self.path("allocator.url")).ok()
    }

    /// An allocator that appliances started later register with.
    pub(crate) fn allocator(&self) -> Result<(Process, String)> {
        let port = free_port()?;
        let url = format!("http://127.0.0.1:{port}");
        let mut command = Command::new(self.bin.join("xpm-allocator"));
        command
            .arg("--listen")
            .arg(format!("127.0.0.1:{port}"))
            .arg("--data")
            .arg(self.path("allocator"))
            .args(["--heartbeat", "200ms"]);
        let mut process = Process::start(&mut command, &self.path("allocator.log"))?;
        process.wait_for("xpm-allocator", || http("GET", port, "/v1/status", None).is_ok())?;
        std::fs::write(self.path("allocator.url"), &url)?;
        Ok((process, url))
    }

    /// xpm-blk, with its control socket.
    pub(crate) fn blk(&self, allocator: &str) -> Result<(Process, PathBuf)> {
        self.client("xpm-blk", "blk", allocator, "")
    }

    /// xpm-fs, with its control socket.
    pub(crate) fn fs(&self, allocator: &str) -> Result<(Process, PathBuf)> {
        self.client("xpm-fs", "fs", allocator, "standby = false\nallow-unsafe-swap = true\n")
    }

    fn client(
        &self,
        program: &'static str,
        name: &str,
        allocator: &str,
        settings: &str,
    ) -> Result<(Process, PathBuf)> {
        let (config, control) = (self.path(&format!("{name}.toml")), self.path(&format!("{name}.sock")));
        let text = format!(
            "allocator = {allocator:?}\ncontrol = {:?}\nstate = {:?}\n{settings}",
            control.display().to_string(),
            self.path(name).display().to_string()
        );
        std::fs::write(&config, text)?;
        let mut command = Command::new(self.bin.join(program));
        command.arg("--config").arg(&config);
        let mut process = Process::start(&mut command, &self.path(&format!("{name}.log")))?;
        process.wait_for(program, || std::os::unix::net::UnixStream::connect(&control).is_ok())?;
        Ok((process, control))
    }

    /// Makes an allocation and shows it at a socket; the URI of that.
    pub(crate) fn attach(&self, blk: &Path, allocator: &str, name: &str, transport: &str) -> Result<String> {
        let socket = self.path(&format!("{name}.sock"));
        let xpm = |args: &[&str]| -> Result<()> {
            let output = Command::new(self.bin.join("xpm"))
                .args(["--allocator", allocator, "--blk"])
                .arg(blk)
                .args(args)
                .output()?;
            if !output.status.success() {
                bail!("xpm {} failed: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
            }
            Ok(())
        };
        let form = format!("nbd-socket={}", socket.display());
        retry(|| xpm(&["alloc", "create", name, "--size", &self.size.1.to_string()]))?;
        xpm(&["blk", "attach", name, "--as", &form, "--transport", transport])?;
        Ok(unix_uri("", &socket))
    }
}

/// An appliance that the benchmark gives grants on itself, without an allocator's help.
pub(crate) struct Appliance {
    control: u16,
    data: u16,
    unix: PathBuf,
    _process: Process,
}

impl Appliance {
    /// A grant of at least `bytes`; its URI over `way`.
    pub(crate) fn grant(&self, number: u32, bytes: u64, way: Way) -> Result<String> {
        const REGION_LEN: u64 = 256 << 20;
        let allocation = format!("{number:032x}");
        let reserve = json!({
            "allocation": allocation, "count": bytes.div_ceil(REGION_LEN), "region_len": REGION_LEN, "ttl": "60s"
        });
        let regions = http("POST", self.control, "/v1/regions", Some(&reserve))?;
        let ids: Vec<&Value> = regions.as_array().into_iter().flatten().map(|region| &region["id"]).collect();
        let key = format!("{number:064x}");
        let commit = json!({
            "allocation": allocation, "name": format!("bench-{number}"), "epoch": 1, "key": key, "regions": ids
        });
        http("PUT", self.control, &format!("/v1/grants/{number:032x}"), Some(&commit))?;
        Ok(match way {
            Way::Unix => unix_uri(&key, &self.unix),
            Way::Tcp => format!("nbd://127.0.0.1:{}/{key}", self.data),
        })
    }
}

fn unix_uri(export: &str, socket: &Path) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

fn nbdinfo(uri: &str) -> bool {
    let status =
        Command::new("nbdinfo").args(["--size", uri]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Until it goes well: an appliance registers a moment after it started.
pub(crate) fn retry(mut action: impl FnMut() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    loop {
        match action() {
            Err(_) if start.elapsed() < Duration::from_secs(5) => {
                std::thread::sleep(Duration::from_millis(100));
            }
            result => return result,
        }
    }
}

/// One request to a daemon on this machine; an error for any status but 2xx.
pub(crate) fn http(method: &str, port: u16, path: &str, body: Option<&Value>) -> Result<Value> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(START_LIMIT))?;
    let body = body.map_or_else(String::new, Value::to_string);
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
    if !head.split(' ').nth(1).is_some_and(|status| status.starts_with('2')) {
        bail!("{method} {path}: {body}");
    }
    Ok(if body.is_empty() { Value::Null } else { serde_json::from_str(body)? })
}
