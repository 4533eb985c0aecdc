//! A store of plain memory, served on a socket of its own, for the tests of the server.

#![allow(dead_code, unsafe_code, missing_docs, unreachable_pub)]

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use xpm_protocol::nbd::{BlockSizes, ExportInfo, ExportName, TransmissionFlags};
use xpm_transport::io::{Completion, IoBuf, IoError, Kind, Operation};
use xpm_transport::nbd::server::{Exports, Listener, Opened, Server, ServerOptions};
use xpm_transport::store::{Extent, Posted, Store};

/// Memory that lives until the process ends.
#[derive(Clone, Copy)]
pub struct Memory {
    base: IoBuf,
}

impl Memory {
    pub fn new(len: usize) -> Memory {
        let bytes: &'static mut [u8] = Box::leak(vec![0; len].into_boxed_slice());
        let base = NonNull::new(bytes.as_mut_ptr()).unwrap();
        // SAFETY: the memory is leaked, so it stays mapped; from here on it is accessed through `IoBuf` only.
        Memory { base: unsafe { IoBuf::new(base, len) } }
    }

    /// Copies the memory at `offset` into `bytes`.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        // SAFETY: `bytes` is borrowed exclusively for the time of the copy.
        let target = unsafe { IoBuf::new(NonNull::new(bytes.as_mut_ptr()).unwrap(), bytes.len()) };
        self.part(offset, bytes.len()).copy_to(target);
    }

    pub fn part(&self, offset: u64, len: usize) -> IoBuf {
        self.base.part(offset as usize, len)
    }
}

/// How a store executes its operations.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// In place.
    Direct,
    /// Through buffers; the next poll ends the operations; `capacity` in flight.
    Deferred { capacity: usize },
    /// Through buffers; the operations end when `len` of them are in flight.
    Batches { len: usize },
}

pub struct MemoryStore {
    memory: Memory,
    mode: Mode,
    /// Whether every second MiB is reported as a hole.
    holes: bool,
    alive: Arc<AtomicBool>,
    pending: VecDeque<Completion>,
    wake: rustix::fd::OwnedFd,
}

impl MemoryStore {
    pub fn new(memory: Memory, mode: Mode, holes: bool, alive: Arc<AtomicBool>) -> MemoryStore {
        let flags = rustix::event::EventfdFlags::NONBLOCK;
        let wake = rustix::event::eventfd(0, flags).unwrap();
        MemoryStore { memory, mode, holes, alive, pending: VecDeque::new(), wake }
    }

    fn carry_out(&self, operation: &Operation) -> Result<(), IoError> {
        let memory = self.memory.part(operation.offset, operation.len as usize);
        match (operation.kind, operation.buf) {
            (Kind::Read, Some(buf)) => memory.copy_to(buf),
            (Kind::Write, Some(buf)) => buf.copy_to(memory),
            (Kind::Trim | Kind::Zero, None) => memory.zero(),
            (Kind::Flush, None) => {}
            _ => return Err(IoError::Invalid),
        }
        Ok(())
    }
}

impl Store for MemoryStore {
    fn is_direct(&self) -> bool {
        self.mode == Mode::Direct
    }

    fn direct(&mut self, offset: u64, len: usize) -> Option<IoBuf> {
        // Pieces of 64 KiB, as on a striped volume.
        let piece = (1 << 16) - (offset as usize & 0xffff);
        self.is_direct().then(|| self.memory.part(offset, len.min(piece)))
    }

    fn post(&mut self, operation: Operation) -> Posted {
        let result = self.carry_out(&operation);
        match self.mode {
            Mode::Direct => Posted::Done(result),
            Mode::Deferred { capacity } if self.pending.len() == capacity => Posted::Full,
            Mode::Deferred { .. } | Mode::Batches { .. } => {
                self.pending.push_back(Completion { token: operation.token, result });
                Posted::Pending
            }
        }
    }

    fn submit(&mut self) {
        rustix::io::write(&self.wake, &1_u64.to_ne_bytes()).unwrap();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) {
        // A few at a time, the last first, because completions may come in any order.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        if let Mode::Batches { len } = self.mode {
            if self.pending.len() >= len {
                completions.extend(self.pending.drain(..));
            }
            return;
        }
        completions.extend((0..3).filter_map(|_| self.pending.pop_back()));
        if !self.pending.is_empty() {
            self.submit();
        }
    }

    fn wait_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        use std::os::fd::AsFd;
        Some(self.wake.as_fd())
    }

    fn extent(&mut self, offset: u64, len: u64) -> Extent {
        const MIB: u64 = 1 << 20;
        Extent { len: len.min(MIB - offset % MIB), hole: self.holes && offset / MIB % 2 == 1 }
    }

    fn alive(&self) -> bool {
        self.alive.load(Ordering::Relaxed)
    }
}

/// Exports `direct`, `deferred`, `holes`, and the name of a grant with session tags.
pub struct MemoryExports {
    pub memory: Memory,
    pub size: u64,
    pub alive: Arc<AtomicBool>,
}

impl Exports for MemoryExports {
    fn open(&self, name: &str) -> Option<Opened> {
        let (mode, session) = match name {
            "direct" | "holes" | "" => (Mode::Direct, None),
            "deferred" => (Mode::Deferred { capacity: 5 }, None),
            "batches" => (Mode::Batches { len: 2 }, None),
            name => (Mode::Direct, name.parse::<ExportName>().ok()?.session),
        };
        let flags = [
            TransmissionFlags::HAS_FLAGS,
            TransmissionFlags::SEND_FLUSH,
            TransmissionFlags::SEND_FUA,
            TransmissionFlags::SEND_TRIM,
            TransmissionFlags::SEND_WRITE_ZEROES,
            TransmissionFlags::SEND_FAST_ZERO,
            TransmissionFlags::SEND_CACHE,
            TransmissionFlags::CAN_MULTI_CONN,
        ];
        let flags = flags.into_iter().fold(TransmissionFlags::default(), TransmissionFlags::with);
        let info = ExportInfo { size: self.size, flags, block: BlockSizes::DEFAULT, description: None };
        let store = MemoryStore::new(self.memory, mode, name == "holes", self.alive.clone());
        Some(Opened { info, store: Box::new(store), group: 1, session })
    }

    fn list(&self) -> Option<Vec<String>> {
        Some(vec!["direct".to_owned(), "deferred".to_owned()])
    }
}

/// A server in this process, on a unix socket.
pub struct Fixture {
    pub runtime: tokio::runtime::Runtime,
    pub server: Server,
    pub socket: PathBuf,
    pub memory: Memory,
    pub alive: Arc<AtomicBool>,
    _listener: Listener,
    _dir: tempfile::TempDir,
}

impl Fixture {
    pub fn new(size: u64) -> Fixture {
        Fixture::with(size, ServerOptions { handshake: Duration::from_secs(5), ..Fixture::options() })
    }

    pub fn options() -> ServerOptions {
        ServerOptions { name: "test", loops: 2, buffers_len: 4 << 20, ..ServerOptions::default() }
    }

    pub fn with(size: u64, options: ServerOptions) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nbd.sock");
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let server = Server::start(options).unwrap();
        let memory = Memory::new(size as usize);
        let alive = Arc::new(AtomicBool::new(true));
        let exports = Arc::new(MemoryExports { memory, size, alive: alive.clone() });
        let bound = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let listener = {
            let _guard = runtime.enter();
            server.listen_unix(bound, exports).unwrap()
        };
        Fixture { runtime, server, socket, memory, alive, _listener: listener, _dir: dir }
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }
}

/// Whether a program is installed; a test that needs a missing program prints a line and passes without it.
pub fn have(program: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| Path::new(&dir).join(program).exists()));
    if !found {
        eprintln!("skipped: {program} is not installed");
    }
    found
}
