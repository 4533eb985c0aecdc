//! Devices of earlier lives that no record wants any more.

use std::path::Path;

use xpm_protocol::ClientId;

use super::netlink::NbdControl;
use super::{connected, mark_of};
use crate::error::Step as _;
use crate::{links, sysfs, usage};

/// Disconnects devices of this client that are none of `wanted`, by their identifiers, if nobody uses them and the process
/// that made them is gone. Returns what it did, a line for each. Blocks.
pub fn remove(client: ClientId, wanted: &[String]) -> Vec<String> {
    let mark = mark_of(client);
    let is_orphan = |(index, identifier): &(u32, String)| {
        identifier.starts_with(&mark) && !wanted.contains(identifier) && !maker_lives(*index)
    };
    connected()
        .into_iter()
        .filter(is_orphan)
        .map(|(index, identifier)| remove_one(index, &identifier))
        .collect()
}

fn remove_one(index: u32, identifier: &str) -> String {
    let disk = format!("nbd{index}");
    if let Some(line) = usage::left_in_use(&disk, usage::is_open) {
        return line;
    }
    let disconnected =
        NbdControl::open().and_then(|mut control| control.disconnect(index).at("disconnect it"));
    match disconnected {
        Ok(()) => {
            links::forget(identifier, &disk);
            format!("/dev/{disk} had lost its server: disconnected")
        }
        Err(error) => format!("/dev/{disk} has lost its server: {error}"),
    }
}

/// Whether the process that made the device is there; it may be just about to record it.
fn maker_lives(index: u32) -> bool {
    sysfs::text(&format!("nbd{index}"), "pid").is_some_and(|pid| Path::new("/proc").join(pid).exists())
}
