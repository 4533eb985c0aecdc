//! The NBD link against servers of other projects.

mod support;

use std::os::fd::AsFd;

use support::LIMIT;
use support::memory::Memory;
use support::model::{Shape, check};
use support::peers::{Peer, name};
use xpm_transport::nbd::client::{ConnectError, NbdLink, connect_to};
use xpm_transport::{Completion, IoError, Kind, Link, Operation};

const SIZE: u64 = 16 << 20;

fn shape(depth: usize, seed: u64) -> Shape {
    Shape { size: SIZE, depth, len_max: 1 << 20, hole: 4096, operations: 1500, seed }
}

fn link(peer: &Peer, depth: usize) -> NbdLink {
    NbdLink::new(peer.connect(), depth).unwrap()
}

#[test]
fn nbdkit_over_unix() {
    let Some(peer) = Peer::nbdkit(false, SIZE, &[], &[]) else { return };
    check(&mut link(&peer, 32), shape(32, 1));
    check(&mut link(&peer, 1), shape(1, 2));
}

#[test]
fn nbdkit_over_tcp() {
    let Some(peer) = Peer::nbdkit(true, SIZE, &[], &[]) else { return };
    check(&mut link(&peer, 64), shape(64, 3));
}

#[test]
fn qemu_over_unix() {
    let Some(peer) = Peer::qemu(false, SIZE) else { return };
    check(&mut link(&peer, 128), shape(128, 4));
}

#[test]
fn qemu_over_tcp() {
    let Some(peer) = Peer::qemu(true, SIZE) else { return };
    check(&mut link(&peer, 16), shape(16, 5));
}

#[test]
fn an_export_is_found_by_any_name_that_it_has() {
    let Some(peer) = Peer::qemu(false, SIZE) else { return };
    let found = connect_to(&peer.target, &name().to_string(), LIMIT).unwrap();
    assert_eq!(found.info.size, SIZE);
    for other in ["", "a name of its own"] {
        let end = connect_to(&peer.target, other, LIMIT);
        assert!(matches!(end, Err(ConnectError::UnknownExport)), "`{other}`: {end:?}");
    }
    let end = connect_to(&peer.target, "\0", LIMIT);
    assert!(matches!(end, Err(ConnectError::Refused(_))), "{end:?}");
    let Some(peer) = Peer::nbdkit(false, SIZE, &[], &[]) else { return };
    assert_eq!(connect_to(&peer.target, "", LIMIT).unwrap().info.size, SIZE);
}

#[test]
fn requests_are_split_to_the_block_size() {
    let options = [
        "blocksize-minimum=1",
        "blocksize-preferred=4096",
        "blocksize-maximum=8192",
        "blocksize-error-policy=error",
    ];
    let Some(peer) = Peer::nbdkit(false, SIZE, &["blocksize-policy"], &options) else { return };
    let mut link = link(&peer, 8);
    assert_eq!(link.info().block.max, 8192);
    check(&mut link, shape(8, 6));
}

#[test]
fn the_depth_is_kept_and_bad_operations_end_alone() {
    let Some(peer) = Peer::nbdkit(false, SIZE, &[], &[]) else { return };
    let mut link = link(&peer, 4);
    let memory = Memory::new(4096);
    let operation =
        |kind, offset, len, token| Operation { kind, offset, len, buf: Some(memory.buf()), token };
    link.post(operation(Kind::Read, 0, 4096, 1)).unwrap();
    link.post(operation(Kind::Read, SIZE, 4096, 2)).unwrap();
    link.post(operation(Kind::Write, 0, 512, 3)).unwrap();
    link.post(operation(Kind::Trim, u64::MAX, 2, 4)).unwrap();
    assert!(link.post(operation(Kind::Read, 0, 4096, 5)).is_err(), "deeper than agreed");
    link.submit();
    assert!(support::readable(link.wait_fd().unwrap().as_fd(), support::LIMIT));
    let mut completions = Vec::new();
    while completions.len() < 4 {
        let mut more = Vec::new();
        support::wait(&mut link, &mut more).unwrap();
        completions.append(&mut more);
    }
    completions.sort_by_key(|completion| completion.token);
    let invalid = Err(IoError::Invalid);
    let expected = [(1, Ok(())), (2, invalid), (3, invalid), (4, invalid)];
    assert_eq!(completions, expected.map(|(token, result)| Completion { token, result }));
    link.post(operation(Kind::Read, 0, 4096, 6)).unwrap();
}
