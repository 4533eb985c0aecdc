//! Messages between a daemon and the service manager that started it (systemd): readiness, the watchdog, and
//! descriptors that are kept for the daemon's next process (sd_notify(3), sd_listen_fds(3)). Without a service
//! manager nothing is sent.

use std::ffi::OsString;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::cmsg_space;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, sendmsg_addr, socket_with,
};

/// How long a message may wait for a busy service manager.
const SEND_LIMIT: Duration = Duration::from_secs(5);
/// Number of watchdog messages within the time-out of the watchdog.
const PINGS: u32 = 3;

/// The service manager that started this process.
#[derive(Debug)]
pub struct Manager {
    socket: OwnedFd,
    address: SocketAddrUnix,
}

impl Manager {
    /// The service manager that `NOTIFY_SOCKET` names, if any. A service manager that cannot be reached is logged and
    /// counts as none.
    pub fn from_environment() -> Option<Manager> {
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty())?;
        match Manager::at(&name) {
            Ok(manager) => Some(manager),
            Err(error) => {
                tracing::warn!(
                    "cannot reach the service manager at {} ({error}): going on without it; unset NOTIFY_SOCKET where \
                     there is none",
                    name.display()
                );
                None
            }
        }
    }

    fn at(name: &OsString) -> io::Result<Manager> {
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
            path => SocketAddrUnix::new(path)?,
        };
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&socket, Timeout::Send, Some(SEND_LIMIT))?;
        Ok(Manager { socket, address })
    }

    /// The daemon serves from now on; `status` is shown to operators.
    pub fn ready(&self, status: &str) {
        self.say(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// Status of the daemon, shown to operators.
    pub fn status(&self, status: &str) {
        self.say(&format!("STATUS={}", one_line(status)));
    }

    /// The daemon is ending.
    pub fn stopping(&self) {
        self.say("STOPPING=1");
    }

    /// The daemon is alive (watchdog).
    pub fn alive(&self) {
        self.say("WATCHDOG=1");
    }

    /// Has a descriptor kept for the next process of this daemon, under an unused name.
    ///
    /// # Errors
    /// When the message cannot be sent. The service manager does not report whether it had room for the descriptor.
    pub fn store(&self, name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        self.send(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), &[descriptor])
    }

    /// Has the descriptors of this name released.
    ///
    /// # Errors
    /// When the message cannot be sent.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    /// Sends a message whose loss does no harm.
    fn say(&self, message: &str) {
        if let Err(error) = self.send(message, &[]) {
            tracing::debug!(%error, "the service manager does not listen");
        }
    }

    fn send(&self, message: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut passed = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !passed.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = [IoSlice::new(message.as_bytes())];
        loop {
            match sendmsg_addr(&self.socket, &self.address, &bytes, &mut passed, SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => {}
                result => return result.map(|_| ()).map_err(Into::into),
            }
        }
    }
}

/// Whether the whole machine is shutting down, by systemd's report (`systemctl is-system-running`), as opposed to a
/// stop of this daemon alone. Blocks until systemd has answered; false without systemd.
pub fn machine_stops() -> bool {
    let asked = Command::new("systemctl").arg("is-system-running").stdin(Stdio::null()).output();
    asked.is_ok_and(|answer| answer.stdout.trim_ascii() == b"stopping")
}

/// Interval at which this daemon has to send watchdog messages, if it has to (`WATCHDOG_USEC`).
pub fn watchdog() -> Option<Duration> {
    let value = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let mine = value("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    interval(value("WATCHDOG_USEC").filter(|_| mine)?)
}

fn interval(limit_us: u64) -> Option<Duration> {
    (limit_us > 0).then(|| (Duration::from_micros(limit_us) / PINGS).max(Duration::from_millis(1)))
}

/// The names of the passed descriptors, the first of which has number 3 (`LISTEN_FDS`). Empty if they are meant for
/// another process.
pub(crate) fn handed() -> Vec<String> {
    let value = |name| std::env::var(name).unwrap_or_default();
    names(&value("LISTEN_PID"), &value("LISTEN_FDS"), &value("LISTEN_FDNAMES"), std::process::id())
}

fn names(pid: &str, count: &str, names: &str, me: u32) -> Vec<String> {
    if pid.parse() != Ok(me) {
        return Vec::new();
    }
    let count = count.parse().unwrap_or(0);
    names
        .split(':')
        .map(ToOwned::to_owned)
        .chain(std::iter::repeat("unknown".to_owned()))
        .take(count)
        .collect()
}

/// Sends watchdog messages at the required interval, each time after `proof` succeeded; `proof` should exercise the
/// daemon's purpose. Never returns; sends nothing if no watchdog is configured.
pub async fn prove_alive<F: Future<Output = bool>>(manager: Option<&Manager>, mut proof: impl FnMut() -> F) {
    let (Some(manager), Some(interval)) = (manager, watchdog()) else { return std::future::pending().await };
    loop {
        if proof().await {
            manager.alive();
        }
        tokio::time::sleep(interval).await;
    }
}

fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixDatagram;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    #[test]
    fn passed_descriptors_have_names() {
        assert_eq!(names("7", "2", "a:b", 7), ["a", "b"]);
        assert_eq!(names("7", "3", "a", 7), ["a", "unknown", "unknown"]);
        assert_eq!(names("7", "1", "a:b", 7), ["a"]);
        for (pid, count) in [("8", "2"), ("", "2"), ("7", ""), ("7", "-1"), ("7", "0")] {
            assert!(names(pid, count, "a:b", 7).is_empty(), "{pid} {count}");
        }
    }

    #[test]
    fn watchdog_messages_come_more_often_than_required() {
        assert_eq!(interval(0), None);
        assert_eq!(interval(30_000_000), Some(Duration::from_secs(10)));
    }

    #[test]
    fn messages_and_descriptors_arrive() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let manager = Manager::at(&path.into_os_string()).unwrap();
        let mut text = [0; 200];
        let mut heard = || {
            let len = socket.recv(&mut text).unwrap();
            String::from_utf8(text[..len].to_vec()).unwrap()
        };
        manager.ready("two\nlines");
        assert_eq!(heard(), "READY=1\nSTATUS=two lines");
        manager.alive();
        assert_eq!(heard(), "WATCHDOG=1");
        manager.stopping();
        assert_eq!(heard(), "STOPPING=1");
        manager.remove("one").unwrap();
        assert_eq!(heard(), "FDSTOREREMOVE=1\nFDNAME=one");

        manager.store("one", directory_of(&directory).as_fd()).unwrap();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut passed = RecvAncillaryBuffer::new(&mut space);
        let mut text = [0; 200];
        let mut parts = [io::IoSliceMut::new(&mut text)];
        recvmsg(&socket, &mut parts, &mut passed, RecvFlags::empty()).unwrap();
        let rights = |message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.count(),
            _ => 0,
        };
        assert_eq!(passed.drain().map(rights).sum::<usize>(), 1);
        assert!(text.starts_with(b"FDSTORE=1\nFDPOLL=0\nFDNAME=one\0"));
    }

    fn directory_of(directory: &tempfile::TempDir) -> std::fs::File {
        std::fs::File::open(directory.path()).unwrap()
    }
}
