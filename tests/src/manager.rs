//! A small service manager: it hears a daemon on a real notification socket, keeps the descriptors that the
//! daemon hands over, and hands them back when it starts the daemon again, as systemd does.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// Longest message, in bytes.
const MESSAGE_MAX: usize = 4096;

/// The manager's state of its daemon.
#[derive(Default)]
struct Known {
    store: Vec<(String, OwnedFd)>,
    /// The last value of each key.
    said: BTreeMap<String, String>,
    pings: u64,
    ended: bool,
}

/// A service manager of one daemon. Its thread ends with it.
pub struct ServiceManager {
    path: PathBuf,
    known: Arc<Mutex<Known>>,
}

impl ServiceManager {
    /// A manager whose notification socket is this path.
    ///
    /// # Panics
    /// When the socket cannot be made.
    pub fn start(path: PathBuf) -> ServiceManager {
        let socket = UnixDatagram::bind(&path).expect("a notification socket");
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a socket takes a time limit");
        let known = Arc::<Mutex<Known>>::default();
        let shared = known.clone();
        std::thread::spawn(move || {
            while !lock(&shared).ended {
                hear(&socket, &shared);
            }
        });
        ServiceManager { path, known }
    }

    /// Has a program started as the manager starts its daemon: with what it kept.
    ///
    /// # Panics
    /// When there are no descriptors left.
    pub fn spawn(&self, program: &Path, arguments: &[String], more: impl FnOnce(&mut Command)) -> Child {
        // The number of the process is known only in it: a shell sets it and becomes the program.
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "export LISTEN_PID=$$ WATCHDOG_PID=$$; exec \"$0\" \"$@\""])
            .arg(program)
            .args(arguments);
        command.env("NOTIFY_SOCKET", &self.path).env("WATCHDOG_USEC", "300000");
        let known = lock(&self.known);
        let names: Vec<&str> = known.store.iter().map(|(name, _)| name.as_str()).collect();
        command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        more(&mut command);
        let numbers: Vec<RawFd> = known.store.iter().map(|(_, descriptor)| descriptor.as_raw_fd()).collect();
        // SAFETY: only dup2(2) and fcntl(2) are called between fork and exec, which are safe there, on
        // descriptors that `known` holds open; the vector was made before.
        unsafe { command.pre_exec(move || hand_over(&numbers)) };
        command.spawn().expect("the daemon can be started")
    }

    /// The names of what is kept.
    pub fn kept(&self) -> Vec<String> {
        lock(&self.known).store.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Keeps this too, as if the daemon had handed it over.
    pub fn keep(&self, name: &str, descriptor: OwnedFd) {
        lock(&self.known).store.push((name.to_owned(), descriptor));
    }

    /// Changes what is kept.
    pub fn change_kept(&self, change: impl FnOnce(&mut Vec<(String, OwnedFd)>)) {
        change(&mut lock(&self.known).store);
    }

    /// Forgets what is kept, as systemd does when the unit is stopped.
    pub fn forget(&self) {
        lock(&self.known).store.clear();
    }

    /// The last value that the daemon said for a key, such as `READY`; forgets it.
    pub fn take_said(&self, key: &str) -> Option<String> {
        lock(&self.known).said.remove(key)
    }

    /// How many times the daemon said that it lives.
    pub fn pings(&self) -> u64 {
        lock(&self.known).pings
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        lock(&self.known).ended = true;
    }
}

fn lock(known: &Mutex<Known>) -> MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

fn hear(socket: &UnixDatagram, known: &Mutex<Known>) {
    let mut text = [0; MESSAGE_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut passed = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut passed, RecvFlags::CMSG_CLOEXEC);
    // Nothing came within the limit.
    let Ok(received) = received else { return };
    let descriptors: Vec<OwnedFd> = passed
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    let text = String::from_utf8_lossy(&text[..received.bytes]).into_owned();
    let mut said: BTreeMap<String, String> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    let mut known = lock(known);
    let name = said.remove("FDNAME").unwrap_or_else(|| "stored".to_owned());
    if said.remove("FDSTORE").is_some() {
        known.store.extend(descriptors.into_iter().map(|descriptor| (name.clone(), descriptor)));
    } else if said.remove("FDSTOREREMOVE").is_some() {
        known.store.retain(|(other, _)| *other != name);
    }
    known.pings += u64::from(said.remove("WATCHDOG").is_some());
    known.said.extend(said);
}

/// Makes these descriptors number 3 and the following ones.
fn hand_over(numbers: &[RawFd]) -> std::io::Result<()> {
    /// Beyond all numbers that are to be set.
    const ASIDE: RawFd = 600;
    let check = |result: i32| if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) };
    // First out of each other's way.
    for (index, number) in (0..).zip(numbers) {
        // SAFETY: a system call on a number; there is no memory in it.
        check(unsafe { libc::dup3(*number, ASIDE + index, libc::O_CLOEXEC) })?;
    }
    for (index, _) in (0..).zip(numbers) {
        // SAFETY: as above. The copy is not closed by exec.
        check(unsafe { libc::dup2(ASIDE + index, 3 + index) })?;
    }
    Ok(())
}
