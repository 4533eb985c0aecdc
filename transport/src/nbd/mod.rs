//! The standard NBD protocol as a transport: the server (of appliances and of NBD sockets), and the client.

pub mod client;
pub mod server;

mod socket;
