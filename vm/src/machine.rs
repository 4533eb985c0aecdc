//! The life of a machine on this host, from the start of its QEMU to the removal of its files.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::process::ChildStdin;
use xpm_protocol::{ByteSize, Name};

use crate::arguments::{self, Start};
use crate::cgroup;
use crate::disk::Disk;
use crate::memory::{MemoryFile, Sizes};
use crate::place::{Machine, Place, Stage};
use crate::process::Process;
use crate::qmp::{Qmp, Version};
use crate::{Error, verbs};

/// Default memory for QEMU itself, beside the guest's RAM.
pub const OVERHEAD: ByteSize = ByteSize(256 << 20);
/// How long QEMU may take until its monitor answers.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Interval of the checks whether QEMU has ended.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// The first version of QEMU whose virtio-mem keeps the RAM of an arriving machine. Older versions punch all of it
/// out of the file at their start, even while they wait for a machine (7.2 was seen to do so, 10.0 not; the change is
/// in 8.1).
const VIRTIO_MEM_MOVES: (u64, u64) = (8, 1);

/// The terms on which a machine is started.
#[derive(Debug, Clone)]
pub struct Terms {
    /// Its name.
    pub name: Name,
    /// The directory that contains the directories of machines.
    pub root: PathBuf,
    /// Its RAM.
    pub sizes: Sizes,
    /// Limit of its local memory; none: unlimited.
    pub local: Option<ByteSize>,
    /// Memory for QEMU itself, beside the RAM.
    pub overhead: ByteSize,
    /// The files of its RAM, with the sizes of [`Sizes::of_files`].
    pub files: Vec<MemoryFile>,
    /// The allocations behind these files; empty for ordinary files.
    pub allocations: Vec<Name>,
    /// Its disks that move with it.
    pub disks: Vec<Disk>,
    /// Whether QEMU may request huge pages.
    pub huge_pages: bool,
    /// QEMU and its arguments.
    pub program: Vec<OsString>,
    /// The command `xpm`, for [`run_as`].
    pub command: PathBuf,
}

impl Terms {
    /// Refuses contradictory terms, before anything is made for them. Returns warnings for the user.
    ///
    /// # Errors
    /// The first contradiction.
    pub fn check(&self, start: Start) -> Result<Vec<String>, Error> {
        let Sizes { memory, maximum } = self.sizes;
        // QEMU's unit of RAM on all machine types with virtio-mem.
        const UNIT: u64 = 2 << 20;
        if memory.0 == 0 || memory.0 % UNIT != 0 {
            return Err(Error::Usage(format!("--memory {memory} is no multiple of {}", ByteSize(UNIT))));
        }
        if let Some(maximum) = maximum.filter(|maximum| *maximum <= memory || maximum.0 % UNIT != 0) {
            let unit = ByteSize(UNIT);
            return Err(Error::Usage(format!(
                "--max {maximum} must be more than --memory {memory}, and a multiple of {unit}"
            )));
        }
        let most = maximum.unwrap_or(memory);
        if let Some(local) = self.local.filter(|local| *local > most || local.0 == 0) {
            return Err(Error::Usage(format!(
                "--local {local} must be at most the machine's RAM, {most}, and not nothing"
            )));
        }
        if self.program.is_empty() {
            return Err(Error::Usage("give QEMU and its arguments behind `--`".to_owned()));
        }
        let warnings = arguments::check(&self.program[1..])?;
        if start == Start::Incoming && maximum.is_some() {
            check_virtio_mem(&self.program[0])?;
        }
        Ok(warnings)
    }
}

/// A machine that this process supervises.
#[derive(Debug)]
pub struct Guarded {
    /// Its directory.
    pub place: Place,
    /// Its record.
    pub machine: Machine,
    /// QEMU.
    pub child: Child,
    /// Warnings for the user.
    pub warnings: Vec<String>,
    /// The command `xpm`.
    command: PathBuf,
    /// The process that fetches pages which the source of a move had cached.
    fetching: Option<Child>,
    _lock: File,
}

impl Guarded {
    /// Starts QEMU and waits until its monitor answers. Returns the machine, with a connection to the monitor for
    /// changes.
    ///
    /// # Errors
    /// When the terms contradict themselves, a machine of this name is here already, or QEMU does not start. Then
    /// nothing is left except files of RAM.
    pub async fn start(terms: &Terms, start: Start) -> Result<(Guarded, Qmp), Error> {
        let warnings = terms.check(start)?;
        let place = Place::below(&terms.root, &terms.name);
        let lock = place.make()?;
        if let Some(left) = place.load()? {
            if left.is_alive() {
                return Err(Error::Machine(format!(
                    "machine `{}` is here already; `xpm vm show {0}` tells more",
                    left.name
                )));
            }
            place.clear(&left)?;
        }
        let mut machine = Machine {
            name: terms.name.clone(),
            stage: Stage::Starting,
            qemu: None,
            command: Process::own().map_err(Error::io("read", Path::new("/proc")))?,
            size: terms.sizes.memory,
            maximum: terms.sizes.maximum,
            local: terms.local,
            files: terms.files.clone(),
            allocations: terms.allocations.clone(),
            disks: terms.disks.clone(),
            cgroup: None,
            arguments: Vec::new(),
        };
        if let Some(local) = terms.local {
            let name = format!("xpm-vm-{}-{}", terms.name, machine.command.id);
            machine.cgroup = Some(cgroup::make(&name, ByteSize(local.0 + terms.overhead.0))?);
        }
        let mut words = terms.program.clone();
        words.extend(arguments::added(&place, &machine.files, &machine.disks, terms.sizes, start));
        machine.arguments = words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        let started = spawn(terms, &words, &place, &mut machine);
        let child = match started {
            Ok(child) => child,
            Err(error) => {
                let _ = place.remove(&machine);
                return Err(error);
            }
        };
        let command = terms.command.clone();
        let mut guarded = Guarded { place, machine, child, warnings, command, fetching: None, _lock: lock };
        let stage = if start == Start::Incoming { Stage::Incoming } else { Stage::Here };
        match guarded.connect(stage).await {
            Ok(qmp) => Ok((guarded, qmp)),
            Err(error) => {
                guarded.end();
                Err(error)
            }
        }
    }

    async fn connect(&mut self, stage: Stage) -> Result<Qmp, Error> {
        let process = self.machine.qemu;
        let path = self.place.drive();
        let qmp = tokio::select! {
            qmp = Qmp::connect(&path, START_LIMIT) => qmp?,
            () = ended(process) => {
                return Err(Error::Machine("QEMU ended at its start; its own message says why".to_owned()));
            }
        };
        self.set_stage(stage)?;
        Ok(qmp)
    }

    /// Records the machine's stage.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn set_stage(&mut self, stage: Stage) -> Result<(), Error> {
        self.machine.stage = stage;
        self.place.save(&self.machine)
    }

    /// Starts the process that fetches pages of the RAM ([`crate::hot::fetch`]), in the machine's cgroup, so that the
    /// pages count as the machine's local memory. Returns the input of the process.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) fn start_fetching(&mut self) -> Result<ChildStdin, Error> {
        let mut command = Command::new(&self.command);
        command.args(["vm", "fetch"]);
        if let Some(cgroup) = &self.machine.cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        command.arg("--").args(self.machine.files.iter().map(|file| &file.path));
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
        let mut child = child.map_err(Error::io("start", &self.command))?;
        let input = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe.into()).and_then(ChildStdin::from_std);
        self.fetching = Some(child);
        input.map_err(Error::io("pass pages to", &self.command))
    }

    /// Waits until QEMU has ended.
    pub async fn ended(&self) {
        ended(self.machine.qemu).await;
    }

    /// Ends QEMU, if it has not ended, and removes all files of the machine except its RAM. Returns the last recorded
    /// stage. Blocks.
    pub fn end(mut self) -> Option<Stage> {
        for child in self.fetching.iter_mut().chain([&mut self.child]) {
            let _ = child.kill();
            let _ = child.wait();
        }
        let stage = self.place.load().ok().flatten().map(|machine| machine.stage);
        if let Err(error) = self.place.remove(&self.machine) {
            eprintln!("xpm: warning: {error}");
        }
        stage
    }
}

fn spawn(terms: &Terms, words: &[OsString], place: &Place, machine: &mut Machine) -> Result<Child, Error> {
    place.save(machine)?;
    let mut command = Command::new(&terms.command);
    command.args(["vm", "exec"]);
    if let Some(cgroup) = &machine.cgroup {
        command.arg("--cgroup").arg(cgroup);
    }
    if terms.huge_pages {
        command.arg("--huge-pages");
    }
    let mut child = command.arg("--").args(words).spawn().map_err(Error::io("start", &terms.command))?;
    let recorded =
        Process::with_id(child.id()).map_err(Error::io("look at", Path::new("/proc"))).and_then(|process| {
            machine.qemu = Some(process);
            place.save(machine)
        });
    if let Err(error) = recorded {
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    Ok(child)
}

/// Replaces this process by a program that cannot request huge pages, in a memory cgroup. Returns only on failure.
pub fn run_as(program: &[OsString], cgroup: Option<&Path>, huge_pages: bool) -> Error {
    use std::os::unix::process::CommandExt as _;
    let prepared = cgroup.map_or(Ok(()), cgroup::enter);
    let prepared =
        prepared.and_then(|()| if huge_pages { Ok(()) } else { crate::filter::refuse_huge_pages() });
    if let Err(error) = prepared {
        return error;
    }
    let Some((program, arguments)) = program.split_first() else {
        return Error::Usage("give a program behind `--`".to_owned());
    };
    let error = Command::new(program).args(arguments).exec();
    Error::io("start", Path::new(program))(error)
}

/// Waits until a process has ended; for ever if the process cannot be watched.
async fn ended(process: Option<Process>) {
    let Some(process) = process else { return std::future::pending().await };
    let Some(descriptor) = process.open() else { return };
    while !process.wait(&descriptor, Duration::ZERO) {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Refuses a QEMU whose virtio-mem would delete the RAM of an arriving machine.
fn check_virtio_mem(program: &OsString) -> Result<(), Error> {
    let output =
        Command::new(program).arg("--version").output().map_err(Error::io("start", Path::new(program)))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match arguments::parse_version(&text) {
        Some(version) if version >= VIRTIO_MEM_MOVES => Ok(()),
        version => {
            let (major, minor) = VIRTIO_MEM_MOVES;
            let found =
                version.map_or("an unknown one".to_owned(), |(major, minor)| format!("{major}.{minor}"));
            Err(Error::Usage(format!(
                "a machine with --max can arrive at QEMU {major}.{minor} and later, and this is {found}: older ones delete \
                 plugged RAM when they start"
            )))
        }
    }
}

/// Tells a QEMU whose machine is elsewhere to quit, and kills it if it does not. Returns when it has ended.
///
/// # Errors
/// When it cannot be ended.
pub(crate) async fn quit(qmp: &mut Qmp, process: Process) -> Result<(), Error> {
    let _ = qmp.quit().await;
    if tokio::time::timeout(verbs::QUIT_LIMIT, ended(Some(process))).await.is_ok() || process.kill() {
        return Ok(());
    }
    Err(Error::Machine(format!(
        "QEMU, process {}, cannot be killed: its threads hang in the kernel",
        process.id
    )))
}

/// A version in its usual text form.
pub fn version_text((major, minor, micro): Version) -> String {
    format!("{major}.{minor}.{micro}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms() -> Terms {
        Terms {
            name: "vm1".parse().unwrap(),
            root: "/nonexistent".into(),
            sizes: Sizes { memory: ByteSize(64 << 20), maximum: None },
            local: None,
            overhead: OVERHEAD,
            files: Vec::new(),
            allocations: Vec::new(),
            disks: Vec::new(),
            huge_pages: false,
            program: vec!["true".into()],
            command: "/bin/false".into(),
        }
    }

    #[test]
    fn contradictory_terms_are_refused() {
        assert!(terms().check(Start::Boot).is_ok());
        let refused = |change: &dyn Fn(&mut Terms), text: &str| {
            let mut terms = terms();
            change(&mut terms);
            let error = terms.check(Start::Boot).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        };
        refused(&|terms| terms.sizes.memory = ByteSize(1 << 20), "no multiple of 2MiB");
        refused(&|terms| terms.sizes.maximum = Some(ByteSize(64 << 20)), "must be more than --memory 64MiB");
        refused(&|terms| terms.local = Some(ByteSize(65 << 20)), "at most the machine's RAM");
        refused(&|terms| terms.program.clear(), "behind `--`");
    }

    #[test]
    fn a_machine_with_virtio_mem_does_not_arrive_at_an_old_qemu() {
        let directory = tempfile::tempdir().unwrap();
        let qemu = |version: &str| {
            use std::os::unix::fs::PermissionsExt;
            let path = directory.path().join(version);
            std::fs::write(&path, format!("#!/bin/sh\necho QEMU emulator version {version}\n")).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
            check_virtio_mem(&path.into())
        };
        let error = qemu("7.2.22").unwrap_err().to_string();
        assert!(error.contains("and this is 7.2"), "{error}");
        assert!(qemu("rubbish").is_err());
        qemu("8.1.0").unwrap();
        qemu("10.0.2").unwrap();
    }
}
