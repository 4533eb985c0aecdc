//! A stream of replies, simple and structured, as a client reads it that has read requests of 64 KiB in
//! flight: what it takes is within bounds, and comes back as it was.

#![no_main]

use libfuzzer_sys::fuzz_target;
use xpm_protocol::nbd::{
    BlockStatus, CHUNK_HEADER_LEN, CONTEXT_LEN, ChunkBody, ChunkHeader, Command, CommandFlags,
    DATA_OFFSET_LEN, ERROR_LEN_MAX, EXTENT_LEN, ErrorChunk, HOLE_LEN, Hole, ReplyHeader, Request,
    SIMPLE_REPLY_LEN,
};

const READ: Request = Request {
    flags: CommandFlags::NONE,
    command: Command::Read,
    cookie: 0,
    offset: 1 << 40,
    length: 64 << 10,
};

fuzz_target!(|input: &[u8]| {
    let mut stream = input;
    while let Ok(Some((header, len))) = ReplyHeader::decode(stream) {
        let (bytes, rest) = stream.split_at(len);
        let payload_len = header.payload_len(READ.length) as usize;
        let Some((payload, rest)) = rest.split_at_checked(payload_len) else { return };
        stream = rest;
        match header {
            ReplyHeader::Simple(reply) => {
                let mut again = [0; SIMPLE_REPLY_LEN];
                reply.encode(&mut again);
                assert_eq!(ReplyHeader::decode(&again), Ok(Some((header, len))));
                assert!(payload_len == 0 || reply.error.is_none());
            }
            ReplyHeader::Chunk(chunk) => {
                let mut again = [0; CHUNK_HEADER_LEN];
                chunk.encode(&mut again);
                // Only flags that nobody knows are lost.
                assert_eq!((&again[6..], again[5] & 1), (&bytes[6..], bytes[5] & 1));
                if take(&chunk, payload).is_none() {
                    return;
                }
            }
        }
    }
});

/// None when the connection would be closed.
fn take(chunk: &ChunkHeader, payload: &[u8]) -> Option<()> {
    match chunk.body().ok()? {
        ChunkBody::None => assert!(payload.is_empty() && chunk.done),
        ChunkBody::Data { length } => {
            let (offset, data) = payload.split_first_chunk::<DATA_OFFSET_LEN>()?;
            assert_eq!(data.len(), length as usize);
            within(u64::from_be_bytes(*offset), length);
        }
        ChunkBody::Hole => {
            let bytes: &[u8; HOLE_LEN] = payload.try_into().expect("the body's length was checked");
            let hole = Hole::decode(bytes).ok()?;
            let mut again = [0; HOLE_LEN];
            hole.encode(&mut again);
            assert_eq!(again, *bytes);
            within(hole.offset, hole.length);
        }
        ChunkBody::BlockStatus { extents } => {
            assert_eq!(payload.len(), CONTEXT_LEN + extents as usize * EXTENT_LEN);
            let status = BlockStatus::decode(payload).ok()?;
            assert_eq!(status.extents().len(), extents as usize);
            assert!(status.extents().all(|extent| extent.length > 0));
        }
        ChunkBody::Error { length } => {
            assert!(length <= ERROR_LEN_MAX);
            let error = ErrorChunk::decode(chunk.kind, payload).ok()?;
            let mut again = [0; ERROR_LEN_MAX as usize];
            let len = error.encode(&mut again).expect("what was read can be written");
            assert_eq!(ErrorChunk::decode(error.kind(), &again[..len]), Ok(error));
        }
    }
    Some(())
}

fn within(offset: u64, length: u32) {
    if READ.covers(offset, length) {
        assert!(offset >= READ.offset && offset + u64::from(length) <= READ.offset + u64::from(READ.length));
    }
}
