//! Processes that outlive the command that started them. A process is identified by its id and its start time, so
//! that a later process with the same id is not taken for it.

use std::fs;
use std::io;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process of this machine, running or ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its process id.
    pub id: u32,
    /// Start time, in clock ticks since this machine started (proc_pid_stat(5), field 22).
    pub started: u64,
}

impl Process {
    /// The process that has this id now.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn with_id(id: u32) -> io::Result<Process> {
        let stat = fs::read_to_string(format!("/proc/{id}/stat"))?;
        let started = parse_start(&stat)
            .ok_or_else(|| io::Error::other(format!("/proc/{id}/stat has another form")))?;
        Ok(Process { id, started })
    }

    /// This process.
    ///
    /// # Errors
    /// When /proc is not mounted.
    pub fn own() -> io::Result<Process> {
        Process::with_id(std::process::id())
    }

    /// Whether it still runs. A process that has ended and was not waited for yet does not run.
    pub fn is_alive(self) -> bool {
        let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", self.id)) else { return false };
        parse_start(&stat) == Some(self.started)
            && parse_state(&stat).is_some_and(|state| !matches!(state, 'Z' | 'X'))
    }

    /// Sends a signal; returns whether the process existed.
    pub fn signal(self, signal: Signal) -> bool {
        self.open().is_some_and(|process| pidfd_send_signal(process, signal).is_ok())
    }

    /// Kills it and waits until it has ended, for at most 10 s. Returns whether it has ended. Blocks.
    pub fn kill(self) -> bool {
        let Some(process) = self.open() else { return true };
        let _ = pidfd_send_signal(&process, Signal::KILL);
        self.wait(&process, Duration::from_secs(10))
    }

    /// Waits until it has ended, for at most `limit`. Returns whether it has ended. Blocks.
    pub fn wait_for_end(self, limit: Duration) -> bool {
        self.open().is_none_or(|process| self.wait(&process, limit))
    }

    /// Waits on a descriptor of it for at most `limit`. Returns whether it has ended. Blocks.
    pub(crate) fn wait(self, process: &OwnedFd, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).ok();
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        loop {
            match poll(&mut fds, limit.as_ref()) {
                Err(Errno::INTR) => {}
                ended => return ended.is_ok_and(|count| count > 0),
            }
        }
    }

    /// A descriptor of the process, if it still runs; readable when it has ended.
    pub(crate) fn open(self) -> Option<OwnedFd> {
        let process = pidfd_open(Pid::from_raw(self.id.cast_signed())?, PidfdFlags::empty()).ok()?;
        // Checked after opening: so the open descriptor is of this process.
        self.is_alive().then_some(process)
    }
}

/// The fields after the name, which is in parentheses and may contain any character.
fn fields(stat: &str) -> Option<std::str::SplitAsciiWhitespace<'_>> {
    Some(stat.rsplit_once(')')?.1.split_ascii_whitespace())
}

fn parse_state(stat: &str) -> Option<char> {
    fields(stat)?.next()?.chars().next()
}

fn parse_start(stat: &str) -> Option<u64> {
    // The state is field 3.
    fields(stat)?.nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_start_time_is_found_after_any_name() {
        let stat = "7 (a) b) (c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 99 1";
        assert_eq!(parse_start(stat), Some(12345));
        assert_eq!(parse_state(stat), Some('S'));
        for broken in ["", "7", "7 (a)", "7 (a) S 1"] {
            assert_eq!(parse_start(broken), None);
        }
    }

    #[test]
    fn another_process_with_the_same_id_is_a_different_process() {
        let own = Process::own().unwrap();
        assert!(own.is_alive());
        let other = Process { started: own.started + 1, ..own };
        assert!(!other.is_alive());
        assert!(!other.signal(Signal::KILL), "nothing was killed");
        assert!(other.kill(), "it has ended already");
    }

    #[test]
    fn an_ended_process_is_not_alive() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::with_id(child.id()).unwrap();
        assert!(process.is_alive());
        assert!(process.kill());
        // The ended process was not waited for yet.
        assert!(!process.is_alive());
        child.wait().unwrap();
        assert!(process.wait_for_end(Duration::ZERO));
    }
}
