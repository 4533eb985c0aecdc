//! Tests of both handshakes with each other, and of each with random input.

use proptest::collection::vec;
use proptest::prelude::*;
use xpm_protocol::nbd::handshake::client::{Agreed, ClientHandshake, HandshakeError, Wishes};
use xpm_protocol::nbd::handshake::server::{Negotiated, ServerHandshake, Step};

use crate::wire::{Server, context_data, info, info_data, option};

/// Passes bytes between the two, in pieces of these lengths, until both are done or one of them gives up.
fn talk(wishes: Wishes, lengths: &[usize]) -> (Result<Agreed, HandshakeError>, Option<Negotiated>) {
    let mut lengths = lengths.iter().copied().cycle();
    let mut client = ClientHandshake::new(wishes);
    let mut server = Server::new();
    let (mut to_client, mut to_server) = (ServerHandshake::new().take_output(), Vec::new());
    let mut negotiated = None;
    loop {
        match client.step() {
            Ok(Some(agreed)) => return (Ok(agreed), negotiated),
            Ok(None) => to_server.extend(client.take_output()),
            Err(error) => return (Err(error), negotiated),
        }
        let length = lengths.next().unwrap();
        if !to_server.is_empty() {
            let piece: Vec<u8> = to_server.drain(..length.min(to_server.len())).collect();
            let (output, step) = server.send(&piece);
            to_client.extend(output);
            if let Step::Ready(ready) = step {
                negotiated = Some(ready);
            }
        } else if !to_client.is_empty() {
            let piece: Vec<u8> = to_client.drain(..length.min(to_client.len())).collect();
            client.receive(&piece);
        } else {
            return (Err(client.closed()), negotiated);
        }
    }
}

proptest! {
    #[test]
    fn client_and_server_agree(structured: bool, base_allocation: bool, lengths in vec(1_usize..40, 1..20)) {
        let wishes = Wishes { export: "disk".to_owned(), structured, base_allocation, visitor: None };
        let (agreed, negotiated) = talk(wishes, &lengths);
        let (agreed, negotiated) = (agreed.unwrap(), negotiated.unwrap());
        prop_assert_eq!(&agreed.info.flags, &negotiated.info.flags);
        prop_assert_eq!(agreed.info.block, info(0).block);
        prop_assert_eq!(agreed.info.size, 1 << 20);
        prop_assert_eq!(agreed.structured, structured);
        prop_assert_eq!(negotiated.structured, structured);
        prop_assert_eq!(agreed.base_allocation, negotiated.base_allocation);
        prop_assert_eq!(agreed.base_allocation.is_some(), structured && base_allocation);
        prop_assert!(agreed.leftover.is_empty() && negotiated.leftover.is_empty());
    }

    #[test]
    fn an_unknown_export_fails_on_both_sides(structured: bool, name in "[a-z]{0,9}", lengths in vec(1_usize..40, 1..20)) {
        prop_assume!(name != "disk");
        let wishes = Wishes { export: name, structured, base_allocation: structured, visitor: None };
        let (agreed, negotiated) = talk(wishes, &lengths);
        prop_assert_eq!(agreed, Err(HandshakeError::UnknownExport));
        prop_assert_eq!(negotiated, None);
    }

    /// Whatever the input, the server does not panic, holds at most the received bytes, and its output is bounded by
    /// what options can ask for.
    #[test]
    fn the_server_survives(pieces in vec(server_input(), 0..60), greeted in any::<bool>()) {
        let mut server = if greeted { Server::greeted() } else { Server::new() };
        let (mut sent, mut heard) = (0, 0);
        for piece in pieces {
            sent += piece.len();
            let (output, step) = server.send(&piece);
            heard += output.len();
            prop_assert!(heard <= 64 * (sent + 64), "{} bytes for {}", heard, sent);
            if let Step::Ready(negotiated) = &step {
                prop_assert!(negotiated.leftover.len() <= sent);
            }
            if !matches!(step, Step::Input) {
                break;
            }
        }
    }

    #[test]
    fn the_client_survives(pieces in vec(client_input(), 0..60), structured: bool) {
        let wishes = Wishes { export: "disk".to_owned(), structured, base_allocation: structured, visitor: None };
        let mut client = ClientHandshake::new(wishes);
        let mut said = 0;
        for piece in pieces {
            client.receive(&piece);
            let step = client.step();
            said += client.take_output().len();
            prop_assert!(said < 400, "it says each thing once");
            if !matches!(step, Ok(None)) {
                break;
            }
        }
    }
}

/// Options, some of them valid.
fn server_input() -> impl Strategy<Value = Vec<u8>> {
    let name = || prop_oneof![Just("disk".to_owned()), "\\PC{0,6}"];
    let number = || prop_oneof![0_u32..12, any::<u32>()];
    prop_oneof![
        vec(any::<u8>(), 0..50),
        (number(), vec(any::<u8>(), 0..50)).prop_map(|(number, data)| option(number, &data)),
        (number(), 0_usize..40_000).prop_map(|(number, len)| option(number, &vec![0; len])),
        (2_u32..8, name(), vec(0_u16..5, 0..5))
            .prop_map(|(number, name, asks)| option(number, &info_data(&name, &asks))),
        (8_u32..11, name())
            .prop_map(|(number, name)| option(number, &context_data(&name, &["base:allocation", "base:"]))),
        Just(option(8, b"")),
    ]
}

/// Greetings and replies, some of them valid.
fn client_input() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![0_u32..6, (0_u32..10).prop_map(|kind| kind | 1 << 31), any::<u32>()];
    prop_oneof![
        4 => Just(ServerHandshake::new().take_output()),
        1 => vec(any::<u8>(), 0..50),
        4 => (prop_oneof![Just(7_u32), Just(8), Just(10)], kind, vec(any::<u8>(), 0..30))
            .prop_map(|(option, kind, data)| crate::wire::reply(option, kind, &data)),
    ]
}
