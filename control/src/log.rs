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

/// The level of all daemons that have none in their environment. Read anew at SIGHUP, which an environment cannot be.
pub const LEVEL_FILE: &str = "/etc/xpm/log-level";
/// The level where nobody asks for one.
const LEVEL_DEFAULT: &str = "info";

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
        let line = one_line(bytes);
        match QUEUE.get() {
            // One that finds no place is lost.
            Some(queue) => drop(queue.try_send(Entry::Line(line.into_owned()))),
            None => io::stderr().write_all(&line)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Changes the level of the log that runs.
type SetLevel = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

static LEVEL: OnceLock<SetLevel> = OnceLock::new();

/// The level that is asked for, and where: by the variable, a file that it names, or the file for all daemons.
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

    /// What to log, and why that is not what was asked for.
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

/// The first line; a file that cannot be read asks for nothing.
fn read_level(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

/// An entry of the log as one line, whoever wrote the text that is in it: a second line would look like an entry of
/// its own. The formatter writes each entry at once, with one line break at its end, and escapes what steers terminals.
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

/// Whether standard error is the journal's, as it says by a variable (systemd.exec(5), `$JOURNAL_STREAM`): device and inode.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let ours = rustix::fs::fstat(io::stderr()).map(|found| format!("{}:{}", found.st_dev, found.st_ino));
    ours.is_ok_and(|ours| ours == stream)
}

/// Starts the log at level `info`, or at what `XPM_LOG` says: a level, or `@PATH` for a file that holds it. Where the
/// variable is not set, `/etc/xpm/log-level` counts if it is there. A second call changes nothing.
/// Lines carry the time, in UTC, unless they go to the journal, which adds its own; and colours at a terminal.
pub fn init() {
    let (filter, complaint) = Wanted::find().filter();
    let terminal = io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Lines).with_ansi(terminal);
    // Only a logger that is set already makes this fail, and that one is then used.
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
    // A second log is not used.
    let _ = LEVEL.set(Box::new(set));
}

/// Reads the level anew from where [`init`] took it, and says in the log what it is. Blocks.
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
