//! The NBD link against this crate's server: both ends of the transport in one process.

mod common;
mod support;

use common::Fixture;
use support::memory::Memory;
use support::model::{Shape, check};
use xpm_protocol::GrantKey;
use xpm_protocol::nbd::{ExportName, SessionTag};
use xpm_transport::nbd::client::{ConnectError, NbdLink, Target, connect};
use xpm_transport::{Completion, Kind, Link, LinkDown, Operation};

const SIZE: u64 = 16 << 20;

fn link(fixture: &Fixture, queue: u16, generation: u32) -> Result<NbdLink, ConnectError> {
    let session = Some(SessionTag { id: 42, queue, generation });
    let name = ExportName { key: GrantKey::from_bytes([3; 32]), session };
    let connected = connect(&Target::Unix(fixture.socket.clone()), &name, support::LIMIT)?;
    Ok(NbdLink::new(connected, 8).unwrap())
}

fn write(memory: &Memory, token: u64) -> Operation {
    Operation { kind: Kind::Write, offset: 0, len: 4096, buf: Some(memory.buf()), token }
}

#[test]
fn model() {
    let fixture = Fixture::new(SIZE);
    for (queue, hole) in [(0, 1), (1, 4096)] {
        let mut link = link(&fixture, queue, 1).unwrap();
        let seed = u64::from(queue) + 10;
        check(&mut link, Shape { size: SIZE, depth: 8, len_max: 4 << 20, hole, operations: 600, seed });
    }
}

#[test]
fn operations_in_flight_are_done_by_the_next_link() {
    let fixture = Fixture::new(SIZE);
    let mut first = link(&fixture, 0, 1).unwrap();
    let mut other = link(&fixture, 1, 1).unwrap();
    let memory = Memory::new(4096);
    memory.set(0, &[7; 4096]);
    first.post(write(&memory, 1)).unwrap();
    let mut second = link(&fixture, 0, 2).unwrap();
    first.submit();
    assert_eq!(support::wait(&mut first, &mut Vec::new()), Err(LinkDown::Broken), "shut out");
    for (link, token) in [(&mut second, 1), (&mut other, 2)] {
        let mut completions = Vec::new();
        link.post(write(&memory, token)).unwrap();
        link.submit();
        support::wait(link, &mut completions).unwrap();
        assert_eq!(completions, [Completion { token, result: Ok(()) }]);
    }
    let old = link(&fixture, 0, 1);
    assert!(matches!(old, Err(ConnectError::Outdated)), "an old one stays out, and knows why");
}

#[test]
fn a_closed_group_breaks_its_links() {
    let fixture = Fixture::new(SIZE);
    let mut link = link(&fixture, 0, 1).unwrap();
    let memory = Memory::new(4096);
    link.post(write(&memory, 1)).unwrap();
    link.submit();
    support::wait(&mut link, &mut Vec::new()).unwrap();
    fixture.server.close_group(1);
    assert_eq!(support::wait(&mut link, &mut Vec::new()), Err(LinkDown::Broken));
}
