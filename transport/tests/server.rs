//! The server engine against clients that follow the protocol, of this and other projects, and against
//! clients that violate it.

#![allow(missing_docs)]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Output};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::{Fixture, have};
use xpm_protocol::nbd::handshake::client::{ClientHandshake, Wishes};
use xpm_protocol::nbd::{
    Command as Nbd, CommandFlags, Errno, ExportName, REQUEST_LEN, Request, SIMPLE_REPLY_LEN, SessionTag,
};
use xpm_protocol::{GrantKey, nbd::ReplyHeader};
use xpm_transport::nbd::server::ServerOptions;

const MIB: u64 = 1 << 20;

/// A client that speaks the protocol byte by byte.
struct Client {
    stream: UnixStream,
}

impl Client {
    fn connect(fixture: &Fixture, export: &str) -> Option<Client> {
        let mut stream = UnixStream::connect(&fixture.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let wishes =
            Wishes { export: export.to_owned(), structured: false, base_allocation: false, visitor: None };
        let mut handshake = ClientHandshake::new(wishes);
        let mut buffer = [0; 512];
        loop {
            match handshake.step() {
                Ok(Some(_)) => return Some(Client { stream }),
                Ok(None) => {}
                Err(_) => return None,
            }
            stream.write_all(&handshake.take_output()).unwrap();
            let count = stream.read(&mut buffer).unwrap();
            if count == 0 {
                return None;
            }
            handshake.receive(&buffer[..count]);
        }
    }

    fn send(&mut self, command: Nbd, offset: u64, length: u32) {
        let mut header = [0; REQUEST_LEN];
        Request { flags: CommandFlags::NONE, command, cookie: offset ^ 7, offset, length }
            .encode(&mut header);
        self.stream.write_all(&header).unwrap();
    }

    fn reply(&mut self) -> Result<(), Errno> {
        let mut header = [0; SIMPLE_REPLY_LEN];
        self.stream.read_exact(&mut header).unwrap();
        match ReplyHeader::decode(&header).unwrap() {
            Some((ReplyHeader::Simple(reply), _)) => reply.error.map_or(Ok(()), Err),
            other => panic!("not a simple reply: {other:?}"),
        }
    }

    fn ask(&mut self, command: Nbd, offset: u64, length: u32) -> Result<(), Errno> {
        self.send(command, offset, length);
        self.reply()
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.send(Nbd::Write, offset, bytes.len() as u32);
        self.stream.write_all(bytes).unwrap();
        self.reply()
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Errno> {
        self.ask(Nbd::Read, offset, length)?;
        let mut bytes = vec![0; length as usize];
        self.stream.read_exact(&mut bytes).unwrap();
        Ok(bytes)
    }

    /// Whether the server closed the connection.
    fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0]) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }
}

fn header(command: Nbd, offset: u64, length: u32) -> [u8; REQUEST_LEN] {
    let mut header = [0; REQUEST_LEN];
    Request { flags: CommandFlags::NONE, command, cookie: offset ^ 7, offset, length }.encode(&mut header);
    header
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

#[test]
fn nbdinfo_sees_the_offered_features() {
    if !have("nbdinfo") {
        return;
    }
    let fixture = Fixture::new(8 * MIB);
    let output = run(Command::new("nbdinfo").args(["--json", &fixture.uri("direct")]));
    let text = String::from_utf8(output.stdout).unwrap();
    for fact in [
        "\"export-size\": 8388608",
        "\"can_trim\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_fast_zero\": true",
        "\"can_df\": true",
        "\"block_size_maximum\": 33554432",
        "base:allocation",
        "\"structured\": true",
    ] {
        assert!(text.contains(fact), "{fact} is not in {text}");
    }
    let map = run(Command::new("nbdinfo").args(["--map", &fixture.uri("holes")]));
    let map = String::from_utf8(map.stdout).unwrap();
    assert_eq!(map.lines().count(), 8, "{map}");
    assert!(map.lines().nth(1).unwrap().contains("hole,zero"), "{map}");
    let list = run(Command::new("nbdinfo").args(["--list", "--json", &fixture.uri("")]));
    assert!(String::from_utf8(list.stdout).unwrap().contains("deferred"));
}

/// Random operations by libnbd, several in flight, compared with a model in the script.
#[test]
fn libnbd_and_a_model_agree() {
    if !have("nbdsh") {
        return;
    }
    const SCRIPT: &str = r#"
import random
random.seed(5)
size = h.get_size()
model = bytearray(size)
for step in range(300):
    kind = random.choice(["write", "write", "read", "read", "zero", "trim", "burst", "big"])
    offset = random.randrange(size)
    length = min(random.choice([1, 511, 4096, 70000, 300000]), size - offset)
    if kind == "write":
        data = random.randbytes(length)
        h.pwrite(data, offset, nbd.CMD_FLAG_FUA if step % 2 else 0)
        model[offset:offset + length] = data
    elif kind == "read":
        assert h.pread(length, offset) == model[offset:offset + length], step
    elif kind == "zero":
        h.zero(length, offset, nbd.CMD_FLAG_NO_HOLE if step % 2 else nbd.CMD_FLAG_FAST_ZERO)
        model[offset:offset + length] = bytes(length)
    elif kind == "trim":
        h.trim(length, offset)
        model[offset:offset + length] = bytes(length)
    elif kind == "big":
        data = random.randbytes(size - 3)
        h.pwrite(data, 2)
        model[2:size - 1] = data
        assert h.pread(size, 0) == model, step
    else:
        buffers = []
        for i in range(40):
            at = random.randrange(size - 9000)
            buffer = nbd.Buffer(random.choice([1, 9000]))
            buffers.append((at, buffer, h.aio_pread(buffer, at)))
        for at, buffer, cookie in buffers:
            while not h.aio_command_completed(cookie):
                h.poll(-1)
            assert buffer.to_bytearray() == model[at:at + buffer.size()], step
h.flush()
assert h.pread(size, 0) == model
"#;
    let fixture = Fixture::new(5 * MIB + 12345);
    for export in ["direct", "deferred"] {
        // The distribution's Python has the module; another Python in the path may not have it.
        run(Command::new("nbdsh").env("PATH", "/usr/bin:/bin").args([
            "-u",
            &fixture.uri(export),
            "-c",
            SCRIPT,
        ]));
        // The model starts from zeros.
        fixture.memory.part(0, (5 * MIB) as usize + 12345).zero();
    }
    let counters = fixture.server.counters();
    assert!(counters.reads > 1000 && counters.writes > 50 && counters.trims > 50, "{counters:?}");
    assert_eq!(counters.errors, 0);
}

#[test]
fn qemu_copies_and_compares() {
    if !have("qemu-img") {
        return;
    }
    let fixture = Fixture::new(16 * MIB);
    let dir = tempfile::tempdir().unwrap();
    let (file, back) = (dir.path().join("in"), dir.path().join("out"));
    let bytes: Vec<u8> =
        (0..16 * MIB / 4).flat_map(|i| (i as u32).wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    std::fs::write(&file, &bytes).unwrap();
    let uri = fixture.uri("deferred");
    run(Command::new("qemu-img").args(["convert", "-n", "-f", "raw", "-O", "raw"]).arg(&file).arg(&uri));
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&file).arg(&uri));
    run(Command::new("nbdcopy").arg(fixture.uri("direct")).arg(&back));
    assert!(std::fs::read(&back).unwrap() == bytes, "nbdcopy brought other bytes back");
}

#[test]
fn a_refused_request_has_its_errno_and_the_connection_stays_open() {
    let fixture = Fixture::new(MIB);
    for export in ["direct", "deferred"] {
        let mut client = Client::connect(&fixture, export).unwrap();
        assert_eq!(client.ask(Nbd::Read, MIB, 1), Err(Errno::Invalid));
        assert_eq!(client.ask(Nbd::Read, u64::MAX - 1, 4096), Err(Errno::Invalid));
        assert_eq!(client.ask(Nbd::Read, 0, 33 << 20), Err(Errno::Invalid));
        assert_eq!(client.ask(Nbd::Trim, MIB - 1, 2), Err(Errno::Invalid));
        assert_eq!(client.ask(Nbd::WriteZeroes, MIB - 1, 2), Err(Errno::NoSpace));
        assert_eq!(client.ask(Nbd::BlockStatus, 0, 1), Err(Errno::Invalid));
        assert_eq!(client.ask(Nbd::Other(77), 0, 1), Err(Errno::Invalid));
        assert_eq!(client.write(MIB - 1, &[1; 5000]), Err(Errno::NoSpace));
        assert_eq!(client.write(0, &vec![1; 40 << 20]), Err(Errno::Invalid));
        assert_eq!(client.write(5, &[9; 3]), Ok(()));
        assert_eq!(client.read(4, 5), Ok(vec![0, 9, 9, 9, 0]));
        assert_eq!(client.ask(Nbd::Flush, 0, 0), Ok(()));
        client.send(Nbd::Disconnect, 0, 0);
        assert!(client.is_closed());
        fixture.memory.part(0, 16).zero();
    }
}

#[test]
fn a_write_longer_than_all_buffers_goes_through_them() {
    let options = ServerOptions { buffers_len: MIB as usize, ..Fixture::options() };
    let fixture = Fixture::with(8 * MIB, options);
    // As many parts are in flight as there are buffers, and they end when the last of them is posted.
    let mut client = Client::connect(&fixture, "batches").unwrap();
    client.stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    for round in 1..=20_u8 {
        client.send(Nbd::Write, MIB, 4 * MIB as u32);
        client.stream.write_all(&vec![round; 4 * MIB as usize]).unwrap();
        assert_eq!(client.reply(), Ok(()));
        let mut found = vec![0; 4 * MIB as usize];
        fixture.memory.read(MIB, &mut found);
        assert!(found.iter().all(|&byte| byte == round));
    }
}

#[test]
fn invalid_bytes_end_their_connection_and_no_other() {
    let fixture = Fixture::new(MIB);
    let mut good = Client::connect(&fixture, "direct").unwrap();
    let mut bad = Client::connect(&fixture, "direct").unwrap();
    bad.stream.write_all(&[0x55; 64]).unwrap();
    assert!(bad.is_closed());
    let mut greedy = Client::connect(&fixture, "direct").unwrap();
    greedy.send(Nbd::Write, 0, u32::MAX);
    assert!(greedy.is_closed());
    let mut stranger = UnixStream::connect(&fixture.socket).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = stranger.read_to_end(&mut answer);
    assert!(Client::connect(&fixture, "nothing").is_none(), "an unknown export is refused");
    assert_eq!(good.read(0, 4096), Ok(vec![0; 4096]));
    assert!(fixture.server.counters().refused >= 2);
}

#[test]
fn a_client_that_vanishes_during_a_request_harms_no_other() {
    let fixture = Fixture::new(64 * MIB);
    let mut good = Client::connect(&fixture, "deferred").unwrap();
    for export in ["direct", "deferred"] {
        let mut reading = Client::connect(&fixture, export).unwrap();
        for _ in 0..20 {
            reading.send(Nbd::Read, 0, 32 << 20);
        }
        let mut bytes = [0; 100_000];
        reading.stream.read_exact(&mut bytes).unwrap();
        let mut writing = Client::connect(&fixture, export).unwrap();
        writing.send(Nbd::Write, 0, 8 << 20);
        writing.stream.write_all(&[3; 100_000]).unwrap();
        // Other clients are served while these two are stuck, and after they disconnected.
        assert_eq!(good.write(MIB, &[5; 4096]), Ok(()));
        drop((reading, writing));
        assert_eq!(good.read(MIB, 4096), Ok(vec![5; 4096]));
    }
    wait_until("the vanished are gone", || fixture.server.connections(None) == 1);
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}: not after 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_group_is_closed_when_its_stores_die() {
    let fixture = Fixture::new(MIB);
    let mut client = Client::connect(&fixture, "direct").unwrap();
    assert_eq!(client.write(0, &[1; 512]), Ok(()));
    fixture.alive.store(false, Ordering::SeqCst);
    fixture.server.close_group(1);
    assert_eq!(fixture.server.connections(Some(1)), 0);
    assert!(client.is_closed());
    // A handshake that was in progress finishes too late: the server does not process its first request.
    let mut late = Client::connect(&fixture, "direct").unwrap();
    // The connection may be closed before the request is even sent.
    let mut request = [2; REQUEST_LEN + 512];
    request[..REQUEST_LEN].copy_from_slice(&header(Nbd::Write, 0, 512));
    let _ = late.stream.write_all(&request);
    assert!(late.is_closed());
    let mut landed = vec![0_u8; 512];
    fixture.memory.read(0, &mut landed);
    assert_eq!(landed, [1; 512], "nothing of the late write landed");
}

#[test]
fn a_newer_generation_shuts_out_the_older() {
    let fixture = Fixture::new(MIB);
    let name = |queue, generation| {
        let session = Some(SessionTag { id: 42, queue, generation });
        ExportName { key: GrantKey::from_bytes([3; 32]), session }.to_string()
    };
    let mut first = Client::connect(&fixture, &name(0, 1)).unwrap();
    let mut other = Client::connect(&fixture, &name(1, 1)).unwrap();
    // Half of a write is on its way when the client opens a new connection.
    first.send(Nbd::Write, 0, 8192);
    first.stream.write_all(&[1; 4096]).unwrap();
    let mut second = Client::connect(&fixture, &name(0, 2)).unwrap();
    assert!(first.is_closed());
    assert_eq!(second.write(0, &[2; 8192]), Ok(()));
    let _ = first.stream.write_all(&[1; 4096]);
    assert_eq!(second.read(0, 8192), Ok(vec![2; 8192]));
    assert_eq!(other.read(0, 1), Ok(vec![2]));
    assert!(Client::connect(&fixture, &name(0, 2)).is_none(), "the same generation does not come twice");
    assert!(Client::connect(&fixture, &name(0, 1)).is_none(), "an older one does not come back");
}

#[test]
fn handshakes_are_limited_in_time_and_number() {
    let options =
        ServerOptions { handshake: Duration::from_millis(300), connections_max: 3, ..Fixture::options() };
    let fixture = Fixture::with(MIB, options);
    let mut slow = UnixStream::connect(&fixture.socket).unwrap();
    slow.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut greeting = [0; 18];
    slow.read_exact(&mut greeting).unwrap();
    slow.write_all(&[0, 0, 0]).unwrap();
    assert_eq!(slow.read(&mut [0]).unwrap(), 0, "one that says nothing is closed");
    let clients: Vec<_> = (0..3).map(|_| Client::connect(&fixture, "direct").unwrap()).collect();
    wait_until("three are served", || fixture.server.connections(None) == 3);
    let mut fourth = UnixStream::connect(&fixture.socket).unwrap();
    assert_eq!(fourth.read(&mut greeting).unwrap(), 0, "one too many is closed");
    drop(clients);
    wait_until("there is room again", || fixture.server.connections(None) == 0);
    assert!(Client::connect(&fixture, "direct").is_some());
}

#[test]
fn thirty_two_clients_at_once() {
    let fixture = Fixture::new(32 * MIB);
    std::thread::scope(|scope| {
        for number in 0..32_u64 {
            let fixture = &fixture;
            scope.spawn(move || {
                let export = if number % 2 == 0 { "direct" } else { "deferred" };
                let mut client = Client::connect(fixture, export).unwrap();
                for round in 0..50_u8 {
                    let bytes = vec![round ^ number as u8; 40_000];
                    client.write(number * MIB + u64::from(round), &bytes).unwrap();
                    assert_eq!(client.read(number * MIB + u64::from(round), 40_000).unwrap(), bytes);
                }
            });
        }
    });
    assert_eq!(fixture.server.counters().writes, 32 * 50);
}
