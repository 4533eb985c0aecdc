//! The NBD client against servers that violate the protocol, fail, stall or do not exist. None of them may
//! make the client panic, hang, or complete an operation twice.

mod support;

use std::time::{Duration, Instant};

use support::memory::Memory;
use support::peers::{free_address, name};
use support::scripted::{Asked, Script, Scripted};
use xpm_transport::nbd::client::{ConnectError, Target, connect};
use xpm_transport::{Completion, IoError, Kind, Link, LinkDown, Operation};

const LEN: usize = 4096;

fn read(memory: &Memory, token: u64) -> Operation {
    Operation { kind: Kind::Read, offset: 0, len: LEN as u64, buf: Some(memory.buf().part(0, LEN)), token }
}

/// Posts one read to a server that answers it by the script; returns the completions and the link's error.
fn read_from(script: impl FnOnce(&mut Script, Asked) + Send + 'static) -> (Vec<Completion>, LinkDown) {
    let (server, mut link) = Scripted::linked(4, |end| {
        let asked = end.asked();
        script(end, asked);
    });
    let memory = Memory::new(LEN);
    link.post(read(&memory, 1)).unwrap();
    link.submit();
    let mut all = Vec::new();
    let down = loop {
        let mut completions = Vec::new();
        let outcome = support::wait(&mut link, &mut completions);
        all.append(&mut completions);
        if let Err(down) = outcome {
            break down;
        }
    };
    assert_eq!(link.poll(&mut all), Err(down), "down for good");
    drop(link);
    server.join();
    (all, down)
}

#[test]
fn invalid_replies() {
    let protocol = (Vec::new(), LinkDown::Protocol);
    let cookies: [fn(u64) -> u64; 5] = [
        |cookie| cookie + 1,
        |cookie| cookie + (1 << 32),
        |_| 0,
        |_| u64::MAX,
        |cookie| cookie & !0xffff_ffff | 77,
    ];
    for cookie in cookies {
        assert_eq!(read_from(move |end, asked| end.reply(0, cookie(asked.cookie))), protocol);
        assert_eq!(read_from(move |end, asked| end.reply(5, cookie(asked.cookie))), protocol);
    }
    assert_eq!(read_from(|end, _| end.send(b"HTTP/1.1 400 Bad Request")), protocol);
    let chunk = |end: &mut Script, asked: Asked| {
        let cookie = asked.cookie.to_be_bytes();
        end.send(&[b"\x66\x8e\x33\xef\0\x01\0\x01", &cookie[..], b"\0\0\0\x08\0\0\0\0\0\0\0\0"].concat());
    };
    assert_eq!(read_from(chunk), protocol, "structured replies were not agreed on");
}

#[test]
fn connections_that_end_too_soon() {
    let broken = (Vec::new(), LinkDown::Broken);
    assert_eq!(read_from(|_, _| ()), broken);
    assert_eq!(read_from(|end, _| end.send(b"\x67\x44\x66")), broken);
    assert_eq!(read_from(|end, asked| end.reply(0, asked.cookie)), broken);
    let short = |end: &mut Script, asked: Asked| {
        end.reply(0, asked.cookie);
        end.send(&[7; LEN - 1]);
    };
    assert_eq!(read_from(short), broken);
}

#[test]
fn one_reply_too_many() {
    let done = vec![Completion { token: 1, result: Ok(()) }];
    let twice = |end: &mut Script, asked: Asked| {
        for _ in 0..2 {
            end.reply(0, asked.cookie);
            end.send(&[7; LEN]);
        }
        end.until_closed();
    };
    assert_eq!(read_from(twice), (done, LinkDown::Protocol));
    let failed = vec![Completion { token: 1, result: Err(IoError::Failed) }];
    let failed_twice = |end: &mut Script, asked: Asked| {
        end.reply(5, asked.cookie);
        end.reply(5, asked.cookie);
        end.until_closed();
    };
    assert_eq!(read_from(failed_twice), (failed, LinkDown::Protocol));
}

#[test]
fn a_reply_before_any_request() {
    let (linked, when_linked) = std::sync::mpsc::channel();
    let (_server, mut link) = Scripted::linked(4, move |end| {
        when_linked.recv().unwrap();
        end.reply(0, 1 << 32);
        end.until_closed();
    });
    linked.send(()).unwrap();
    assert_eq!(support::wait(&mut link, &mut Vec::new()), Err(LinkDown::Protocol));
}

#[test]
fn an_idle_link_notices_the_end() {
    let (server, mut link) = Scripted::linked(4, |_| ());
    server.join();
    assert!(support::readable(link.wait_fd().unwrap(), support::LIMIT));
    assert_eq!(link.poll(&mut Vec::new()), Err(LinkDown::Broken));
}

#[test]
fn errors_end_their_operation_alone() {
    let errors = [
        (1, IoError::Invalid),
        (5, IoError::Failed),
        (12, IoError::Failed),
        (22, IoError::Invalid),
        (28, IoError::NoSpace),
        (95, IoError::Unsupported),
        (108, IoError::Fenced),
        (12_345, IoError::Invalid),
    ];
    let (server, mut link) = Scripted::linked(2, move |end| {
        for (errno, _) in errors {
            let (first, second) = (end.asked(), end.asked());
            end.reply(0, second.cookie);
            end.send(&[9; LEN]);
            end.reply(errno, first.cookie);
        }
        end.until_closed();
    });
    for (_, error) in errors {
        let (one, two) = (Memory::new(LEN), Memory::new(LEN));
        link.post(read(&one, 1)).unwrap();
        link.post(read(&two, 2)).unwrap();
        link.submit();
        let mut all = Vec::new();
        while all.len() < 2 {
            let mut completions = Vec::new();
            support::wait(&mut link, &mut completions).unwrap();
            all.append(&mut completions);
        }
        let expected = [Completion { token: 2, result: Ok(()) }, Completion { token: 1, result: Err(error) }];
        assert_eq!(all, expected);
        assert_eq!(two.get(0, LEN), [9; LEN]);
    }
    drop(link);
    server.join();
}

const LONG: usize = 16 << 20;

fn long_write(memory: &Memory) -> Operation {
    Operation { kind: Kind::Write, offset: 0, len: LONG as u64, buf: Some(memory.buf()), token: 1 }
}

#[test]
fn a_write_may_be_refused_while_it_is_sent() {
    let (server, mut link) = Scripted::linked(2, |end| {
        let asked = end.asked();
        assert_eq!(asked.command, 1);
        end.reply(28, asked.cookie);
        // The client has to wait until the server has received its bytes.
        std::thread::sleep(Duration::from_millis(50));
        end.receive(asked.len as usize);
        end.until_closed();
    });
    let memory = Memory::new(LONG);
    link.post(long_write(&memory)).unwrap();
    link.submit();
    let mut completions = Vec::new();
    support::wait(&mut link, &mut completions).unwrap();
    assert_eq!(completions, [Completion { token: 1, result: Err(IoError::NoSpace) }]);
    drop(link);
    server.join();
}

#[test]
fn a_write_cannot_be_done_before_it_is_sent() {
    let (server, mut link) = Scripted::linked(2, |end| {
        let asked = end.asked();
        end.reply(0, asked.cookie);
        end.until_closed();
    });
    let memory = Memory::new(LONG);
    link.post(long_write(&memory)).unwrap();
    link.submit();
    assert_eq!(support::wait(&mut link, &mut Vec::new()), Err(LinkDown::Protocol));
    drop(link);
    server.join();
}

#[test]
fn a_server_that_pauses_delays_operations_only() {
    let (server, mut link) = Scripted::linked(2, |end| {
        std::thread::sleep(Duration::from_millis(100));
        let asked = end.asked();
        end.receive(asked.len as usize);
        end.reply(0, asked.cookie);
        end.until_closed();
    });
    let memory = Memory::new(LONG);
    link.post(long_write(&memory)).unwrap();
    link.submit();
    assert_eq!(link.poll(&mut Vec::new()), Ok(()), "returns while the server does not read");
    let mut completions = Vec::new();
    support::wait(&mut link, &mut completions).unwrap();
    assert_eq!(completions, [Completion { token: 1, result: Ok(()) }]);
    drop(link);
    server.join();
}

#[test]
fn dropping_a_link_does_not_block() {
    let (server, mut link) = Scripted::linked(2, Script::until_closed);
    let memory = Memory::new(LONG);
    link.post(long_write(&memory)).unwrap();
    link.submit();
    drop(link);
    server.join();
}

fn connect_to(script: impl FnOnce(&mut Script) + Send + 'static) -> ConnectError {
    let server = Scripted::bare(script);
    let error = connect(&server.target, &name(), support::LIMIT).expect_err("a bad handshake");
    server.join();
    error
}

#[test]
fn bad_handshakes() {
    let error = connect_to(|end| end.send(b"SSH-2.0-OpenSSH_9.2p1\r\n"));
    assert!(matches!(error, ConnectError::Protocol(_)), "{error}");
    let error = connect_to(|end| end.send(b"NBDMAG"));
    assert!(matches!(error, ConnectError::Unreachable(_)), "{error}");
    let error = connect_to(|end| {
        end.send(b"NBDMAGICIHAVEOPT\0\0");
        end.receive(4 + 16 + 64);
    });
    assert!(matches!(error, ConnectError::UnknownExport), "how servers without GO refuse: {error}");
    let answer = |kind: u32, data: &'static [u8]| {
        connect_to(move |end| {
            end.send(b"NBDMAGICIHAVEOPT\0\x03");
            end.receive(4);
            end.option_reply(kind, data);
            end.until_closed();
        })
    };
    assert!(matches!(answer((1 << 31) + 6, b""), ConnectError::UnknownExport));
    assert!(matches!(answer((1 << 31) + 2, b"no"), ConnectError::Refused(text) if text == "no"));
    assert!(matches!(answer((1 << 31) + 5, b""), ConnectError::Unsupported(_)));
    assert!(matches!(answer(1, b""), ConnectError::Protocol(_)), "no size");
    assert!(matches!(answer(3, b"\0\0\x07"), ConnectError::Protocol(_)));
}

#[test]
fn a_slow_server_cannot_exceed_the_limit() {
    let limit = Duration::from_millis(300);
    let scripts: [fn(&mut Script); 2] = [Script::until_closed, |end| {
        for byte in b"NBDMAGICIHAVEOPT\0\x03" {
            std::thread::sleep(Duration::from_millis(50));
            if !end.try_send(&[*byte]) {
                return;
            }
        }
        end.until_closed();
    }];
    for script in scripts {
        let server = Scripted::bare(script);
        let start = Instant::now();
        let error = connect(&server.target, &name(), limit).expect_err("no handshake");
        assert!(matches!(error, ConnectError::TimedOut), "{error}");
        assert!(start.elapsed() >= limit);
        server.join();
    }
}

#[test]
fn nothing_listens() {
    let folder = tempfile::TempDir::new().unwrap();
    for target in [Target::Tcp(free_address()), Target::Unix(folder.path().join("socket"))] {
        let error = connect(&target, &name(), support::LIMIT).expect_err("nobody listens");
        assert!(matches!(error, ConnectError::Unreachable(_)), "{error}");
    }
}
