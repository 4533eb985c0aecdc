//! A virtual machine as a vhost-user-blk device sees one: memory, rings and a driver, in the test's process. The
//! messages are those of the crate `vhost`, whose authors did not write the back-end that is tested.
//!
//! Guest memory is a memfd that is read and written by system calls: the other end has it mapped.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::wait_until;

/// Entries of a ring.
pub const RING: u16 = 64;
/// Bytes of guest memory.
pub const MEMORY: u64 = 16 << 20;
/// Where the test's data may lie: behind all rings and headers.
pub const DATA: u64 = 4 << 20;

/// The offset of the guest's addresses in the monitor's process.
const USER: u64 = 1 << 40;
/// Room of one queue's structures.
const QUEUE: u64 = 0x1_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Kinds of requests, and ends of them, by the standard's numbers.
#[allow(missing_docs)]
pub mod blk {
    pub const READ: u32 = 0;
    pub const WRITE: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    pub const OK: u8 = 0;
    pub const FAILED: u8 = 1;
    pub const UNSUPPORTED: u8 = 2;
}

/// A buffer of a chain: guest address, length, whether the device writes to it.
pub type Buffer = (u64, u32, bool);

/// A queue, the driver's side.
struct Queue {
    kick: EventFd,
    call: EventFd,
    error: EventFd,
    available: u16,
    used: u16,
}

/// A virtual machine.
pub struct Guest {
    memory: File,
    queues: Vec<Queue>,
    inflight: Option<(VhostUserInflight, File)>,
    /// Its connection to the device; none when it is cut.
    pub frontend: Option<Frontend>,
    /// The device's messages come here.
    messages: Option<UnixStream>,
    /// The features that were agreed on.
    pub features: u64,
}

/// A memfd of so many bytes that can only stay as long, or also become shorter.
fn memory_file(len: u64, sealed: bool) -> OwnedFd {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd");
    ftruncate(&file, len).expect("its length");
    if sealed {
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).expect("its seals");
    }
    file
}

impl Guest {
    /// The same with memory that it can cut off.
    ///
    /// # Panics
    /// As [`Guest::new`].
    pub fn with_unsealed_memory(queues: u16) -> Guest {
        Guest { memory: memory_file(MEMORY, false).into(), ..Guest::new(queues) }
    }

    /// Whether a device takes its memory.
    ///
    /// # Panics
    /// When the device refuses something else.
    pub fn offers_memory(&mut self, socket: &Path) -> bool {
        wait_until("the device is there", || UnixStream::connect(socket).is_ok());
        self.greet(socket);
        let region = self.region();
        self.frontend.as_mut().expect("it is connected").set_mem_table(&[region]).is_ok()
    }

    fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.memory.as_raw_fd(),
        }
    }

    /// Has the device look at a queue.
    ///
    /// # Panics
    /// When that cannot be said.
    pub fn kick(&self, queue: usize) {
        self.queues[queue].kick.write(1).expect("a kick");
    }

    /// Cuts all of its memory off.
    ///
    /// # Panics
    /// When it is sealed.
    pub fn cut_memory(&self) {
        ftruncate(&self.memory, 0).expect("it can be cut");
    }

    /// A machine whose disk has so many queues; it is not connected.
    ///
    /// # Panics
    /// When the system has no memory for it.
    pub fn new(queues: u16) -> Guest {
        let memory = memory_file(MEMORY, true);
        let event = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let queue = || Queue { kick: event(), call: event(), error: event(), available: 0, used: 0 };
        let queues = std::iter::repeat_with(queue).take(queues.into()).collect();
        Guest { memory: memory.into(), queues, inflight: None, frontend: None, messages: None, features: 0 }
    }

    /// Connects to a device and starts it, as often as there is one at the socket again. Marks of what is in
    /// flight are asked for the first time, and given back later.
    ///
    /// # Panics
    /// When the device refuses something.
    pub fn connect(&mut self, socket: &Path) {
        wait_until("the device is there", || UnixStream::connect(socket).is_ok());
        self.greet(socket);
        self.start();
    }

    /// Agrees with a device on features.
    fn greet(&mut self, socket: &Path) {
        let count = self.queues.len() as u64;
        // The one that looked whether it is there may not have been turned away yet.
        wait_until("the device answers", || {
            let frontend = Frontend::connect(socket, count).expect("it is there");
            let answers = frontend.get_features().is_ok();
            self.frontend = answers.then(|| frontend.clone());
            answers
        });
        let frontend = self.frontend.as_mut().expect("it is connected");
        frontend.set_owner().expect("owner");
        self.features = frontend.get_features().expect("features");
        let protocol = frontend.get_protocol_features().expect("protocol features");
        frontend.set_protocol_features(protocol).expect("protocol features");
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(self.features).expect("features");
        assert!(frontend.get_queue_num().expect("queues") >= count);
        if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair().expect("a socket pair");
            frontend.set_backend_request_fd(&theirs).expect("a socket for its messages");
            self.messages = Some(ours);
        }
    }

    /// Describes memory and rings, and has them served.
    ///
    /// # Panics
    /// When the device refuses something.
    pub fn start(&mut self) {
        let region = self.region();
        let frontend = self.frontend.as_mut().expect("it is connected");
        if self.inflight.is_none() {
            let wanted = VhostUserInflight {
                num_queues: self.queues.len() as u16,
                queue_size: RING,
                ..VhostUserInflight::default()
            };
            self.inflight = Some(frontend.get_inflight_fd(&wanted).expect("marks of what is in flight"));
        }
        if let Some((info, file)) = &self.inflight {
            frontend.set_inflight_fd(info, file.as_raw_fd()).expect("marks of what is in flight");
        }
        frontend.set_mem_table(&[region]).expect("memory");
        for (index, queue) in self.queues.iter().enumerate() {
            let at = USER + index as u64 * QUEUE;
            frontend.set_vring_num(index, RING).expect("size");
            let addresses = VringConfigData {
                queue_max_size: RING,
                queue_size: RING,
                flags: 0,
                desc_table_addr: at,
                used_ring_addr: at + 0x2000,
                avail_ring_addr: at + 0x1000,
                log_addr: None,
            };
            frontend.set_vring_addr(index, &addresses).expect("addresses");
            frontend.set_vring_base(index, queue.used).expect("base");
            frontend.set_vring_call(index, &queue.call).expect("call");
            frontend.set_vring_err(index, &queue.error).expect("error");
            frontend.set_vring_kick(index, &queue.kick).expect("kick");
            frontend.set_vring_enable(index, true).expect("enable");
        }
    }

    /// Resets the device: its rings are stopped and begin anew, empty, with nothing in flight.
    ///
    /// # Panics
    /// When the device refuses something.
    pub fn reset(&mut self) {
        for index in 0..self.queues.len() {
            self.frontend.as_ref().expect("it is connected").get_vring_base(index).expect("base");
            self.write(index as u64 * QUEUE, &vec![0; QUEUE as usize]);
            let queue = &mut self.queues[index];
            (queue.available, queue.used) = (0, 0);
            let _ = queue.error.read();
        }
        self.inflight = None;
        self.start();
    }

    /// Cuts the connection.
    pub fn disconnect(&mut self) {
        (self.frontend, self.messages) = (None, None);
    }

    /// Bytes of guest memory that were ever used, by anybody.
    ///
    /// # Panics
    /// When the system does not tell.
    pub fn resident(&self) -> u64 {
        self.memory.metadata().expect("a file").blocks() * 512
    }

    /// Reads guest memory.
    ///
    /// # Panics
    /// When it is not there.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, address).expect("guest memory");
        bytes
    }

    /// Writes guest memory.
    ///
    /// # Panics
    /// When it is not there.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, address).expect("guest memory");
    }

    fn describe(&self, table: u64, index: u16, address: u64, len: u32, (flags, next): (u16, u16)) {
        let bytes =
            [address.to_le_bytes().as_slice(), &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
                .concat();
        self.write(table + u64::from(index) * 16, &bytes);
    }

    /// Writes a chain of buffers into a table from `first` on.
    pub fn chain(&self, table: u64, first: u16, buffers: &[Buffer]) {
        for (index, &(address, len, writable)) in (first..).zip(buffers) {
            let more = usize::from(index - first) + 1 < buffers.len();
            let flags = if more { NEXT } else { 0 } | if writable { WRITE } else { 0 };
            self.describe(table, index, address, len, (flags, index + 1));
        }
    }

    /// The table of descriptors of a queue.
    pub fn table(&self, queue: usize) -> u64 {
        queue as u64 * QUEUE
    }

    /// Makes a head available and kicks.
    ///
    /// # Panics
    /// When the kick cannot be written.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let at = self.table(queue) + 0x1000;
        let available = self.queues[queue].available;
        self.write(at + 4 + 2 * u64::from(available % RING), &head.to_le_bytes());
        self.queues[queue].available = available.wrapping_add(1);
        self.set_available(queue, self.queues[queue].available);
    }

    /// Says up to which index there is something available, and kicks.
    ///
    /// # Panics
    /// When the kick cannot be written.
    pub fn set_available(&mut self, queue: usize, index: u16) {
        let at = self.table(queue) + 0x1000;
        self.write(at + 2, &index.to_le_bytes());
        self.queues[queue].kick.write(1).expect("a kick");
    }

    /// Submits a request in slot `slot` (up to 15) of a queue: kind, sector, its data.
    pub fn submit(&mut self, queue: usize, slot: u16, (kind, sector): (u32, u64), data: &[Buffer]) {
        let header = self.header(queue, slot);
        self.write(header, &[kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat());
        self.write(header + 16, &[0xff]);
        let buffers = [&[(header, 16, false)], data, &[(header + 16, 1, true)]].concat();
        match buffers.len() {
            ..=4 => self.chain(self.table(queue), slot * 4, &buffers),
            len => {
                let table = self.table(queue) + 0x4000 + u64::from(slot) * 0x800;
                self.chain(table, 0, &buffers);
                self.describe(self.table(queue), slot * 4, table, len as u32 * 16, (INDIRECT, 0));
            }
        }
        self.offer(queue, slot * 4);
    }

    fn header(&self, queue: usize, slot: u16) -> u64 {
        self.table(queue) + 0x3000 + u64::from(slot) * 32
    }

    /// The entries of a queue used since the last call: slots and lengths.
    pub fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let at = self.table(queue) + 0x2000;
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let mut slots = Vec::new();
        loop {
            let index = self.read(at + 2, 2);
            let index = u16::from_le_bytes([index[0], index[1]]);
            // To be called for the next one; what was used before the device could see that is looked for once more.
            self.write(self.table(queue) + 0x1000 + 4 + 2 * u64::from(RING), &index.to_le_bytes());
            fence(Ordering::SeqCst);
            if self.queues[queue].used == index && self.read(at + 2, 2) == index.to_le_bytes() {
                return slots;
            }
            while self.queues[queue].used != index {
                let place = u64::from(self.queues[queue].used % RING);
                let element = self.read(at + 4 + 8 * place, 8);
                slots.push((word(&element[..4]) as u16 / 4, word(&element[4..])));
                self.queues[queue].used = self.queues[queue].used.wrapping_add(1);
            }
        }
    }

    /// Waits until the device has used so many requests, and looks when it is called only; their slots, lengths and
    /// status.
    ///
    /// # Panics
    /// When it does not.
    pub fn wait(&mut self, queue: usize, count: usize) -> Vec<(u16, u32, u8)> {
        let mut got = self.used(queue);
        while got.len() < count {
            wait_until("the device calls", || self.queues[queue].call.read().is_ok());
            got.extend(self.used(queue));
        }
        assert_eq!(got.len(), count, "none is used twice");
        got.iter().map(|&(slot, len)| (slot, len, self.status(queue, slot))).collect()
    }

    /// The status byte of a slot; 0xff before its end.
    pub fn status(&self, queue: usize, slot: u16) -> u8 {
        self.read(self.header(queue, slot) + 16, 1)[0]
    }

    /// Submits one request and waits for it: the length that was written, and the status.
    ///
    /// # Panics
    /// When it does not end.
    pub fn run(&mut self, queue: usize, request: (u32, u64), data: &[Buffer]) -> (u32, u8) {
        self.submit(queue, 0, request, data);
        let (_, len, status) = self.wait(queue, 1)[0];
        (len, status)
    }

    /// Whether the device said that a queue's ring is broken, since this was asked last.
    pub fn is_broken(&self, queue: usize) -> bool {
        self.queues[queue].error.read().is_ok()
    }

    /// Bytes of the configuration space.
    ///
    /// # Panics
    /// When the device refuses.
    pub fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let frontend = self.frontend.as_mut().expect("it is connected");
        let room = vec![0; len as usize];
        frontend
            .get_config(offset, len, VhostUserConfigFlags::empty(), &room)
            .expect("the configuration space")
            .1
    }

    /// Its size by the configuration space.
    ///
    /// # Panics
    /// When the device refuses.
    pub fn size(&mut self) -> u64 {
        let sectors = self.config(0, 8);
        u64::from_le_bytes(sectors.try_into().expect("eight bytes")) * 512
    }

    /// Waits for the next message of the device; its number.
    ///
    /// # Panics
    /// When there is none.
    pub fn message(&mut self) -> u32 {
        let messages = self.messages.as_mut().expect("it is connected");
        messages.set_read_timeout(Some(crate::LIMIT)).expect("a limit");
        let mut header = [0; 12];
        messages.read_exact(&mut header).expect("a message");
        u32::from_ne_bytes([header[0], header[1], header[2], header[3]])
    }

    /// Gives the device more memory, and takes it away.
    ///
    /// # Panics
    /// When the device refuses.
    pub fn plug(&mut self, guest: u64, len: u64, plugged: bool) -> File {
        let file = memory_file(len, true);
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: guest,
            memory_size: len,
            userspace_addr: USER + guest,
            mmap_offset: 0,
            mmap_handle: file.as_fd().as_raw_fd(),
        };
        let frontend = self.frontend.as_mut().expect("it is connected");
        match plugged {
            true => drop(frontend.add_mem_region(&region).expect("it takes memory")),
            false => frontend.remove_mem_region(&region).expect("it gives memory back"),
        }
        file.into()
    }
}
