//! Shared memory as a transport, for an appliance on the same host.
//!
//! The appliance passes the memory of a grant's regions to the client as sealed memfds over a unix socket;
//! from then on the client loads and stores, and no message is sent for any operation.
//!
//! **The connection is the grant.** It stays open and silent. When the appliance closes it, the grant was
//! revoked or the appliance died; the client unmaps the memory and connects again to learn which. When the
//! client closes it, the client has unmapped the memory.
//!
//! **Limit of sharing.** Memory that was passed cannot be taken back from a process that keeps its mapping:
//! [`server::ShmServer::close_group`] reports how many clients did not unmap it. Unless this number is known
//! to be 0, the memory must never be lent to another account; the appliance drops such a memfd and allocates
//! new memory.
//!
//! ## Messages
//! All numbers are big-endian.
//!
//! | from | bytes | what |
//! |---|---|---|
//! | client | 8 | `"xpm-shm\0"` |
//! | | 4 | version: 1, or 2 from a client that sends its life |
//! | | 4 | version 1: 0; version 2: bytes of its [`Visitor`](xpm_protocol::Visitor), 1 to 1024 |
//! | | 32 | the grant's key |
//! | | (version 2) | the visitor, as text |
//! | server | 8 | `"xpm-shm\0"` |
//! | | 4 | status: 0 granted, 1 no such grant, 2 no such version, 3 not for this life |
//! | | 4 | status 0: number of regions; 3: bytes of the reason, which follows as text; else 0 |
//! | | 8 | length of the regions together, in bytes; 0 unless granted |
//! | server, for each region in order | 8 | its length in bytes |
//!
//! The memfd of each region is passed with the lengths by `SCM_RIGHTS`, for up to 64 regions in one
//! message. After that neither side sends anything.

pub mod client;
pub mod server;

mod link;
mod mapping;
mod wire;
