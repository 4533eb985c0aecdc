//! Memory pressure (Documentation/accounting/psi.rst of the kernel): the kernel notifies when tasks had to
//! wait for memory for too long.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::Notify;

const FILE: &str = "/proc/pressure/memory";
/// The window in which stalls are counted.
const WINDOW: Duration = Duration::from_secs(1);
/// Stack of the thread that waits; all of it is locked.
const STACK_LEN: usize = 128 << 10;

/// Records when the threshold is exceeded.
#[derive(Debug)]
pub struct Watch {
    passed: Arc<AtomicBool>,
}

impl Watch {
    /// Requests a notification from the kernel when tasks waited for `stall` within a second, and from then
    /// on wakes `notify` each time, at most once a second.
    ///
    /// # Errors
    /// When the kernel does not support this: it has no PSI, or PSI is off (`psi=1` turns it on).
    pub fn start(stall: Duration, notify: Arc<Notify>) -> io::Result<Watch> {
        let trigger = ask(stall)?;
        let passed = Arc::new(AtomicBool::new(false));
        let shared = Arc::clone(&passed);
        thread::Builder::new().name("xpm-pressure".to_owned()).stack_size(STACK_LEN).spawn(move || {
            while wait(&trigger) {
                shared.store(true, Ordering::Relaxed);
                notify.notify_one();
            }
        })?;
        Ok(Watch { passed })
    }

    /// Whether the threshold was exceeded since the last call.
    pub fn take(&self) -> bool {
        self.passed.swap(false, Ordering::Relaxed)
    }
}

fn ask(stall: Duration) -> io::Result<File> {
    let mut file = OpenOptions::new().read(true).write(true).open(FILE)?;
    // The kernel requires the whole order in one write, with a terminating zero.
    file.write_all(format!("some {} {}\0", stall.as_micros(), WINDOW.as_micros()).as_bytes())?;
    Ok(file)
}

/// Waits for the next notification. Returns false when there will be none.
fn wait(trigger: &File) -> bool {
    let mut wanted = [PollFd::new(trigger, PollFlags::PRI)];
    loop {
        match poll(&mut wanted, None) {
            Ok(_) => return !wanted[0].revents().contains(PollFlags::ERR),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// The share of the last ten seconds in which some task waited, in hundredths of a percent; none if the
/// kernel does not report it.
pub fn some_avg10() -> Option<u64> {
    parse(&fs::read_to_string(FILE).ok()?)
}

fn parse(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let value = line.split_ascii_whitespace().find_map(|word| word.strip_prefix("avg10="))?;
    let (whole, part) = value.split_once('.')?;
    whole.parse::<u64>().ok()?.checked_mul(100)?.checked_add(part.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_the_kernel() {
        let text = "some avg10=3.07 avg60=0.00 avg300=0.00 total=5\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!(parse(text), Some(307));
        assert_eq!(parse("full avg10=0.00\n"), None);
        assert_eq!(parse("some avg10=x\n"), None);
    }
}
