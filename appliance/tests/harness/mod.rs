//! Starts the program on free ports, and sends it requests.

#![allow(dead_code, reason = "not each file of tests uses all of it")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use xpm_transport::shm::client::{ConnectError, ShmLink, connect};
use xpm_transport::{Completion, IoBuf, Kind, Link as _, Operation};

pub(crate) const MIB: u64 = 1 << 20;
/// Size of the regions in these tests.
pub(crate) const LEN: u64 = 16 * MIB;
/// Time limit of every wait; the test fails after it.
const LIMIT: Duration = Duration::from_secs(60);

/// The key of this number, as text.
pub(crate) fn key(number: u64) -> String {
    format!("{number:064x}")
}

/// Runs a program that must succeed; returns its output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{errors}");
    text + &errors
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xpm-appliance"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// The daemon's default places allow one daemon per machine; these allow several.
fn with_own_places(directory: &tempfile::TempDir, arguments: &[&str]) -> Command {
    let mut command = command(arguments);
    let place = |name: &str| directory.path().join(name).display().to_string();
    for (option, value) in [
        ("--listen", "127.0.0.1:0".to_owned()),
        ("--nbd", "127.0.0.1:0".to_owned()),
        ("--run-dir", place("run")),
        ("--state", place("state")),
        ("--region-size", "16MiB".to_owned()),
    ] {
        // With an invalid memory size, a region size would only hide the reason.
        let hides = option == "--region-size" && arguments.contains(&"0");
        if !hides && !arguments.contains(&option) {
            command.args([option, &value]);
        }
    }
    command
}

/// The same command, run in the cgroup whose list of processes is this file.
fn in_group(procs: &str, command: &Command) -> Command {
    let mut inside = Command::new("sh");
    inside.args(["-c", "echo $$ >\"$0\" && exec \"$@\"", procs]).arg(command.get_program());
    inside.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    inside
}

/// The error of a daemon that cannot start.
pub(crate) fn complaint(arguments: &[&str]) -> String {
    let directory = tempfile::tempdir().unwrap();
    complaint_of(with_own_places(&directory, arguments), arguments)
}

/// As [`complaint`], in a cgroup.
pub(crate) fn complaint_in(procs: &str, arguments: &[&str]) -> String {
    let directory = tempfile::tempdir().unwrap();
    complaint_of(in_group(procs, &with_own_places(&directory, arguments)), arguments)
}

fn complaint_of(mut command: Command, arguments: &[&str]) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{arguments:?} was accepted");
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.lines().filter(|line| !line.contains("WARN")).collect();
    assert_eq!(lines.len(), 1, "not one line: {text}");
    lines[0].to_owned()
}

/// Collects a daemon's output as it arrives.
fn collect(child: &mut Child) -> Arc<Mutex<String>> {
    let log = Arc::new(Mutex::new(String::new()));
    let (stderr, sink) = (child.stderr.take().unwrap(), log.clone());
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            sink.lock().unwrap().push_str(&(line + "\n"));
        }
    });
    log
}

/// A running daemon.
pub(crate) struct Daemon {
    child: Child,
    log: Arc<Mutex<String>>,
    pub(crate) control: SocketAddr,
    pub(crate) nbd: SocketAddr,
    pub(crate) directory: tempfile::TempDir,
    /// The token that each request carries, if not empty.
    pub(crate) token: String,
}

impl Daemon {
    /// Starts a daemon and waits until all of its memory is ready.
    pub(crate) fn start(arguments: &[&str]) -> Daemon {
        Daemon::start_with_token(arguments, "")
    }

    pub(crate) fn start_with_token(arguments: &[&str], token: &str) -> Daemon {
        let directory = tempfile::tempdir().unwrap();
        let command = with_own_places(&directory, arguments);
        Daemon::spawn(command, directory, token)
    }

    /// Starts a daemon in a cgroup, and does not wait for its memory.
    pub(crate) fn start_in(procs: &str, arguments: &[&str]) -> Daemon {
        let directory = tempfile::tempdir().unwrap();
        let command = in_group(procs, &with_own_places(&directory, arguments));
        Daemon::spawn(command, directory, "")
    }

    fn spawn(mut command: Command, directory: tempfile::TempDir, token: &str) -> Daemon {
        let mut child = command.spawn().unwrap();
        let log = collect(&mut child);
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut daemon = Daemon { child, log, control: any, nbd: any, directory, token: token.to_owned() };
        let line = daemon.wait_log("control at");
        let address = |after: &str| {
            let rest = line.split(after).nth(1).unwrap();
            rest.split([' ', ',']).next().unwrap().parse().unwrap()
        };
        (daemon.control, daemon.nbd) = (address("control at "), address("NBD at "));
        // Waits for its stock or for all of its memory.
        daemon.wait("memory is ready", |status| {
            status["ready"] == status["capacity"] || daemon.has_option("--ready")
        });
        daemon
    }

    /// Starts a daemon that reads its log level from a file. With some levels it logs nothing when it is ready, so this
    /// waits until it accepts connections on its socket.
    pub(crate) fn start_with_level(level: &std::path::Path, arguments: &[&str]) -> Daemon {
        let directory = tempfile::tempdir().unwrap();
        let mut command = with_own_places(&directory, arguments);
        command.env("XPM_LOG", format!("@{}", level.display()));
        let mut child = command.spawn().unwrap();
        let log = collect(&mut child);
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let socket = directory.path().join("run/nbd.sock");
        let limit = Instant::now() + LIMIT;
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < limit, "it never listens");
            std::thread::sleep(Duration::from_millis(5));
        }
        Daemon { child, log, control: any, nbd: any, directory, token: String::new() }
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn has_option(&self, option: &str) -> bool {
        let words = std::fs::read(format!("/proc/{}/cmdline", self.child.id())).unwrap_or_default();
        words.split(|byte| *byte == 0).any(|word| word == option.as_bytes())
    }

    /// Sends the daemon a signal, by its number.
    pub(crate) fn signal(&self, number: i32) {
        run("kill", &[&format!("-{number}"), &self.child.id().to_string()]);
    }

    /// Waits for a line of the log.
    pub(crate) fn wait_log(&self, word: &str) -> String {
        let limit = Instant::now() + LIMIT;
        loop {
            let log = self.log.lock().unwrap().clone();
            if let Some(line) = log.lines().find(|line| line.contains(word)) {
                return line.to_owned();
            }
            assert!(Instant::now() < limit, "the log never says `{word}`: {log}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The daemon's whole log.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits for a status that fulfils the condition.
    pub(crate) fn wait(&self, what: &str, condition: impl Fn(&Value) -> bool) {
        let limit = Instant::now() + LIMIT;
        loop {
            let status = self.get("/v1/status");
            if condition(&status) {
                return;
            }
            assert!(Instant::now() < limit, "never: {what}: {status}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        let (status, answer) = self.raw("GET", path, "");
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// Sends one request; returns the status and the answer.
    pub(crate) fn raw(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let mut stream = self.send(method, path, body);
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let headers = match self.token.as_str() {
            "" => String::new(),
            token => format!("authorization: Bearer {token}\r\n"),
        };
        let mut stream = TcpStream::connect(self.control).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\n{headers}\
             content-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        stream
    }

    pub(crate) fn reserve_body(&self, count: u32, region_len: u64) -> Value {
        json!({ "allocation": format!("{:032x}", 1), "count": count, "region_len": region_len, "ttl": "60s" })
    }

    pub(crate) fn commit_body(&self, epoch: u64, key_number: u64, regions: &[String]) -> Value {
        json!({
            "allocation": format!("{:032x}", 1), "name": "a", "epoch": epoch, "key": key(key_number), "regions": regions
        })
    }

    /// Makes a grant of new regions; returns their ids.
    pub(crate) fn grant(&self, grant: u128, key_number: u64, count: u32) -> Vec<String> {
        let (status, answer) = self.raw("POST", "/v1/regions", &self.reserve_body(count, LEN).to_string());
        assert_eq!(status, 200, "{answer}");
        let ids = answer.as_array().unwrap().iter().map(|region| region["id"].as_str().unwrap().to_owned());
        let ids: Vec<String> = ids.collect();
        let body = self.commit_body(1, key_number, &ids).to_string();
        let (status, answer) = self.raw("PUT", &format!("/v1/grants/{grant:032x}"), &body);
        assert_eq!(status, 200, "{answer}");
        ids
    }

    pub(crate) fn tcp_uri(&self, name: &str) -> String {
        format!("nbd://{}/{name}", self.nbd)
    }

    pub(crate) fn unix_uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.directory.path().join("run/nbd.sock").display())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The daemon may have ended by itself, which the test noticed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client of libnbd that stays connected.
pub(crate) struct Shell {
    child: Child,
    input: ChildStdin,
    output: BufReader<std::process::ChildStdout>,
}

impl Shell {
    pub(crate) fn open(uri: &str) -> Shell {
        Shell::start("import nbd, sys\nh = nbd.NBD()\nh.connect_uri(sys.argv[1])\n", &[uri])
    }

    /// A shell that executes these lines first.
    fn start(lines: &str, arguments: &[&str]) -> Shell {
        const LOOP: &str = "for line in sys.stdin:\n  try:\n    exec(line)\n    print('fine', flush=True)\n  \
                            except Exception as e:\n    print('nbd.Error', e, flush=True)\n";
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", &format!("{lines}{LOOP}")])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Shell { child, input, output: BufReader::new(output) }
    }

    /// Runs a line, which must succeed, or fail with `error`.
    pub(crate) fn say(&mut self, line: &str, error: &str) {
        writeln!(self.input, "{line}").unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        let expected = if error.is_empty() { "fine" } else { error };
        assert!(answer.starts_with(expected), "{line}: {answer}");
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process on the same host that received a grant's memory and keeps it mapped in any case.
pub(crate) struct Keeper(Shell);

impl Keeper {
    /// With `disconnected`, the process closes its connection.
    pub(crate) fn open(daemon: &Daemon, key: &str, disconnected: bool) -> Keeper {
        const OPEN: &str = "import mmap, socket\nsaid = socket.socket(socket.AF_UNIX)\nsaid.connect(sys.argv[1])\n\
                            said.sendall(b'xpm-shm\\0' + (1).to_bytes(4, 'big') + bytes(4) + bytes.fromhex(sys.argv[2]))\n\
                            answer = said.recv(24, socket.MSG_WAITALL)\nassert answer[8:12] == bytes(4), answer\n\
                            count = int.from_bytes(answer[12:16], 'big')\n\
                            _, fds, _, _ = socket.recv_fds(said, 8 * count, count)\n\
                            kept = [mmap.mmap(fd, 0) for fd in fds]\n";
        let path = daemon.directory.path().join("run/shm.sock");
        let mut shell = Shell::start(&format!("import sys\n{OPEN}"), &[path.to_str().unwrap(), key]);
        if disconnected {
            shell.say("said.close()", "");
            daemon.wait("it left", |status| status["connections"] == 0);
        }
        Keeper(shell)
    }

    /// Writes into a region.
    pub(crate) fn write(&mut self, region: usize, text: &str) {
        self.0.say(&format!("kept[{region}][:{}] = b'{text}'", text.len()), "");
    }

    /// Checks that a region begins with this text.
    pub(crate) fn sees(&mut self, region: usize, text: &str) {
        let line =
            format!("want = b'{text}'; assert kept[{region}][:len(want)] == want, kept[{region}][:16]");
        self.0.say(&line, "");
    }
}

/// A client of shared memory.
pub(crate) struct Shared {
    link: ShmLink,
}

impl Shared {
    pub(crate) fn open(daemon: &Daemon, key: &str) -> Result<Shared, ConnectError> {
        let path = daemon.directory.path().join("run/shm.sock");
        let grant = connect(&path, &key.parse().unwrap(), LIMIT)?;
        Ok(Shared { link: ShmLink::new(grant, 4) })
    }

    #[expect(unsafe_code, reason = "a buffer of this test is the source of a write")]
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        let start = std::ptr::NonNull::new(bytes.as_mut_ptr()).unwrap();
        // SAFETY: the vector lives until the completion arrives, and is not used otherwise meanwhile.
        let buf = Some(unsafe { IoBuf::new(start, bytes.len()) });
        let operation = Operation { kind: Kind::Write, offset, len: bytes.len() as u64, buf, token: 7 };
        self.link.post(operation).unwrap();
        self.link.submit();
        let mut completions = Vec::new();
        self.link.poll(&mut completions).unwrap();
        assert_eq!(completions, [Completion { token: 7, result: Ok(()) }]);
    }

    /// Waits until the appliance revoked the grant.
    pub(crate) fn wait_down(&mut self) {
        let limit = Instant::now() + LIMIT;
        while self.link.poll(&mut Vec::new()).is_ok() {
            assert!(Instant::now() < limit, "the link stays up");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Accepts one heartbeat like an allocator, and answers it.
pub(crate) fn heartbeat(listener: &TcpListener, interval: &str) -> Value {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut line, mut len) = (String::new(), 0);
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line).unwrap();
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            len = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; len];
    reader.read_exact(&mut body).unwrap();
    let answer = json!({ "interval": interval }).to_string();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{answer}",
        answer.len()
    )
    .unwrap();
    serde_json::from_slice(&body).unwrap()
}
