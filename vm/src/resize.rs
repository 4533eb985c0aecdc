//! Resizes a machine's RAM by its virtio-mem device, whose driver in the guest plugs and unplugs the requested
//! memory.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;
use xpm_protocol::ByteSize;

use crate::Error;
use crate::arguments::VIRTIO_MEM;
use crate::place::{Machine, Place};
use crate::qmp::{Qmp, QmpError};

const MONITOR_LIMIT: Duration = Duration::from_secs(5);

/// Plugged RAM of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Plugged {
    /// Total RAM now.
    pub size: ByteSize,
    /// Requested total RAM.
    pub asked: ByteSize,
}

impl Plugged {
    /// Whether the guest has followed the request.
    pub fn is_done(self) -> bool {
        self.size == self.asked
    }
}

/// Requests this much total RAM from the guest, and waits for at most `limit`. Returns the RAM after that; a guest
/// without a driver, or without free memory to give up, does not follow.
///
/// # Errors
/// When the machine cannot have this much, or QEMU refuses the request.
pub async fn resize(place: &Place, size: ByteSize, limit: Duration) -> Result<Plugged, Error> {
    let _lock = place.lock_to_change()?;
    let machine = place.load_alive()?;
    check(&machine, size)?;
    let mut qmp = Qmp::connect(&place.drive(), MONITOR_LIMIT).await?;
    let block = property(&mut qmp, "block-size").await?;
    let requested = size.0 - machine.size.0;
    if block == 0 || !requested.is_multiple_of(block) {
        return Err(Error::Usage(format!(
            "machine `{}` has {} and gets or gives more by {}: {size} cannot be reached",
            machine.name,
            machine.size,
            ByteSize(block)
        )));
    }
    let path = device_path();
    qmp.execute("qom-set", json!({"path": path, "property": "requested-size", "value": requested})).await?;
    let until = Instant::now() + limit;
    loop {
        let plugged = plugged(&mut qmp, &machine).await?;
        let left = until.saturating_duration_since(Instant::now());
        if plugged.is_done() || left.is_zero() {
            return Ok(plugged);
        }
        let changed = qmp.event("resize", left, |event| {
            (event.name == "MEMORY_DEVICE_SIZE_CHANGE" && event.data["id"] == VIRTIO_MEM).then_some(())
        });
        match changed.await {
            Ok(()) | Err(QmpError::Silent { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn check(machine: &Machine, size: ByteSize) -> Result<(), Error> {
    let Some(maximum) = machine.maximum else {
        return Err(Error::Usage(format!(
            "machine `{}` was started without --max, so its RAM is always {}",
            machine.name, machine.size
        )));
    };
    if size < machine.size || size > maximum {
        return Err(Error::Usage(format!(
            "machine `{}` can have {} (--memory) to {maximum} (--max), not {size}",
            machine.name, machine.size
        )));
    }
    Ok(())
}

/// The RAM of a machine with a virtio-mem device.
///
/// # Errors
/// When QEMU does not answer.
pub async fn plugged(qmp: &mut Qmp, machine: &Machine) -> Result<Plugged, QmpError> {
    let whole = |more: u64| ByteSize(machine.size.0.saturating_add(more));
    let asked = property(qmp, "requested-size").await?;
    Ok(Plugged { size: whole(property(qmp, "size").await?), asked: whole(asked) })
}

async fn property(qmp: &mut Qmp, name: &str) -> Result<u64, QmpError> {
    let value = qmp.execute("qom-get", json!({"path": device_path(), "property": name})).await?;
    Ok(value.as_u64().unwrap_or_default())
}

fn device_path() -> String {
    format!("/machine/peripheral/{VIRTIO_MEM}")
}
