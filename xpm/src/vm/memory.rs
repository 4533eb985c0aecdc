//! How a machine's RAM becomes files: ordinary ones, or allocations that xpm-fs of this host shows. And how its disks
//! that move with it become sockets of xpm-blk.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Allocation, Create};
use xpm_protocol::api::blk::{AttachDevice, Device, Form, SocketPlace};
use xpm_protocol::{ByteSize, Name};
use xpm_vm::disk::Disk;
use xpm_vm::machine::{Guarded, Terms};
use xpm_vm::memory::{MemoryFile, plain_files};
use xpm_vm::ownership::Heirs;

use crate::attach;
use crate::connect::{Daemon, Daemons, Failure};
use crate::output::{self, Output};

/// Below the machines' directory; no machine has a name that starts with a dot.
const FILES: &str = ".ram";
/// How long xpm-fs is asked again while it starts.
const ATTACH_WAIT: Duration = Duration::from_secs(10);
/// How long RAM may be in use by another command after QEMU has ended, and the pause between two attempts.
const DETACH_WAIT: Duration = Duration::from_secs(15);
const DETACH_PAUSE: Duration = Duration::from_millis(100);

/// A machine's RAM on this host, and its disks that move with it.
pub(super) struct Ram {
    heirs: Heirs,
    /// What was shown for this machine, and who shows it.
    shown: Vec<(Daemon, Name)>,
}

/// The disks of a machine, by the allocations that its user named.
pub(super) fn disks(names: &[Name], root: &Path) -> Vec<Disk> {
    let socket = |name: &Name| root.join(FILES).join(format!("{name}.nbd"));
    names.iter().map(|name| Disk { name: name.clone(), socket: socket(name) }).collect()
}

impl Ram {
    /// Gets the RAM of a machine that starts here, and tells the terms where it is. This is the one place that knows what RAM is made of.
    pub(super) async fn get(
        terms: &mut Terms,
        file: Option<&Path>,
        daemons: &Daemons,
    ) -> anyhow::Result<Ram> {
        let mut ram = Ram { heirs: Heirs::default(), shown: Vec::new() };
        if let Some(file) = file {
            terms.files = plain_files(file, terms.sizes)?;
            return Ok(ram);
        }
        match ram.show_all(terms, daemons).await {
            Ok(()) => Ok(ram),
            Err(error) => {
                ram.give_back().await;
                Err(error)
            }
        }
    }

    async fn show_all(&mut self, terms: &mut Terms, daemons: &Daemons) -> anyhow::Result<()> {
        let names = names(&terms.name)?;
        let (allocator, fs) = (daemons.allocator()?, daemons.fs()?);
        make_directory(&terms.root)?;
        for (name, size) in names.into_iter().zip(terms.sizes.of_files()) {
            let path = self.show(&allocator, &fs, &name, size, &terms.root).await?;
            terms.files.push(MemoryFile { path, size });
            terms.allocations.push(name);
        }
        for disk in &mut terms.disks {
            let blk = daemons.blk()?;
            let request =
                AttachDevice::new(disk.name.clone(), Form::NbdSocket(SocketPlace::Unix(disk.socket.clone())));
            if let Ok(there) = blk.get::<Device>(&format!("/v1/devices/{}", disk.name)).await {
                if !matches!(there.form, Form::NbdSocket(_)) || there.path == "-" {
                    bail!(
                        "disk `{}` is shown by xpm-blk as {}, and the machine reaches it by NBD: detach it, or leave --disk out",
                        disk.name,
                        there.form
                    );
                }
                disk.socket = there.path.into();
                continue;
            }
            attach::ensure(&blk, &request, ATTACH_WAIT).await?;
            self.shown.push((blk, disk.name.clone()));
        }
        Ok(())
    }

    /// Has an allocation shown as a file. One that is shown already stays so after the machine.
    async fn show(
        &mut self,
        allocator: &Daemon,
        fs: &Daemon,
        name: &Name,
        size: ByteSize,
        root: &Path,
    ) -> anyhow::Result<PathBuf> {
        ensure(allocator, name, size).await?;
        if let Ok(there) = fs.get::<Device>(&format!("/v1/devices/{name}")).await
            && there.path != "-"
        {
            return Ok(there.path.into());
        }
        let path = root.join(FILES).join(name.as_str());
        attach::ensure(fs, &AttachDevice::new(name.clone(), Form::File(path.clone())), ATTACH_WAIT).await?;
        self.shown.push((fs.clone(), name.clone()));
        Ok(path)
    }

    /// The RAM of a machine that comes from another host: this host stands by for its allocations.
    pub(super) async fn get_to_receive(
        terms: &mut Terms,
        file: Option<&Path>,
        daemons: &Daemons,
    ) -> anyhow::Result<Ram> {
        if file.is_some() {
            return Ram::get(terms, file, daemons).await;
        }
        let mut ram = Ram { heirs: Heirs::default(), shown: Vec::new() };
        match ram.stand_by(terms, daemons).await {
            Ok(()) => Ok(ram),
            Err(error) => {
                ram.give_back().await;
                Err(error)
            }
        }
    }

    async fn stand_by(&mut self, terms: &mut Terms, daemons: &Daemons) -> anyhow::Result<()> {
        let names = names(&terms.name)?;
        let fs = daemons.fs()?;
        self.heirs.ram = Some(fs.blk_status().await?.client);
        make_directory(&terms.root)?;
        for (name, size) in names.into_iter().zip(terms.sizes.of_files()) {
            let path = terms.root.join(FILES).join(name.as_str());
            self.stand_by_for(&fs, &name, Form::File(path.clone())).await?;
            terms.files.push(MemoryFile { path, size });
            terms.allocations.push(name);
        }
        for disk in &terms.disks {
            let blk = daemons.blk()?;
            self.heirs.disks = Some(blk.blk_status().await?.client);
            let form = Form::NbdSocket(SocketPlace::Unix(disk.socket.clone()));
            self.stand_by_for(&blk, &disk.name, form).await?;
        }
        Ok(())
    }

    async fn stand_by_for(&mut self, daemon: &Daemon, name: &Name, form: Form) -> anyhow::Result<()> {
        let request = AttachDevice { standby: true, ..AttachDevice::new(name.clone(), form) };
        let shown = daemon.post::<_, Device>("/v1/devices", &request).await;
        shown.with_context(|| format!("this host cannot stand by for `{name}`"))?;
        self.shown.push((daemon.clone(), name.clone()));
        Ok(())
    }

    /// The clients of this host that stand by.
    pub(super) fn heirs(&self) -> Heirs {
        self.heirs
    }

    /// Stays with a machine until it has ended, and gives its RAM back.
    pub(super) async fn stay(
        self,
        started: Result<Guarded, xpm_vm::Error>,
        output: Output,
    ) -> anyhow::Result<ExitCode> {
        let ended = match started {
            Ok(guarded) => super::stay(guarded, output).await,
            Err(error) => Err(error.into()),
        };
        self.give_back().await;
        ended
    }

    /// The allocations stay; another host can have them.
    async fn give_back(&self) {
        for (daemon, name) in &self.shown {
            if let Err(error) = detach(daemon, name).await
                // What went to another host has ended here.
                && !error.is(ErrorKind::NotFound)
            {
                output::warn(&format!(
                    "`{name}` is still shown here: {error}; run `xpm fs detach {name}`, or `xpm blk detach {name}` for a disk"
                ));
            }
        }
    }
}

/// Ends a device. A command that moves the machine has its RAM open, too, and ends soon after QEMU.
async fn detach(daemon: &Daemon, name: &Name) -> Result<(), Failure> {
    let begun = Instant::now();
    loop {
        match daemon.delete(&format!("/v1/devices/{name}")).await {
            Err(error) if error.is(ErrorKind::InUse) && begun.elapsed() < DETACH_WAIT => {
                tokio::time::sleep(DETACH_PAUSE).await;
            }
            done => return done,
        }
    }
}

fn make_directory(root: &Path) -> anyhow::Result<()> {
    let directory = root.join(FILES);
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))
}

/// The allocations of a machine.
fn names(machine: &Name) -> anyhow::Result<[Name; 2]> {
    let plugged = format!("{machine}-plugged");
    let plugged = plugged.parse().with_context(|| format!("`{plugged}` is too long for an allocation"))?;
    Ok([machine.clone(), plugged])
}

/// Makes an allocation where there is none of this name.
async fn ensure(allocator: &Daemon, name: &Name, size: ByteSize) -> anyhow::Result<()> {
    let there = match allocator.get::<Allocation>(&format!("/v1/allocations/{name}")).await {
        Err(failure) if failure.is(ErrorKind::NotFound) => None,
        there => Some(there?),
    };
    let allocation = match there {
        Some(allocation) => allocation,
        None => {
            let made: Allocation = allocator
                .post("/v1/allocations", &Create::new(name.clone(), size))
                .await
                .with_context(|| format!("no external memory for `{name}`"))?;
            made.warnings.iter().for_each(|warning| output::warn(warning));
            made
        }
    };
    if allocation.size < size {
        bail!(
            "allocation `{name}` has {}, and the machine needs {size}: run `xpm alloc resize {name} {size}`, or choose another name",
            allocation.size
        );
    }
    Ok(())
}
