//! Encoding replies. Each function writes into the room for one header and returns the length in bytes.

use xpm_protocol::nbd::{
    CHUNK_HEADER_LEN, ChunkHeader, ChunkType, CommandFlags, EXTENT_LEN, Errno, Request, SIMPLE_REPLY_LEN,
    STATE_HOLE, STATE_ZERO, SimpleReply,
};

use super::output::HEAD_LEN;
use crate::store::Store;

type Head = [u8; HEAD_LEN];

/// Where the extents of a block status chunk begin: behind the header and the context's id.
const EXTENTS_START: usize = CHUNK_HEADER_LEN + 4;
/// Most extents in one reply. A client asks again for the extents behind them; swap and file systems never
/// do.
const EXTENTS_MAX: usize = (HEAD_LEN - EXTENTS_START) / EXTENT_LEN;

pub(super) fn simple(head: &mut Head, cookie: u64, error: Option<Errno>) -> usize {
    if let Some(bytes) = head.first_chunk_mut() {
        SimpleReply { error, cookie }.encode(bytes);
    }
    SIMPLE_REPLY_LEN
}

/// The head of a read's only chunk; `length` bytes of data follow.
pub(super) fn data(head: &mut Head, cookie: u64, offset: u64, length: u32) -> usize {
    chunk(head, ChunkType::OffsetData, cookie, length + 8);
    put(head, CHUNK_HEADER_LEN, &offset.to_be_bytes())
}

/// A chunk that reports an error, without a message.
pub(super) fn error(head: &mut Head, cookie: u64, errno: Errno) -> usize {
    chunk(head, ChunkType::Error, cookie, 6);
    let end = put(head, CHUNK_HEADER_LEN, &errno.to_wire().to_be_bytes());
    put(head, end, &0_u16.to_be_bytes())
}

/// The extents of a block status request, as many as fit.
pub(super) fn block_status(head: &mut Head, request: &Request, context: u32, store: &mut dyn Store) -> usize {
    let most = if request.flags.contains(CommandFlags::REQ_ONE) { 1 } else { EXTENTS_MAX };
    let mut end = put(head, CHUNK_HEADER_LEN, &context.to_be_bytes());
    let (mut offset, mut left) = (request.offset, u64::from(request.length));
    for _ in 0..most {
        if left == 0 {
            break;
        }
        let extent = store.extent(offset, left);
        // An extent is at most as long as the request, whose length has 32 bits.
        let len = extent.len.clamp(1, left);
        let state = if extent.hole { STATE_HOLE | STATE_ZERO } else { 0 };
        end = put(head, end, &(len as u32).to_be_bytes());
        end = put(head, end, &state.to_be_bytes());
        offset += len;
        left -= len;
    }
    chunk(head, ChunkType::BlockStatus, request.cookie, (end - CHUNK_HEADER_LEN) as u32);
    end
}

fn chunk(head: &mut Head, kind: ChunkType, cookie: u64, length: u32) {
    if let Some(bytes) = head.first_chunk_mut() {
        ChunkHeader { done: true, kind, cookie, length }.encode(bytes);
    }
}

fn put(head: &mut Head, start: usize, bytes: &[u8]) -> usize {
    let end = start + bytes.len();
    head[start..end].copy_from_slice(bytes);
    end
}
