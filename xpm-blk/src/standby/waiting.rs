//! The side of the process that stands by.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::blk::Form;
use xpm_protocol::{ClientId, Life, Name};

use super::ballast::Ballast;
use super::link::{self, FromStandby, Receiver, Sender, ToStandby};
use super::{TICK, socket_path};
use crate::config::Config;
use crate::error::{DeviceError, Step};
use crate::frontend::{buffers, fuse, ublk};
use crate::records::{self, Record};
use xpm_safety as safety;

/// Heap for the objects that are created when this process takes over: volumes, links with their buffers,
/// tasks. In bytes.
const HEAP_LEN: usize = 8 << 20;
/// Time limit of the serving process for making room for a successor: it ends a standby that is not ready.
const ANSWER_LIMIT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
/// Pause between two checks for the death of a process that has closed its end.
const CLOSED_PAUSE: Duration = Duration::from_millis(1);

/// The connection to the serving process.
pub(crate) struct Post {
    sender: Sender,
    receiver: Receiver,
    serving: OwnedFd,
    serving_pid: Pid,
    successor: bool,
}

/// The result of the wait.
pub(crate) enum Outcome {
    /// The serving process is dead, and this process takes over.
    GoOn(Inheritance),
    /// The serving process is gone, but another one may have taken over: check again.
    LookAgain,
    /// This process is not needed.
    End(String),
}

/// The state that a dead process left to this one.
pub(crate) struct Inheritance {
    /// The lock of the state directory.
    pub(crate) lock: OwnedFd,
    pub(crate) client: ClientId,
    /// The life that continues; none when an xpm-blk from before lives existed hands over.
    pub(crate) life: Option<Life>,
    pub(crate) records: BTreeMap<Name, Record>,
    pub(crate) descriptors: BTreeMap<Name, OwnedFd>,
    /// Whether the predecessor was told to end: then this process ends when no device is in use.
    pub(crate) ends: bool,
}

impl Post {
    /// The connection of a standby, whose parent is at the other end of its standard input.
    pub(crate) fn of_parent() -> Result<Post, DeviceError> {
        let socket = io::stdin().as_fd().try_clone_to_owned().at("take over standard input")?;
        Post::new(socket.into(), false)
    }

    /// The connection of a process that found the state directory in use; none when no process listens there.
    pub(crate) fn of_successor(state: &Path) -> Result<Option<Post>, DeviceError> {
        match UnixStream::connect(socket_path(state)) {
            Ok(socket) => match Post::new(socket, true) {
                // The serving process has died meanwhile.
                Err(_) => Ok(None),
                post => post.map(Some),
            },
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Ok(None)
            }
            Err(error) => Err(error.at(format!("connect to {}", socket_path(state).display()))),
        }
    }

    fn new(socket: UnixStream, successor: bool) -> Result<Post, DeviceError> {
        let at = || "find the process that serves";
        let serving_pid = socket_peercred(&socket).at(at())?.pid;
        let serving = pidfd_open(serving_pid, PidfdFlags::empty()).at(at())?;
        let (sender, receiver) = link::split(socket).at(at())?;
        let hello = FromStandby::Hello { pid: std::process::id(), successor, records: records::VERSION };
        sender.send(&hello, None).at(at())?;
        Ok(Post { sender, receiver, serving, serving_pid, successor })
    }

    /// Blocks until the serving process has answered or is dead, at most 10 s. By then no third process is
    /// allocating its memory.
    pub(crate) fn wait_for_answer(&self) {
        let mut watched =
            [PollFd::new(&self.serving, PollFlags::IN), PollFd::new(self.receiver.socket(), PollFlags::IN)];
        // The wait that follows notices an error or silence.
        let _ = poll(&mut watched, Some(&ANSWER_LIMIT));
    }

    /// Stands by until that ends. Holds memory meanwhile, which is returned to the kernel afterwards, because
    /// the kernel needs memory for the takeover, too. Blocks.
    pub(crate) fn wait(self, config: &Config) -> Outcome {
        safety::while_others_serve(|| safety::reserve_heap(HEAP_LEN));
        let silence_max = config.silence_max();
        let watch = Watch {
            post: self,
            config,
            client: None,
            life: None,
            records: BTreeMap::new(),
            descriptors: BTreeMap::new(),
            lock: None,
            ends: false,
            told: false,
            changed: false,
            silent: 0,
            silence_max,
            tick: Instant::now() + TICK,
        };
        match Ballast::new(config.standby_reserve.0 as usize) {
            Ok(ballast) => {
                let outcome = watch.run();
                match outcome {
                    Outcome::GoOn(_) => ballast.give_back_slowly(),
                    Outcome::LookAgain | Outcome::End(_) => drop(ballast),
                }
                outcome
            }
            Err(error) => Outcome::End(format!("no memory for a standby: {error}")),
        }
    }
}

struct Watch<'a> {
    post: Post,
    config: &'a Config,
    client: Option<ClientId>,
    life: Option<Life>,
    records: BTreeMap<Name, Record>,
    descriptors: BTreeMap<Name, OwnedFd>,
    lock: Option<OwnedFd>,
    ends: bool,
    /// Whether all present records have been received.
    told: bool,
    /// Whether the prepared resources may no longer fit.
    changed: bool,
    /// Checks since the last message of the serving process.
    silent: u32,
    silence_max: u32,
    tick: Instant,
}

impl Watch<'_> {
    fn run(mut self) -> Outcome {
        loop {
            let (dead, heard) = self.sleep();
            // Messages that it sent before its death count, above all the lock.
            if heard && let Some(outcome) = self.hear_all(dead) {
                return outcome;
            }
            if dead {
                return self.go_on();
            }
            if Instant::now() >= self.tick {
                self.tick = Instant::now() + TICK;
                self.look();
            }
            if self.told
                && self.changed
                && let Err(error) = self.prepare()
            {
                return Outcome::End(format!("this process cannot stand by: {error}"));
            }
        }
    }

    /// Waits; returns whether the serving process is dead, and whether it has sent a message.
    fn sleep(&self) -> (bool, bool) {
        let left = self.tick.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut watched = [
            PollFd::new(&self.post.serving, PollFlags::IN),
            PollFd::new(self.post.receiver.socket(), PollFlags::IN),
        ];
        if !poll(&mut watched, Some(&timeout)).is_ok_and(|ready| ready > 0) {
            return (false, false);
        }
        (!watched[0].revents().is_empty(), !watched[1].revents().is_empty())
    }

    /// Handles the messages that have arrived; after the death of the sender, all of them.
    fn hear_all(&mut self, dead: bool) -> Option<Outcome> {
        loop {
            match self.hear() {
                Ok(None) => {}
                Ok(Some(outcome)) => return Some(outcome),
                Err(_) if dead => return None,
                // The other end is closed. An armed process waits for the death that causes this, because it
                // would be killed if it were not needed; a successor connects again.
                Err(_) if self.lock.is_none() && self.post.successor => return Some(Outcome::LookAgain),
                Err(_) => {
                    std::thread::sleep(CLOSED_PAUSE);
                    return None;
                }
            }
            if !dead {
                return None;
            }
        }
    }

    fn hear(&mut self) -> io::Result<Option<Outcome>> {
        let (message, passed) = self.post.receiver.receive::<ToStandby>()?;
        self.silent = 0;
        match message {
            ToStandby::Hello { pid, .. } if pid != self.post.serving_pid.as_raw_pid().cast_unsigned() => {
                // The process that had the lock is not the one that answers.
                return Ok(Some(Outcome::LookAgain));
            }
            ToStandby::Hello { records, .. } if records > records::VERSION => {
                return Ok(Some(Outcome::End(format!(
                    "the {} that serves is newer (version {records} of the records, this one knows {}): use that one",
                    self.config.program.name(),
                    records::VERSION
                ))));
            }
            ToStandby::Record(text) => match records::parse(&text) {
                Ok(record) => {
                    self.records.insert(record.request.name.clone(), record);
                    self.changed = true;
                }
                Err(_) => return Ok(Some(Outcome::End("a record cannot be read".to_owned()))),
            },
            ToStandby::Descriptor(name) => {
                self.descriptors.extend(passed.map(|descriptor| (name, descriptor)));
            }
            ToStandby::Removed(name) => {
                self.descriptors.remove(&name);
                self.records.remove(&name);
                self.changed = true;
            }
            ToStandby::Told => (self.told, self.changed) = (true, true),
            ToStandby::Lock => self.lock = passed,
            ToStandby::Go { ends } => self.ends = ends,
            ToStandby::Refused(why) => return Ok(Some(Outcome::End(why))),
            ToStandby::Hello { client, life, .. } => (self.client, self.life) = (Some(client), life),
            ToStandby::Beat => {}
        }
        Ok(None)
    }

    /// Sends a sign of life, and checks for one of the serving process.
    fn look(&mut self) {
        // A process that cannot receive is detected by its silence.
        let _ = self.post.sender.send(&FromStandby::Beat, None);
        self.silent += 1;
        // A successor waits longer, so that the standby acts first, if there is one.
        let silence_max = if self.lock.is_some() { self.silence_max } else { self.silence_max * 2 };
        if self.silent > silence_max && (self.lock.is_some() || self.post.successor) {
            tracing::error!(
                "the {} that serves, process {}, has hung for {} s: it is killed",
                self.config.program.name(),
                self.post.serving_pid.as_raw_pid(),
                self.silent
            );
            // An error means that the process is dead already.
            let _ = pidfd_send_signal(&self.post.serving, Signal::KILL);
            self.silent = 0;
        }
    }

    /// Prepares the resources that the devices need.
    fn prepare(&mut self) -> Result<(), DeviceError> {
        self.changed = false;
        let shape = |record: &Record| self.config.shape(&record.request, record.number);
        let ublk = self.records.values().filter(|record| record.request.form == Form::Ublk);
        let shapes: Vec<_> = ublk.map(shape).collect();
        let files = self.records.values().filter_map(|record| Some((shape(record), record.mounted?)));
        let mut lens: Vec<usize> =
            files.flat_map(|(shape, mounted)| fuse::buffer_lens(&shape, &mounted)).collect();
        safety::while_others_serve(|| {
            lens.extend(ublk::prepare(&shapes)?);
            buffers::set_aside(lens).at("set memory for buffers aside")
        })?;
        safety::use_reserve();
        let locked = safety::locked_bytes();
        self.post.sender.send(&FromStandby::Ready { locked }, None).at("report that this process is ready")
    }

    fn go_on(self) -> Outcome {
        match (self.lock, self.client) {
            (Some(lock), Some(client)) => {
                let (life, records, descriptors) = (self.life, self.records, self.descriptors);
                Outcome::GoOn(Inheritance { lock, client, life, records, descriptors, ends: self.ends })
            }
            _ if self.post.successor => Outcome::LookAgain,
            _ => Outcome::End("the process that serves died before this one could stand by".to_owned()),
        }
    }
}

/// The error when the state directory is in use but no process hands over.
pub(crate) fn nobody(config: &Config) -> DeviceError {
    let what = format!(
        "the state directory {} is in use by another {}, which cannot hand over: give each its own `state`",
        config.state().display(),
        config.program.name()
    );
    DeviceError::new(ErrorKind::Conflict, what)
}
