//! Somebody who answers in place of an appliance, as a host that redirects packets can.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use xpm_protocol::nbd::handshake::server::{NoExport, ServerHandshake, Step};

/// Answers every NBD client that its export does not exist; until it is dropped.
pub struct Impostor {
    over: Arc<AtomicBool>,
    refused: Arc<AtomicU64>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl Impostor {
    /// Listens at the address of an appliance that does not.
    ///
    /// # Panics
    /// When something listens there.
    pub fn start(address: SocketAddr) -> Impostor {
        let listener = TcpListener::bind(address).expect("nobody listens there");
        let (over, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (is_over, count) = (over.clone(), refused.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if is_over.load(Ordering::Acquire) {
                    return;
                }
                if refuse(stream).is_ok() {
                    count.fetch_add(1, Ordering::Release);
                }
            }
        });
        Impostor { over, refused, address, thread: Some(thread) }
    }

    /// Clients that were refused so far.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Acquire)
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        // Wakes the thread up.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Ok: the client was told that there is no such export.
fn refuse(mut stream: TcpStream) -> std::io::Result<()> {
    let mut handshake = ServerHandshake::new();
    let (mut buffer, mut told) = ([0; 4096], false);
    loop {
        let step = handshake.step();
        stream.write_all(&handshake.take_output())?;
        match step {
            Step::Input => match stream.read(&mut buffer)? {
                0 if told => return Ok(()),
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                count => handshake.receive(&buffer[..count]),
            },
            Step::Open(_) => {
                handshake.found(Err(&NoExport::Unknown));
                told = true;
            }
            Step::List => handshake.listed(None),
            Step::Ready(_) | Step::Close(_) => {
                return if told { Ok(()) } else { Err(std::io::ErrorKind::Other.into()) };
            }
        }
    }
}
