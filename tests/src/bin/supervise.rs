//! `supervise SOCKET PROGRAM [ARGUMENT...]`: a service manager of one daemon, for whoever cannot be one: it hears the
//! daemon on this notification socket and keeps what the daemon hands over for its next life, as systemd does.
//!
//! It does what the lines of its standard input wish:
//!
//! - `kill [SECONDS]`: kills the daemon as `kill -9` does, and starts it again after so many seconds (0).
//! - `restart [SECONDS]`: tells it to end (SIGTERM), and starts it again so long after it has.
//!
//! Each time that the daemon says that it is ready, a line says `ready PID`. The end of the input ends the daemon in
//! order, and then this program; so does a daemon that ends unasked, with status 1. The daemon's output goes to
//! standard error.

use std::io::BufRead as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use xpm_tests::manager::ServiceManager;

/// How often it is looked whether the daemon lives.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long the daemon may take to be ready, and to end when it is told to.
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("supervise: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[String]) -> Result<()> {
    let [socket, command @ ..] = words else { bail!("usage: supervise SOCKET PROGRAM [ARGUMENT...]") };
    let service = Service::new(socket.into(), command)?;
    let wishes = read_wishes();
    let mut daemon = service.start()?;
    loop {
        match wishes.recv_timeout(LOOK_EVERY) {
            Ok(wish) => {
                let wish = wish?;
                end(&mut daemon, wish.signal)?;
                thread::sleep(wish.pause);
                daemon = service.start()?;
            }
            Err(RecvTimeoutError::Timeout) => check_alive(&mut daemon)?,
            Err(RecvTimeoutError::Disconnected) => return end(&mut daemon, Signal::TERM),
        }
    }
}

/// The order for the daemon.
#[derive(Debug, PartialEq)]
struct Wish {
    signal: Signal,
    pause: Duration,
}

impl Wish {
    fn parse(line: &str) -> Result<Wish> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (signal, pause) = match words[..] {
            ["kill", ref rest @ ..] => (Signal::KILL, rest),
            ["restart", ref rest @ ..] => (Signal::TERM, rest),
            _ => bail!("no wish: {line}"),
        };
        let seconds = match pause {
            [] => 0.0,
            [seconds] => seconds.parse().with_context(|| format!("no number of seconds: {line}"))?,
            _ => bail!("no wish: {line}"),
        };
        let pause = Duration::try_from_secs_f64(seconds).with_context(|| format!("no time: {line}"))?;
        Ok(Wish { signal, pause })
    }
}

fn read_wishes() -> Receiver<Result<Wish>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(Wish::parse(&line)).is_err() {
                return;
            }
        }
    });
    receiver
}

/// The daemon, and how it is started.
struct Service {
    manager: ServiceManager,
    arguments: Vec<String>,
}

impl Service {
    fn new(socket: PathBuf, command: &[String]) -> Result<Service> {
        if command.is_empty() {
            bail!("a program is missing");
        }
        // The daemon does not outlive this program, however that ends.
        let mut arguments = vec!["--pdeathsig".to_owned(), "KILL".to_owned()];
        arguments.extend_from_slice(command);
        Ok(Service { manager: ServiceManager::start(socket), arguments })
    }

    fn start(&self) -> Result<Child> {
        self.manager.take_said("READY");
        let output =
            std::io::stderr().as_fd().try_clone_to_owned().context("cannot duplicate a descriptor")?;
        let mut daemon = self.manager.spawn(Path::new("setpriv"), &self.arguments, |command| {
            command.stdin(Stdio::null()).stdout(output);
        });
        let deadline = Instant::now() + LIMIT;
        while self.manager.take_said("READY").is_none() {
            check_alive(&mut daemon)?;
            if Instant::now() > deadline {
                bail!("the daemon is not ready after {LIMIT:?}");
            }
            thread::sleep(LOOK_EVERY);
        }
        println!("ready {}", daemon.id());
        Ok(daemon)
    }
}

fn check_alive(daemon: &mut Child) -> Result<()> {
    match daemon.try_wait()? {
        Some(status) => bail!("the daemon ended unasked: {status}"),
        None => Ok(()),
    }
}

/// Ends the daemon by this signal and waits until it is gone.
fn end(daemon: &mut Child, signal: Signal) -> Result<()> {
    kill_process(Pid::from_child(daemon), signal).context("cannot signal the daemon")?;
    let deadline = Instant::now() + LIMIT;
    loop {
        match daemon.try_wait()? {
            Some(status) if signal == Signal::TERM && !status.success() => bail!("it ended with {status}"),
            Some(_) => return Ok(()),
            None if Instant::now() > deadline => bail!("it does not end on {signal:?}"),
            None => thread::sleep(LOOK_EVERY),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes() {
        let wish = |line| Wish::parse(line).ok();
        assert_eq!(wish("kill"), Some(Wish { signal: Signal::KILL, pause: Duration::ZERO }));
        assert_eq!(
            wish("restart 1.5"),
            Some(Wish { signal: Signal::TERM, pause: Duration::from_millis(1500) })
        );
        for wrong in ["", "stop", "kill x", "kill -1", "kill 1 2"] {
            assert_eq!(wish(wrong), None, "{wrong}");
        }
    }
}
