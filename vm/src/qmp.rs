//! QMP, the control protocol of QEMU (its docs/interop/qmp-spec.rst): JSON objects, one per line, over a unix socket.
//!
//! A [`Qmp`] has one connection and runs one command at a time. Events that arrive while an answer is awaited are
//! kept in order for [`Qmp::event`]. A monitor of QEMU serves one connection at a time, so a [`Qmp`] has its monitor
//! for itself.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

/// Time limit of QEMU's greeting and of an answer. Commands return at once; events report the end of long operations.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// The longest line that is read from QEMU. Answers to the commands of this crate have some kilobytes.
const LINE_MAX: usize = 4 << 20;
/// Most events that are kept. QEMU limits the rate of frequent events.
const EVENTS_MAX: usize = 4096;
/// Pause between attempts to connect to the socket of a starting QEMU.
const CONNECT_AGAIN: Duration = Duration::from_millis(5);

/// Why QEMU did not execute a command.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket cannot be reached.
    #[error("cannot reach QEMU's monitor {path}: {source}; is the virtual machine running?")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection ended.
    #[error("QEMU closed its monitor {path} during `{during}`: the process has ended or is ending")]
    Closed {
        /// The socket.
        path: PathBuf,
        /// The command, or the awaited event.
        during: String,
    },
    /// No answer in time.
    #[error(
        "QEMU did not answer `{during}` on its monitor {path} within {limit:?}; does another program hold the monitor?"
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// The command, or the awaited event.
        during: String,
        /// The time limit.
        limit: Duration,
    },
    /// QEMU refused the command.
    #[error("QEMU refused `{command}`: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's text.
        reason: String,
    },
    /// The peer does not speak QMP.
    #[error("what answers at {path} is not QMP: {why}")]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// The fault.
        why: String,
    },
}

/// An event of QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// Its data; null if it has none.
    pub data: Value,
}

impl Event {
    /// The status in a `MIGRATION` event.
    pub fn migration_status(&self) -> Option<&str> {
        (self.name == "MIGRATION").then(|| self.data["status"].as_str())?
    }
}

/// A version of QEMU, such as (7, 2, 22).
pub type Version = (u64, u64, u64);

/// A connection to a monitor of QEMU.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    stream: UnixStream,
    /// Received bytes that are not a whole line yet. Kept here so that a cancelled read loses nothing.
    received: Vec<u8>,
    events: VecDeque<Event>,
    command_last: u64,
    version: Version,
}

impl Qmp {
    /// Connects and negotiates. Retries for `limit` while the socket does not exist or does not accept.
    ///
    /// # Errors
    /// When the socket cannot be reached within the limit, or the greeting or the answer to the negotiation is
    /// missing.
    pub async fn connect(path: &Path, limit: Duration) -> Result<Qmp, QmpError> {
        let until = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path).await {
                Ok(stream) => break stream,
                Err(source) if Instant::now() >= until => {
                    return Err(QmpError::Unreachable { path: path.to_owned(), source });
                }
                Err(_) => tokio::time::sleep(CONNECT_AGAIN).await,
            }
        };
        let mut qmp = Qmp {
            path: path.to_owned(),
            stream,
            received: Vec::new(),
            events: VecDeque::new(),
            command_last: 0,
            version: (0, 0, 0),
        };
        let greeting = qmp.line("greeting", limit.max(Duration::from_secs(1))).await?;
        let number = |key| greeting["QMP"]["version"]["qemu"][key].as_u64();
        let (Some(major), Some(minor), Some(micro)) = (number("major"), number("minor"), number("micro"))
        else {
            return Err(qmp.not_qmp(format!("its greeting is {greeting}")));
        };
        qmp.version = (major, minor, micro);
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// QEMU's version, from its greeting.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Executes a command and returns its result.
    ///
    /// # Errors
    /// When QEMU refuses it, ends, or does not answer within [`ANSWER_LIMIT`].
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.command_last += 1;
        let id = self.command_last;
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        line.push('\n');
        let until = Instant::now() + ANSWER_LIMIT;
        match timeout_at(until, self.stream.write_all(line.as_bytes())).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(self.closed(command)),
            Err(_) => return Err(self.silent(command, ANSWER_LIMIT)),
        }
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let mut answer = self.line(command, left).await?;
            if let Some(event) = event(&answer) {
                self.keep(event);
            } else if answer["id"].as_u64() != Some(id) {
                // An answer to an earlier command, whose limit had passed.
            } else if answer.get("error").is_some() {
                let reason = answer["error"]["desc"].as_str().unwrap_or("without a reason").to_owned();
                return Err(QmpError::Refused { command: command.to_owned(), reason });
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Returns the next event for which `pick` returns a value, from the kept events and those that arrive within
    /// `limit`. Events before it are dropped. `what` names the awaited event in an error. Cancelling loses nothing
    /// except dropped events.
    ///
    /// # Errors
    /// When QEMU ends, or the limit passes.
    pub async fn event<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut pick: impl FnMut(&Event) -> Option<T>,
    ) -> Result<T, QmpError> {
        let until = Instant::now() + limit;
        loop {
            while let Some(event) = self.events.pop_front() {
                if let Some(found) = pick(&event) {
                    return Ok(found);
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            let line = match self.line(what, left).await {
                Err(QmpError::Silent { .. }) => return Err(self.silent(what, limit)),
                line => line?,
            };
            self.events.extend(event(&line));
        }
    }

    /// Drops the kept events.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// The next line, decoded.
    async fn line(&mut self, during: &str, limit: Duration) -> Result<Value, QmpError> {
        let until = Instant::now() + limit;
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .ok()
                    .filter(Value::is_object)
                    .ok_or_else(|| self.not_qmp(shown(&line)));
            }
            if self.received.len() > LINE_MAX {
                return Err(self.not_qmp(format!("a line is longer than {LINE_MAX} bytes")));
            }
            match timeout_at(until, self.stream.read_buf(&mut self.received)).await {
                Ok(Ok(0) | Err(_)) => return Err(self.closed(during)),
                Ok(Ok(_)) => {}
                Err(_) => return Err(self.silent(during, limit)),
            }
        }
    }

    fn closed(&self, during: &str) -> QmpError {
        QmpError::Closed { path: self.path.clone(), during: during.to_owned() }
    }

    fn silent(&self, during: &str, limit: Duration) -> QmpError {
        QmpError::Silent { path: self.path.clone(), during: during.to_owned(), limit }
    }

    fn not_qmp(&self, why: String) -> QmpError {
        QmpError::NotQmp { path: self.path.clone(), why }
    }
}

/// The event in a line, if it is one.
fn event(line: &Value) -> Option<Event> {
    let name = line.get("event")?.as_str()?.to_owned();
    Some(Event { name, data: line.get("data").cloned().unwrap_or_default() })
}

/// The start of a line that could not be parsed.
fn shown(line: &[u8]) -> String {
    let start: String = String::from_utf8_lossy(line).chars().take(80).collect();
    format!("it says `{}`", start.trim_end().escape_debug())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt as _, BufReader};
    use tokio::net::UnixListener;

    use super::*;

    const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7},"package":""},"capabilities":["oob"]}}"#;

    /// A monitor that sends `lines` after each command that it reads, with the command's id in place of `ID`.
    async fn monitor(lines: &'static [&'static str]) -> Result<Qmp, QmpError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let _directory = directory;
            let (stream, _) = listener.accept().await.unwrap();
            let (read, mut write) = stream.into_split();
            let mut commands = BufReader::new(read).lines();
            for line in lines {
                if line.contains("ID") {
                    let Ok(Some(command)) = commands.next_line().await else { return };
                    let command: Value = serde_json::from_str(&command).unwrap();
                    let line = line.replace("ID", &command["id"].to_string());
                    write.write_all(line.as_bytes()).await.unwrap();
                } else {
                    write.write_all(line.as_bytes()).await.unwrap();
                }
                write.write_all(b"\n").await.unwrap();
            }
            // Stays open until the other side closes, unless the list ends with `{}`.
            if lines.last() != Some(&"{}") {
                let _ = commands.next_line().await;
            }
        });
        Qmp::connect(&path, Duration::from_secs(5)).await
    }

    #[tokio::test]
    async fn answers_and_events_are_told_apart() {
        let lines = &[
            GREETING,
            r#"{"return":{},"id":ID}"#,
            r#"{"event":"STOP","timestamp":{}}"#,
            r#"{"return":{"late":1},"id":777}"#,
            r#"{"event":"MIGRATION","data":{"status":"active"}}"#,
            r#"{"return":{"status":"paused"},"id":ID}"#,
            r#"{"error":{"class":"GenericError","desc":"no such thing"},"id":ID}"#,
            r#"{"event":"MIGRATION","data":{"status":"completed"}}"#,
            r#"{"event":"RESUME"}"#,
        ];
        let mut qmp = monitor(lines).await.unwrap();
        assert_eq!(qmp.version(), (7, 2, 22));
        assert_eq!(qmp.execute("query-status", json!({})).await.unwrap(), json!({"status": "paused"}));
        let error = qmp.execute("device_del", json!({"id": "x"})).await.unwrap_err().to_string();
        assert_eq!(error, "QEMU refused `device_del`: no such thing");
        let limit = Duration::from_secs(5);
        // Events that came before the answer are first.
        assert_eq!(qmp.event("any", limit, |event| Some(event.name.clone())).await.unwrap(), "STOP");
        let completed =
            |event: &Event| event.migration_status().filter(|status| *status == "completed").map(drop);
        qmp.event("the end", limit, completed).await.unwrap();
        qmp.event("RESUME", limit, |event| (event.name == "RESUME").then_some(())).await.unwrap();
        let error = qmp.event("nothing", Duration::from_millis(20), |_| Some(())).await.unwrap_err();
        assert!(matches!(&error, QmpError::Silent { during, .. } if during == "nothing"), "{error}");
    }

    #[tokio::test]
    async fn a_closed_connection_and_a_foreign_protocol_are_errors() {
        let error = monitor(&["SSH-2.0-OpenSSH_9.2"]).await.unwrap_err().to_string();
        assert!(error.contains("is not QMP: it says `SSH-2.0"), "{error}");
        let error = monitor(&["{}"]).await.unwrap_err().to_string();
        assert!(error.contains("is not QMP: its greeting is {}"), "{error}");
        let mut qmp = monitor(&[GREETING, r#"{"return":{},"id":ID}"#, "{}"]).await.unwrap();
        let error = qmp.execute("stop", json!({})).await.unwrap_err();
        assert!(matches!(&error, QmpError::Closed { during, .. } if during == "stop"), "{error}");
        let nowhere = Qmp::connect(Path::new("/nonexistent/qmp"), Duration::ZERO).await.unwrap_err();
        assert!(matches!(nowhere, QmpError::Unreachable { .. }), "{nowhere}");
    }
}
