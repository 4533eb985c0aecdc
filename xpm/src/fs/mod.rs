//! `xpm fs`: allocations as files of this host.

use std::path::Path;

use anyhow::Context as _;
use xpm_protocol::api::blk::{AttachDevice, Cache, Device, Form};

use crate::blk;
use crate::cli::{FsAttachArgs, FsCommand};
use crate::connect::Daemons;
use crate::output::Output;
use crate::table::fields;
use crate::{attach, lost};

mod trees;

/// Directory of files that have no other path.
pub(crate) const FILES: &str = "/run/xpm/fs";

pub(crate) async fn run(command: FsCommand, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    let fs = daemons.fs()?;
    match command {
        FsCommand::Attach(args) => {
            let (ensure, wait) = (args.ensure, args.wait);
            let request = request(args)?;
            let device = match ensure {
                false => attach::once(&fs, &request).await?,
                true => attach::ensure(&fs, &request, wait.unwrap_or_default().0).await?,
            };
            output.print(&device, |device| device.path.clone())?;
            let Device { name, path, size, .. } = &device;
            output.hint(&format!(
                "a virtual machine:  -object memory-backend-file,id=ram,size={},mem-path={path},share=on\n\
                 remove it:          xpm fs detach {name}",
                size.0
            ));
            Ok(())
        }
        FsCommand::Mount(args) => {
            let device = trees::mount(args, &daemons.allocator()?, &fs).await?;
            output.print(&device, |device| device.path.clone())?;
            output.hint(&format!("unmount it:  xpm fs unmount {}\n", device.path));
            Ok(())
        }
        FsCommand::Unmount { tree, force } => {
            let name = trees::mounted(&tree, &fs).await?;
            blk::detach(&fs, &name, force, output).await
        }
        FsCommand::List(args) => {
            let mut devices = fs.devices().await?;
            // Files of a tree are seen in the tree; `xpm fs show NAME.NUMBER` shows one.
            devices.retain(|device| !matches!(device.form, Form::InTree(_)));
            blk::FILES.print(devices, &args, output)?;
            blk::warn_of_debts(&fs).await;
            Ok(())
        }
        FsCommand::Show { name } => {
            let device: Device = fs.get(&format!("/v1/devices/{name}")).await?;
            output.print(&device, blk::show)
        }
        FsCommand::Abort { name } => {
            let aborted: Device = fs
                .put(&format!("/v1/devices/{name}/abort"), &())
                .await
                .with_context(|| format!("cannot abort `{name}`"))?;
            output.print(&aborted, |device| {
                format!("{} is aborted; remove it: xpm fs detach {name}\n", device.path)
            })
        }
        FsCommand::Cache { name, drop } => {
            let path = format!("/v1/devices/{name}/cache");
            let cache: Cache = match drop {
                false => fs.get(&path).await?,
                true => fs.put(&path, &()).await?,
            };
            output.print(&cache, |cache| {
                fields(&[
                    ("cached", cache.cached.to_string()),
                    ("changed", cache.dirty.to_string()),
                    ("being written", cache.writeback.to_string()),
                ])
            })
        }
        FsCommand::GiveUp(args) => lost::give_up(&args, &fs, output).await,
        FsCommand::Detach { name, force } => blk::detach(&fs, &name, force, output).await,
    }
}

fn request(args: FsAttachArgs) -> anyhow::Result<AttachDevice> {
    let at = args.at.unwrap_or_else(|| Path::new(FILES).join(args.name.as_str()));
    let at = std::path::absolute(&at).with_context(|| format!("cannot use the path {}", at.display()))?;
    Ok(AttachDevice {
        queues: args.queues,
        depth: args.depth,
        transport: args.transport,
        hold: args.hold,
        force: args.force,
        lose: args.lose,
        standby: args.standby,
        read_ahead: args.read_ahead,
        ..AttachDevice::new(args.name, Form::File(at))
    })
}
