//! The client's end of RDMA: connecting to a grant. Control plane: it blocks, allocates and logs.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use xpm_protocol::nbd::SessionTag;
use xpm_protocol::{Epoch, GrantKey};

use super::bounce::Bounce;
use super::buffers::{Buffers, LocalDevice};
use super::cm::{Channel, Event, Id, Kind, Size};
use super::engine::QueueSize;
pub use super::engine::Table;
use super::link::Connection;
pub use super::link::RdmaLink;
use super::pages::Pages;
use super::pair::Pair;
use super::plain::Pair as Plain;
use super::verbs::{Access, Batch, CompletionQueue, Device, Registration, Request};
use super::wire::{ENTRY_LEN, Entry, Hello, Welcome};
use super::{errors, exchange};
pub use crate::connect::ConnectError;
use crate::connect::{Deadline, dial_tcp, wait};
use crate::nbd::client::NbdLink;

/// The inline capacity that is requested for a work request, in bytes.
const INLINE_WANTED: u32 = 128;
/// Work requests beyond one for each operation: a long operation needs several.
const REQUESTS_MORE: usize = 64;
/// Time between two polls for a completion while connecting.
const ASK_AGAIN: Duration = Duration::from_micros(50);

/// The address to connect to, and the client's identity.
#[derive(Debug, Clone)]
pub struct Target<'a> {
    /// The appliance's listener.
    pub address: SocketAddr,
    /// The grant's key.
    pub key: &'a GrantKey,
    /// The epoch in which the client owns the grant.
    pub epoch: Epoch,
    /// The queue's session.
    pub session: SessionTag,
    /// Time limit for connecting.
    pub limit: Duration,
    /// Operations in flight; at least 1.
    pub depth: usize,
}

/// Connects to a grant. The link takes over `beside`, an NBD connection to the same grant. Blocks, and ends
/// within the target's limit; by then the appliance has closed the earlier connections of the same session
/// and queue.
///
/// # Errors
/// See [`ConnectError`]. [`ConnectError::Unavailable`]: this host has no RDMA, or no RDMA device reaches the
/// address.
pub fn connect(target: &Target<'_>, beside: NbdLink) -> Result<RdmaLink, ConnectError> {
    let deadline = Deadline::after(target.limit);
    let mut made = managed(target, deadline).or_else(|error| match error {
        // The connection manager is missing on this host or at the appliance.
        ConnectError::Unavailable(_) | ConnectError::Unreachable(_) if !is_registering(&error) => {
            plain(target, deadline).map_err(|other| if is_final(&other) { other } else { error })
        }
        error => Err(error),
    })?;
    let table = read_table(&mut made.connection, made.local.domain(), &made.welcome, deadline)?;
    if table.len() != beside.info().size {
        return Err(broken("a table that is not of the export"));
    }
    let bounce = Bounce::new(made.local.domain()).map_err(|error| resources("a buffer", &error))?;
    let size = QueueSize {
        depth: target.depth.max(1),
        requests: made.size.requests as usize,
        inline: made.size.inline as usize,
    };
    RdmaLink::new(made.connection, beside, table, (Buffers::new(made.local), bounce), size)
        .map_err(ConnectError::Unreachable)
}

/// A new connection, and the results of connecting.
struct Made {
    connection: Connection,
    welcome: Welcome,
    local: Arc<LocalDevice>,
    /// The actual size of the queue pair, as the device created it.
    size: Size,
}

/// Whether the appliance answered that it is still registering the grant's memory.
fn is_registering(error: &ConnectError) -> bool {
    matches!(error, ConnectError::Unreachable(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

/// Whether the appliance answered, so that another way of connecting is useless.
fn is_final(error: &ConnectError) -> bool {
    is_registering(error)
        || matches!(
            error,
            ConnectError::UnknownExport
                | ConnectError::Outdated
                | ConnectError::Refused(_)
                | ConnectError::Unsupported(_)
        )
}

/// Connects by the connection manager.
fn managed(target: &Target<'_>, deadline: Deadline) -> Result<Made, ConnectError> {
    let events = Channel::new().map_err(|error| errors::no_rdma(&error))?;
    let mut id = Id::new(&events).map_err(|error| errors::no_rdma(&error))?;
    resolve(&id, &events, target.address, deadline)?;
    let local = LocalDevice::of(&id, || keeper(&id)).map_err(|error| errors::no_rdma(&error))?;
    let (completions, size) = queue(&local, target.depth)?;
    let inline = id
        .make_queue_pair(local.domain(), &completions, size)
        .or_else(|_| id.make_queue_pair(local.domain(), &completions, Size { inline: 0, ..size }))
        .map_err(|error| resources("a queue pair", &error))?;
    let connection = Connection { pair: Pair::Managed { id, events }, completions };
    let Pair::Managed { id, events } = &connection.pair else { unreachable!("made so above") };

    let hello = Hello::new(target.key.clone(), target.epoch, target.session);
    id.connect(&hello.encode()).map_err(ConnectError::Unreachable)?;
    let said = expect(events, Kind::Established, deadline)?.said;
    let welcome = Welcome::decode(&said).ok_or_else(|| broken("an invalid answer"))?;
    Ok(Made { connection, welcome, local, size: Size { inline, ..size } })
}

/// Connects by messages over TCP, to the same address.
fn plain(target: &Target<'_>, deadline: Deadline) -> Result<Made, ConnectError> {
    let control = dial_tcp(target.address, deadline)?;
    let own = exchange::own_address(&control).map_err(ConnectError::Unreachable)?;
    let (local, port) = LocalDevice::at(own.ip()).map_err(|error| errors::no_rdma(&error))?;
    let (completions, size) = queue(&local, target.depth)?;
    let (pair, inline) = Plain::new(local.domain(), &completions, size)
        .or_else(|_| Plain::new(local.domain(), &completions, Size { inline: 0, ..size }))
        .map_err(|error| resources("a queue pair", &error))?;
    let connection = Connection { pair: Pair::Plain { pair: Some(pair), control }, completions };
    let Pair::Plain { pair: Some(pair), control } = &connection.pair else { unreachable!("made so above") };

    let packet = exchange::first_packet().map_err(ConnectError::Unreachable)?;
    let hello = Hello::new(target.key.clone(), target.epoch, target.session);
    let (welcome, other) = exchange::ask(control.as_fd(), &hello, &pair.end(&port, packet), deadline)?;
    pair.connect(local.domain().device(), &port, packet, &other).map_err(ConnectError::Unreachable)?;
    Ok(Made { connection, welcome, local, size: Size { inline, ..size } })
}

/// Creates a completion queue for `depth` operations; also returns the size of its queue pair.
fn queue(local: &LocalDevice, depth: usize) -> Result<(CompletionQueue, Size), ConnectError> {
    let device = local.domain().device();
    let limits = device.limits().map_err(ConnectError::Unreachable)?;
    let requests = (depth + REQUESTS_MORE).min(limits.work_requests as usize);
    let requests = u32::try_from(requests).unwrap_or(u32::MAX).min(limits.completions);
    let completions = CompletionQueue::new(device.clone(), requests)
        .map_err(|error| resources("a completion queue", &error))?;
    Ok((completions, Size { requests, inline: INLINE_WANTED }))
}

/// Whether this host has RDMA at all; if not, the error names the reason and the remedy.
///
/// # Errors
/// The reason.
pub fn check_support() -> Result<(), String> {
    let managed = Channel::new().and_then(|events| Id::new(&events).map(drop));
    managed.or_else(|error| match Device::all() {
        Ok(devices) if !devices.is_empty() => Ok(()),
        _ => Err(errors::explain(&error)),
    })
}

fn resolve(
    id: &Id,
    events: &Arc<Channel>,
    target: SocketAddr,
    deadline: Deadline,
) -> Result<(), ConnectError> {
    id.resolve_address(target, deadline.rest()?).map_err(|error| no_way(&error))?;
    expect(events, Kind::AddressResolved, deadline)?;
    id.resolve_route(deadline.rest()?).map_err(|error| no_way(&error))?;
    expect(events, Kind::RouteResolved, deadline)?;
    Ok(())
}

fn no_way(error: &std::io::Error) -> ConnectError {
    ConnectError::Unavailable(format!("no RDMA device of this host leads there ({error})"))
}

/// Another identifier on the same device as `id`.
fn keeper(id: &Id) -> std::io::Result<Id> {
    let mut address =
        id.local_address().ok_or_else(|| std::io::Error::other("the identifier has no address"))?;
    address.set_port(0);
    let keeper = Id::new(&Channel::new()?)?;
    keeper.bind(address)?;
    Ok(keeper)
}

/// Waits for an event of kind `wanted`.
fn expect(events: &Arc<Channel>, wanted: Kind, deadline: Deadline) -> Result<Event, ConnectError> {
    loop {
        match events.next().map_err(ConnectError::Unreachable)? {
            None => wait(events.as_fd(), PollFlags::IN, deadline)?,
            Some(event) if event.kind == wanted => return Ok(event),
            Some(event) => match event.kind {
                Kind::Rejected => return Err(errors::of_rejection(event.status, &event.said)),
                Kind::Failed | Kind::Disconnected | Kind::DeviceRemoved => {
                    return Err(failed(event.status, wanted));
                }
                _ => {}
            },
        }
    }
}

fn failed(status: i32, wanted: Kind) -> ConnectError {
    if status >= 0 {
        return ConnectError::Unreachable(std::io::Error::other(format!("the attempt failed ({status})")));
    }
    let error = std::io::Error::from_raw_os_error(-status);
    match (wanted, -status) {
        (Kind::AddressResolved, libc::ENODEV) => no_way(&error),
        _ => ConnectError::Unreachable(error),
    }
}

/// Reads the table of the grant's regions from the appliance's memory.
fn read_table(
    connection: &mut Connection,
    domain: &Arc<super::verbs::Domain>,
    welcome: &Welcome,
    deadline: Deadline,
) -> Result<Table, ConnectError> {
    let len = welcome.regions as usize * ENTRY_LEN;
    let pages = Pages::new(len).map_err(ConnectError::Memory)?;
    let registration = Registration::new(domain, pages.whole(), Access::Local)
        .map_err(|error| resources("a buffer", &error))?;
    let buffer = pages.whole().part(0, len);
    let request = Request {
        id: 0,
        is_read: true,
        buffer,
        local_key: registration.local_key(buffer),
        address: welcome.table,
        remote_key: welcome.rkey,
        signalled: true,
    };
    let mut batch = Batch::new(1);
    batch.push(&request);
    let queue_pair = connection.pair.raw().ok_or_else(crate::connect::closed)?;
    let outcome =
        batch.post(queue_pair).map_err(ConnectError::Unreachable).and_then(|()| {
            match wait_for_one(&mut connection.completions, deadline)? {
                0 => Ok(()),
                status => Err(ConnectError::Unreachable(std::io::Error::other(format!(
                    "the table of regions cannot be read (status {status})"
                )))),
            }
        });
    if let Err(error) = outcome {
        // After this call, the device no longer writes to the pages.
        connection.pair.destroy();
        return Err(error);
    }
    let mut bytes = vec![0; len];
    buffer.copy_to_slice(&mut bytes);
    let entries = bytes.as_chunks::<ENTRY_LEN>().0.iter().map(Entry::decode).collect();
    Ok(Table::new(entries, u32::from(welcome.region_shift)))
}

/// The status of the next completion. Polls repeatedly rather than arming the queue: a completion event that
/// nothing takes would wake the link later without reason.
fn wait_for_one(completions: &mut CompletionQueue, deadline: Deadline) -> Result<u32, ConnectError> {
    loop {
        let mut found = None;
        completions.poll(|ended| found = Some(ended.status)).map_err(ConnectError::Unreachable)?;
        if let Some(status) = found {
            return Ok(status);
        }
        deadline.rest()?;
        std::thread::sleep(ASK_AGAIN);
    }
}

fn resources(what: &str, error: &std::io::Error) -> ConnectError {
    ConnectError::Unavailable(format!(
        "the RDMA device gives no {what}: {error}; see `ulimit -l` (LimitMEMLOCK) and `xpm doctor`",
        what = what.trim_start_matches("a ")
    ))
}

fn broken(what: &str) -> ConnectError {
    ConnectError::Protocol(what.to_owned())
}
