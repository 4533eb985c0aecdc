//! The log: lines on standard error, which the service manager keeps.

use std::borrow::Cow;
use std::io::{self, IsTerminal as _, Write};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use tracing_subscriber::EnvFilter;

/// Environment variable with the level (`error`, `warn`, `info`, `debug`, `trace`) or a filter in
/// the form of tracing-subscriber's `EnvFilter`.
pub const LEVEL_VARIABLE: &str = "XPM_LOG";

/// File with the level of all daemons that have none in their environment. Unlike the environment, it can be read
/// again at SIGHUP.
pub const LEVEL_FILE: &str = "/etc/xpm/log-level";
/// Default level.
const LEVEL_DEFAULT: &str = "info";

/// Most lines that wait for the writing thread; further lines are dropped.
const LINES_MAX: usize = 4096;
/// Longest wait until all lines are written.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Queue to the writing thread, once there is one.
static QUEUE: OnceLock<SyncSender<Entry>> = OnceLock::new();

enum Entry {
    Line(Vec<u8>),
    /// All lines before this entry are written.
    Flush(SyncSender<()>),
}

/// Starts a thread that writes the log lines from now on. So no logging thread waits for the log file or for the
/// reader of the log, whose memory may be swapped out to a device that waits for the logging thread.
///
/// # Errors
/// When no thread can be started.
pub fn detach() -> io::Result<()> {
    let (sender, receiver) = sync_channel(LINES_MAX);
    std::thread::Builder::new()
        .name("xpm-log".to_owned())
        .stack_size(256 << 10)
        .spawn(move || write_lines(&receiver))?;
    // If there was a queue already, this one has no sender, and its thread ends.
    let _ = QUEUE.set(sender);
    Ok(())
}

/// Waits until all lines so far are written, but at most a second.
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
            // A write error cannot be reported anywhere.
            Entry::Line(line) => drop(io::stderr().write_all(&line)),
            Entry::Flush(written) => drop(written.send(())),
        }
    }
}

/// Receives the lines of the log.
struct Lines;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = one_line(bytes);
        match QUEUE.get() {
            // A line is dropped if the queue is full.
            Some(queue) => drop(queue.try_send(Entry::Line(line.into_owned()))),
            None => io::stderr().write_all(&line)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Changes the level of the running log.
type SetLevel = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

static LEVEL: OnceLock<SetLevel> = OnceLock::new();

/// The wanted level and its source: the variable, a file that the variable names, or the file for all daemons.
struct Wanted {
    text: String,
    source: String,
}

impl Wanted {
    fn find() -> Wanted {
        let variable = std::env::var(LEVEL_VARIABLE).unwrap_or_default();
        match variable.strip_prefix('@') {
            Some(path) => Wanted { text: read_level(path), source: path.to_owned() },
            None if variable.is_empty() => {
                Wanted { text: read_level(LEVEL_FILE), source: LEVEL_FILE.to_owned() }
            }
            None => Wanted { text: variable, source: LEVEL_VARIABLE.to_owned() },
        }
    }

    /// The filter to use, and why it differs from the wanted level, if it does.
    fn filter(&self) -> (EnvFilter, Option<String>) {
        match self.text.as_str() {
            "" => (EnvFilter::new(LEVEL_DEFAULT), None),
            text => match EnvFilter::try_new(text) {
                Ok(filter) => (filter, None),
                Err(error) => {
                    let line =
                        format!("{}: `{text}` is not a level ({error}); using {LEVEL_DEFAULT}", self.source);
                    (EnvFilter::new(LEVEL_DEFAULT), Some(line))
                }
            },
        }
    }
}

/// The first line; an unreadable file counts as empty.
fn read_level(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

/// A log entry as one line, whatever text it contains: a second line would look like an entry of its own. The
/// formatter writes each entry at once, with one line break at its end, and escapes terminal control characters.
fn one_line(entry: &[u8]) -> Cow<'_, [u8]> {
    let body = entry.strip_suffix(b"\n").unwrap_or(entry);
    let breaks = |byte: &u8| matches!(byte, b'\n' | b'\r');
    if !body.iter().any(breaks) {
        return Cow::Borrowed(entry);
    }
    let mut line: Vec<u8> = body.iter().map(|byte| if breaks(byte) { b' ' } else { *byte }).collect();
    line.extend_from_slice(&entry[body.len()..]);
    Cow::Owned(line)
}

/// Whether standard error goes to the journal, by the device and inode in `$JOURNAL_STREAM` (systemd.exec(5)).
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let ours = rustix::fs::fstat(io::stderr()).map(|found| format!("{}:{}", found.st_dev, found.st_ino));
    ours.is_ok_and(|ours| ours == stream)
}

/// Starts the log at level `info`, or at the level in `XPM_LOG`: a level, or `@PATH` for a file that contains it. If
/// the variable is not set, `/etc/xpm/log-level` counts if it exists. A second call changes nothing. Lines carry the
/// time in UTC, unless they go to the journal, which adds its own; at a terminal they are coloured.
pub fn init() {
    let (filter, complaint) = Wanted::find().filter();
    let terminal = io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Lines).with_ansi(terminal);
    // This fails only if a logger is set already; that logger is then used.
    let _ = match is_journal() {
        false => {
            let lines = lines.with_filter_reloading();
            let handle = lines.reload_handle();
            set_level_by(move |filter| handle.reload(filter).map_err(|error| error.to_string()));
            lines.try_init()
        }
        true => {
            let lines = lines.without_time().with_filter_reloading();
            let handle = lines.reload_handle();
            set_level_by(move |filter| handle.reload(filter).map_err(|error| error.to_string()));
            lines.try_init()
        }
    };
    if let Some(line) = complaint {
        tracing::warn!("{line}");
    }
}

fn set_level_by(set: impl Fn(EnvFilter) -> Result<(), String> + Send + Sync + 'static) {
    // If a second log is set up, the first one stays in use.
    let _ = LEVEL.set(Box::new(set));
}

/// Reads the level again from the source that [`init`] used, and logs it. Blocks.
pub fn reload() {
    let Some(set) = LEVEL.get() else { return };
    let wanted = Wanted::find();
    let (filter, complaint) = wanted.filter();
    let level = filter.to_string();
    match (set(filter), complaint) {
        (Err(error), _) => tracing::error!("the log's level stays as it was: {error}"),
        (Ok(()), Some(line)) => tracing::warn!("{line}"),
        (Ok(()), None) if wanted.text.is_empty() => tracing::info!("the log's level is {level}"),
        (Ok(()), None) => tracing::info!("the log's level is {level}, by {}", wanted.source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_one_line() {
        assert_eq!(one_line(b" INFO a\n").as_ref(), b" INFO a\n");
        assert_eq!(one_line(b" INFO a\r\n WARN forged\n").as_ref(), b" INFO a   WARN forged\n");
        assert_eq!(one_line(b"").as_ref(), b"");
    }
}
