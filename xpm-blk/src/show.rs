//! Shows a record's allocation, by the front end of its form.

use std::os::fd::OwnedFd;
use std::time::Duration;

use xpm_client_core::{Change, Volume, VolumeOptions};
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::MapChange;
use xpm_protocol::api::blk::{AttachDevice, Form, Hold};
use xpm_protocol::{ClientId, Visitor};
use xpm_transport::nbd::server::Server;

use crate::config::Config;
use crate::error::{DeviceError, Step};
use crate::frontend::fuse::tree::{TreeFile, TreeMount, Trees};
use crate::frontend::fuse::{FuseFile, Mounting, PageCache};
use crate::frontend::kernel_nbd::{NbdDevice, Shared};
use crate::frontend::nbd_socket::NbdSocket;
use crate::frontend::ublk::{Mark, UblkDevice};
use crate::frontend::vhost_user::VhostUserBlk;
use crate::frontend::{Shape, Shown};
use crate::records::Record;

/// When the appliances have to be connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// Later; and showing may wait for the device itself only, because its users may have no memory left.
    TakenOver,
    /// Before the device is shown: a client waits for the answer.
    Required,
    /// Later: the device existed before, and its I/O is held meanwhile.
    Later,
}

/// The shown device, and its change in progress.
pub(crate) type ShownWith = (Box<dyn Shown>, Option<Change>);

/// Shows the allocation of a record. If the record has a firm change, writes go to both places from the first
/// write on. Blocks; must be called within a tokio runtime.
pub(crate) fn show(
    record: &Record,
    config: &Config,
    (client, visitor): (ClientId, Option<&Visitor>),
    (server, trees): (&Server, &Trees),
    (readiness, left): (Readiness, Option<OwnedFd>),
) -> Result<ShownWith, DeviceError> {
    let request = &record.request;
    let shape = Shape { block_size: record.block_size(), ..config.shape(request, record.number) };
    let hold = request.hold.unwrap_or(config.hold);
    let refusal_limit = config.refusal_limit.0;
    let shared = Shared { client, visitor, map: &record.map, hold, refusal_limit };
    let group = record.map.id.as_u128();
    if request.form == Form::NbdDirect {
        if let Some(why) = record.given_up.values().next() {
            NbdDevice::end_left(client, &record.map)?;
            return Err(DeviceError::new(
                ErrorKind::NotFound,
                format!("allocation {} is {why}", request.name),
            ));
        }
        let shown =
            NbdDevice::show_direct(shared, (record.session, record.generation), request.transport, &shape)?;
        return Ok((Box::new(shown), None));
    }
    let volume = open(record, config, (hold, visitor), &shape, readiness)?;
    let resume = |change: &MapChange| {
        volume.resume(&change.next, &change.moved).map_err(|error| {
            DeviceError::new(ErrorKind::Internal, format!("resume a change of {}: {error}", request.name))
        })
    };
    let change = record.change.as_deref().map(resume).transpose()?;
    let shown: Box<dyn Shown> = match &request.form {
        Form::Ublk => Box::new(UblkDevice::show(volume, &shape, Mark::new(client, record.session))?),
        Form::Nbd | Form::NbdDirect => {
            Box::new(NbdDevice::show(shared, volume, server.clone(), group, &shape)?)
        }
        Form::VhostUser(path) => {
            let allow_unsealed = config.allow_unsealed;
            Box::new(VhostUserBlk::show(request.name.as_str(), path, volume, &shape, allow_unsealed)?)
        }
        Form::File(path) => {
            let page_cache = page_cache(config, request);
            let (name, left) = (request.name.as_str(), left.zip(record.mounted));
            let mounting = Mounting { name, path, left, page_cache };
            Box::new(FuseFile::show(volume, &shape, mounting)?)
        }
        Form::Tree(path) => {
            let page_cache = page_cache(config, request);
            let (name, left) = (request.name.as_str(), left.zip(record.mounted));
            let mounting = Mounting { name, path, left, page_cache };
            Box::new(TreeMount::show(volume, &shape, mounting, (trees, &config.state()))?)
        }
        Form::InTree(tree) => Box::new(TreeFile::show(&request.name, volume, trees.tree(tree))?),
        Form::NbdSocket(place) => {
            // A socket that was shown before may be in use.
            let insecure = config.insecure || readiness != Readiness::Required;
            let (name, blocks) = (request.name.as_str(), shape.block_size);
            Box::new(NbdSocket::show((name, blocks), place, volume, server.clone(), group, insecure)?)
        }
    };
    Ok((shown, change))
}

fn page_cache(config: &Config, request: &AttachDevice) -> PageCache {
    PageCache { dirty_budget: config.dirty_budget.0, read_ahead: request.read_ahead.unwrap_or_default().0 }
}

/// Removes the kernel's remains of a device that leads to an appliance without this process.
pub(crate) fn end_left(record: &Record, client: ClientId) -> Result<(), DeviceError> {
    NbdDevice::end_left(client, &record.map)
}

fn open(
    record: &Record,
    config: &Config,
    (hold, visitor): (Hold, Option<&Visitor>),
    shape: &Shape,
    readiness: Readiness,
) -> Result<Volume, DeviceError> {
    let limit: Duration = config.connect_limit.0;
    let (session, generation) = match record.request.form {
        // The requests of the earlier life are submitted again; its own late requests must not land behind
        // these.
        Form::VhostUser(_)
        | Form::Ublk
        | Form::Nbd
        | Form::NbdDirect
        | Form::File(_)
        | Form::Tree(_)
        | Form::InTree(_) => (record.session, record.generation),
        // A new session for each life of this process: clients do not repeat requests by themselves.
        Form::NbdSocket(_) => (xpm_control::random::u128().at("make a session number")?, 0),
    };
    let options = VolumeOptions {
        hold,
        transport: record.request.transport,
        forbidden: config.forbid_transports.clone(),
        connect_limit: limit,
        depth: usize::from(shape.depth),
        session,
        generation,
        host: xpm_control::host::host_id().ok(),
        refusal_limit: config.refusal_limit.0,
        visitor: visitor.cloned(),
        held: record.role.waits(),
        contested: !record.role.is_owner(),
    };
    let name = &record.request.name;
    let volume = Volume::open(&record.map, options)
        .map_err(|error| DeviceError::new(ErrorKind::Internal, format!("open allocation {name}: {error}")))?;
    for (appliance, why) in &record.given_up {
        volume.give_up(*appliance, why);
    }
    // A standby cannot connect before it is the owner.
    if readiness == Readiness::Required && record.role.waits().is_none() {
        volume.wait_ready(limit).map_err(|error| {
            DeviceError::new(ErrorKind::Unavailable, format!("allocation {name}: {error}"))
        })?;
    }
    Ok(volume)
}
