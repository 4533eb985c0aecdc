//! A fake NBD server: a correct handshake, written out byte by byte, followed by a script.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use tempfile::TempDir;
use xpm_transport::nbd::client::{NbdLink, Target, connect};

use super::LIMIT;
use super::peers::name;

/// Size of the fake export.
pub(crate) const SIZE: u64 = 64 << 20;

/// The fields of a request that scripts need.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) len: u32,
}

/// The server's end of the connection.
pub(crate) struct Script(UnixStream);

/// A server that accepts one connection and runs a function on it.
pub(crate) struct Scripted {
    pub(crate) target: Target,
    thread: JoinHandle<()>,
    _folder: TempDir,
}

impl Scripted {
    /// A server that runs `script` on the bare connection.
    pub(crate) fn bare(script: impl FnOnce(&mut Script) + Send + 'static) -> Scripted {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let stream = listener.accept().unwrap().0;
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            script(&mut Script(stream));
        });
        Scripted { target: Target::Unix(path), thread, _folder: folder }
    }

    /// A server that runs `script` after the handshake, and a link to it.
    pub(crate) fn linked(
        depth: usize,
        script: impl FnOnce(&mut Script) + Send + 'static,
    ) -> (Scripted, NbdLink) {
        let server = Scripted::bare(|end| {
            end.handshake();
            script(end);
        });
        let connected = connect(&server.target, &name(), LIMIT).unwrap();
        (server, NbdLink::new(connected, depth).unwrap())
    }

    /// Waits for the end of the script, and panics if the script panicked.
    pub(crate) fn join(self) {
        self.thread.join().unwrap();
    }
}

impl Script {
    pub(crate) fn handshake(&mut self) {
        self.send(b"NBDMAGICIHAVEOPT\0\x03");
        assert_eq!(self.receive(4), [0, 0, 0, 3]);
        let option = self.receive(16);
        assert_eq!(option[..12], *b"IHAVEOPT\0\0\0\x07");
        self.receive(u32::from_be_bytes(option[12..].try_into().unwrap()) as usize);
        self.option_reply(3, &[&[0, 0][..], &SIZE.to_be_bytes(), &[0, 0x6d]].concat());
        self.option_reply(1, &[]);
    }

    pub(crate) fn option_reply(&mut self, kind: u32, data: &[u8]) {
        let len = (data.len() as u32).to_be_bytes();
        self.send(
            &[b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07", &kind.to_be_bytes()[..], &len, data].concat(),
        );
    }

    pub(crate) fn asked(&mut self) -> Asked {
        let bytes = self.receive(28);
        assert_eq!(bytes[..4], [0x25, 0x60, 0x95, 0x13]);
        Asked {
            command: u16::from_be_bytes(bytes[6..8].try_into().unwrap()),
            cookie: u64::from_be_bytes(bytes[8..16].try_into().unwrap()),
            len: u32::from_be_bytes(bytes[24..].try_into().unwrap()),
        }
    }

    pub(crate) fn reply(&mut self, errno: u32, cookie: u64) {
        self.send(&[&[0x67, 0x44, 0x66, 0x98][..], &errno.to_be_bytes(), &cookie.to_be_bytes()].concat());
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// Sends to a client that may have disconnected; returns whether it succeeded.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.0.write_all(bytes).is_ok()
    }

    pub(crate) fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Reads until the client closes the connection.
    pub(crate) fn until_closed(&mut self) {
        let mut rest = Vec::new();
        let _ = self.0.read_to_end(&mut rest);
    }
}
