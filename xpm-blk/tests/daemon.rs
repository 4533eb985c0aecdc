//! The program over its real control socket, with no reachable allocator: its answers, its refusals, and its
//! end.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use xpm_control::client::{Client, ClientError};
use xpm_protocol::api::blk::{Device, Status};
use xpm_protocol::api::{ErrorBody, ErrorKind};

/// A time limit far above any duration here.
const LIMIT: Duration = Duration::from_secs(60);

struct Blk {
    directory: TempDir,
    process: Child,
}

impl Blk {
    fn start() -> Blk {
        let directory = tempfile::tempdir().unwrap();
        let process = command(directory.path()).spawn().unwrap();
        let blk = Blk { directory, process };
        let deadline = Instant::now() + LIMIT;
        while std::os::unix::net::UnixStream::connect(blk.socket()).is_err() {
            assert!(Instant::now() < deadline, "xpm-blk does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        blk
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    fn client(&self) -> Client {
        Client::new(&format!("unix:{}", self.socket().display()), None).unwrap().with_limit(LIMIT)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    fn wait(mut self) -> ExitStatus {
        self.process.wait().unwrap()
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// xpm-blk with all files in a directory, and an allocator at a port where no server listens.
fn command(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xpm-blk"));
    let config = directory.join("blk.toml");
    std::fs::write(&config, "allocator = \"http://127.0.0.1:1\"\n").unwrap();
    command.arg("--config").arg(config);
    command.arg("--control").arg(directory.join("s")).arg("--state").arg(directory.join("state"));
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

fn refusal<T>(result: Result<T, ClientError>) -> ErrorBody {
    match result {
        Err(ClientError::Refused(body)) => body,
        Err(other) => panic!("no refusal: {other}"),
        Ok(_) => panic!("it was not refused"),
    }
}

async fn attach(client: &Client, request: serde_json::Value) -> Result<Device, ClientError> {
    client.post("/v1/devices", &request).await
}

#[tokio::test]
async fn status_and_an_empty_list() {
    let blk = Blk::start();
    let client = blk.client();
    let status: Status = client.get("/v1/status").await.unwrap();
    assert_eq!(status.pid, blk.process.id());
    assert_eq!(status.allocator, "http://127.0.0.1:1");
    assert!(status.safety.len() >= 5);
    assert!(status.safety.iter().all(|item| item.ok != item.remedy.is_some()));
    let devices: Vec<Device> = client.get("/v1/devices").await.unwrap();
    assert!(devices.is_empty());
}

#[tokio::test]
async fn refusals() {
    let blk = Blk::start();
    let client = blk.client();
    let socket = format!("nbd-socket={}", blk.directory.path().join("n").display());

    let body = refusal(attach(&client, serde_json::json!({"name": "a", "as": socket})).await);
    assert_eq!(body.kind, ErrorKind::Unavailable);
    assert!(body.error.contains("http://127.0.0.1:1"), "{}", body.error);

    for (request, part) in [
        (serde_json::json!({"name": "a", "as": "vhost"}), "nbd-direct"),
        (serde_json::json!({"name": "a", "as": socket, "depth": 0}), "1 to 1024"),
        (serde_json::json!({"name": "a", "as": socket, "queues": 65}), "1 to 64"),
        (serde_json::json!({"name": "../a", "as": socket}), "a name"),
        (serde_json::json!({"name": "a", "as": socket, "dpeth": 1}), "dpeth"),
    ] {
        let body = refusal(attach(&client, request).await);
        assert!(body.error.contains(part), "{}", body.error);
    }

    let body = refusal(client.delete("/v1/devices/a").await);
    assert_eq!(body.kind, ErrorKind::NotFound);
    let body = refusal(client.get::<Device>("/v1/devices/a").await);
    assert_eq!(body.kind, ErrorKind::NotFound);
    let body = refusal(client.delete("/v1/devices/a?forec=true").await);
    assert_eq!(body.kind, ErrorKind::Invalid);
    let devices: Vec<Device> = client.get("/v1/devices").await.unwrap();
    assert!(devices.is_empty(), "nothing is left of what was refused");
}

#[tokio::test]
async fn a_kernel_without_the_drivers_is_recognized() {
    if Path::new("/dev/ublk-control").exists() || Path::new("/sys/module/nbd").exists() {
        eprintln!("skipped: this kernel has the drivers");
        return;
    }
    let blk = Blk::start();
    for form in ["ublk", "nbd", "nbd-direct"] {
        let body = refusal(attach(&blk.client(), serde_json::json!({"name": "a", "as": form})).await);
        assert_eq!(body.kind, ErrorKind::Unsupported, "{form}: {}", body.error);
    }
}

#[test]
fn a_signal_ends_it_and_the_next_process_reuses_its_socket_and_directory() {
    let blk = Blk::start();
    let status = |process: &mut Command| process.status().unwrap();
    let state = blk.directory.path().join("another-state");
    let second = status(command(blk.directory.path()).arg("--state").arg(state).stderr(Stdio::null()));
    assert!(!second.success(), "two daemons at one socket");
    blk.signal(Signal::TERM);
    assert!(blk.wait().success());
}

#[test]
fn the_configuration_is_checked_and_errors_are_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("c.toml");
    let check = |text: &str| -> Output {
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_xpm-blk"));
        command.arg("--check").arg("--config").arg(&file).output().unwrap()
    };
    assert!(check("depth = 8").status.success());
    for (text, part) in [
        ("depht = 8", "c.toml:1"),
        ("depth = 8\nhold = 5", "c.toml:2"),
        ("depth = 0", "1 to 1024"),
        ("depth = ", "c.toml:1"),
        ("[[device]]\nname = \"a\"", "c.toml:1"),
    ] {
        let output = check(text);
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{text}");
        assert!(line.contains(part) && line.trim_end().lines().count() == 1, "{line}");
    }
}

#[test]
fn a_state_directory_of_a_newer_version_is_left_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let devices = directory.path().join("state/devices");
    std::fs::create_dir_all(&devices).unwrap();
    std::fs::write(devices.join("a.json"), "{\"version\": 99}").unwrap();
    let output = command(directory.path()).stderr(Stdio::piped()).output().unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(line.contains("newer xpm-blk"), "{line}");
    assert_eq!(std::fs::read(devices.join("a.json")).unwrap(), b"{\"version\": 99}");
}
