//! `xpm blk attach`: once, or until the allocation is shown.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::blk::{AttachDevice, Device};

use crate::connect::Daemon;

/// Pause between two tries.
const PAUSE: Duration = Duration::from_secs(1);
/// How often it is looked whether a device that is coming is there.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Shows an allocation, in one try.
pub(crate) async fn once(blk: &Daemon, request: &AttachDevice) -> anyhow::Result<Device> {
    let device = blk.post("/v1/devices", request).await;
    device.with_context(|| format!("cannot attach `{}` as {}", request.name, request.form))
}

/// Has the allocation shown in this form: content with a device that is there, and trying for `wait` what may succeed
/// later.
pub(crate) async fn ensure(blk: &Daemon, request: &AttachDevice, wait: Duration) -> anyhow::Result<Device> {
    let begun = Instant::now();
    let mut said = false;
    loop {
        let failure = match there(blk, request).await? {
            Some(device) if is_shown(&device) => return Ok(device),
            Some(_) => None,
            None => match blk.post("/v1/devices", request).await {
                Ok(device) => return Ok(device),
                // Somebody else was faster, or it is on its way.
                Err(failure) if failure.is(ErrorKind::Conflict) && shown(blk, request).await => None,
                Err(failure) if !failure.may_pass() => return Err(failure).with_context(|| cannot(request)),
                Err(failure) => Some(failure),
            },
        };
        if begun.elapsed() >= wait {
            match failure {
                Some(failure) => return Err(failure).with_context(|| cannot(request)),
                None => bail!(
                    "{}: it is not shown yet; `xpm blk show {}` says why",
                    cannot(request),
                    request.name
                ),
            }
        }
        if let Some(failure) = failure.as_ref().filter(|_| !said) {
            eprintln!("xpm: {}: {failure}; trying again for {}", cannot(request), xpm_protocol::Span(wait));
            said = true;
        }
        tokio::time::sleep(if failure.is_some() { PAUSE } else { LOOK_EVERY }).await;
    }
}

/// The device of this allocation, if there is one or one is coming; it must be of the form that is asked for.
async fn there(blk: &Daemon, request: &AttachDevice) -> anyhow::Result<Option<Device>> {
    let device: Device = match blk.get(&format!("/v1/devices/{}", request.name)).await {
        Ok(device) => device,
        // Asking for it says more.
        Err(_) => return Ok(None),
    };
    if device.form != request.form {
        bail!(
            "{}: it is shown as {} at {}; `xpm blk detach {}` first, or ask for that form",
            cannot(request),
            device.form,
            device.path,
            request.name
        );
    }
    Ok(Some(device))
}

async fn shown(blk: &Daemon, request: &AttachDevice) -> bool {
    there(blk, request).await.is_ok_and(|device| device.is_some())
}

/// A device that is not shown again yet has no path.
fn is_shown(device: &Device) -> bool {
    device.path != "-"
}

fn cannot(request: &AttachDevice) -> String {
    format!("cannot attach `{}` as {}", request.name, request.form)
}
