//! Tests of the NBD codec against the specification: golden bytes, tables of cases, and properties.

#![allow(missing_docs)]

mod client;
mod pair;
mod reply;
mod request;
mod server;
mod wire;
