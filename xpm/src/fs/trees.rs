//! `xpm fs mount`: a directory whose files are allocations.

use std::path::Path;

use anyhow::{Context as _, bail};
use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Allocation, Create};
use xpm_protocol::api::blk::{AttachDevice, Device, Form};
use xpm_protocol::units::ByteSize;

use crate::attach;
use crate::cli::FsMountArgs;
use crate::connect::Daemon;

/// Size of the allocation that carries the name of a tree, in bytes: the smallest region.
const CARRIER_LEN: u64 = 16 << 20;
/// What tells it from allocations with data.
const LABEL: (&str, &str) = ("xpm-tree", "yes");

/// Mounts a tree, which is made if there is none of this name.
pub(super) async fn mount(args: FsMountArgs, allocator: &Daemon, fs: &Daemon) -> anyhow::Result<Device> {
    let at = std::path::absolute(&args.directory)
        .with_context(|| format!("cannot use the path {}", args.directory.display()))?;
    let at = at.components().collect::<std::path::PathBuf>();
    let name = match args.name {
        Some(name) => name,
        None => name_of(&at)?,
    };
    let label: (Name, Name) = (LABEL.0.parse()?, LABEL.1.parse()?);
    let labels = [label.clone()].into_iter().collect();
    let create = Create { account: args.account, labels, ..Create::new(name.clone(), ByteSize(CARRIER_LEN)) };
    match allocator.post::<_, Allocation>("/v1/allocations", &create).await {
        Ok(_) => {}
        Err(failure) if failure.is(ErrorKind::Conflict) => {
            let there: Allocation = allocator.get(&format!("/v1/allocations/{name}")).await?;
            if there.labels.get(&label.0) != Some(&label.1) {
                bail!("`{name}` is an allocation and no tree: give the tree another name by `--name`");
            }
        }
        Err(failure) => return Err(failure).with_context(|| format!("cannot make the tree `{name}`")),
    }
    let request = AttachDevice {
        queues: args.queues,
        transport: args.transport,
        hold: args.hold,
        read_ahead: args.read_ahead,
        ..AttachDevice::new(name, Form::Tree(at))
    };
    attach::once(fs, &request).await
}

fn name_of(directory: &Path) -> anyhow::Result<Name> {
    let last = directory.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match last.parse() {
        Ok(name) => Ok(name),
        Err(_) => bail!("{} makes no name for a tree: give one by `--name`", directory.display()),
    }
}

/// The name of a tree that is mounted at a directory, or has this name.
pub(super) async fn mounted(tree: &Path, fs: &Daemon) -> anyhow::Result<Name> {
    let devices = fs.devices().await?;
    let trees = devices.iter().filter(|device| matches!(device.form, Form::Tree(_)));
    let at = std::path::absolute(tree).unwrap_or_else(|_| tree.to_owned());
    let at = at.components().collect::<std::path::PathBuf>();
    let found = trees.clone().find(|device| matches!(&device.form, Form::Tree(path) if *path == at));
    let found = found.or_else(|| trees.clone().find(|device| Some(device.name.as_str()) == tree.to_str()));
    match found {
        Some(device) => Ok(device.name.clone()),
        None => bail!("no tree is mounted at {}; `xpm fs list` lists them", tree.display()),
    }
}
