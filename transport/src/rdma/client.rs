//! The client's end: connecting to a grant. Control plane: it blocks, allocates and logs.

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

/// Bytes that a request is asked to be able to carry itself.
const INLINE_WANTED: u32 = 128;
/// Work requests beyond one for each operation: long operations are several.
const REQUESTS_MORE: usize = 64;
/// Time between two looks for a completion while connecting.
const ASK_AGAIN: Duration = Duration::from_micros(50);

/// Where to connect to, and as whom.
#[derive(Debug, Clone)]
pub struct Target<'a> {
    /// The appliance's listener.
    pub address: SocketAddr,
    /// The grant's key.
    pub key: &'a GrantKey,
    /// The ownership that it is held by.
    pub epoch: Epoch,
    /// The queue's session.
    pub session: SessionTag,
    /// Longest time to connect.
    pub limit: Duration,
    /// Operations in flight; at least 1.
    pub depth: usize,
}

/// Connects to a grant, whose NBD connection `beside` becomes part of the link. Blocks, and ends
/// within the target's limit; the appliance then has shut out the earlier connections of the same
/// session and queue.
///
/// # Errors
/// See [`ConnectError`]. [`ConnectError::Unavailable`]: this host has no RDMA, or no RDMA device
/// leads there.
pub fn connect(target: &Target<'_>, beside: NbdLink) -> Result<RdmaLink, ConnectError> {
    let deadline = Deadline::after(target.limit);
    let mut made = managed(target, deadline).or_else(|error| match error {
        // The connection manager is missing here or there.
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

/// A connection, and what came with it.
struct Made {
    connection: Connection,
    welcome: Welcome,
    local: Arc<LocalDevice>,
    /// As large as the device made it.
    size: Size,
}

/// The appliance answered, but not yes yet.
fn is_registering(error: &ConnectError) -> bool {
    matches!(error, ConnectError::Unreachable(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

/// The appliance answered.
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

/// By the connection manager.
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
    let welcome = Welcome::decode(&said).ok_or_else(|| broken("an answer that is none"))?;
    Ok(Made { connection, welcome, local, size: Size { inline, ..size } })
}

/// By messages over TCP, to the same address.
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

/// A completion queue for so many operations, and the size of its queue pair.
fn queue(local: &LocalDevice, depth: usize) -> Result<(CompletionQueue, Size), ConnectError> {
    let device = local.domain().device();
    let limits = device.limits().map_err(ConnectError::Unreachable)?;
    let requests = (depth + REQUESTS_MORE).min(limits.work_requests as usize);
    let requests = u32::try_from(requests).unwrap_or(u32::MAX).min(limits.completions);
    let completions = CompletionQueue::new(device.clone(), requests)
        .map_err(|error| resources("a completion queue", &error))?;
    Ok((completions, Size { requests, inline: INLINE_WANTED }))
}

/// Whether this host has RDMA at all; if not, why, in words that say what to do.
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

/// Another identifier on the device of one.
fn keeper(id: &Id) -> std::io::Result<Id> {
    let mut address =
        id.local_address().ok_or_else(|| std::io::Error::other("the identifier has no address"))?;
    address.set_port(0);
    let keeper = Id::new(&Channel::new()?)?;
    keeper.bind(address)?;
    Ok(keeper)
}

/// Waits for an event of this kind.
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
        // After this, the device does not write to the pages any more.
        connection.pair.destroy();
        return Err(error);
    }
    let mut bytes = vec![0; len];
    buffer.copy_to_slice(&mut bytes);
    let entries = bytes.as_chunks::<ENTRY_LEN>().0.iter().map(Entry::decode).collect();
    Ok(Table::new(entries, u32::from(welcome.region_shift)))
}

/// The status of the next completion. Asks again and again, for an event that nobody takes would wake the
/// link for nothing later.
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
