//! The log: lines on standard error, which the service manager keeps.

use std::io::{self, IsTerminal as _, Write};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use tracing_subscriber::EnvFilter;

/// Environment variable with the level (`error`, `warn`, `info`, `debug`, `trace`) or a filter in
/// the form of tracing-subscriber's `EnvFilter`.
pub const LEVEL_VARIABLE: &str = "XPM_LOG";

/// Lines that wait for the thread that writes them; what is beyond is lost.
const LINES_MAX: usize = 4096;
/// Longest wait until all lines are written.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Where lines go once they are written by a thread of their own.
static QUEUE: OnceLock<SyncSender<Entry>> = OnceLock::new();

enum Entry {
    Line(Vec<u8>),
    /// All before it are written.
    Flush(SyncSender<()>),
}

/// From here on a thread of its own writes the lines, so that nobody who has something to say waits for the file or the
/// reader of it, whose memory may be swapped out to a device that waits for whoever has something to say.
///
/// # Errors
/// When no thread can be started.
pub fn detach() -> io::Result<()> {
    let (sender, receiver) = sync_channel(LINES_MAX);
    std::thread::Builder::new()
        .name("xpm-log".to_owned())
        .stack_size(256 << 10)
        .spawn(move || write_lines(&receiver))?;
    // A second queue has no sender, and its thread ends.
    let _ = QUEUE.set(sender);
    Ok(())
}

/// Waits until what was said so far is written, but not for long.
pub fn flush() {
    let Some(queue) = QUEUE.get() else { return };
    let (written, wait) = sync_channel(1);
    if queue.try_send(Entry::Flush(written)).is_ok() {
        let _ = wait.recv_timeout(FLUSH_LIMIT);
    }
}

fn write_lines(entries: &Receiver<Entry>) {
    for entry in entries {
        match entry {
            // There is nobody to tell that it cannot be written.
            Entry::Line(line) => drop(io::stderr().write_all(&line)),
            Entry::Flush(written) => drop(written.send(())),
        }
    }
}

/// Takes lines of the log.
struct Lines;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match QUEUE.get() {
            // One that finds no place is lost.
            Some(queue) => drop(queue.try_send(Entry::Line(bytes.to_vec()))),
            None => io::stderr().write_all(bytes)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts the log at level `info`, or at what `XPM_LOG` says. A second call changes nothing.
/// Without a terminal, lines carry no colours and no time, for the journal adds its own.
pub fn init() {
    let wanted = std::env::var(LEVEL_VARIABLE).unwrap_or_default();
    let filter = match wanted.is_empty() {
        true => Ok(EnvFilter::new("info")),
        false => EnvFilter::try_new(&wanted),
    };
    let (filter, complaint) = match filter {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let terminal = io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Lines).with_ansi(terminal);
    // Only a logger that is set already makes this fail, and that one is then used.
    let _ = match terminal {
        true => lines.try_init(),
        false => lines.without_time().try_init(),
    };
    if let Some(error) = complaint {
        tracing::warn!("{LEVEL_VARIABLE}={wanted} is not a level ({error}); using info");
    }
}
