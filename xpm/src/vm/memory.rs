//! How a machine's RAM becomes files: ordinary ones, or allocations that xpm-fs of this host shows.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Allocation, Create};
use xpm_protocol::api::blk::{AttachDevice, Device, Form};
use xpm_protocol::{ByteSize, ClientId, Name};
use xpm_vm::machine::{Guarded, Terms};
use xpm_vm::memory::{MemoryFile, plain_files};

use crate::attach;
use crate::connect::{Daemon, Daemons};
use crate::output::{self, Output};

/// Below the machines' directory; no machine has a name that starts with a dot.
const FILES: &str = ".ram";
/// How long xpm-fs is asked again while it starts.
const ATTACH_WAIT: Duration = Duration::from_secs(10);

/// A machine's RAM on this host.
pub(super) struct Ram {
    /// Whom to tell that allocations are not used any more.
    fs: Option<Daemon>,
    heir: Option<ClientId>,
    /// Those that were shown for this machine.
    allocations: Vec<Name>,
}

impl Ram {
    /// Gets the RAM of a machine that starts here, and tells the terms where it is. This is the one place that knows what RAM is made of.
    pub(super) async fn get(
        terms: &mut Terms,
        file: Option<&Path>,
        daemons: &Daemons,
    ) -> anyhow::Result<Ram> {
        if let Some(file) = file {
            terms.files = plain_files(file, terms.sizes)?;
            return Ok(Ram { fs: None, heir: None, allocations: Vec::new() });
        }
        let names = names(&terms.name)?;
        let (allocator, fs) = (daemons.allocator()?, daemons.fs()?);
        let mut ram = Ram { fs: Some(fs.clone()), heir: None, allocations: Vec::new() };
        for (name, size) in names.into_iter().zip(terms.sizes.of_files()) {
            match ram.show(&allocator, &fs, &name, size, &terms.root).await {
                Ok(path) => terms.files.push(MemoryFile { path, size }),
                Err(error) => {
                    ram.give_back().await;
                    return Err(error);
                }
            }
            terms.allocations.push(name);
        }
        Ok(ram)
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
        std::fs::create_dir_all(root.join(FILES))
            .with_context(|| format!("cannot make {}", root.join(FILES).display()))?;
        attach::ensure(fs, &AttachDevice::new(name.clone(), Form::File(path.clone())), ATTACH_WAIT).await?;
        self.allocations.push(name.clone());
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
        let names = names(&terms.name)?;
        let fs = daemons.fs()?;
        let heir = fs.blk_status().await?.client;
        let mut ram = Ram { fs: Some(fs.clone()), heir: Some(heir), allocations: Vec::new() };
        let directory = terms.root.join(FILES);
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        for (name, size) in names.into_iter().zip(terms.sizes.of_files()) {
            let path = directory.join(name.as_str());
            let request =
                AttachDevice { standby: true, ..AttachDevice::new(name.clone(), Form::File(path.clone())) };
            let shown = fs.post::<_, Device>("/v1/devices", &request).await;
            if let Err(failure) = shown {
                ram.give_back().await;
                return Err(failure).with_context(|| format!("this host cannot stand by for `{name}`"));
            }
            terms.files.push(MemoryFile { path, size });
            terms.allocations.push(name.clone());
            ram.allocations.push(name);
        }
        Ok(ram)
    }

    /// The client of this host that stands by for the RAM.
    pub(super) fn heir(&self) -> Option<ClientId> {
        self.heir
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
        let Some(fs) = &self.fs else { return };
        for name in &self.allocations {
            if let Err(error) = fs.delete(&format!("/v1/devices/{name}")).await
                // What went to another host has ended here.
                && !error.is(ErrorKind::NotFound)
            {
                output::warn(&format!("`{name}` is still shown here: {error}; run `xpm fs detach {name}`"));
            }
        }
    }
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
