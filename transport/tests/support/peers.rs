//! NBD servers of other projects, each on a socket of the test's own.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use xpm_protocol::GrantKey;
use xpm_protocol::nbd::ExportName;
use xpm_transport::nbd::client::{Connected, Target, connect};

use super::LIMIT;

/// A running server; killed when this is dropped.
pub(crate) struct Peer {
    child: Child,
    pub(crate) target: Target,
    _folder: TempDir,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Peer {
    /// A connection to it.
    pub(crate) fn connect(&self) -> Connected {
        connect(&self.target, &name(), LIMIT).unwrap()
    }

    /// `nbdkit` with a memory disk and the given filters and options; none if it is not installed.
    pub(crate) fn nbdkit(tcp: bool, size: u64, filters: &[&str], options: &[&str]) -> Option<Peer> {
        Peer::start("nbdkit", tcp, |command, folder, target| {
            command.args(["--foreground", "--exit-with-parent"]);
            match target {
                Target::Tcp(address) => {
                    command.arg("-i").arg(address.ip().to_string());
                    command.arg("-p").arg(address.port().to_string());
                }
                Target::Unix(path) => {
                    command.arg("-U").arg(path);
                }
            }
            command.args(filters.iter().map(|filter| format!("--filter={filter}")));
            command.arg("memory").arg(size.to_string()).args(options);
            command.current_dir(folder);
        })
    }

    /// `qemu-nbd` on a file in memory; none if it is not installed.
    pub(crate) fn qemu(tcp: bool, size: u64) -> Option<Peer> {
        Peer::start("qemu-nbd", tcp, |command, folder, target| {
            let disk = folder.join("disk");
            std::fs::File::create(&disk).unwrap().set_len(size).unwrap();
            command.args(["-f", "raw", "-t", "-e", "8", "--discard=unmap", "-x", &name().to_string()]);
            match target {
                Target::Tcp(address) => {
                    command.arg("-b").arg(address.ip().to_string());
                    command.arg("-p").arg(address.port().to_string());
                }
                Target::Unix(path) => {
                    command.arg("-k").arg(path);
                }
            }
            command.arg(disk);
        })
    }

    fn start(program: &str, tcp: bool, arrange: impl Fn(&mut Command, &Path, &Target)) -> Option<Peer> {
        if Command::new(program).arg("--version").stdout(Stdio::null()).status().is_err() {
            eprintln!("skipped: {program} is not installed");
            return None;
        }
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() }.unwrap();
        let target =
            if tcp { Target::Tcp(free_address()) } else { Target::Unix(folder.path().join("socket")) };
        let mut command = Command::new(program);
        arrange(&mut command, folder.path(), &target);
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let peer = Peer { child, target, _folder: folder };
        peer.wait_until_up();
        Some(peer)
    }

    fn wait_until_up(&self) {
        let deadline = Instant::now() + LIMIT;
        while let Err(error) = connect(&self.target, &name(), Duration::from_secs(1)) {
            assert!(Instant::now() < deadline, "the server does not come up: {error}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The name of the export of every peer.
pub(crate) fn name() -> ExportName {
    ExportName { key: GrantKey::from_bytes([0x5a; 32]), session: None }
}

/// An address that was free a moment ago.
pub(crate) fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}
