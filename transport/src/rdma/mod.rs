//! RDMA: one-sided access to the memory of an appliance, by verbs and the RDMA connection manager of
//! rdma-core, which are loaded at run time.
//!
//! A client connects one reliable queue pair for each of its queues to each grant. After that, it reads and
//! writes with RDMA READ and WRITE only, and no processor of the appliance takes part. The appliance
//! registers the regions of a grant in a protection domain of the grant's own, so the keys are useless on the
//! connections of any other grant; revoking a grant deregisters the memory first and then destroys the queue
//! pairs.
//!
//! Trimming, zeroing and the notification that an appliance ended go over an NBD connection, which each link
//! has in addition to its queue pair.
//!
//! * [`client::connect`] returns a [`client::RdmaLink`].
//! * [`server::RdmaServer`] is the appliance's end.
//! * [`wire`] has the messages of the two ends.
//! * [`inventory`] lists the devices of a machine, and the obstacles to using them.

mod bounce;
mod buffers;
pub mod client;
mod cm;
mod engine;
mod errors;
mod exchange;
pub mod inventory;
mod link;
mod pages;
mod pair;
mod plain;
pub mod server;
mod verbs;
pub mod wire;
