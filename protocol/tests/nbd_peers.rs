//! Tests of the client's codec against servers of other projects, over real sockets. A server that is not installed
//! is skipped with a message.

#![allow(missing_docs)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use xpm_protocol::nbd::handshake::client::{Agreed, ClientHandshake, HandshakeError, Wishes};
use xpm_protocol::nbd::{
    BlockStatus, CHUNK_HEADER_LEN, ChunkBody, Command, CommandFlags, Errno, ErrorChunk, Hole, REQUEST_LEN,
    ReplyHeader, Request, SIMPLE_REPLY_LEN, STATE_HOLE, STATE_ZERO, TransmissionFlags,
};

const SIZE: u64 = 1 << 20;

/// A server with a MiB of zeros named `disk`. Its process ends when the value is dropped.
struct Peer {
    process: Child,
    dir: PathBuf,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Peer {
    /// Starts the server; none if the program is not installed. `arguments` makes its arguments from the socket and
    /// an empty file.
    fn start(program: &str, test: &str, arguments: fn(&Path, &Path) -> Vec<String>) -> Option<Peer> {
        let dir = std::env::temp_dir().join(format!("xpm-{program}-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("file");
        std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
        let mut process = Process::new(program);
        process.args(arguments(&dir.join("s"), &file)).stdin(Stdio::null()).stdout(Stdio::null());
        match process.spawn() {
            Ok(process) => Some(Peer { process, dir }),
            Err(error) => {
                eprintln!("left out: {program}: {error}");
                std::fs::remove_dir_all(&dir).unwrap();
                None
            }
        }
    }

    fn nbdkit(test: &str) -> Option<Peer> {
        Peer::start("nbdkit", test, |socket, _| {
            ["-f", "-U", socket.to_str().unwrap(), "memory", "1M"].map(str::to_owned).to_vec()
        })
    }

    fn qemu_nbd(test: &str) -> Option<Peer> {
        Peer::start("qemu-nbd", test, |socket, file| {
            let (socket, file) = (socket.to_str().unwrap(), file.to_str().unwrap());
            ["-t", "-k", socket, "-x", "disk", "-f", "raw", "--discard=unmap", file]
                .map(str::to_owned)
                .to_vec()
        })
    }

    fn connect(&self) -> UnixStream {
        let start = Instant::now();
        loop {
            match UnixStream::connect(self.dir.join("s")) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                    return stream;
                }
                Err(error) => assert!(start.elapsed() < Duration::from_secs(20), "{error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn negotiate(&self, export: &str, rich: bool) -> Result<(UnixStream, Agreed), HandshakeError> {
        let mut stream = self.connect();
        let wishes =
            Wishes { export: export.to_owned(), structured: rich, base_allocation: rich, visitor: None };
        let mut handshake = ClientHandshake::new(wishes);
        // A small buffer splits messages.
        let mut buffer = [0; 7];
        loop {
            let step = handshake.step();
            stream.write_all(&handshake.take_output()).unwrap();
            if let Some(agreed) = step? {
                return Ok((stream, agreed));
            }
            match stream.read(&mut buffer).unwrap() {
                0 => return Err(handshake.closed()),
                count => handshake.receive(&buffer[..count]),
            }
        }
    }
}

struct Client {
    stream: UnixStream,
    cookie: u64,
}

/// The combined replies to one request.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    error: Option<Errno>,
    data: Vec<u8>,
    /// For each extent: context, length and state.
    extents: Vec<(u32, u32, u32)>,
}

impl Client {
    fn ask(&mut self, command: Command, offset: u64, length: u32, payload: &[u8]) -> Answer {
        self.cookie += 1;
        let request = Request { flags: CommandFlags::NONE, command, cookie: self.cookie, offset, length };
        let mut header = [0; REQUEST_LEN];
        request.encode(&mut header);
        self.stream.write_all(&header).unwrap();
        self.stream.write_all(payload).unwrap();
        let read_len = if command == Command::Read { length } else { 0 };
        let mut answer = Answer { data: vec![0; read_len as usize], ..Answer::default() };
        while !self.reply(&request, read_len, &mut answer) {}
        answer
    }

    /// Reads one simple reply or chunk; returns whether it was the last.
    fn reply(&mut self, request: &Request, read_len: u32, answer: &mut Answer) -> bool {
        let mut bytes = [0; CHUNK_HEADER_LEN];
        self.stream.read_exact(&mut bytes[..SIMPLE_REPLY_LEN]).unwrap();
        let header = match ReplyHeader::decode(&bytes[..SIMPLE_REPLY_LEN]).unwrap() {
            Some((header, _)) => header,
            None => {
                self.stream.read_exact(&mut bytes[SIMPLE_REPLY_LEN..]).unwrap();
                ReplyHeader::decode(&bytes).unwrap().unwrap().0
            }
        };
        assert_eq!(header.cookie(), request.cookie);
        let mut payload = vec![0; header.payload_len(read_len) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        let chunk = match header {
            ReplyHeader::Simple(reply) => {
                answer.error = reply.error;
                answer.data = payload;
                return true;
            }
            ReplyHeader::Chunk(chunk) => chunk,
        };
        match chunk.body().unwrap() {
            ChunkBody::None => {}
            ChunkBody::Data { length } => {
                let (offset, data) = payload.split_first_chunk().unwrap();
                let offset = u64::from_be_bytes(*offset);
                assert!(request.covers(offset, length));
                answer.data[(offset - request.offset) as usize..][..length as usize].copy_from_slice(data);
            }
            ChunkBody::Hole => {
                let hole = Hole::decode(payload.first_chunk().unwrap()).unwrap();
                assert!(request.covers(hole.offset, hole.length));
            }
            ChunkBody::BlockStatus { .. } => {
                let status = BlockStatus::decode(&payload).unwrap();
                answer
                    .extents
                    .extend(status.extents().map(|extent| (status.context, extent.length, extent.state)));
            }
            ChunkBody::Error { .. } => {
                answer.error = Some(ErrorChunk::decode(chunk.kind, &payload).unwrap().error);
            }
        }
        chunk.done
    }
}

/// Writes, reads, asks for block status, and provokes an error.
fn exercise(peer: &Peer, rich: bool) {
    let (stream, agreed) = peer.negotiate("disk", rich).unwrap();
    assert_eq!(agreed.info.size, SIZE);
    assert!(agreed.info.flags.contains(TransmissionFlags::HAS_FLAGS));
    assert!(agreed.leftover.is_empty());
    assert_eq!((agreed.structured, agreed.base_allocation.is_some()), (rich, rich));
    let mut client = Client { stream, cookie: 41 };
    let bytes: Vec<u8> = (0..8192_u32).map(|i| (i * 31 + i / 256) as u8).collect();
    assert_eq!(client.ask(Command::Write, 65536, 8192, &bytes), Answer::default());
    let mut expected = vec![0; 16384];
    expected[4096..12288].copy_from_slice(&bytes);
    let answer = client.ask(Command::Read, 61440, 16384, &[]);
    assert_eq!((answer.error, answer.data == expected), (None, true));
    assert_eq!(client.ask(Command::Flush, 0, 0, &[]), Answer::default());
    assert_eq!(client.ask(Command::WriteZeroes, 65536, 8192, &[]), Answer::default());
    assert_eq!(client.ask(Command::Read, 61440, 16384, &[]).data, vec![0; 16384]);
    assert_eq!(client.ask(Command::Trim, 0, SIZE as u32, &[]), Answer::default());
    if let Some(context) = agreed.base_allocation {
        let extents = client.ask(Command::BlockStatus, 0, SIZE as u32, &[]).extents;
        assert_eq!(extents, [(context, SIZE as u32, STATE_HOLE | STATE_ZERO)]);
    }
    assert_eq!(client.ask(Command::Read, SIZE, 512, &[]).error, Some(Errno::Invalid));
    // The specification requires ENOSPC, and nbdkit sends it; qemu-nbd 7.2 sends EINVAL.
    let error = client.ask(Command::Write, SIZE, 512, &[0; 512]).error;
    assert!(matches!(error, Some(Errno::NoSpace | Errno::Invalid)), "{error:?}");
}

#[test]
fn the_client_works_with_nbdkit() {
    let Some(peer) = Peer::nbdkit("understood") else { return };
    exercise(&peer, false);
    exercise(&peer, true);
}

#[test]
fn the_client_works_with_qemu_nbd() {
    let Some(peer) = Peer::qemu_nbd("understood") else { return };
    exercise(&peer, false);
    exercise(&peer, true);
}

#[test]
fn qemu_nbd_refuses_an_unknown_export() {
    let Some(peer) = Peer::qemu_nbd("refuses") else { return };
    for rich in [false, true] {
        let refused = peer.negotiate("topsecret", rich).map(|_| ());
        assert_eq!(refused, Err(HandshakeError::UnknownExport));
    }
    assert!(peer.negotiate("disk", false).is_ok(), "the server serves on");
}
