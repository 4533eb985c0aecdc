//! `xpm blk`: allocations as devices of this host.

use anyhow::Context as _;
use serde::Serialize;
use xpm_protocol::api::blk::{
    AttachDevice, Device, DeviceState, Form, LinkState, LinkStatus, Owed, SocketPlace, TransportKind,
};
use xpm_protocol::{ByteSize, Name};

use crate::cli::{AttachArgs, BlkCommand};
use crate::connect::{Daemon, Daemons};
use crate::listing::{Cell, Column, Listing};
use crate::output::{self, Output};
use crate::table::{Table, fields};
use crate::{age, attach, hibernation, lost};

pub(crate) async fn run(command: BlkCommand, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    if matches!(command, BlkCommand::CheckHibernation) {
        return hibernation::check();
    }
    let blk = daemons.blk()?;
    match command {
        BlkCommand::Attach(args) => {
            let (ensure, wait) = (args.ensure, args.wait);
            let request = request(args);
            let device = match ensure {
                false => attach::once(&blk, &request).await?,
                true => attach::ensure(&blk, &request, wait.unwrap_or_default().0).await?,
            };
            output.print(&device, |device| device.path.clone())?;
            output.hint(&next_steps(&device));
            Ok(())
        }
        BlkCommand::CheckHibernation => hibernation::check(),
        BlkCommand::GiveUp(args) => lost::give_up(&args, &blk, output).await,
        BlkCommand::List(args) => {
            LISTING.print(blk.devices().await?, &args, output)?;
            warn_of_debts(&blk).await;
            Ok(())
        }
        BlkCommand::Show { name } => {
            let device: Device = blk.get(&format!("/v1/devices/{name}")).await?;
            output.print(&device, show)
        }
        BlkCommand::Detach { name, force } => detach(&blk, &name, force, output).await,
    }
}

/// Has a daemon of this host show an allocation no longer.
pub(crate) async fn detach(daemon: &Daemon, name: &Name, force: bool, output: Output) -> anyhow::Result<()> {
    let query = if force { "?force=true" } else { "" };
    let path = format!("/v1/devices/{name}{query}");
    daemon.delete(&path).await.with_context(|| format!("cannot detach `{name}`"))?;
    warn_of_debts(daemon).await;
    output.print(&Detached { detached: name.clone() }, |_| String::new())
}

/// Says which allocations are detached here and are not given back yet; nothing where the daemon does not say.
pub(crate) async fn warn_of_debts(blk: &Daemon) {
    let Ok(status) = blk.blk_status().await else { return };
    for Owed { allocation, reason, .. } in &status.owed {
        output::warn(&format!(
            "`{allocation}` is detached here, and the allocator does not know yet ({reason}): it is told when it answers"
        ));
    }
}

/// What `detach --json` prints.
#[derive(Debug, Serialize)]
struct Detached {
    detached: Name,
}

fn request(args: AttachArgs) -> AttachDevice {
    AttachDevice {
        name: args.name,
        form: args.form,
        queues: args.queues,
        depth: args.depth,
        transport: args.transport,
        hold: args.hold,
        force: args.force,
        lose: args.lose,
        block_size: args.block_size,
        standby: args.standby,
        read_ahead: None,
    }
}

/// What a person does next with a new device.
fn next_steps(device: &Device) -> String {
    let Device { name, path, .. } = device;
    let use_it = match &device.form {
        Form::Ublk | Form::Nbd | Form::NbdDirect => format!(
            "swap:         mkswap {path} && swapon --discard {path}\n\
             file system:  mkfs.ext4 {path} && mount -o discard {path} /mnt\n"
        ),
        Form::NbdSocket(SocketPlace::Unix(socket)) => {
            format!("look at it:   nbdinfo 'nbd+unix:///?socket={}'\n", socket.display())
        }
        Form::NbdSocket(SocketPlace::Tcp(address)) => format!("look at it:   nbdinfo nbd://{address}\n"),
        // xpm-blk shows none; `xpm fs` says what to do with one.
        Form::File(_) | Form::Tree(_) | Form::InTree(_) => String::new(),
        Form::VhostUser(_) => format!(
            "QEMU:         -object memory-backend-memfd,id=ram,size=SIZE,share=on -machine memory-backend=ram \\\n\
             \x20             -chardev socket,id={name},path={path},reconnect=1 \\\n\
             \x20             -device vhost-user-blk-pci,chardev={name}\n"
        ),
    };
    format!("{use_it}remove it:    xpm blk detach {name}")
}

/// The list of this host's devices.
pub(crate) const LISTING: Listing<Device> = Listing {
    columns: COLUMNS,
    empty: "No devices on this host: make one with `xpm blk attach NAME --as FORM`.\n",
};

/// The list of this host's files.
pub(crate) const FILES: Listing<Device> =
    Listing { columns: COLUMNS, empty: "No files on this host: make one with `xpm fs attach NAME`.\n" };

const COLUMNS: &[Column<Device>] = &[
    Column::text("NAME", |one| Cell::text(&one.name)),
    Column::text("AS", |one| Cell::text(form(&one.form))),
    Column::text("PATH", |one| Cell::text(&one.path)),
    Column::number("SIZE", |one| Cell::ranked(one.size, one.size.0)),
    Column::text("STATE", |one| Cell::text(state(one))),
    Column::text("TRANSPORT", |one| Cell::text(transports(one))),
    Column::wide_number("READ", |one| bytes(one.counters.read_bytes)),
    Column::wide_number("WRITTEN", |one| bytes(one.counters.write_bytes)),
    Column::wide_number("IN FLIGHT", |one| Cell::ranked(one.in_flight, one.in_flight)),
    Column::text("USED BY", |one| Cell::text(one.users.join(", "))),
];

fn bytes(count: u64) -> Cell {
    Cell::ranked(ByteSize(count), count)
}

/// The transports of its links, each once.
fn transports(device: &Device) -> String {
    let mut names: Vec<String> = device.links.iter().map(|link| link.transport.to_string()).collect();
    names.sort();
    names.dedup();
    names.join(", ")
}

/// Why a link that is up is not by the best transport, where that can be mended: not on a machine without
/// an RDMA device, which lacks RDMA by nature.
pub(crate) fn worse_way(link: &LinkStatus, rdma_here: bool) -> Option<&str> {
    let reason = link.reason.as_deref().filter(|_| link.state == LinkState::Up)?;
    let by_nature = !rdma_here && reason.starts_with(&format!("no {} ", TransportKind::Rdma));
    (!by_nature).then_some(reason)
}

fn form(form: &Form) -> &'static str {
    match form {
        Form::Ublk => "ublk",
        Form::Nbd => "nbd",
        Form::NbdDirect => "nbd-direct",
        Form::NbdSocket(_) => "nbd-socket",
        Form::VhostUser(_) => "vhost-user",
        Form::File(_) => "file",
        Form::Tree(_) => "tree",
        Form::InTree(_) => "in a tree",
    }
}

fn state(device: &Device) -> String {
    match device.state {
        DeviceState::Live => "live".to_owned(),
        DeviceState::Holding => "holding".to_owned(),
        DeviceState::Lost => lost_on(device),
    }
}

/// With the appliances that do not have its memory any more.
fn lost_on(device: &Device) -> String {
    let lost = device.links.iter().filter(|link| link.state == LinkState::Lost);
    let names: Vec<String> = lost.map(|link| link.appliance_name.to_string()).collect();
    if names.is_empty() { "lost".to_owned() } else { format!("lost on {}", names.join(", ")) }
}

pub(crate) fn show(device: &Device) -> String {
    let counters = &device.counters;
    let users = if device.users.is_empty() { "nobody".to_owned() } else { device.users.join(", ") };
    let mut text = fields(&[
        ("name", device.name.to_string()),
        ("as", device.form.to_string()),
        ("path", device.path.clone()),
        ("size", device.size.to_string()),
        (
            "block size",
            device.block_size.map_or_else(|| "the client's choice".to_owned(), |size| size.to_string()),
        ),
        ("state", explained_state(device)),
        ("ends", device.ending.clone().unwrap_or_else(|| "not announced".to_owned())),
        ("used by", users),
        ("epoch", device.epoch.to_string()),
        ("queues", format!("{}, {} requests deep", device.queues, device.depth)),
        ("in flight", device.in_flight.to_string()),
        ("read", format!("{} in {} requests", ByteSize(counters.read_bytes), counters.reads)),
        ("written", format!("{} in {} requests", ByteSize(counters.write_bytes), counters.writes)),
        ("trimmed", format!("{} requests", counters.trims)),
        ("errors", counters.errors.to_string()),
        ("attached", format!("{} ago", age::short(device.age.0))),
    ]);
    text.push('\n');
    text.push_str(&links(&device.links));
    text
}

fn explained_state(device: &Device) -> String {
    match device.state {
        DeviceState::Live => "live".to_owned(),
        DeviceState::Holding => "holding: an appliance is out of reach, I/O to it waits".to_owned(),
        DeviceState::Lost => format!("{}: memory is gone, I/O to it fails", lost_on(device)),
    }
}

fn links(links: &[LinkStatus]) -> String {
    let mut table = Table::new(&["APPLIANCE", "TRANSPORT", "LINK", "FOR", ">RECONNECTS", "REASON"]);
    for link in links {
        table.row([
            link.appliance_name.to_string(),
            link.transport.to_string(),
            link_state(link.state).to_owned(),
            age::short(link.since.0),
            link.reconnects.to_string(),
            link.reason.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}

fn link_state(state: LinkState) -> &'static str {
    match state {
        LinkState::Up => "up",
        LinkState::Connecting => "connecting",
        LinkState::Lost => "lost",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_machine_lacks_by_nature_is_nothing_to_mend() {
        let link = |state: &str, reason: &str| -> LinkStatus {
            serde_json::from_value(json!({
                "appliance": "0".repeat(32), "appliance_name": "a", "transport": "nbd-tcp", "state": state,
                "since": "1s", "reconnects": 0, "reason": reason
            }))
            .unwrap()
        };
        let no_rdma = link("up", "no rdma to the appliance: no RDMA");
        assert_eq!(worse_way(&no_rdma, false), None);
        assert!(worse_way(&no_rdma, true).is_some());
        assert!(worse_way(&link("up", "no shm to the appliance: refused"), false).is_some());
        assert_eq!(worse_way(&link("connecting", "no rdma to it"), true), None, "that is another problem");
    }
}
