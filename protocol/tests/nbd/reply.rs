//! Tests of replies: their bytes, and which of them a client accepts.

use proptest::collection::vec;
use proptest::prelude::*;
use xpm_protocol::nbd::{
    BadReplyMagic, BlockStatus, CHUNK_HEADER_LEN, ChunkBody, ChunkHeader, ChunkType, EXTENT_LEN, EXTENTS_MAX,
    Errno, ErrorChunk, HOLE_LEN, Hole, ReplyHeader, SIMPLE_REPLY_LEN, STATE_HOLE, STATE_ZERO, SimpleReply,
    StatusExtent,
};

use crate::wire::hex;

const COOKIE: u64 = 0x0102_0304_0506_0708;

fn header(kind: ChunkType, done: bool, length: u32) -> ChunkHeader {
    ChunkHeader { done, kind, cookie: COOKIE, length }
}

fn decode(bytes: &[u8]) -> ReplyHeader {
    ReplyHeader::decode(bytes).unwrap().unwrap().0
}

#[test]
fn simple_replies_are_golden() {
    for (error, golden) in [(None, "00000000"), (Some(Errno::NoSpace), "0000001c")] {
        let reply = SimpleReply { error, cookie: COOKIE };
        let mut bytes = [0xff; SIMPLE_REPLY_LEN];
        reply.encode(&mut bytes);
        assert_eq!(bytes.as_slice(), hex(&format!("67446698 {golden} 0102030405060708")));
        assert_eq!(ReplyHeader::decode(&bytes), Ok(Some((ReplyHeader::Simple(reply), SIMPLE_REPLY_LEN))));
    }
    let ok = decode(&hex("67446698 00000000 0102030405060708"));
    let failed = decode(&hex("67446698 00000005 0102030405060708"));
    assert_eq!((ok.cookie(), ok.payload_len(4096), ok.payload_len(0)), (COOKIE, 4096, 0));
    assert_eq!((failed.cookie(), failed.payload_len(4096)), (COOKIE, 0));
}

#[test]
fn chunk_headers_are_golden() {
    let golden = [
        (header(ChunkType::None, true, 0), "0001 0000", "00000000"),
        (header(ChunkType::OffsetData, false, 0x1008), "0000 0001", "00001008"),
        (header(ChunkType::OffsetHole, true, 12), "0001 0002", "0000000c"),
        (header(ChunkType::BlockStatus, true, 12), "0001 0005", "0000000c"),
        (header(ChunkType::Error, true, 6), "0001 8001", "00000006"),
        (header(ChunkType::ErrorOffset, true, 14), "0001 8002", "0000000e"),
    ];
    for (header, start, length) in golden {
        let mut bytes = [0xff; CHUNK_HEADER_LEN];
        header.encode(&mut bytes);
        assert_eq!(bytes.as_slice(), hex(&format!("668e33ef {start} 0102030405060708 {length}")));
        assert_eq!(ReplyHeader::decode(&bytes), Ok(Some((ReplyHeader::Chunk(header), CHUNK_HEADER_LEN))));
        let reply = decode(&bytes);
        assert_eq!((reply.cookie(), reply.payload_len(1)), (COOKIE, header.length));
    }
    // "Clients MUST ignore unrecognized flags."
    let odd = hex("668e33ef fffe 0001 0102030405060708 00001008");
    assert_eq!(decode(&odd), ReplyHeader::Chunk(header(ChunkType::OffsetData, false, 0x1008)));
}

#[test]
fn an_incomplete_header_is_not_read() {
    for whole in
        [hex("67446698 00000000 0102030405060708"), hex("668e33ef 0001 0000 0102030405060708 00000000")]
    {
        for cut in 0..whole.len() {
            assert_eq!(ReplyHeader::decode(&whole[..cut]), Ok(None));
        }
        assert!(ReplyHeader::decode(&whole).unwrap().is_some());
    }
    assert_eq!(ReplyHeader::decode(&hex("25609513")), Err(BadReplyMagic));
}

#[test]
fn the_form_of_a_body_follows_from_kind_and_length() {
    use ChunkType::*;
    let good = [
        (header(None, true, 0), ChunkBody::None),
        (header(OffsetData, false, 9), ChunkBody::Data { length: 1 }),
        (header(OffsetData, true, u32::MAX), ChunkBody::Data { length: u32::MAX - 8 }),
        (header(OffsetHole, false, 12), ChunkBody::Hole),
        (header(BlockStatus, true, 12), ChunkBody::BlockStatus { extents: 1 }),
        (header(BlockStatus, true, 4 + 8 * EXTENTS_MAX), ChunkBody::BlockStatus { extents: EXTENTS_MAX }),
        (header(Error, true, 6), ChunkBody::Error { length: 6 }),
        (header(ErrorOffset, true, 14 + 4096), ChunkBody::Error { length: 14 + 4096 }),
        (header(Other(0x8123), true, 6), ChunkBody::Error { length: 6 }),
    ];
    for (header, body) in good {
        assert_eq!(header.body(), Ok(body), "{header:?}");
    }
    let bad = [
        header(None, true, 1),
        header(None, false, 0),
        header(OffsetData, true, 8),
        header(OffsetData, true, 0),
        header(OffsetHole, true, 11),
        header(OffsetHole, true, 13),
        header(BlockStatus, true, 0),
        header(BlockStatus, true, 4),
        header(BlockStatus, true, 8),
        header(BlockStatus, true, 16),
        header(BlockStatus, true, 4 + 8 * (EXTENTS_MAX + 1)),
        header(Error, true, 5),
        header(Error, true, u32::MAX),
        header(ErrorOffset, true, 13),
        header(Other(3), true, 0),
        header(Other(0x7fff), true, 6),
        header(Other(0x8003), true, 5),
        header(Other(0xffff), true, 1 << 20),
    ];
    for header in bad {
        assert!(header.body().is_err(), "{header:?}");
    }
}

#[test]
fn bodies_are_golden() {
    let hole = Hole { offset: 0x1122_3344_5566_7788, length: 0x200 };
    let mut bytes = [0; HOLE_LEN];
    hole.encode(&mut bytes);
    assert_eq!(bytes.as_slice(), hex("1122334455667788 00000200"));
    assert_eq!(Hole::decode(&bytes), Ok(hole));
    assert!(Hole::decode(&[0; HOLE_LEN]).is_err());

    let extent = StatusExtent { length: 0x1000, state: STATE_HOLE | STATE_ZERO };
    let mut bytes = [0; EXTENT_LEN];
    extent.encode(&mut bytes);
    assert_eq!(bytes.as_slice(), hex("00001000 00000003"));
    let body = hex("00000007 00001000 00000003 00000200 00000000");
    let status = BlockStatus::decode(&body).unwrap();
    assert_eq!(status.context, 7);
    let data = StatusExtent { length: 0x200, state: 0 };
    assert_eq!(status.extents().collect::<Vec<_>>(), [extent, data]);
    for bad in ["", "00000007", "00000007 00001000", "00000007 00000000 00000003"] {
        assert!(BlockStatus::decode(&hex(bad)).is_err(), "{bad}");
    }
}

#[test]
fn errors_are_golden() {
    let error = ErrorChunk { error: Errno::Io, message: "gone", offset: Some(0x4000) };
    let mut bytes = [0; 64];
    let len = error.encode(&mut bytes).unwrap();
    assert_eq!(&bytes[..len], hex("00000005 0004 676f6e65 0000000000004000"));
    assert_eq!(error.kind(), ChunkType::ErrorOffset);
    assert_eq!(ErrorChunk::decode(ChunkType::ErrorOffset, &bytes[..len]), Ok(error));
    // Bytes after the message of an unknown kind are ignored.
    let unknown = ErrorChunk { offset: None, ..error };
    assert_eq!(ErrorChunk::decode(ChunkType::Other(0x8009), &bytes[..len]), Ok(unknown));
    for cut in 0..len {
        assert!(ErrorChunk::decode(ChunkType::ErrorOffset, &bytes[..cut]).is_err(), "cut at {cut}");
    }
    assert_eq!(error.encode(&mut bytes[..len - 1]), None);
    let long = "a".repeat(4097);
    assert_eq!(ErrorChunk { message: &long, ..error }.encode(&mut [0; 8192]), None);
    let mut long = hex("00000005 1001");
    long.extend([b'a'; 4097]);
    assert!(ErrorChunk::decode(ChunkType::Error, &long).is_err(), "longer than any string");
    let odd = hex("00000000 0001 ff");
    let odd = ErrorChunk::decode(ChunkType::Error, &odd).unwrap();
    assert_eq!(odd, ErrorChunk { error: Errno::Invalid, message: "", offset: None });
}

proptest! {
    #[test]
    fn headers_round_trip(bytes in vec(any::<u8>(), 0..24), magic in 0..3) {
        let mut bytes = bytes;
        let start = [hex("67446698"), hex("668e33ef"), Vec::new()][magic as usize].clone();
        bytes.splice(..start.len().min(bytes.len()), start);
        match ReplyHeader::decode(&bytes) {
            Ok(Some((ReplyHeader::Simple(reply), len))) => {
                let mut again = [0; SIMPLE_REPLY_LEN];
                reply.encode(&mut again);
                prop_assert_eq!(len, SIMPLE_REPLY_LEN);
                prop_assert_eq!(decode(&again), ReplyHeader::Simple(reply));
            }
            Ok(Some((ReplyHeader::Chunk(header), len))) => {
                let mut again = [0; CHUNK_HEADER_LEN];
                header.encode(&mut again);
                prop_assert_eq!(len, CHUNK_HEADER_LEN);
                prop_assert_eq!(decode(&again), ReplyHeader::Chunk(header));
            }
            Ok(None) => prop_assert!(bytes.len() < CHUNK_HEADER_LEN),
            Err(BadReplyMagic) => prop_assert!(bytes.len() >= 4),
        }
    }

    #[test]
    fn errors_round_trip(message in "\\PC{0,50}", offset: Option<u64>, number in 1_u32..200) {
        let error = Errno::from_wire(number).unwrap();
        let chunk = ErrorChunk { error, message: &message, offset };
        let mut bytes = [0; 300];
        let len = chunk.encode(&mut bytes).unwrap();
        prop_assert_eq!(ErrorChunk::decode(chunk.kind(), &bytes[..len]), Ok(chunk));
        let header = header(chunk.kind(), true, len as u32);
        prop_assert_eq!(header.body(), Ok(ChunkBody::Error { length: len as u32 }));
    }

    #[test]
    fn random_bodies_do_not_panic(bytes in vec(any::<u8>(), 0..80), offset: bool) {
        let kind = if offset { ChunkType::ErrorOffset } else { ChunkType::Error };
        if let Ok(chunk) = ErrorChunk::decode(kind, &bytes) {
            prop_assert!(chunk.message.len() + 6 <= bytes.len());
            prop_assert_eq!(chunk.offset.is_some(), offset);
        }
        if let Ok(status) = BlockStatus::decode(&bytes) {
            prop_assert_eq!(status.extents().len() * 8 + 4, bytes.len());
            prop_assert!(status.extents().all(|extent| extent.length > 0));
        }
    }
}
