//! Programs that take this machine for another one.

use std::path::Path;

use crate::{Daemon, programs};

/// The content of `/etc/machine-id` on the other machine.
const MACHINE_ID: &str = "0123456789abcdef0123456789abcdef\n";

/// Starts a program of this project with another `/etc/machine-id`, in a mount namespace of its own; its output is in
/// `NAME.log` of the directory.
///
/// # Panics
/// When it cannot be started.
pub fn start_elsewhere(dir: &Path, name: &str, program: &str, arguments: &[String]) -> Daemon {
    let machine = dir.join("machine-id");
    std::fs::write(&machine, MACHINE_ID).expect("the directory of the test can be written to");
    let line = format!("mount --bind {} /etc/machine-id && exec \"$@\"", machine.display());
    let program = programs().join(program).display().to_string();
    let words = ["-m", "sh", "-c", &line, "sh", &program].map(str::to_owned);
    Daemon::start(dir, name, "/usr/bin/unshare", &[&words, arguments].concat())
}
