//! A monitor of QEMU, by QMP: one command at a time, its answer waited for.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take to listen, and to answer.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) struct Monitor {
    read: BufReader<UnixStream>,
    write: UnixStream,
}

impl Monitor {
    /// Waits until QEMU listens.
    pub(crate) fn connect(socket: &Path) -> Result<Monitor> {
        let begun = Instant::now();
        let write = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if begun.elapsed() > LIMIT => {
                    return Err(error)
                        .with_context(|| format!("QEMU does not listen at {}", socket.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        write.set_read_timeout(Some(LIMIT))?;
        let mut monitor = Monitor { read: BufReader::new(write.try_clone()?), write };
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Executes a command; what it returned.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        writeln!(self.write, "{}", json!({"execute": command, "arguments": arguments}))?;
        loop {
            let mut line = String::new();
            if self.read.read_line(&mut line)? == 0 {
                bail!("QEMU ended during {command}");
            }
            let mut answer: Value = serde_json::from_str(&line).context("QEMU's answer is no JSON")?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refused {command}: {}", error["desc"].as_str().unwrap_or_default());
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }
}
