//! An allocator and appliances as processes, each with a directory of its own. All end when the cluster is dropped.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use xpm_control::client::{Client, ClientError};
use xpm_protocol::ApplianceId;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Appliance, Status};
use xpm_protocol::api::appliance;

/// Time limit of waits that have none of their own. Only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Cluster {
    directory: tempfile::TempDir,
    allocator: Option<Child>,
    url: String,
    appliances: Vec<Option<Child>>,
}

impl Cluster {
    /// Starts all processes and waits until all appliances are up.
    pub(crate) async fn start(appliances: usize, memory: u64) -> Cluster {
        let directory = tempfile::tempdir().unwrap();
        let mut cluster = Cluster { directory, allocator: None, url: String::new(), appliances: Vec::new() };
        cluster.start_allocator(&[]).await;
        for number in 0..appliances {
            let child = cluster.start_appliance(number, memory);
            cluster.appliances.push(Some(child));
        }
        cluster.all_up().await;
        cluster
    }

    /// Starts the allocator, at its earlier address if it had one.
    pub(crate) async fn start_allocator(&mut self, more: &[&str]) {
        let log = self.directory.path().join("allocator.log");
        let listen = match self.url.strip_prefix("http://") {
            Some(address) => address.to_owned(),
            None => "127.0.0.1:0".to_owned(),
        };
        let mut command = allocator_command();
        command.args(["--listen", &listen, "--data", &self.data(), "--heartbeat", "500ms"]).args(more);
        self.allocator = Some(command.stderr(File::create(&log).unwrap()).spawn().unwrap());
        let mut address = None;
        eventually("the allocator listens", async || {
            address = listens_at(&log);
            address.is_some()
        })
        .await;
        self.url = format!("http://{}", address.unwrap());
    }

    fn start_appliance(&self, number: usize, memory: u64) -> Child {
        let path =
            |what: &str| self.directory.path().join(format!("{what}{number}")).to_str().unwrap().to_owned();
        let log = File::create(path("log")).unwrap();
        Command::new(appliance_binary())
            .args(["--listen", "127.0.0.1:0", "--nbd", "127.0.0.1:0", "--no-lock", "--region-size", "16MiB"])
            .args([
                "--memory",
                &memory.to_string(),
                "--name",
                &format!("a{number}"),
                "--allocator",
                &self.url,
            ])
            .args(["--run-dir", &path("run"), "--state", &path("state")])
            .stderr(log)
            .spawn()
            .unwrap()
    }

    pub(crate) fn data(&self) -> String {
        self.directory.path().join("data").to_str().unwrap().to_owned()
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(&self.url, None).unwrap()
    }

    /// Clients of the appliances, in the order of their names.
    pub(crate) async fn appliance_clients(&self) -> Vec<Client> {
        let mut appliances: Vec<Appliance> = self.client().get("/v1/appliances").await.unwrap();
        appliances.sort_by(|a, b| a.info.name.cmp(&b.info.name));
        appliances.iter().map(|one| Client::new(&one.info.control, None).unwrap()).collect()
    }

    pub(crate) async fn all_up(&self) {
        let wanted = self.appliances.iter().flatten().count() as u64;
        let client = self.client();
        eventually("all appliances are up", async || {
            client.get::<Status>("/v1/status").await.is_ok_and(|status| status.appliances_up == wanted)
        })
        .await;
    }

    /// Waits until no appliance has memory in use.
    pub(crate) async fn nothing_used(&self) {
        for client in self.appliance_clients().await {
            eventually("memory is given back", async || {
                let status: appliance::Status = client.get("/v1/status").await.unwrap();
                status.granted.0 == 0 && status.reserved.0 == 0 && status.free == status.capacity
            })
            .await;
        }
    }

    pub(crate) fn kill_allocator(&mut self) {
        self.allocator.take().into_iter().for_each(end);
    }

    pub(crate) async fn kill_appliance(&mut self, number: usize) -> ApplianceId {
        let appliances: Vec<Appliance> = self.client().get("/v1/appliances").await.unwrap();
        self.appliances[number].take().into_iter().for_each(end);
        appliances.iter().find(|one| one.info.name.as_str() == format!("a{number}")).unwrap().info.id
    }

    pub(crate) fn stop_appliance(&self, number: usize) {
        self.signal(number, Signal::STOP);
    }

    pub(crate) fn continue_appliance(&self, number: usize) {
        self.signal(number, Signal::CONT);
    }

    fn signal(&self, number: usize, signal: Signal) {
        let child = self.appliances[number].as_ref().unwrap();
        kill_process(Pid::from_child(child), signal).unwrap();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.directory.path().join("allocator.log"));
            eprintln!("the allocator said:\n{}", log.unwrap_or_default());
        }
        self.kill_allocator();
        self.appliances.iter_mut().filter_map(Option::take).for_each(end);
    }
}

fn end(mut child: Child) {
    // The process may have ended by itself.
    let _ = child.kill();
    let _ = child.wait();
}

/// The address that the allocator's log names, once the log has it.
fn listens_at(log: &Path) -> Option<String> {
    let text = std::fs::read_to_string(log).ok()?;
    let (_, rest) = text.split_once("listens at ")?;
    Some(rest.split_once(',')?.0.to_owned())
}

pub(crate) fn allocator_command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xpm-allocator"));
    command.env_remove("XPM_LOG").stdin(Stdio::null());
    command
}

/// The appliance program next to the allocator program: the one from a build of the whole workspace. If only this
/// package was built, it is built here, because cargo builds only the programs of the tested package. Then it is
/// built with other features, and all its dependencies with it.
fn appliance_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let directory = Path::new(env!("CARGO_BIN_EXE_xpm-allocator")).parent().unwrap();
        let binary = directory.join("xpm-appliance");
        if !binary.exists() {
            let mut build = Command::new(env!("CARGO"));
            build
                .args(["build", "--quiet", "--package", "xpm-appliance", "--target-dir"])
                .arg(directory.parent().unwrap());
            if directory.ends_with("release") {
                build.arg("--release");
            }
            assert!(build.status().unwrap().success(), "the appliance is built");
        }
        binary
    })
}

/// Waits until the condition holds.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, wait).await.is_ok(), "{what}: not in time");
}

pub(crate) fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (ErrorKind, String) {
    match result.unwrap_err() {
        ClientError::Refused(body) => (body.kind, body.error),
        other => panic!("{}", xpm_control::error_line(&other)),
    }
}
