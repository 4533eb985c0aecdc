//! apt-get, which other programs of the machine use as well.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::util;

/// How long another program may hold apt's locks: unattended upgrades take minutes.
const LOCK_LIMIT: Duration = Duration::from_secs(600);
/// Pause between two tries.
const PAUSE: Duration = Duration::from_secs(2);

/// Runs apt-get to its end, and waits while another program holds one of apt's locks.
/// (`DPkg::Lock::Timeout` covers dpkg's lock only, not those of the lists and of the downloaded packages.)
///
/// # Errors
/// When apt-get fails, or a lock is held for ten minutes; with the text that apt-get wrote to standard error.
pub(crate) fn get(command: &mut Command) -> Result<()> {
    run(command, PAUSE, LOCK_LIMIT)
}

fn run(command: &mut Command, pause: Duration, limit: Duration) -> Result<()> {
    let start = Instant::now();
    loop {
        let output = command.stdin(Stdio::null()).stdout(Stdio::inherit()).stderr(Stdio::piped()).output();
        let output = output.context("cannot run apt-get")?;
        let text = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            eprint!("{text}");
            return Ok(());
        }
        match lock_line(&text) {
            Some(line) if start.elapsed() < limit => {
                println!("setup: waiting until another program has done with apt: {line}");
                thread::sleep(pause);
            }
            Some(line) => bail!("apt is in use for more than {}: {line}", util::human_time(limit)),
            None => bail!("apt-get failed: {}: {}", output.status, text.trim()),
        }
    }
}

/// The line by which apt-get says that a lock is held.
fn lock_line(text: &str) -> Option<&str> {
    let line = text.lines().find(|line| line.contains("Could not get lock"))?;
    Some(line.trim_start_matches("E: "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCKED: &str = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 12 (apt-get)";

    /// A program in apt-get's place: the first `failures` runs end as if another one had the lock.
    fn script(failures: u32, text: &str) -> (tempfile::TempDir, Command) {
        let dir = tempfile::tempdir().unwrap();
        let count = dir.path().join("count");
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!(
            "echo x >>{0}; [ $(wc -l <{0}) -gt {failures} ] || {{ echo '{text}' >&2; exit 100; }}",
            count.display()
        ));
        (dir, command)
    }

    #[test]
    fn a_lock_that_is_held_is_waited_for() {
        let (_dir, mut command) = script(3, LOCKED);
        run(&mut command, Duration::ZERO, Duration::from_secs(60)).unwrap();
    }

    #[test]
    fn a_lock_that_is_held_for_ever_is_an_error_with_its_holder() {
        let (_dir, mut command) = script(u32::MAX, LOCKED);
        let error = run(&mut command, Duration::ZERO, Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("held by process 12"), "{error}");
    }

    #[test]
    fn other_failures_are_not_waited_for() {
        let (_dir, mut command) = script(1, "E: Unable to locate package nosuch");
        let error = run(&mut command, Duration::ZERO, Duration::from_secs(60)).unwrap_err().to_string();
        assert!(error.contains("Unable to locate package"), "{error}");
    }
}
