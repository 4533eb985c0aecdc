//! Tests of the server's handshake, byte by byte.

use xpm_protocol::nbd::TransmissionFlags;
use xpm_protocol::nbd::constants::*;
use xpm_protocol::nbd::handshake::server::{CloseReason, Negotiated, ServerHandshake, Step};

use crate::wire::{Server, context_data, hex, info_data, option, replies, reply, string};

fn ready(step: Step) -> Negotiated {
    match step {
        Step::Ready(negotiated) => negotiated,
        other => panic!("not ready: {other:?}"),
    }
}

#[test]
fn the_greeting_is_golden() {
    let greeting = ServerHandshake::new().take_output();
    assert_eq!(greeting, hex("4e42444d41474943 49484156454f5054 0003"));
}

#[test]
fn go_is_golden() {
    let mut server = Server::greeted();
    let request = hex("49484156454f5054 00000007 0000000c 00000004 6469736b 0001 0003");
    assert_eq!(request, option(OPT_GO, &info_data("disk", &[INFO_BLOCK_SIZE])));
    let (output, step) = server.send(&request);
    let expected = hex("0003e889045565a9 00000007 00000003 0000000c 0000 0000000000100000 0d6d
         0003e889045565a9 00000007 00000003 0000000e 0003 00000200 00001000 00100000
         0003e889045565a9 00000007 00000001 00000000");
    assert_eq!(output, expected);
    let negotiated = ready(step);
    assert_eq!((negotiated.structured, negotiated.base_allocation), (false, None));
    assert_eq!(negotiated.info.flags.bits(), 0x0d6d);
    assert_eq!(server.opened, [("disk".to_owned(), true)]);
}

#[test]
fn an_export_by_name_is_golden() {
    for (flags, zeroes) in [(1_u32, 124), (3, 0), (2, 0), (0, 124)] {
        let mut server = Server::new();
        server.send(&flags.to_be_bytes());
        let (output, step) = server.send(&option(OPT_EXPORT_NAME, b"disk"));
        let mut expected = hex("0000000000100000 0d6d");
        expected.extend(vec![0; zeroes]);
        assert_eq!(output, expected, "client flags {flags}");
        assert_eq!(ready(step).info.size, 1 << 20);
    }
    let (output, step) = Server::greeted().send(&option(OPT_EXPORT_NAME, b"nothing"));
    assert_eq!((output, step), (Vec::new(), Step::Close(CloseReason::UnknownExport)));
    for name in [&b"di\0sk"[..], b"\xff", &[b'a'; 4097], &[b'a'; 20_000]] {
        let (output, step) = Server::greeted().send(&option(OPT_EXPORT_NAME, name));
        assert!(output.is_empty() && matches!(step, Step::Close(_)));
    }
}

#[test]
fn unknown_client_flags_and_invalid_bytes_close() {
    for bytes in [&4_u32.to_be_bytes()[..], &0x8000_0001_u32.to_be_bytes(), b"GET / HTTP/1.1\r\n\r\n"] {
        let (output, step) = Server::new().send(bytes);
        assert!(output.is_empty() && matches!(step, Step::Close(CloseReason::Protocol(_))), "{step:?}");
    }
    let (_, step) = Server::greeted().send(b"IHAVEOPX\0\0\0\x07\0\0\0\0");
    assert!(matches!(step, Step::Close(CloseReason::Protocol(_))), "{step:?}");
}

#[test]
fn an_unknown_option_is_unsupported_and_the_next_one_works() {
    let mut server = Server::greeted();
    for number in [0, 4, OPT_STARTTLS, OPT_EXTENDED_HEADERS, 77, u32::MAX] {
        for data in [&b""[..], b"some data"] {
            assert_eq!(server.kinds(number, data), [REP_ERR_UNSUP], "option {number}");
        }
    }
    assert_eq!(server.kinds(OPT_INFO, &info_data("disk", &[])), [REP_INFO, REP_INFO, REP_ACK]);
}

#[test]
fn abort_is_acknowledged_with_any_data() {
    for data in [&b""[..], b"bye", &[7; 100_000]] {
        let (output, step) = Server::greeted().send(&option(OPT_ABORT, data));
        assert_eq!(output, reply(OPT_ABORT, REP_ACK, b""));
        assert_eq!(step, Step::Close(CloseReason::Aborted));
    }
}

#[test]
fn lists_are_given_or_refused() {
    let mut server = Server::greeted();
    let names = [(REP_SERVER, string("disk")), (REP_SERVER, string("other")), (REP_ACK, Vec::new())];
    assert_eq!(server.ask(OPT_LIST, b""), names);
    assert_eq!(server.kinds(OPT_LIST, b"x"), [REP_ERR_INVALID]);
    server.lists = false;
    assert_eq!(server.kinds(OPT_LIST, b""), [REP_ERR_POLICY]);
}

#[test]
fn information_is_sent_as_requested() {
    let mut server = Server::greeted();
    let asks = [INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, INFO_EXPORT, 99];
    let answers = server.ask(OPT_INFO, &info_data("disk", &asks));
    let kinds: Vec<u16> =
        answers.iter().filter_map(|(_, data)| Some(u16::from_be_bytes(*data.first_chunk()?))).collect();
    assert_eq!(kinds, [INFO_EXPORT, INFO_BLOCK_SIZE, INFO_NAME, INFO_DESCRIPTION]);
    assert_eq!(answers[2].1, b"\0\x01disk");
    assert_eq!(answers[3].1, b"\0\x02a disk");
    assert_eq!(server.kinds(OPT_INFO, &info_data("nothing", &[])), [REP_ERR_UNKNOWN]);
    assert_eq!(server.kinds(OPT_GO, &info_data("nothing", &[])), [REP_ERR_UNKNOWN]);
    assert_eq!(server.kinds(OPT_GO, &info_data("", &[])), [REP_ERR_UNKNOWN]);
    let entered: Vec<bool> = server.opened.iter().map(|(_, enters)| *enters).collect();
    assert_eq!(entered, [false, false, true, true]);
}

#[test]
fn malformed_requests_for_information_are_invalid() {
    let good = info_data("disk", &[INFO_NAME, INFO_BLOCK_SIZE]);
    let mut server = Server::greeted();
    for cut in 0..good.len() {
        assert_eq!(server.kinds(OPT_INFO, &good[..cut]), [REP_ERR_INVALID], "cut at {cut}");
    }
    let mut long = good.clone();
    long.push(0);
    let mut lying = good;
    lying[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    let name = "a".repeat(4097);
    for data in [long, lying, info_data(&name, &[]), info_data("a\0b", &[]), b"\0\0\0\x01\xff\0\0".to_vec()] {
        assert_eq!(server.kinds(OPT_GO, &data), [REP_ERR_INVALID]);
    }
    assert!(server.opened.is_empty(), "nothing malformed is looked up");
}

#[test]
fn df_is_announced_with_structured_replies() {
    let mut server = Server::greeted();
    assert_eq!(server.kinds(OPT_STRUCTURED_REPLY, b"x"), [REP_ERR_INVALID]);
    let df = TransmissionFlags::SEND_DF.bits();
    let flags = |server: &mut Server| {
        let answers = server.ask(OPT_INFO, &info_data("disk", &[]));
        u16::from_be_bytes(answers[0].1[10..12].try_into().unwrap())
    };
    assert_eq!(flags(&mut server) & df, 0);
    assert_eq!(server.ask(OPT_STRUCTURED_REPLY, b""), [(REP_ACK, Vec::new())]);
    assert_eq!(flags(&mut server) & df, df);
    let (output, step) = server.send(&option(OPT_EXPORT_NAME, b"disk"));
    let negotiated = ready(step);
    assert!(negotiated.structured);
    assert_eq!(output[8..10], negotiated.info.flags.bits().to_be_bytes());
    assert!(negotiated.info.flags.contains(TransmissionFlags::SEND_DF));
}

#[test]
fn contexts_need_structured_replies() {
    let mut server = Server::greeted();
    for number in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
        let data = context_data("disk", &["base:allocation"]);
        assert_eq!(server.kinds(number, &data), [REP_ERR_INVALID]);
    }
    server.kinds(OPT_STRUCTURED_REPLY, b"");
    let list = |server: &mut Server, queries: &[&str]| {
        server.ask(OPT_LIST_META_CONTEXT, &context_data("disk", queries))
    };
    let found = [(REP_META_CONTEXT, b"\0\0\0\0base:allocation".to_vec()), (REP_ACK, Vec::new())];
    for queries in [&[][..], &["base:"], &["base:allocation"], &["qemu:x", "base:allocation", "base:"]] {
        assert_eq!(list(&mut server, queries), found, "{queries:?}");
    }
    for queries in [&["base:other"][..], &["x-a:b"], &["colon"]] {
        assert_eq!(list(&mut server, queries), found[1..], "{queries:?}");
    }
    for queries in [&[][..], &["base:"], &["base:other"], &["qemu:base:allocation"]] {
        let kinds = server.kinds(OPT_SET_META_CONTEXT, &context_data("disk", queries));
        assert_eq!(kinds, [REP_ACK], "{queries:?}");
    }
    let good = context_data("disk", &["base:", "base:allocation"]);
    for cut in 0..good.len() {
        assert_eq!(server.kinds(OPT_SET_META_CONTEXT, &good[..cut]), [REP_ERR_INVALID], "cut at {cut}");
    }
}

/// The last setting counts, for the entered export, and a failed setting leaves none.
#[test]
fn contexts_count_for_the_export_that_they_were_set_for() {
    let set = |export: &str, query: &str| option(OPT_SET_META_CONTEXT, &context_data(export, &[query]));
    let chosen = set("disk", "base:allocation");
    let cases: [(&str, Vec<Vec<u8>>, bool); 6] = [
        ("set", vec![chosen.clone()], true),
        ("set for another export", vec![set("other", "base:allocation")], false),
        ("replaced by one of another export", vec![chosen.clone(), set("other", "base:allocation")], false),
        ("replaced by none", vec![chosen.clone(), set("disk", "base:")], false),
        ("replaced by a malformed one", vec![chosen.clone(), option(OPT_SET_META_CONTEXT, b"?")], false),
        ("replaced by one too long", vec![chosen.clone(), option(OPT_SET_META_CONTEXT, &[0; 50_000])], false),
    ];
    for (case, options, counts) in cases {
        for by_name in [false, true] {
            let mut server = Server::greeted();
            server.kinds(OPT_STRUCTURED_REPLY, b"");
            for bytes in &options {
                server.send(bytes);
            }
            let last = match by_name {
                true => option(OPT_EXPORT_NAME, b"disk"),
                false => option(OPT_GO, &info_data("disk", &[])),
            };
            let (_, step) = server.send(&last);
            assert_eq!(ready(step).base_allocation.is_some(), counts, "{case}");
        }
    }
}

#[test]
fn long_options_are_skipped_and_longer_ones_close() {
    let mut server = Server::greeted();
    assert_eq!(server.kinds(OPT_GO, &[0; 100_000]), [REP_ERR_TOO_BIG]);
    assert_eq!(server.kinds(OPT_STRUCTURED_REPLY, b""), [REP_ACK]);
    let mut header = option(OPT_GO, b"");
    header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    let (_, step) = server.send(&header);
    assert!(matches!(step, Step::Close(CloseReason::Protocol(_))), "before any of its data came: {step:?}");
}

#[test]
fn a_flood_of_options_closes() {
    let mut server = Server::greeted();
    let flood: Vec<u8> = (0..1000).flat_map(|_| option(OPT_LIST, b"")).collect();
    let (output, step) = server.send(&flood);
    assert!(matches!(step, Step::Close(CloseReason::Protocol(_))), "{step:?}");
    assert!(replies(&output).len() < 300);
    let (output, step) = server.send(&option(OPT_LIST, b""));
    assert!(output.is_empty() && matches!(step, Step::Close(_)), "it stays closed");
}

#[test]
fn the_first_requests_may_come_with_the_last_option() {
    let mut server = Server::greeted();
    let mut bytes = option(OPT_GO, &info_data("disk", &[]));
    bytes.extend(b"requests");
    assert_eq!(ready(server.send(&bytes).1).leftover, b"requests");
}

#[test]
fn names_are_not_printed() {
    let mut handshake = ServerHandshake::new();
    handshake.receive(&3_u32.to_be_bytes());
    handshake.receive(&option(OPT_GO, &info_data("topsecret", &[])));
    let step = handshake.step();
    assert_eq!(step, Step::Open("topsecret".to_owned()));
    let printed = format!("{handshake:?} {step:?}");
    assert!(!printed.contains("secret") && !printed.contains("116, 111, 112"), "{printed}");
}
