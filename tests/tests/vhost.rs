//! `--as vhost-user=PATH`: a real xpm-blk with a driver of the test's own at the other end.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use vhost::VhostBackend;
use vhost::vhost_user::Frontend;
use xpm_tests::vhost::{DATA, Guest, blk};
use xpm_tests::{Cluster, Daemon, LIMIT, wait_until};

/// Makes an allocation and shows it; the socket.
fn attach(cluster: &Cluster, name: &str, options: &[&str]) -> PathBuf {
    cluster.ok(&["alloc", "create", name, "--size", "64MiB", "--stripe", "2"]);
    let socket = cluster.dir().join(format!("{name}.sock"));
    let form = format!("vhost-user={}", socket.display());
    let printed = cluster.ok(&[&["blk", "attach", name, "--as", &form], options].concat());
    assert_eq!(printed, socket.display().to_string());
    socket
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|place| (place / 7) as u8 ^ (place % 251) as u8 ^ seed).collect()
}

#[test]
fn a_guest_reads_and_writes_by_several_queues() {
    let cluster = Cluster::start(2);
    let socket = attach(&cluster, "disk", &[]);
    let mut guest = Guest::new(3);
    guest.connect(&socket);
    assert_eq!(guest.size(), 64 << 20);
    assert_eq!(guest.config(34, 2), [16, 0], "queues");
    // xpm-blk locks its memory; the guest's is not its own, and not faulted in by it.
    assert!(guest.resident() < 1 << 20, "{} bytes", guest.resident());

    // Each queue writes a part, in buffers of odd lengths, by a chain and by a table.
    let len = 256 << 10;
    for queue in 0..3_u64 {
        guest.write(DATA, &pattern(queue as u8, len));
        let sector = queue * 1000 + 7;
        let pieces: &[(u64, u32, bool)] = match queue {
            0 => &[(DATA, len as u32, false)],
            1 => &[(DATA, 512, false), (DATA + 512, len as u32 - 512, false)],
            _ => &[
                (DATA, 1, false),
                (DATA + 1, 4096, false),
                (DATA + 4097, 100_000, false),
                (DATA + 104_097, len as u32 - 104_097, false),
            ],
        };
        assert_eq!(guest.run(queue as usize, (blk::WRITE, sector), pieces), (1, blk::OK));
    }
    // The next one reads it, into buffers of other lengths.
    for queue in 0..3_u64 {
        guest.write(DATA, &vec![0; len]);
        let pieces = [(DATA, 70_000, true), (DATA + 70_000, len as u32 - 70_000, true)];
        let reader = (queue as usize + 1) % 3;
        assert_eq!(guest.run(reader, (blk::READ, queue * 1000 + 7), &pieces), (len as u32 + 1, blk::OK));
        assert!(guest.read(DATA, len) == pattern(queue as u8, len), "queue {queue}");
    }
    assert_eq!(guest.run(0, (blk::FLUSH, 0), &[]), (1, blk::OK));
    assert_eq!(guest.run(1, (blk::GET_ID, 0), &[(DATA, 20, true)]), (21, blk::OK));
    assert_eq!(guest.read(DATA, 20), b"disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");

    // Discarding and zeroing, by two ranges each: 8 sectors of the first part, and 16 further on.
    for (kind, flags, first) in
        [(blk::DISCARD, 0, 8_u64), (blk::WRITE_ZEROES, 0, 108), (blk::WRITE_ZEROES, 1, 208)]
    {
        let range = |sector: u64, sectors: u32| {
            [sector.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &u32::to_le_bytes(flags)].concat()
        };
        guest.write(DATA, &[range(first, 8), range(first + 40, 16)].concat());
        assert_eq!(guest.run(2, (kind, 0), &[(DATA, 32, false)]), (1, blk::OK));
    }
    let whole = pattern(0, len);
    assert_eq!(guest.run(0, (blk::READ, 7), &[(DATA, len as u32, true)]).1, blk::OK);
    for (sector, bytes) in (7_u64..).zip(guest.read(DATA, len).chunks(512)) {
        let zeroed = [8, 108, 208]
            .iter()
            .any(|first| (*first..first + 8).contains(&sector) || (first + 40..first + 56).contains(&sector));
        let place = (sector as usize - 7) * 512;
        let expected = if zeroed { &[0; 512] } else { &whole[place..place + 512] };
        assert!(bytes == expected, "sector {sector}");
    }

    // Many at once, on all queues: more parts than a channel takes.
    for queue in 0..3 {
        for slot in 0..16 {
            let at = DATA + u64::from(slot) * 0x8000;
            let pieces: Vec<_> = (0..32).map(|piece| (at + piece * 0x400, 0x400, true)).collect();
            guest.submit(queue, slot, (blk::READ, 1007), &pieces);
        }
    }
    for queue in 0..3 {
        let mut ended = guest.wait(queue, 16);
        ended.sort_unstable();
        let expected: Vec<_> = (0..16).map(|slot| (slot, 0x8001, blk::OK)).collect();
        assert_eq!(ended, expected);
    }
    for slot in 0..16_u64 {
        assert!(guest.read(DATA + slot * 0x8000, 0x8000) == pattern(1, len)[..0x8000]);
    }
    let shown = cluster.json(&["blk", "show", "disk"]);
    assert_eq!(shown["counters"]["errors"], 0, "{shown}");
}

#[test]
fn memory_comes_and_goes_while_it_is_used() {
    let cluster = Cluster::start(2);
    let mut guest = Guest::new(1);
    guest.connect(&attach(&cluster, "disk", &[]));
    let more = guest.plug(1 << 32, 1 << 20, true);
    more.write_all_at(&pattern(3, 4096), 4096).unwrap();
    let buffer = (1 << 32) + 4096;
    assert_eq!(guest.run(0, (blk::WRITE, 8), &[(buffer, 4096, false)]).1, blk::OK);
    assert_eq!(guest.run(0, (blk::READ, 8), &[(DATA, 4096, true)]).1, blk::OK);
    assert!(guest.read(DATA, 4096) == pattern(3, 4096));
    guest.plug(1 << 32, 1 << 20, false);
    assert_eq!(guest.run(0, (blk::WRITE, 8), &[(buffer, 4096, false)]).1, blk::FAILED);
    assert_eq!(guest.run(0, (blk::READ, 8), &[(DATA, 4096, true)]).1, blk::OK);
}

#[test]
fn requests_in_flight_are_submitted_again_after_kill_9() {
    let mut cluster = Cluster::start(2);
    let socket = attach(&cluster, "disk", &["--transport", "nbd-tcp"]);
    let mut guest = Guest::new(2);
    guest.connect(&socket);
    guest.write(DATA, &pattern(9, 64 << 10));
    assert_eq!(guest.run(0, (blk::WRITE, 0), &[(DATA, 64 << 10, false)]).1, blk::OK);
    assert_eq!(guest.run(1, (blk::FLUSH, 0), &[]).1, blk::OK);
    for round in 0..3_u8 {
        // There is no reply: all requests stay in flight.
        cluster.appliances.iter().for_each(Daemon::freeze);
        for slot in 0..8_u16 {
            let at = DATA + (1 << 20) + u64::from(slot) * 4096;
            guest.write(at, &pattern(round * 16 + slot as u8, 4096));
            guest.submit(0, slot, (blk::WRITE, 1024 + u64::from(slot) * 8), &[(at, 4096, false)]);
            guest.submit(1, slot, (blk::READ, 0), &[(DATA + (2 << 20) + u64::from(slot) * 4096, 4096, true)]);
        }
        wait_until("they are in flight", || cluster.json(&["blk", "show", "disk"])["in_flight"] == 16);
        cluster.blk.kill();
        guest.disconnect();
        cluster.appliances.iter().for_each(|appliance| appliance.signal(Signal::CONT));
        cluster.restart_blk();
        guest.connect(&socket);
        for queue in 0..2 {
            let mut ended = guest.wait(queue, 8);
            ended.sort_unstable();
            let len = if queue == 0 { 1 } else { 4097 };
            let expected: Vec<_> = (0..8).map(|slot| (slot, len, blk::OK)).collect();
            assert_eq!(ended, expected, "each once, queue {queue}");
        }
        for slot in 0..8_u64 {
            assert!(guest.read(DATA + (2 << 20) + slot * 4096, 4096) == pattern(9, 4096));
        }
        assert_eq!(guest.run(1, (blk::READ, 1024), &[(DATA, 8 * 4096, true)]).1, blk::OK);
        for slot in 0..8_u8 {
            let got = guest.read(DATA + u64::from(slot) * 4096, 4096);
            assert!(got == pattern(round * 16 + slot, 4096), "round {round}, slot {slot}");
        }
    }
    assert!(cluster.blk.log().contains("submitted again"), "{}", cluster.blk.log());
}

#[test]
fn a_front_end_that_goes_and_comes_loses_nothing() {
    let cluster = Cluster::start(2);
    let socket = attach(&cluster, "disk", &["--transport", "nbd-tcp"]);
    let mut guest = Guest::new(1);
    guest.connect(&socket);
    assert!(cluster.json(&["blk", "show", "disk"])["users"][0] == "a virtual machine");
    let line = cluster.refused(&["blk", "detach", "disk"]);
    assert!(line.contains("in use: a virtual machine") && line.contains("shut it down"), "{line}");
    cluster.ok(&["alloc", "create", "more", "--size", "16MiB"]);
    let form = format!("vhost-user={}", socket.display());
    let line = cluster.refused(&["blk", "attach", "more", "--as", &form]);
    assert!(line.contains("another process does"), "{line}");
    cluster.ok(&["alloc", "delete", "more"]);
    // A second one is turned away, and the first one notices nothing.
    let second = vhost_features(&socket);
    assert!(second.is_err(), "{second:?}");
    for slot in 0..8 {
        guest.submit(0, slot, (blk::WRITE, u64::from(slot) * 8), &[(DATA, 4096, false)]);
    }
    guest.disconnect();
    guest.connect(&socket);
    let ended = guest.wait(0, 8);
    assert!(ended.iter().all(|(_, _, status)| *status == blk::OK), "{ended:?}");
    assert_eq!(guest.run(0, (blk::READ, 0), &[(DATA, 4096, true)]).1, blk::OK);
    guest.disconnect();
    wait_until("nobody uses it", || cluster.json(&["blk", "show", "disk"])["users"][0].is_null());
    cluster.ok(&["blk", "detach", "disk"]);
    assert!(!socket.exists());
    cluster.ok(&["alloc", "delete", "disk"]);
}

fn vhost_features(socket: &Path) -> vhost::Result<u64> {
    Frontend::connect(socket, 1).and_then(|frontend| frontend.get_features())
}

#[test]
fn a_guest_that_is_reset_while_io_is_held_is_not_held_up() {
    let cluster = Cluster::start(2);
    let mut guest = Guest::new(1);
    guest.connect(&attach(&cluster, "disk", &["--transport", "nbd-tcp"]));
    guest.write(DATA, &pattern(1, 4096));
    assert_eq!(guest.run(0, (blk::WRITE, 0), &[(DATA, 4096, false)]).1, blk::OK);
    cluster.appliances.iter().for_each(Daemon::freeze);
    guest.submit(0, 0, (blk::WRITE, 0), &[(DATA + 4096, 4096, false)]);
    guest.submit(0, 1, (blk::READ, 0), &[(DATA + 8192, 4096, true)]);
    guest.reset();
    guest.write(DATA + 8192, &[0x77; 4096]);
    cluster.appliances.iter().for_each(|appliance| appliance.signal(Signal::CONT));
    assert_eq!(guest.run(0, (blk::WRITE, 0), &[(DATA, 4096, false)]).1, blk::OK);
    assert_eq!(guest.run(0, (blk::READ, 0), &[(DATA + 4096, 4096, true)]).1, blk::OK);
    assert!(
        guest.read(DATA + 4096, 4096) == pattern(1, 4096),
        "what was written before the reset came later"
    );
    assert!(guest.read(DATA + 8192, 4096) == [0x77; 4096], "a read from before the reset came after it");
}

#[test]
fn a_guest_hears_of_a_new_size() {
    let cluster = Cluster::start(2);
    let mut guest = Guest::new(1);
    let disk = attach(&cluster, "disk", &[]);
    guest.connect(&disk);
    assert_eq!(guest.message(), 2, "the size may not be the one that it knew");
    let last = (128 << 20) / 512 - 8;
    assert_eq!(guest.run(0, (blk::READ, last), &[(DATA, 4096, true)]), (1, blk::FAILED));
    cluster.ok(&["alloc", "resize", "disk", "128MiB"]);
    assert_eq!(guest.message(), 2, "the configuration has changed");
    assert_eq!(guest.size(), 128 << 20);
    assert_eq!(guest.run(0, (blk::READ, last), &[(DATA, 4096, true)]), (4097, blk::OK));
    cluster.ok(&["alloc", "resize", "disk", "64MiB"]);
    assert_eq!(guest.message(), 2, "the configuration has changed");
    assert_eq!(guest.size(), 64 << 20);
    assert_eq!(guest.run(0, (blk::READ, last), &[(DATA, 4096, true)]), (1, blk::FAILED));

    guest.disconnect();
    cluster.ok(&["alloc", "resize", "disk", "96MiB"]);
    guest.connect(&disk);
    assert_eq!(guest.message(), 2, "the size has changed while it was away");
    assert_eq!(guest.size(), 96 << 20);
}

#[test]
fn rubbish_breaks_the_guests_own_ring_and_nothing_else() {
    let cluster = Cluster::start(2);
    let mut other = Guest::new(1);
    other.connect(&attach(&cluster, "other", &[]));
    let mut guest = Guest::new(2);
    let disk = attach(&cluster, "disk", &[]);
    guest.connect(&disk);
    guest.write(DATA, &pattern(5, 4096));
    assert_eq!(guest.run(0, (blk::WRITE, 0), &[(DATA, 4096, false)]).1, blk::OK);

    // A request with a status byte gets an error there.
    for (what, request, data) in [
        ("a buffer outside of memory", (blk::READ, 0), (1 << 50, 4096, true)),
        ("a buffer that reaches out of it", (blk::READ, 0), ((16 << 20) - 512, 4096, true)),
        ("a length beyond all", (blk::READ, 0), (DATA, u32::MAX, true)),
        ("a sector beyond the end", (blk::WRITE, 1 << 60), (DATA, 4096, false)),
        ("half a sector", (blk::WRITE, 0), (DATA, 100, false)),
        ("a read into what cannot be written", (blk::READ, 0), (DATA, 4096, false)),
        ("a write of what is to be written", (blk::WRITE, 0), (DATA, 4096, true)),
    ] {
        assert_eq!(guest.run(0, request, &[data]), (1, blk::FAILED), "{what}");
    }
    assert_eq!(guest.run(0, (77, 0), &[]), (1, blk::UNSUPPORTED));
    guest.chain(guest.table(0), 0, &[(DATA, 15, false), (0x3010, 1, true)]);
    guest.offer(0, 0);
    assert_eq!(guest.wait(0, 1)[0].2, blk::FAILED, "a header that is too short");

    // A request without one breaks the ring. The other queue and the other device go on, and so does it after a reset.
    let table = guest.table(0);
    type Rubbish<'a> = &'a dyn Fn(&mut Guest);
    let breaks: [(&str, Rubbish<'_>); 6] = [
        ("a loop", &|guest| {
            guest.chain(table, 0, &[(DATA, 16, false), (DATA, 16, false)]);
            guest.write(table + 16 + 12, &[1, 0, 0, 0]);
            guest.offer(0, 0);
        }),
        ("a next one beyond the table", &|guest| {
            guest.chain(table, 63, &[(DATA, 16, false), (DATA, 1, true)]);
            guest.offer(0, 63);
        }),
        ("a head that is none", &|guest| guest.offer(0, 64)),
        ("more than there can be", &|guest| guest.set_available(0, 9999)),
        ("a status that cannot be written", &|guest| {
            guest.chain(table, 0, &[(DATA, 16, false), (DATA + 32, 1, false)]);
            guest.offer(0, 0);
        }),
        ("a status outside of memory", &|guest| {
            guest.chain(table, 0, &[(DATA, 16, false), (u64::MAX, 1, true)]);
            guest.offer(0, 0);
        }),
    ];
    for (what, rubbish) in breaks {
        rubbish(&mut guest);
        wait_until(what, || guest.is_broken(0));
        assert!(guest.used(0).is_empty(), "{what}");
        assert_eq!(guest.run(1, (blk::READ, 0), &[(DATA + 8192, 4096, true)]), (4097, blk::OK), "{what}");
        assert!(guest.read(DATA + 8192, 4096) == pattern(5, 4096), "{what}");
        assert_eq!(other.run(0, (blk::READ, 0), &[(DATA, 4096, true)]), (4097, blk::OK), "{what}");
        guest.reset();
        assert_eq!(guest.run(0, (blk::READ, 0), &[(DATA + 8192, 4096, true)]), (4097, blk::OK), "{what}");
    }

    // A front end that speaks rubbish is disconnected, and the next one is served.
    guest.disconnect();
    for junk in [
        &[0xff_u8; 4096][..],
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        &[1, 0, 0, 0, 1, 0, 0, 0, 99, 0, 0, 0],
    ] {
        let mut socket = UnixStream::connect(&disk).expect("the socket is there");
        socket.write_all(junk).expect("it takes anything");
        socket.shutdown(Shutdown::Write).expect("it can be ended");
        // Reset or ended: it is over.
        let _ = socket.read_to_end(&mut Vec::new());
    }
    // So is one that waits for an answer that there cannot be: the state of queue 99.
    let mut socket = UnixStream::connect(&disk).expect("the socket is there");
    socket.set_read_timeout(Some(LIMIT)).expect("a limit");
    socket.write_all(&[11_u32, 1, 8, 99, 0].map(u32::to_ne_bytes).concat()).expect("it takes anything");
    assert_eq!(socket.read(&mut [0; 16]).ok(), Some(0), "it is disconnected");
    guest.connect(&disk);
    assert_eq!(guest.run(0, (blk::READ, 0), &[(DATA + 8192, 4096, true)]), (4097, blk::OK));

    // Random bytes everywhere; only its own device may suffer.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..200 {
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // Small numbers often: they are more likely to mean something.
            if state & 3 == 0 { (state >> 8) as u8 } else { (state >> 8) as u8 & 7 }
        })
        .take(0x2000)
        .collect();
        // Not the used ring, and not the index.
        guest.write(table, &bytes[..0x1000]);
        guest.write(table + 0x1004, &bytes[0x1004..]);
        let available = u16::from_le_bytes([bytes[0], bytes[1]]);
        guest.set_available(0, available);
        if guest.is_broken(0) {
            guest.reset();
        }
    }
    guest.reset();
    assert_eq!(guest.run(0, (blk::READ, 8), &[(DATA, 4096, true)]), (4097, blk::OK));
    assert_eq!(other.run(0, (blk::READ, 0), &[(DATA, 4096, true)]), (4097, blk::OK));
    assert!(!cluster.blk.log().contains("panicked"), "{}", cluster.blk.log());
}

#[test]
fn memory_that_a_front_end_can_cut_off_is_refused() {
    let cluster = Cluster::start(2);
    let socket = attach(&cluster, "disk", &[]);
    assert!(!Guest::with_unsealed_memory(1).offers_memory(&socket));
    wait_until("the log says why", || cluster.blk.log().contains("F_SEAL_SHRINK"));
    let mut sealed = Guest::new(1);
    sealed.connect(&socket);
    assert_eq!(sealed.run(0, (blk::READ, 0), &[(DATA, 4096, true)]), (4097, blk::OK));
}

#[test]
fn a_front_end_that_cuts_its_memory_off_harms_itself_alone() {
    let mut cluster = Cluster::start(2);
    cluster.restart_blk_with("allow-unsealed = true");
    let mut other = Guest::new(1);
    other.connect(&attach(&cluster, "other", &[]));
    let disk = attach(&cluster, "disk", &[]);
    let mut guest = Guest::with_unsealed_memory(1);
    guest.connect(&disk);
    guest.write(DATA, &pattern(5, 4096));
    assert_eq!(guest.run(0, (blk::WRITE, 0), &[(DATA, 4096, false)]).1, blk::OK);
    let pid = cluster.blk.pid();

    guest.cut_memory();
    guest.kick(0);
    wait_until("its ring is broken", || guest.is_broken(0));
    assert_eq!(other.run(0, (blk::READ, 0), &[(DATA, 4096, true)]), (4097, blk::OK), "the other goes on");
    assert!(cluster.blk.is_alive() && cluster.blk.pid() == pid, "{}", cluster.blk.log());
    assert!(cluster.blk.log().contains("guest memory is gone"), "{}", cluster.blk.log());

    // One with whole memory is served, with what was written.
    guest.disconnect();
    let mut next = Guest::new(1);
    next.connect(&disk);
    assert_eq!(next.run(0, (blk::READ, 0), &[(DATA, 4096, true)]), (4097, blk::OK));
    assert!(next.read(DATA, 4096) == pattern(5, 4096));
}
