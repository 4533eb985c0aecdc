//! The messages by which the two ends connect over TCP where the connection manager cannot be used. The TCP
//! connection stays open for as long as the queue pairs exist; when it closes, they end.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::getsockname;

use super::wire::{ANSWER_LEN, ASK_LEN, End, Hello, Refusal, Welcome, decode_answer};
use crate::connect::{ConnectError, Deadline, closed, receive_some, send_all};

/// Sends the client's identity and the address of its queue pair; returns the appliance's queue pair and the
/// table. Blocks.
pub(super) fn ask(
    stream: BorrowedFd<'_>,
    hello: &Hello,
    end: &End,
    deadline: Deadline,
) -> Result<(Welcome, End), ConnectError> {
    let mut message = [0; ASK_LEN];
    let (first, second) = message.split_at_mut(ASK_LEN - super::wire::END_LEN);
    first.copy_from_slice(&hello.encode());
    second.copy_from_slice(&end.encode());
    send_all(stream, &message, deadline)?;
    let mut answer = [0; ANSWER_LEN];
    let mut filled = 0;
    while filled < ANSWER_LEN {
        match receive_some(stream, &mut answer[filled..], deadline)? {
            0 => return Err(closed()),
            received => filled += received,
        }
    }
    let answer = decode_answer(&answer)
        .ok_or_else(|| ConnectError::Protocol("an answer that is not of xpm's RDMA protocol".to_owned()))?;
    answer.map_err(super::errors::of_refusal)
}

/// Decodes a client's request.
pub(super) fn read_ask(bytes: &[u8; ASK_LEN]) -> Result<(Hello, End), Refusal> {
    let hello = Hello::decode(bytes)?;
    let end = bytes.last_chunk().and_then(End::decode).ok_or(Refusal::Version)?;
    Ok((hello, end))
}

/// An unpredictable number for the first packet of a queue pair: 24 bits.
pub(super) fn first_packet() -> io::Result<u32> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(u32::from_ne_bytes(bytes) >> 8)
}

/// The address of this end of a TCP connection.
pub(super) fn own_address(stream: &OwnedFd) -> io::Result<SocketAddr> {
    let address = getsockname(stream.as_fd())?;
    SocketAddr::try_from(address).map_err(|_| io::Error::other("not a TCP connection"))
}
