//! Tests of the client's handshake, also against servers that break the protocol.

use xpm_protocol::nbd::constants::*;
use xpm_protocol::nbd::handshake::client::{Agreed, ClientHandshake, HandshakeError, Wishes};
use xpm_protocol::nbd::{BlockSizes, TransmissionFlags};

use crate::wire::{context_data, hex, info_data, option, reply};

const GREETING: &str = "4e42444d41474943 49484156454f5054 0003";

fn wishes(rich: bool) -> Wishes {
    Wishes { export: "disk".to_owned(), structured: rich, base_allocation: rich, visitor: None }
}

fn info_export(size: u64, flags: u16) -> Vec<u8> {
    let mut data = INFO_EXPORT.to_be_bytes().to_vec();
    data.extend(size.to_be_bytes());
    data.extend(flags.to_be_bytes());
    data
}

fn info_block(min: u32, preferred: u32, max: u32) -> Vec<u8> {
    let mut data = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    data.extend([min, preferred, max].iter().flat_map(|size| size.to_be_bytes()));
    data
}

/// The result of a handshake in which the server sends these messages, one after the other.
fn hear(handshake: &mut ClientHandshake, messages: &[Vec<u8>]) -> Result<Option<Agreed>, HandshakeError> {
    let mut agreed = handshake.step()?;
    for message in messages {
        handshake.receive(message);
        agreed = handshake.step()?;
    }
    Ok(agreed)
}

/// The result if the server answers GO with these replies.
fn go(replies: &[(u32, Vec<u8>)]) -> Result<Option<Agreed>, HandshakeError> {
    let mut messages = vec![hex(GREETING)];
    messages.extend(replies.iter().map(|(kind, data)| reply(OPT_GO, *kind, data)));
    hear(&mut ClientHandshake::new(wishes(false)), &messages)
}

#[test]
fn the_bytes_sent_are_golden() {
    let mut client = ClientHandshake::new(wishes(true));
    assert_eq!(client.step(), Ok(None));
    assert!(client.take_output().is_empty(), "the server speaks first");
    client.receive(&hex(GREETING));
    assert_eq!(client.step(), Ok(None));
    assert_eq!(client.take_output(), hex("00000003 49484156454f5054 00000008 00000000"));
    client.receive(&reply(OPT_STRUCTURED_REPLY, REP_ACK, b""));
    assert_eq!(client.step(), Ok(None));
    let set = option(OPT_SET_META_CONTEXT, &context_data("disk", &["base:allocation"]));
    assert_eq!(client.take_output(), set);
    client.receive(&reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0\0\0\x07base:allocation"));
    client.receive(&reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0\0\0\x08x-other:thing"));
    client.receive(&reply(OPT_SET_META_CONTEXT, REP_ACK, b""));
    assert_eq!(client.step(), Ok(None));
    assert_eq!(client.take_output(), option(OPT_GO, &info_data("disk", &[INFO_BLOCK_SIZE])));
    client.receive(&reply(OPT_GO, REP_INFO, &info_export(1 << 40, 0x05ed)));
    client.receive(&reply(OPT_GO, REP_INFO, b"\0\x63what nobody knows"));
    client.receive(&reply(OPT_GO, REP_INFO, &info_block(512, 4096, u32::MAX)));
    client.receive(&reply(OPT_GO, REP_ACK, b""));
    let agreed = client.step().unwrap().unwrap();
    assert!(client.take_output().is_empty() && agreed.leftover.is_empty());
    assert_eq!((agreed.info.size, agreed.info.flags.bits()), (1 << 40, 0x05ed));
    assert_eq!(agreed.info.block, BlockSizes { min: 512, preferred: 4096, max: u32::MAX - 511 });
    assert_eq!((agreed.structured, agreed.base_allocation), (true, Some(7)));
}

#[test]
fn it_does_without_unsupported_features() {
    let mut client = ClientHandshake::new(wishes(true));
    let messages = [
        hex(GREETING),
        reply(OPT_STRUCTURED_REPLY, REP_ERR_UNSUP, b"no"),
        reply(OPT_GO, REP_INFO, &info_export(5, 0x0881)),
        reply(OPT_GO, REP_ACK, b""),
    ];
    let agreed = hear(&mut client, &messages).unwrap().unwrap();
    assert_eq!((agreed.structured, agreed.base_allocation), (false, None));
    assert_eq!(agreed.info.block, BlockSizes::DEFAULT);
    // DF requires structured replies, and FAST_ZERO requires WRITE_ZEROES.
    assert_eq!(agreed.info.flags, TransmissionFlags::HAS_FLAGS);
}

/// "If an error is returned, the client MUST disregard any context replies that may have been sent."
#[test]
fn contexts_ahead_of_an_error_do_not_count() {
    let mut client = ClientHandshake::new(wishes(true));
    let messages = [
        hex(GREETING),
        reply(OPT_STRUCTURED_REPLY, REP_ACK, b""),
        reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0\0\0\x07base:allocation"),
        reply(OPT_SET_META_CONTEXT, REP_ERR_TOO_BIG, b""),
        reply(OPT_GO, REP_INFO, &info_export(5, 1)),
        reply(OPT_GO, REP_ACK, b""),
    ];
    let agreed = hear(&mut client, &messages).unwrap().unwrap();
    assert_eq!((agreed.structured, agreed.base_allocation), (true, None));
}

#[test]
fn old_servers_are_asked_by_name() {
    for (flags, zeroes, unsupported) in [(0_u16, 124, false), (2, 0, false), (1, 124, true), (3, 0, true)] {
        let mut client = ClientHandshake::new(wishes(false));
        let mut greeting = hex("4e42444d41474943 49484156454f5054");
        greeting.extend(flags.to_be_bytes());
        assert_eq!(hear(&mut client, &[greeting]), Ok(None));
        if unsupported {
            client.take_output();
            assert_eq!(hear(&mut client, &[reply(OPT_GO, REP_ERR_UNSUP, b"")]), Ok(None));
            assert_eq!(client.take_output(), option(OPT_EXPORT_NAME, b"disk"));
        } else {
            let mut expected = u32::from(flags).to_be_bytes().to_vec();
            expected.extend(option(OPT_EXPORT_NAME, b"disk"));
            assert_eq!(client.take_output(), expected);
        }
        assert_eq!(client.closed(), HandshakeError::UnknownExport);
        let mut answer = hex("0000000000100000 0003");
        answer.extend(vec![0; zeroes]);
        let last = answer.split_off(answer.len() - 1);
        assert_eq!(hear(&mut client, &[answer]), Ok(None));
        let agreed = hear(&mut client, &[last]).unwrap().unwrap();
        assert_eq!((agreed.info.size, agreed.info.flags.bits()), (1 << 20, 3));
    }
}

#[test]
fn refusals_are_told_apart_and_answered_with_abort() {
    let cases = [
        (REP_ERR_UNKNOWN, HandshakeError::UnknownExport),
        (REP_ERR_POLICY, HandshakeError::Policy("not (the name) for you".to_owned())),
        (REP_ERR_TLS_REQD, HandshakeError::TlsRequired),
        (REP_ERR_SHUTDOWN, HandshakeError::ShuttingDown),
        (REP_ERR_INVALID, HandshakeError::Refused("not (the name) for you".to_owned())),
        (REP_ERR + 999, HandshakeError::Refused("not (the name) for you".to_owned())),
    ];
    for (kind, expected) in cases {
        let mut client = ClientHandshake::new(wishes(false));
        assert_eq!(hear(&mut client, &[hex(GREETING)]), Ok(None));
        client.take_output();
        let refusal = reply(OPT_GO, kind, b"not di\x0esk\n for you");
        assert_eq!(hear(&mut client, &[refusal]), Err(expected));
        assert_eq!(client.take_output(), option(OPT_ABORT, b""));
    }
}

#[test]
fn other_services_are_recognised_by_their_first_byte() {
    for greeting in ["H", "SSH-2.0-OpenSSH_9.2\r\n", "NBDMAGIX"] {
        let mut client = ClientHandshake::new(wishes(false));
        client.receive(greeting.as_bytes());
        assert_eq!(client.step(), Err(HandshakeError::NotNbd), "{greeting}");
        assert!(client.take_output().is_empty());
    }
    let mut client = ClientHandshake::new(wishes(false));
    client.receive(&hex("4e42444d41474943 0000420281861253 0000"));
    assert_eq!(client.step(), Err(HandshakeError::NotNbd), "the oldstyle handshake");
}

#[test]
fn invalid_names_are_not_sent() {
    for export in ["a".repeat(4097), "a\0b".to_owned()] {
        let mut client = ClientHandshake::new(Wishes { export, ..wishes(false) });
        client.receive(&hex(GREETING));
        assert_eq!(client.step(), Err(HandshakeError::BadName));
        assert!(client.take_output().is_empty());
    }
}

#[test]
fn a_server_that_breaks_the_protocol_is_an_error() {
    let ack = (REP_ACK, Vec::new());
    let export = (REP_INFO, info_export(1 << 20, 1));
    let cases = [
        ("no size", vec![ack.clone()]),
        ("a size cut short", vec![(REP_INFO, info_export(1, 1)[..11].to_vec())]),
        ("a size too long", vec![(REP_INFO, [info_export(1, 1), vec![0]].concat())]),
        ("information without a kind", vec![(REP_INFO, vec![0])]),
        ("a kind out of place", vec![(REP_SERVER, Vec::new())]),
        ("a block of 0", vec![(REP_INFO, info_block(0, 4096, 1 << 20))]),
        ("a block of 3", vec![(REP_INFO, info_block(3, 4096, 1 << 20))]),
        ("a block of 128 KiB", vec![(REP_INFO, info_block(1 << 17, 1 << 17, 1 << 20))]),
        ("preferred below 512", vec![(REP_INFO, info_block(1, 256, 1 << 20))]),
        ("preferred below the least", vec![(REP_INFO, info_block(4096, 512, 1 << 20))]),
        ("preferred no power of two", vec![(REP_INFO, info_block(1, 5000, 1 << 20))]),
        ("most no multiple", vec![(REP_INFO, info_block(512, 4096, 5000))]),
        ("most 0", vec![(REP_INFO, info_block(1, 4096, 0))]),
        ("most below preferred", vec![(REP_INFO, info_block(1, 4096, 2048)), export.clone(), ack.clone()]),
        ("no end", vec![export.clone(); 100]),
    ];
    for (case, replies) in cases {
        assert!(matches!(go(&replies), Err(HandshakeError::Protocol(_))), "{case}");
    }
    let small = [(REP_INFO, info_block(1, 4096, 1024)), (REP_INFO, info_export(1000, 1)), ack];
    assert!(go(&small).unwrap().is_some(), "enough for the whole export");

    let mut long = reply(OPT_GO, REP_INFO, b"");
    long[16..].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut magic = reply(OPT_GO, REP_ACK, b"");
    magic[0] = 1;
    for message in [long, magic, reply(OPT_INFO, REP_ACK, b"")] {
        let mut client = ClientHandshake::new(wishes(false));
        let result = hear(&mut client, &[hex(GREETING), message]);
        assert!(matches!(result, Err(HandshakeError::Protocol(_))), "{result:?}");
    }
    assert_eq!(ClientHandshake::new(wishes(false)).closed(), HandshakeError::Closed);
}

#[test]
fn names_are_not_printed() {
    let wishes =
        Wishes { export: "topsecret".to_owned(), structured: false, base_allocation: false, visitor: None };
    let mut client = ClientHandshake::new(wishes.clone());
    client.receive(&hex(GREETING));
    assert_eq!(client.step(), Ok(None));
    let printed = format!("{wishes:?} {client:?}");
    assert!(!printed.contains("secret") && !printed.contains("116, 111, 112"), "{printed}");
}
