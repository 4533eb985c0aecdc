//! A monitor of a QEMU that no command of xpm looks after.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::{LIMIT, wait_until};

/// A connection to a monitor, by QMP.
pub struct Monitor {
    read: BufReader<UnixStream>,
    write: UnixStream,
}

impl Monitor {
    /// Waits until QEMU listens.
    ///
    /// # Panics
    /// When it does not.
    pub fn connect(socket: &Path) -> Monitor {
        let mut stream = None;
        wait_until("QEMU listens", || {
            stream = UnixStream::connect(socket).ok();
            stream.is_some()
        });
        let write = stream.expect("it listens");
        write.set_read_timeout(Some(LIMIT)).expect("a limit");
        let read = BufReader::new(write.try_clone().expect("a second descriptor"));
        let mut monitor = Monitor { read, write };
        monitor.execute("qmp_capabilities", &json!({}));
        monitor
    }

    /// Executes a command, which has to go well; what it returned.
    ///
    /// # Panics
    /// When QEMU refuses it, or ends.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        writeln!(self.write, "{line}").expect("QEMU reads");
        loop {
            let mut line = String::new();
            self.read.read_line(&mut line).expect("QEMU answers");
            let mut answer: Value = serde_json::from_str(&line).expect("it is JSON");
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if answer.get("return").is_some() {
                return answer["return"].take();
            }
        }
    }
}

/// A QEMU with ordinary RAM that no command of xpm looks after; ended when dropped.
pub struct Plain {
    child: Child,
    /// Its monitor.
    pub monitor: Monitor,
    serial: PathBuf,
}

impl Plain {
    /// Starts one by a command that names no argument yet; `name` is new in the directory.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(mut command: Command, dir: &Path, name: &str, kernel: &Path, more: &[&str]) -> Plain {
        let (serial, socket) = (dir.join(format!("{name}.serial")), dir.join(format!("{name}.qmp")));
        command
            .args("-display none -nodefaults -vga none -accel tcg,tb-size=16 -kernel".split(' '))
            .arg(kernel);
        command.args(["-serial", &format!("file:{}", serial.display())]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]).args(more);
        let child = command.stdout(Stdio::null()).spawn().expect("QEMU can be started");
        Plain { child, monitor: Monitor::connect(&socket), serial }
    }

    /// Passes over its memory that the guest has made here.
    ///
    /// # Panics
    /// When it found a bad page.
    pub fn passes(&self) -> u64 {
        super::passes(&self.serial)
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
