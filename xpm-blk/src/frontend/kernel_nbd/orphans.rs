//! Removing devices of earlier lives that no record needs any more.

use std::path::Path;

use xpm_protocol::ClientId;

use super::netlink::NbdControl;
use super::{connected, mark_of};
use crate::error::Step as _;
use crate::{links, sysfs, usage};

/// Disconnects unused devices of this client whose identifiers are not in `wanted` and whose creating process
/// has ended. Returns a line for each step. Blocks.
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

/// Whether the process that created the device is alive; it may be about to record the device.
fn maker_lives(index: u32) -> bool {
    sysfs::text(&format!("nbd{index}"), "pid").is_some_and(|pid| Path::new("/proc").join(pid).exists())
}
