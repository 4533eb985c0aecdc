//! A server with several addresses, some of which do not work.

mod common;
mod support;

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use common::{Fixture, MemoryExports};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with};
use support::LIMIT;
use xpm_protocol::GrantKey;
use xpm_protocol::nbd::ExportName;
use xpm_transport::nbd::client::{ConnectError, Connected, connect_first};
use xpm_transport::nbd::server::{Exports, Listener, Opened};

const SIZE: u64 = 16 << 20;

fn name() -> ExportName {
    ExportName { key: GrantKey::from_bytes([3; 32]), session: None }
}

fn first_of(addresses: &[SocketAddr]) -> Result<Connected, ConnectError> {
    connect_first(addresses, name, None, LIMIT)
}

/// A server without any export.
struct Nothing;

impl Exports for Nothing {
    fn open(&self, _: &str) -> Option<Opened> {
        None
    }
}

fn exports(fixture: &Fixture) -> Arc<dyn Exports> {
    Arc::new(MemoryExports { memory: fixture.memory, size: SIZE, alive: fixture.alive.clone() })
}

fn serve(fixture: &Fixture, exports: Arc<dyn Exports>) -> (Listener, SocketAddr) {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let _runtime = fixture.runtime.enter();
    (fixture.server.listen_tcp(socket, exports).unwrap(), address)
}

/// A socket that accepts no more connections: a further connection attempt gets no answer, as behind a broken
/// network.
struct Dead {
    address: SocketAddr,
    _listener: OwnedFd,
    _clients: Vec<OwnedFd>,
}

impl Dead {
    fn new() -> Dead {
        let stream = |flags| socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
        let listener = stream(SocketFlags::CLOEXEC);
        bind(&listener, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        listen(&listener, 0).unwrap();
        let address = rustix::net::getsockname(listener.as_fd()).unwrap().try_into().unwrap();
        let clients = (0..4).map(|_| {
            let client = stream(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
            let _ = rustix::net::connect(&client, &address);
            client
        });
        let clients = clients.collect();
        Dead { address, _listener: listener, _clients: clients }
    }
}

#[test]
fn a_dead_address_and_a_hanging_server_do_not_use_up_the_limit() {
    let fixture = Fixture::new(SIZE);
    let (_listener, address) = serve(&fixture, exports(&fixture));
    let (dead, still) = (Dead::new(), TcpListener::bind("127.0.0.1:0").unwrap());
    let refused = { TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() };
    let start = Instant::now();
    let all = [dead.address, still.local_addr().unwrap(), refused, address];
    assert_eq!(first_of(&all).unwrap().info.size, SIZE);
    assert!(start.elapsed() < LIMIT / 4, "it took {:?}, as long as a time limit", start.elapsed());
}

#[test]
fn a_refusing_address_does_not_keep_another_from_being_tried() {
    let fixture = Fixture::new(SIZE);
    let (_listener, address) = serve(&fixture, exports(&fixture));
    let (_other, without) = serve(&fixture, Arc::new(Nothing));
    assert_eq!(first_of(&[without, address]).unwrap().info.size, SIZE);
    assert!(matches!(first_of(&[without]), Err(ConnectError::UnknownExport)));
    let refused = { TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() };
    assert!(matches!(first_of(&[refused, without]), Err(ConnectError::UnknownExport)), "what it said counts");
    assert!(matches!(first_of(&[]), Err(ConnectError::Unreachable(_))));
}
