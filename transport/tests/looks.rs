//! Asking for the description of an export does not affect the client that entered the export.

mod common;
mod support;

use std::net::TcpListener;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Fixture, MemoryExports};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use support::LIMIT;
use xpm_protocol::nbd::{ExportName, SessionTag};
use xpm_protocol::{GrantKey, InstallationId, Life, MachineId, SeatId, Visitor};
use xpm_transport::nbd::client::{ConnectError, Target, connect_as, describe, describe_first};
use xpm_transport::nbd::server::{Exports, Opened};

const SIZE: u64 = 16 << 20;
const KEY: [u8; 32] = [3; 32];

/// Memory under one key; counts the clients that it admits.
struct Counting {
    memory: MemoryExports,
    admitted: AtomicUsize,
}

impl Exports for Counting {
    fn open(&self, name: &str) -> Option<Opened> {
        let known = name.parse::<ExportName>().ok()?.key == GrantKey::from_bytes(KEY);
        known.then(|| self.memory.open(name)).flatten()
    }

    fn admit(&self, _: &Opened, _: Option<&Visitor>) -> Result<(), String> {
        self.admitted.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

fn visitor(machine: u128) -> Visitor {
    let (installation, seat) = (InstallationId::from_u128(2), SeatId::from_u128(machine));
    Visitor::new(Life { machine: MachineId::from_u128(machine), installation, seat, number: 4 }, "web1")
}

#[test]
fn description_requests_admit_no_client_and_close_no_connection() {
    let fixture = Fixture::new(SIZE);
    let memory = MemoryExports { memory: fixture.memory, size: SIZE, alive: fixture.alive.clone() };
    let exports = Arc::new(Counting { memory, admitted: AtomicUsize::new(0) });
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let _listener = {
        let _runtime = fixture.runtime.enter();
        fixture.server.listen_tcp(socket, exports.clone()).unwrap()
    };
    let target = Target::Tcp(address);
    let name = |generation| ExportName {
        key: GrantKey::from_bytes(KEY),
        session: Some(SessionTag { id: 5, queue: 0, generation }),
    };
    let owner = visitor(1);
    let entered = connect_as(&target, &name(7), Some(&owner), LIMIT).unwrap();
    assert_eq!(exports.admitted.load(Ordering::Relaxed), 1);

    // A newer connection of the queue would shut out the first connection, and an older one would be refused;
    // a description request has neither effect.
    for look in [ExportName { session: None, ..name(0) }, name(6), name(8)] {
        assert_eq!(describe(&target, &look, LIMIT).unwrap().size, SIZE);
        assert_eq!(describe_first(&[address], &look, LIMIT).unwrap().size, SIZE);
    }
    assert_eq!(exports.admitted.load(Ordering::Relaxed), 1, "a look was let in");
    assert_eq!(fixture.server.living(1, &visitor(9).life), [owner], "the owner's connection is its own");
    let mut ended = [PollFd::from_borrowed_fd(entered.stream.as_fd(), PollFlags::RDHUP)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    assert_eq!(poll(&mut ended, Some(&at_once)).unwrap(), 0, "the owner's connection was closed");

    let foreign = ExportName { key: GrantKey::from_bytes([4; 32]), session: None };
    assert!(matches!(describe(&target, &foreign, LIMIT), Err(ConnectError::UnknownExport)));
}
