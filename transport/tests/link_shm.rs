//! Both ends of shared memory, over a real socket.

mod support;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, MlockAllFlags, ProtFlags, mlockall, mmap, munlockall};
use support::memory::Memory;
use support::model::{Shape, check};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use xpm_protocol::GrantKey;
use xpm_transport::shm::client::{ConnectError, ShmGrant, ShmLink, connect};
use xpm_transport::shm::server::{Listener, ShmExport, ShmExports, ShmServer};
use xpm_transport::{Completion, IoError, Kind, Link, LinkDown, Operation};

const GROUP: u128 = 77;
const MIB: u64 = 1 << 20;

fn key() -> GrantKey {
    GrantKey::from_bytes([0x33; 32])
}

struct Grants {
    regions: Mutex<Vec<(Arc<OwnedFd>, u64)>>,
    revoked: AtomicBool,
}

impl ShmExports for Grants {
    fn open(&self, asked: &GrantKey) -> Option<ShmExport> {
        let regions = self.regions.lock().unwrap().clone();
        (*asked == key() && !self.revoked.load(Ordering::SeqCst))
            .then_some(ShmExport { group: GROUP, regions })
    }
}

struct Appliance {
    grants: Arc<Grants>,
    server: ShmServer,
    path: PathBuf,
    _listener: Listener,
    _runtime: Runtime,
    _folder: TempDir,
}

fn region(len: u64, seals: SealFlags) -> (Arc<OwnedFd>, u64) {
    let memory = memfd_create("region", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&memory, len).unwrap();
    fcntl_add_seals(&memory, seals).unwrap();
    (Arc::new(memory), len)
}

fn regions(lens: &[u64]) -> Vec<(Arc<OwnedFd>, u64)> {
    lens.iter().map(|len| region(*len, SealFlags::SHRINK | SealFlags::GROW)).collect()
}

impl Appliance {
    fn new(regions: Vec<(Arc<OwnedFd>, u64)>) -> Appliance {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("socket");
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let grants = Arc::new(Grants { regions: Mutex::new(regions), revoked: AtomicBool::new(false) });
        let server = ShmServer::new(grants.clone());
        let listener = {
            let _entered = runtime.enter();
            server.listen(UnixListener::bind(&path).unwrap()).unwrap()
        };
        Appliance { grants, server, path, _listener: listener, _runtime: runtime, _folder: folder }
    }

    fn connect(&self) -> Result<Arc<ShmGrant>, ConnectError> {
        connect(&self.path, &key(), support::LIMIT)
    }

    /// Memory that the regions use, in bytes.
    fn held(&self) -> u64 {
        let regions = self.grants.regions.lock().unwrap();
        regions.iter().map(|(memory, _)| fstat(memory).unwrap().st_blocks as u64 * 512).sum()
    }

    fn wait_for_connections(&self, count: usize) {
        for _ in 0..2000 {
            if self.server.connections(Some(GROUP)) == count {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{} connections, not {count}", self.server.connections(Some(GROUP)));
    }
}

#[test]
fn model() {
    let appliance = Appliance::new(regions(&[4 * MIB, 8 * MIB, 4 * MIB]));
    let grant = appliance.connect().unwrap();
    assert_eq!(grant.size(), 16 * MIB);
    for (depth, hole, seed) in [(1, 4096, 1), (32, 1, 2), (32, 100, 3)] {
        let shape = Shape { size: 16 * MIB, depth, len_max: 2 * MIB, hole, operations: 400, seed };
        check(&mut ShmLink::new(grant.clone(), depth), shape);
    }
    // A second client sees the same bytes.
    let other = appliance.connect().unwrap();
    let (one, two) = (Memory::new(4096), Memory::new(4096));
    one.set(0, b"seen by both");
    run(&mut ShmLink::new(grant, 1), Kind::Write, 4 * MIB - 2048, Some(&one), 4096).unwrap();
    run(&mut ShmLink::new(other, 1), Kind::Read, 4 * MIB - 2048, Some(&two), 4096).unwrap();
    assert_eq!(two.get(0, 12), b"seen by both");
}

fn run(
    link: &mut ShmLink,
    kind: Kind,
    offset: u64,
    memory: Option<&Memory>,
    len: u64,
) -> Result<(), IoError> {
    let buf = memory.map(Memory::buf);
    link.post(Operation { kind, offset, len, buf, token: 5 }).unwrap();
    link.submit();
    let mut completions = Vec::new();
    link.poll(&mut completions).unwrap();
    let [Completion { token: 5, result }] = completions[..] else { panic!("{completions:?}") };
    result
}

#[test]
fn trim_gives_memory_back_across_regions() {
    let appliance = Appliance::new(regions(&[MIB, MIB]));
    let mut link = ShmLink::new(appliance.connect().unwrap(), 4);
    run(&mut link, Kind::Zero, 0, None, 2 * MIB).unwrap();
    assert_eq!(appliance.held(), 2 * MIB);
    run(&mut link, Kind::Trim, 1, None, 2 * MIB - 2).unwrap();
    assert_eq!(appliance.held(), 2 * 4096, "the pages at both ends are kept");
    run(&mut link, Kind::Trim, 0, None, 2 * MIB).unwrap();
    assert_eq!(appliance.held(), 0);
}

#[test]
fn operations_outside_the_grant_are_refused() {
    let appliance = Appliance::new(regions(&[MIB, MIB]));
    let mut link = ShmLink::new(appliance.connect().unwrap(), 2);
    let memory = Memory::new(4096);
    for (kind, offset, len) in [
        (Kind::Read, 2 * MIB, 4096),
        (Kind::Write, 2 * MIB - 1, 4096),
        (Kind::Trim, u64::MAX, 2),
        (Kind::Zero, 0, u64::MAX),
        (Kind::Read, 0, 4095),
    ] {
        assert_eq!(run(&mut link, kind, offset, Some(&memory), len), Err(IoError::Invalid));
    }
    assert_eq!(link.direct(2 * MIB, 1), None);
    assert_eq!(link.direct(2 * MIB - 1, 2), None);
    let (first, last) = (link.direct(0, 1).unwrap(), link.direct(2 * MIB - 1, 1).unwrap());
    assert_eq!(last.as_ptr() as usize - first.as_ptr() as usize, (2 * MIB - 1) as usize, "one range");
    link.post(Operation { kind: Kind::Flush, offset: 0, len: 0, buf: None, token: 1 }).unwrap();
    link.post(Operation { kind: Kind::Flush, offset: 0, len: 0, buf: None, token: 2 }).unwrap();
    assert!(link.post(Operation { kind: Kind::Flush, offset: 0, len: 0, buf: None, token: 3 }).is_err());
}

#[test]
fn a_grant_of_many_regions() {
    let appliance = Appliance::new(regions(&[64 << 10; 300]));
    let grant = appliance.connect().unwrap();
    let mut link = ShmLink::new(grant, 1);
    let memory = Memory::new(1);
    for number in 0..300_u64 {
        memory.set(0, &[number as u8]);
        run(&mut link, Kind::Write, number * (64 << 10), Some(&memory), 1).unwrap();
    }
    for (number, (region, _)) in appliance.grants.regions.lock().unwrap().iter().enumerate() {
        let mut byte = [0];
        rustix::io::pread(region, &mut byte, 0).unwrap();
        assert_eq!(byte, [number as u8], "in order");
    }
}

#[test]
fn a_wrong_key_is_an_unknown_grant() {
    let appliance = Appliance::new(regions(&[MIB]));
    let wrong = GrantKey::from_bytes([0x34; 32]);
    let error = connect(&appliance.path, &wrong, support::LIMIT).expect_err("a wrong key");
    assert!(matches!(error, ConnectError::UnknownExport), "{error}");
    appliance.connect().unwrap();
}

#[test]
fn a_revoked_grant_is_unmapped() {
    let appliance = Appliance::new(regions(&[MIB]));
    let mut link = ShmLink::new(appliance.connect().unwrap(), 1);
    let mut busy = ShmLink::new(link.grant().clone(), 1);
    appliance.wait_for_connections(1);
    let revoked = std::thread::scope(|scope| {
        appliance.grants.revoked.store(true, Ordering::SeqCst);
        let closing = scope.spawn(|| appliance.server.close_group(GROUP));
        assert!(support::readable(link.wait_fd().unwrap(), support::LIMIT));
        assert_eq!(link.poll(&mut Vec::new()), Err(LinkDown::Revoked));
        // A link that is never idle notices the revocation as well.
        let memory = Memory::new(1);
        let down = (0..10_000).find_map(|token| {
            let buf = Some(memory.buf());
            busy.post(Operation { kind: Kind::Write, offset: 0, len: 1, buf, token }).unwrap();
            busy.poll(&mut Vec::new()).err()
        });
        assert_eq!(down, Some(LinkDown::Revoked));
        let before = appliance.held();
        busy.post(Operation { kind: Kind::Trim, offset: 0, len: MIB, buf: None, token: 1 }).unwrap();
        assert_eq!(appliance.held(), before, "nothing is touched any more");
        drop((link, busy));
        closing.join().unwrap()
    });
    assert_eq!(revoked, 0, "all clients let go");
    appliance.wait_for_connections(0);
    assert!(matches!(appliance.connect(), Err(ConnectError::UnknownExport)));
}

#[test]
fn a_client_that_does_not_unmap_is_reported() {
    let appliance = Appliance::new(regions(&[MIB]));
    let grant = appliance.connect().unwrap();
    appliance.wait_for_connections(1);
    appliance.grants.revoked.store(true, Ordering::SeqCst);
    assert_eq!(appliance.server.close_group(GROUP + 1), 0);
    assert_eq!(appliance.server.close_group(GROUP), 1);
    assert!(grant.is_revoked());
    appliance.wait_for_connections(0);
}

#[test]
fn a_client_that_disconnects_is_removed() {
    let appliance = Appliance::new(regions(&[MIB]));
    let grants = [appliance.connect().unwrap(), appliance.connect().unwrap()];
    appliance.wait_for_connections(2);
    drop(grants);
    appliance.wait_for_connections(0);
}

#[test]
fn memory_that_can_shrink_is_refused() {
    let sealed = SealFlags::SHRINK | SealFlags::GROW;
    let longer = (region(MIB, sealed).0, 2 * MIB);
    let odd = region(MIB + 1, sealed);
    let pipe = (Arc::new(rustix::pipe::pipe().unwrap().0), MIB);
    let file = tempfile::tempfile().unwrap();
    file.set_len(MIB).unwrap();
    let file = (Arc::new(OwnedFd::from(file)), MIB);
    for bad in [region(MIB, SealFlags::empty()), region(MIB, SealFlags::GROW), longer, odd, pipe, file] {
        let appliance = Appliance::new(vec![region(MIB, sealed), bad]);
        let error = appliance.connect().expect_err("bad memory");
        assert!(matches!(error, ConnectError::Protocol(_)), "{error}");
        appliance.wait_for_connections(0);
    }
}

#[test]
fn garbage_is_dropped() {
    let appliance = Appliance::new(regions(&[MIB]));
    for garbage in [&b"GET / HTTP/1.1\r\nHost: appliance\r\nAccept: everything\r\n\r\n"[..], b"xpm-shm\0"] {
        let mut stream = UnixStream::connect(&appliance.path).unwrap();
        stream.write_all(garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        // A connection reset is an end as well.
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"");
    }
    let mut stream = UnixStream::connect(&appliance.path).unwrap();
    stream.write_all(b"xpm-shm\0\0\0\0\x02").unwrap();
    stream.write_all(&[0; 36]).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer[..12], *b"xpm-shm\0\0\0\0\x02", "a later version is told so");
    appliance.connect().unwrap();
}

#[test]
fn bad_servers() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("socket");
    assert!(matches!(connect(&path, &key(), support::LIMIT), Err(ConnectError::Unreachable(_))));
    let listener = UnixListener::bind(&path).unwrap();
    let limit = Duration::from_millis(300);
    assert!(matches!(connect(&path, &key(), limit), Err(ConnectError::TimedOut)));
    drop(listener.accept());
    let answer = |bytes: &'static [u8]| {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut stream = listener.accept().unwrap().0;
                stream.read_exact(&mut [0; 48]).unwrap();
                stream.write_all(bytes).unwrap();
            });
            connect(&path, &key(), support::LIMIT).expect_err("a bad server")
        })
    };
    assert!(matches!(answer(b""), ConnectError::Unreachable(_)));
    assert!(matches!(answer(b"NBDMAGICIHAVEOPT\0\x03 and more bytes"), ConnectError::Protocol(_)));
    let granted = b"xpm-shm\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\x10\0\0";
    assert!(matches!(answer(granted), ConnectError::Unreachable(_)), "no memory");
    let bare = b"xpm-shm\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\0\0";
    assert!(matches!(answer(bare), ConnectError::Unreachable(_)), "a length without memory");
    let absurd = b"xpm-shm\0\0\0\0\0\0\0\0\x01\xff\0\0\0\0\x10\0\0";
    assert!(matches!(answer(absurd), ConnectError::Protocol(_)));
}

#[test]
fn locking_of_memory_does_not_fault_it_in() {
    if let Err(error) = mlockall(MlockAllFlags::FUTURE) {
        eprintln!("skipped: this process may not lock its memory: {error}");
        return;
    }
    let appliance = Appliance::new(regions(&[64 * MIB, 64 * MIB]));
    let grant = appliance.connect();
    munlockall().unwrap();
    let grant = match grant {
        Err(ConnectError::Memory(error)) => return eprintln!("skipped: RLIMIT_MEMLOCK is too low: {error}"),
        grant => grant.unwrap(),
    };
    assert_eq!(appliance.held(), 0);
    assert!(grant.direct(0, 128 << 20).is_some());
    assert!(!grant.is_revoked());
}

/// The file of a region is sealed against shrinking, so a file that is too short takes the place of a page here; a
/// page that the hardware reports as bad raises the same signal.
#[test]
fn a_page_that_cannot_be_accessed_is_an_error_of_its_operations() {
    let appliance = Appliance::new(regions(&[MIB]));
    let grant = appliance.connect().unwrap();
    let file = tempfile::tempfile().unwrap();
    let page = grant.direct(8192, 4096).unwrap().as_ptr();
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED);
    #[allow(unsafe_code)]
    // SAFETY: the page is a part of the grant's mapping, to which no reference exists.
    unsafe { mmap(page.cast(), 4096, access, flags, &file, 0) }.unwrap();
    let mut link = ShmLink::new(grant, 4);
    let memory = Memory::new(16_384);
    for kind in [Kind::Read, Kind::Write, Kind::Zero] {
        assert_eq!(run(&mut link, kind, 0, Some(&memory), 16_384), Err(IoError::BadMemory), "{kind:?}");
        run(&mut link, kind, 12_288, Some(&Memory::new(4096)), 4096).unwrap();
    }
}
