//! Removing devices of earlier lives that no record needs any more.

use std::path::Path;

use xpm_protocol::ClientId;

use super::control::Control;
use super::device_numbers;
use super::mark::{self, Mark};
use super::uapi::{self, DeviceInfo};
use crate::{links, usage};

/// Deletes unused devices of this client that have lost their server and whose marks are not in `wanted`.
/// Returns a line for each step. Blocks.
pub fn remove(client: ClientId, wanted: &[Mark]) -> Vec<String> {
    let Ok(mut control) = Control::open() else { return Vec::new() };
    let is_orphan = |info: &DeviceInfo| {
        mark::is_of(info.mark, client)
            && !is_served(info)
            && wanted.iter().all(|wanted| wanted.bits() != info.mark)
    };
    let orphans: Vec<DeviceInfo> = device_numbers()
        .into_iter()
        .filter_map(|number| control.info(number).ok().flatten().filter(is_orphan))
        .collect();
    orphans.iter().map(|info| remove_one(&mut control, info)).collect()
}

fn remove_one(control: &mut Control, info: &DeviceInfo) -> String {
    let number = info.device;
    let disk = format!("ublkb{number}");
    if info.state != uapi::STATE_DEAD {
        if info.flags & uapi::F_USER_RECOVERY == 0 {
            return format!("ublk device {number} has no server and is not dead yet: left alone");
        }
        if let Some(line) = usage::left_in_use(&disk, usage::is_claimed) {
            return line;
        }
        if let Err(error) = control.stop(number) {
            return format!("ublk device {number} has lost its server: {error}");
        }
    }
    match control.delete(number) {
        Ok(()) => {
            links::forget(&disk, &disk);
            format!("ublk device {number} had lost its server: deleted")
        }
        Err(error) => format!("ublk device {number} has lost its server: {error}"),
    }
}

fn is_served(info: &DeviceInfo) -> bool {
    info.state != uapi::STATE_QUIESCED
        && u32::try_from(info.pid).is_ok_and(|pid| pid != 0 && Path::new(&format!("/proc/{pid}")).exists())
}
