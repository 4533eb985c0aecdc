//! Safe wrapper of librdmacm (rdma_cm(7)): addresses, listeners and connections.

#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::time::Duration;

use rdma_mummy_sys as sys;

use super::verbs::{CompletionQueue, Domain, check, complain, pointer, set_nonblocking};

/// `RDMA_OPTION_ID` of rdma/rdma_cma.h, and two options of it.
const OPTION_ID: i32 = 0;
const OPTION_ID_REUSEADDR: i32 = 1;
const OPTION_ID_ACK_TIMEOUT: i32 = 3;
/// `RDMA_MAX_RESP_RES` and `RDMA_MAX_INIT_DEPTH`: as many concurrent reads as the devices support.
const READS_MAX: u8 = 0xff;
/// Retransmissions of a request before the connection is given up; 7 is the maximum.
pub(super) const RETRIES: u8 = 7;
/// Time without an acknowledgement before a request is sent again: 4.096 us times two to this power, 0.27 s
/// (IBTA 1, 9.9.1.4.1.1). With [`RETRIES`], a silent appliance is noticed within seconds.
pub(super) const ACK_TIMEOUT: u8 = 16;

/// An event channel, which delivers the events of identifiers.
pub(super) struct Channel {
    raw: NonNull<sys::rdma_event_channel>,
}

// SAFETY: librdmacm's calls are thread-safe, and the channel is read with read(2).
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

/// An event of an identifier.
pub(super) struct Event {
    /// The kind of event.
    pub(super) kind: Kind,
    /// The identifier that the event is about.
    pub(super) id: Tag,
    /// 0, an error number, or the reason of a rejection.
    pub(super) status: i32,
    /// The other end's private data, possibly padded.
    pub(super) said: Vec<u8>,
    /// The new identifier of a connection request.
    pub(super) request: Option<Id>,
}

/// The kinds of events that this module distinguishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The address was found, and with it the device.
    AddressResolved,
    /// The route was found.
    RouteResolved,
    /// A client requests a connection.
    Request,
    /// The connection is established.
    Established,
    /// The other end rejected the connection.
    Rejected,
    /// An attempt failed: no such address, no route, or no answer.
    Failed,
    /// The connection is closed.
    Disconnected,
    /// The device was removed.
    DeviceRemoved,
    /// An event that needs no action.
    Other,
}

impl Kind {
    fn of(event: sys::rdma_cm_event_type::Type) -> Kind {
        use sys::rdma_cm_event_type as from;
        match event {
            from::RDMA_CM_EVENT_ADDR_RESOLVED => Kind::AddressResolved,
            from::RDMA_CM_EVENT_ROUTE_RESOLVED => Kind::RouteResolved,
            from::RDMA_CM_EVENT_CONNECT_REQUEST => Kind::Request,
            from::RDMA_CM_EVENT_ESTABLISHED => Kind::Established,
            from::RDMA_CM_EVENT_REJECTED => Kind::Rejected,
            from::RDMA_CM_EVENT_ADDR_ERROR
            | from::RDMA_CM_EVENT_ROUTE_ERROR
            | from::RDMA_CM_EVENT_CONNECT_ERROR
            | from::RDMA_CM_EVENT_UNREACHABLE => Kind::Failed,
            from::RDMA_CM_EVENT_DISCONNECTED | from::RDMA_CM_EVENT_TIMEWAIT_EXIT => Kind::Disconnected,
            from::RDMA_CM_EVENT_DEVICE_REMOVAL => Kind::DeviceRemoved,
            _ => Kind::Other,
        }
    }
}

/// Names an identifier in events; valid as long as the identifier lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tag(usize);

impl Channel {
    pub(super) fn new() -> io::Result<Arc<Channel>> {
        // SAFETY: the call has no preconditions.
        let raw = pointer(unsafe { sys::rdma_create_event_channel() })?;
        let channel = Arc::new(Channel { raw });
        set_nonblocking(channel.as_fd())?;
        Ok(channel)
    }

    /// Takes the next event; none when no event is pending.
    pub(super) fn next(self: &Arc<Channel>) -> io::Result<Option<Event>> {
        let mut raw = null_mut();
        // SAFETY: the channel is alive, and the result is written to a live variable.
        match check(unsafe { sys::rdma_get_cm_event(self.raw.as_ptr(), &raw mut raw) }) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
        let raw = pointer(raw)?;
        // SAFETY: the event is valid until it is acknowledged. Its parameters are those of a connection, as
        // every identifier here is of RDMA_PS_TCP, and its private data have the length that the event
        // states.
        let event = unsafe {
            let event = &*raw.as_ptr();
            let (data, len) = (event.param.conn.private_data, event.param.conn.private_data_len);
            let said = match data.is_null() {
                true => Vec::new(),
                false => std::slice::from_raw_parts(data.cast::<u8>(), usize::from(len)).to_vec(),
            };
            let kind = Kind::of(event.event);
            let request = match kind {
                Kind::Request => Some(Id::owned(pointer(event.id)?, self.clone())),
                _ => None,
            };
            Event { kind, id: Tag(event.id.addr()), status: event.status, said, request }
        };
        // SAFETY: the event was taken above, once, and no reference to it is left.
        complain("an event", unsafe { sys::rdma_ack_cm_event(raw.as_ptr()) });
        Ok(Some(event))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel, and so its descriptor, is open as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw((*self.raw.as_ptr()).fd as RawFd) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: every identifier holds the channel, so no identifier is left, and all events that were
        // taken are acknowledged.
        unsafe { sys::rdma_destroy_event_channel(self.raw.as_ptr()) }
    }
}

/// An identifier: an address, a listener, or a connection with its queue pair.
pub(super) struct Id {
    raw: NonNull<sys::rdma_cm_id>,
    has_queue_pair: bool,
    /// The domain that the queue pair uses; dropped after the queue pair.
    used: Option<Arc<Domain>>,
    _channel: Arc<Channel>,
}

// SAFETY: librdmacm's calls are thread-safe, and the calls that change the identifier take it exclusively.
unsafe impl Send for Id {}
// SAFETY: as above.
unsafe impl Sync for Id {}

/// The size of a queue pair.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    /// Work requests in flight.
    pub(super) requests: u32,
    /// Inline capacity of a request in bytes, as requested; the device may give more, or refuse.
    pub(super) inline: u32,
}

impl Size {
    /// Attributes of a reliable queue pair of this size that reports its completions to `completions`.
    pub(super) fn attributes(self, completions: &CompletionQueue) -> sys::ibv_qp_init_attr {
        // SAFETY: the structure consists of numbers and pointers, for which zeros are valid.
        let mut wanted: sys::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        wanted.send_cq = completions.raw();
        wanted.recv_cq = completions.raw();
        wanted.qp_type = sys::ibv_qp_type::IBV_QPT_RC;
        wanted.cap.max_send_wr = self.requests;
        wanted.cap.max_send_sge = 1;
        wanted.cap.max_recv_wr = 1;
        wanted.cap.max_recv_sge = 1;
        wanted.cap.max_inline_data = self.inline;
        wanted
    }
}

impl Id {
    pub(super) fn new(channel: &Arc<Channel>) -> io::Result<Id> {
        let mut raw = null_mut();
        // SAFETY: the channel is alive, and the result is written to a live variable.
        check(unsafe {
            sys::rdma_create_id(
                channel.raw.as_ptr(),
                &raw mut raw,
                null_mut(),
                sys::rdma_port_space::RDMA_PS_TCP,
            )
        })?;
        Ok(Id::owned(pointer(raw)?, channel.clone()))
    }

    fn owned(raw: NonNull<sys::rdma_cm_id>, channel: Arc<Channel>) -> Id {
        Id { raw, has_queue_pair: false, used: None, _channel: channel }
    }

    /// The name of this identifier in events.
    pub(super) fn tag(&self) -> Tag {
        Tag(self.raw.as_ptr().addr())
    }

    /// The device's context, once the identifier is bound to a device.
    pub(super) fn context(&self) -> Option<NonNull<sys::ibv_context>> {
        // SAFETY: the identifier is alive.
        NonNull::new(unsafe { (*self.raw.as_ptr()).verbs })
    }

    /// Binds the identifier to a local address, and to the device of that address if there is one.
    pub(super) fn bind(&self, address: SocketAddr) -> io::Result<()> {
        let yes = 1_i32;
        // SAFETY: the identifier is alive, and the option's value is read during the call only. If the call
        // is refused, the default stays.
        unsafe {
            sys::rdma_set_option(
                self.raw.as_ptr(),
                OPTION_ID,
                OPTION_ID_REUSEADDR,
                (&raw const yes).cast_mut().cast(),
                size_of::<i32>(),
            );
        }
        let mut address = RawAddress::from(address);
        // SAFETY: the identifier is alive, and the address, which is of a known family, is read during the
        // call only.
        check(unsafe { sys::rdma_bind_addr(self.raw.as_ptr(), address.as_mut_ptr()) })
    }

    /// Listens for connection requests, of which up to `backlog` may be pending.
    pub(super) fn listen(&self, backlog: i32) -> io::Result<()> {
        // SAFETY: the identifier is alive.
        check(unsafe { sys::rdma_listen(self.raw.as_ptr(), backlog) })
    }

    /// The identifier's own address.
    pub(super) fn local_address(&self) -> Option<SocketAddr> {
        // SAFETY: the identifier is alive; the address is storage for any family.
        let address = unsafe { (*self.raw.as_ptr()).route.addr.src_addr_union.src_storage };
        RawAddress { storage: address }.into()
    }

    /// Starts looking for the device that reaches `target`.
    pub(super) fn resolve_address(&self, target: SocketAddr, limit: Duration) -> io::Result<()> {
        let mut target = RawAddress::from(target);
        // SAFETY: the identifier is alive, and the address is read during the call only.
        check(unsafe {
            sys::rdma_resolve_addr(self.raw.as_ptr(), null_mut(), target.as_mut_ptr(), millis(limit))
        })
    }

    /// Starts looking for the route.
    pub(super) fn resolve_route(&self, limit: Duration) -> io::Result<()> {
        // SAFETY: the identifier is alive.
        check(unsafe { sys::rdma_resolve_route(self.raw.as_ptr(), millis(limit)) })
    }

    /// Creates the queue pair, in a domain of the identifier's device. `completions` has to live as long as
    /// the queue pair. Returns the inline capacity in bytes.
    pub(super) fn make_queue_pair(
        &mut self,
        domain: &Arc<Domain>,
        completions: &CompletionQueue,
        size: Size,
    ) -> io::Result<u32> {
        let mut wanted = size.attributes(completions);
        // SAFETY: the identifier, the domain and the completion queue are alive, and `wanted` is used
        // during the call only.
        check(unsafe { sys::rdma_create_qp(self.raw.as_ptr(), domain.raw(), &raw mut wanted) })?;
        self.has_queue_pair = true;
        self.used = Some(domain.clone());
        Ok(wanted.cap.max_inline_data)
    }

    /// The queue pair.
    pub(super) fn queue_pair(&self) -> Option<NonNull<sys::ibv_qp>> {
        // SAFETY: the identifier is alive.
        NonNull::new(unsafe { (*self.raw.as_ptr()).qp }).filter(|_| self.has_queue_pair)
    }

    /// Destroys the queue pair. After this call, the device no longer accesses a buffer for it.
    pub(super) fn destroy_queue_pair(&mut self) {
        if std::mem::take(&mut self.has_queue_pair) {
            // SAFETY: the identifier is alive and has a queue pair.
            unsafe { sys::rdma_destroy_qp(self.raw.as_ptr()) }
        }
        self.used = None;
    }

    /// Requests the connection from the other end.
    pub(super) fn connect(&self, say: &[u8]) -> io::Result<()> {
        let timeout = ACK_TIMEOUT;
        // SAFETY: the identifier is alive, and the option's value is read during the call only. An older
        // kernel refuses the option, and keeps its longer timeout.
        unsafe {
            sys::rdma_set_option(
                self.raw.as_ptr(),
                OPTION_ID,
                OPTION_ID_ACK_TIMEOUT,
                (&raw const timeout).cast_mut().cast(),
                size_of::<u8>(),
            );
        }
        let mut parameters = parameters(say);
        // SAFETY: the identifier is alive, and the parameters and what they point to are read during
        // the call only.
        check(unsafe { sys::rdma_connect(self.raw.as_ptr(), &raw mut parameters) })
    }

    /// Accepts a request.
    pub(super) fn accept(&self, say: &[u8]) -> io::Result<()> {
        let mut parameters = parameters(say);
        // SAFETY: as for `connect`.
        check(unsafe { sys::rdma_accept(self.raw.as_ptr(), &raw mut parameters) })
    }

    /// Rejects a request.
    pub(super) fn reject(&self, say: &[u8]) -> io::Result<()> {
        let len = u8::try_from(say.len()).unwrap_or(u8::MAX);
        // SAFETY: the identifier is alive, and `len` bytes are read during the call only.
        check(unsafe { sys::rdma_reject(self.raw.as_ptr(), say.as_ptr().cast(), len) })
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        self.destroy_queue_pair();
        // SAFETY: the identifier is alive, has no queue pair, and each of its events that was taken is
        // acknowledged.
        complain("an identifier", unsafe { sys::rdma_destroy_id(self.raw.as_ptr()) });
    }
}

fn parameters(say: &[u8]) -> sys::rdma_conn_param {
    // SAFETY: the structure consists of numbers and a pointer, for which zeros are valid.
    let mut parameters: sys::rdma_conn_param = unsafe { std::mem::zeroed() };
    parameters.private_data = say.as_ptr().cast();
    parameters.private_data_len = u8::try_from(say.len()).unwrap_or(u8::MAX);
    parameters.responder_resources = READS_MAX;
    parameters.initiator_depth = READS_MAX;
    parameters.flow_control = 1;
    parameters.retry_count = RETRIES;
    parameters.rnr_retry_count = RETRIES;
    parameters
}

fn millis(limit: Duration) -> i32 {
    i32::try_from(limit.as_millis()).unwrap_or(i32::MAX).max(1)
}

/// An address in the form of the C libraries.
struct RawAddress {
    storage: libc::sockaddr_storage,
}

impl RawAddress {
    fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        (&raw mut self.storage).cast()
    }
}

impl From<SocketAddr> for RawAddress {
    fn from(address: SocketAddr) -> RawAddress {
        // SAFETY: the structure consists of plain numbers, for which zeros are valid.
        let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        match address {
            SocketAddr::V4(address) => {
                let raw = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
                    sin_zero: [0; 8],
                };
                // SAFETY: the storage is large enough and aligned for every kind of address.
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(raw) }
            }
            SocketAddr::V6(address) => {
                let raw = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: address.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                    sin6_scope_id: address.scope_id(),
                };
                // SAFETY: as for IPv4.
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(raw) }
            }
        }
        RawAddress { storage }
    }
}

impl From<RawAddress> for Option<SocketAddr> {
    fn from(raw: RawAddress) -> Option<SocketAddr> {
        let start = &raw const raw.storage;
        match i32::from(raw.storage.ss_family) {
            libc::AF_INET => {
                // SAFETY: the family says that the storage holds an IPv4 address, for which it is large
                // enough and aligned.
                let address = unsafe { start.cast::<libc::sockaddr_in>().read() };
                let ip = Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddr::new(IpAddr::V4(ip), u16::from_be(address.sin_port)))
            }
            libc::AF_INET6 => {
                // SAFETY: as for IPv4.
                let address = unsafe { start.cast::<libc::sockaddr_in6>().read() };
                let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
                Some(SocketAddr::new(IpAddr::V6(ip), u16::from_be(address.sin6_port)))
            }
            _ => None,
        }
    }
}

/// The addresses of this host's network interfaces, without loopback and link-local addresses.
pub(super) fn host_addresses() -> io::Result<Vec<IpAddr>> {
    let mut first = null_mut();
    // SAFETY: the list is written to a live variable, and freed below.
    check(unsafe { libc::getifaddrs(&raw mut first) })?;
    let mut found = Vec::new();
    let mut next: *const libc::ifaddrs = first;
    while !next.is_null() {
        // SAFETY: the entry belongs to the list, which is not freed yet.
        let entry = unsafe { &*next };
        if !entry.ifa_addr.is_null() {
            // SAFETY: an address of the list has the length of its family.
            found.extend(unsafe { ip_of(entry.ifa_addr) });
        }
        next = entry.ifa_next;
    }
    // SAFETY: the list is freed once, and no reference to it is left.
    unsafe { libc::freeifaddrs(first) };
    found.retain(|ip| match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    });
    Ok(found)
}

/// The IP address of a socket address; none for other families.
///
/// # Safety
/// `address` must point to an address with the length of its family.
unsafe fn ip_of(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: every address begins with its family.
    match i32::from(unsafe { (*address).sa_family }) {
        libc::AF_INET => {
            // SAFETY: the family is IPv4, and the caller guarantees the matching length.
            let address = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(IpAddr::V4(Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes())))
        }
        libc::AF_INET6 => {
            // SAFETY: as for IPv4.
            let address = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            Some(IpAddr::V6(Ipv6Addr::from(address.sin6_addr.s6_addr)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_conversion_to_the_c_form() {
        for text in ["192.0.2.7:10810", "[2001:db8::7]:10810", "[fe80::1%3]:9"] {
            let address: SocketAddr = text.parse().unwrap();
            let back: Option<SocketAddr> = RawAddress::from(address).into();
            assert_eq!(back.map(|back| (back.ip(), back.port())), Some((address.ip(), address.port())));
        }
        let nothing = RawAddress::from("0.0.0.0:0".parse::<SocketAddr>().unwrap());
        let mut other = nothing;
        other.storage.ss_family = libc::AF_UNIX as libc::sa_family_t;
        assert_eq!(Option::<SocketAddr>::from(other), None);
    }

    #[test]
    fn host_addresses_contain_no_loopback() {
        let addresses = host_addresses().unwrap();
        assert!(addresses.iter().all(|ip| !ip.is_loopback()));
    }

    /// On a host without RDMA every call fails with an error, and none ends the process.
    #[test]
    fn without_rdma_there_is_an_error() {
        if let Err(error) = Channel::new() {
            assert!(error.raw_os_error().is_some(), "{error}");
        }
    }
}
