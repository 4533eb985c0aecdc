//! Safe wrapper of libibverbs (verbs(7)): protection domains, memory regions, completion queues and queue
//! pairs, as owned values that are destroyed in the right order.
//!
//! The libraries are loaded at run time; without them every constructor fails with `EOPNOTSUPP`.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use rdma_mummy_sys as sys;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::cm::Id;
use crate::io::IoBuf;

/// The accesses that registered memory allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// This end only.
    Local,
    /// The other end may read it.
    RemoteRead,
    /// The other end may read and write it.
    RemoteWrite,
}

impl Access {
    const fn flags(self) -> i32 {
        let write = sys::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0;
        let flags = match self {
            Access::Local => write,
            Access::RemoteRead => sys::ibv_access_flags::IBV_ACCESS_REMOTE_READ.0,
            Access::RemoteWrite => {
                write
                    | sys::ibv_access_flags::IBV_ACCESS_REMOTE_READ.0
                    | sys::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0
            }
        };
        flags as i32
    }
}

/// An open device.
pub(super) struct Device {
    context: NonNull<sys::ibv_context>,
    keeper: Keeper,
}

/// The resource that keeps a device open.
enum Keeper {
    /// The context belongs to the connection manager; this identifier is bound to the device.
    Manager(#[expect(dead_code, reason = "only held")] Id),
    /// This module opened the device.
    Own,
}

// SAFETY: verbs may be called from any thread (verbs(7) objects are thread-safe); the keeper is only held.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// Limits of a device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Most work requests in one queue.
    pub(super) work_requests: u32,
    /// Most entries of one completion queue.
    pub(super) completions: u32,
    /// Most concurrent READs that a queue pair answers.
    pub(super) reads_answered: u8,
    /// Most concurrent READs that a queue pair issues.
    pub(super) reads_asked: u8,
}

impl Device {
    /// The device that the identifier `keeper` is bound to; the device keeps the identifier. None if it is
    /// not bound to a device.
    pub(super) fn of(keeper: Id) -> Option<Arc<Device>> {
        Some(Arc::new(Device { context: keeper.context()?, keeper: Keeper::Manager(keeper) }))
    }

    /// All devices of this host that can be opened, without the connection manager.
    pub(super) fn all() -> io::Result<Vec<Arc<Device>>> {
        let mut count = 0;
        // SAFETY: `count` is valid for writing one number.
        let list = pointer(unsafe { sys::ibv_get_device_list(&raw mut count) })?;
        let count = usize::try_from(count).unwrap_or(0);
        let open = |place| {
            // SAFETY: the list has `count` devices and is not freed yet.
            let context = NonNull::new(unsafe { sys::ibv_open_device(*list.as_ptr().add(place)) })?;
            Some(Arc::new(Device { context, keeper: Keeper::Own }))
        };
        let devices = (0..count).filter_map(open).collect();
        // SAFETY: the list is freed once; open devices do not need it.
        unsafe { sys::ibv_free_device_list(list.as_ptr()) };
        Ok(devices)
    }

    /// Whether this module opened the device.
    pub(super) const fn is_own(&self) -> bool {
        matches!(self.keeper, Keeper::Own)
    }

    pub(super) const fn raw(&self) -> *mut sys::ibv_context {
        self.context.as_ptr()
    }

    /// Whether the identifier is bound to this device.
    pub(super) fn is_of(&self, id: &Id) -> bool {
        id.context() == Some(self.context)
    }

    /// Its name, like `mlx5_0`.
    pub(super) fn name(&self) -> String {
        // SAFETY: the context is open as long as the keeper lives, its device is set at opening, and the name
        // is a zero-terminated string.
        let name =
            unsafe { std::ffi::CStr::from_ptr(sys::ibv_get_device_name((*self.context.as_ptr()).device)) };
        name.to_string_lossy().into_owned()
    }

    pub(super) fn limits(&self) -> io::Result<Limits> {
        // SAFETY: the structure consists of plain numbers, for which zeros are valid.
        let mut found: sys::ibv_device_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, and `found` is written only during the call.
        check(unsafe { sys::ibv_query_device(self.context.as_ptr(), &raw mut found) })?;
        Ok(Limits {
            work_requests: found.max_qp_wr.max(1) as u32,
            completions: found.max_cqe.max(1) as u32,
            reads_answered: u8::try_from(found.max_qp_rd_atom).unwrap_or(u8::MAX),
            reads_asked: u8::try_from(found.max_qp_init_rd_atom).unwrap_or(u8::MAX),
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.is_own() {
            // SAFETY: this module opened the device, and every object of the device holds it, so no object is
            // left.
            complain("a device", unsafe { sys::ibv_close_device(self.context.as_ptr()) });
        }
    }
}

/// A protection domain: memory that is registered in it can be accessed over the domain's queue pairs only.
pub(super) struct Domain {
    raw: NonNull<sys::ibv_pd>,
    device: Arc<Device>,
}

// SAFETY: as for `Device`.
unsafe impl Send for Domain {}
// SAFETY: as for `Device`.
unsafe impl Sync for Domain {}

impl Domain {
    pub(super) fn new(device: Arc<Device>) -> io::Result<Arc<Domain>> {
        // SAFETY: the context is open as long as `device` lives.
        let raw = pointer(unsafe { sys::ibv_alloc_pd(device.context.as_ptr()) })?;
        Ok(Arc::new(Domain { raw, device }))
    }

    pub(super) const fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(super) const fn raw(&self) -> *mut sys::ibv_pd {
        self.raw.as_ptr()
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: every object in the domain holds it, so no object is left.
        complain("a protection domain", unsafe { sys::ibv_dealloc_pd(self.raw.as_ptr()) });
    }
}

/// Registered memory: pinned, and known to the device. Registering blocks until all pages are faulted in.
pub(super) struct Registration {
    raw: NonNull<sys::ibv_mr>,
    start: usize,
    len: usize,
    _domain: Arc<Domain>,
}

// SAFETY: as for `Device`.
unsafe impl Send for Registration {}
// SAFETY: as for `Device`; its keys never change.
unsafe impl Sync for Registration {}

impl Registration {
    /// Registers a buffer, whose memory has to stay mapped as long as the registration lives. (The device
    /// keeps the pages even after an unmap, but would then access pages that no process sees.)
    pub(super) fn new(domain: &Arc<Domain>, buffer: IoBuf, access: Access) -> io::Result<Registration> {
        // SAFETY: the domain is alive. The range is mapped memory by the contract of `IoBuf`. The device
        // accesses the range only on behalf of work requests, whose buffers are `IoBuf`s too, and of the
        // other end, which the caller permits.
        let raw =
            unsafe { sys::ibv_reg_mr(domain.raw(), buffer.as_ptr().cast(), buffer.len(), access.flags()) };
        let (start, len) = (buffer.as_ptr().addr(), buffer.len());
        Ok(Registration { raw: pointer(raw)?, start, len, _domain: domain.clone() })
    }

    /// The key for this end, if the whole buffer is within the registration.
    pub(super) fn local_key(&self, buffer: IoBuf) -> Option<u32> {
        let start = buffer.as_ptr().addr().checked_sub(self.start)?;
        // SAFETY: the region is registered as long as `self` lives.
        (start.checked_add(buffer.len())? <= self.len).then(|| unsafe { (*self.raw.as_ptr()).lkey })
    }

    /// The key for the other end.
    pub(super) fn remote_key(&self) -> u32 {
        // SAFETY: the region is registered as long as `self` lives.
        unsafe { (*self.raw.as_ptr()).rkey }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: the memory is registered, and is not deregistered twice.
        complain("registered memory", unsafe { sys::ibv_dereg_mr(self.raw.as_ptr()) });
    }
}

/// The completion of a work request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ended {
    /// The id that the request was posted with.
    pub(super) id: u64,
    /// The status of `enum ibv_wc_status`; 0: success.
    pub(super) status: u32,
}

/// A completion queue, and the descriptor that reports completions.
pub(super) struct CompletionQueue {
    raw: NonNull<sys::ibv_cq>,
    channel: NonNull<sys::ibv_comp_channel>,
    /// Events that were taken and not acknowledged yet.
    events: u32,
    _device: Arc<Device>,
}

// SAFETY: as for `Device`; methods that change the queue take it exclusively.
unsafe impl Send for CompletionQueue {}

/// Completions taken in one call.
const BATCH: usize = 16;
/// Events that are acknowledged together: doing so takes a lock.
const EVENTS_MAX: u32 = 1 << 16;

impl CompletionQueue {
    /// A queue for up to `depth` completions.
    pub(super) fn new(device: Arc<Device>, depth: u32) -> io::Result<CompletionQueue> {
        let context = device.context.as_ptr();
        // SAFETY: the context is open as long as `device` lives.
        let channel = pointer(unsafe { sys::ibv_create_comp_channel(context) })?;
        // SAFETY: the context is open, the channel belongs to it.
        let raw = pointer(unsafe {
            sys::ibv_create_cq(context, depth.cast_signed(), null_mut(), channel.as_ptr(), 0)
        });
        let raw = raw.inspect_err(|_| {
            // SAFETY: the channel has no queue.
            complain("a completion channel", unsafe { sys::ibv_destroy_comp_channel(channel.as_ptr()) });
        })?;
        let queue = CompletionQueue { raw, channel, events: 0, _device: device };
        set_nonblocking(queue.as_fd())?;
        Ok(queue)
    }

    /// Passes each available completion to `each`. No system call on real hardware.
    pub(super) fn poll(&mut self, mut each: impl FnMut(Ended)) -> io::Result<()> {
        loop {
            // SAFETY: the structure consists of plain numbers, for which zeros are valid.
            let mut found: [sys::ibv_wc; BATCH] = unsafe { std::mem::zeroed() };
            // SAFETY: the queue is alive, and `found` has room for `BATCH` completions.
            let count = unsafe { sys::ibv_poll_cq(self.raw.as_ptr(), BATCH as i32, found.as_mut_ptr()) };
            let count = usize::try_from(count).map_err(|_| io::Error::from_raw_os_error(libc::EIO))?;
            for ended in found.iter().take(count) {
                each(Ended { id: ended.wr_id, status: ended.status });
            }
            if count < BATCH {
                return Ok(());
            }
        }
    }

    /// Makes the descriptor readable with the next completion. A completion that arrived before is not
    /// reported.
    pub(super) fn arm(&mut self) -> io::Result<()> {
        // SAFETY: the queue is alive.
        check(unsafe { sys::ibv_req_notify_cq(self.raw.as_ptr(), 0) })
    }

    /// Takes the event of a completion; after it the queue is no longer armed. Returns false when there is no
    /// event.
    pub(super) fn take_event(&mut self) -> bool {
        let (mut queue, mut context) = (null_mut(), null_mut());
        // SAFETY: the channel is alive, and the results are written to live variables.
        let status =
            unsafe { sys::ibv_get_cq_event(self.channel.as_ptr(), &raw mut queue, &raw mut context) };
        if status != 0 {
            return false;
        }
        self.events += 1;
        if self.events == EVENTS_MAX {
            self.acknowledge();
        }
        true
    }

    fn acknowledge(&mut self) {
        // SAFETY: exactly `events` events were taken and not acknowledged yet.
        unsafe { sys::ibv_ack_cq_events(self.raw.as_ptr(), std::mem::take(&mut self.events)) }
    }

    pub(super) const fn raw(&self) -> *mut sys::ibv_cq {
        self.raw.as_ptr()
    }
}

impl AsFd for CompletionQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel, and so its descriptor, is open as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw((*self.channel.as_ptr()).fd as RawFd) }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        self.acknowledge();
        // SAFETY: the queue pair was destroyed before, all events are acknowledged, and the channel is
        // destroyed after the queue.
        unsafe {
            complain("a completion queue", sys::ibv_destroy_cq(self.raw.as_ptr()));
            complain("a completion channel", sys::ibv_destroy_comp_channel(self.channel.as_ptr()));
        }
    }
}

/// A one-sided access.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    /// Copied into its completion.
    pub(super) id: u64,
    /// READ into the buffer, or WRITE from it.
    pub(super) is_read: bool,
    /// Memory of this end; not empty, at most 1 GiB.
    pub(super) buffer: IoBuf,
    /// The buffer's key; none for a WRITE whose bytes are copied into the request now.
    pub(super) local_key: Option<u32>,
    /// Address at the other end.
    pub(super) address: u64,
    /// The key at the other end.
    pub(super) remote_key: u32,
    /// Whether its completion is reported; an error always is.
    pub(super) signalled: bool,
}

/// Requests that are posted together: one call, one doorbell of the device.
pub(super) struct Batch {
    requests: Vec<sys::ibv_send_wr>,
    pieces: Vec<sys::ibv_sge>,
}

// SAFETY: the pointers in the requests are set only during `post`, and point into the batch itself.
unsafe impl Send for Batch {}

impl Batch {
    /// A batch of at most `room` requests.
    pub(super) fn new(room: usize) -> Batch {
        Batch { requests: Vec::with_capacity(room), pieces: Vec::with_capacity(room) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Adds a request; the caller has checked that there is room.
    pub(super) fn push(&mut self, request: &Request) {
        debug_assert!(self.requests.len() < self.requests.capacity(), "more requests than room");
        self.pieces.push(sys::ibv_sge {
            addr: request.buffer.as_ptr().addr() as u64,
            length: request.buffer.len() as u32,
            lkey: request.local_key.unwrap_or_default(),
        });
        // SAFETY: the structure consists of plain numbers, unions of numbers, and null pointers.
        let mut posted: sys::ibv_send_wr = unsafe { std::mem::zeroed() };
        posted.wr_id = request.id;
        posted.num_sge = 1;
        posted.opcode = match request.is_read {
            true => sys::ibv_wr_opcode::IBV_WR_RDMA_READ,
            false => sys::ibv_wr_opcode::IBV_WR_RDMA_WRITE,
        };
        if request.signalled {
            posted.send_flags |= sys::ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
        if request.local_key.is_none() {
            posted.send_flags |= sys::ibv_send_flags::IBV_SEND_INLINE.0;
        }
        posted.wr.rdma = sys::rdma_t { remote_addr: request.address, rkey: request.remote_key };
        self.requests.push(posted);
    }

    /// Posts all requests on a queue pair and empties the batch.
    ///
    /// # Errors
    /// When the queue pair accepts no more requests; it is broken then.
    pub(super) fn post(&mut self, queue_pair: NonNull<sys::ibv_qp>) -> io::Result<()> {
        let count = self.requests.len();
        for index in 0..count {
            let piece: *mut sys::ibv_sge = &raw mut self.pieces[index];
            let next = match index + 1 < count {
                true => &raw mut self.requests[index + 1],
                false => null_mut(),
            };
            self.requests[index].sg_list = piece;
            self.requests[index].next = next;
        }
        let mut refused = null_mut();
        // SAFETY: the queue pair is alive (its owner calls), and the chain, which is not empty,
        // leads to elements of the two vectors, which are not touched during the call.
        let status =
            unsafe { sys::ibv_post_send(queue_pair.as_ptr(), self.requests.as_mut_ptr(), &raw mut refused) };
        self.requests.clear();
        self.pieces.clear();
        check(status)
    }
}

/// The result of a call that returns 0 or an error number, or -1 with the number in `errno`.
pub(super) fn check(status: i32) -> io::Result<()> {
    match status {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        number => Err(io::Error::from_raw_os_error(number.abs())),
    }
}

/// The result of a call that returns null for an error, with its number in `errno`.
pub(super) fn pointer<T>(raw: *mut T) -> io::Result<NonNull<T>> {
    NonNull::new(raw).ok_or_else(io::Error::last_os_error)
}

/// Logs that an object could not be destroyed; no other action is possible.
pub(super) fn complain(what: &str, status: i32) {
    if let Err(error) = check(status) {
        tracing::warn!("cannot destroy {what}: {error}");
    }
}

pub(super) fn set_nonblocking(descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let flags = fcntl_getfl(descriptor)?;
    Ok(fcntl_setfl(descriptor, flags | OFlags::NONBLOCK)?)
}
