//! Bench `swap`: how long one program takes that has half of the memory that it needs, on swap of every kind, in one
//! guest.

use anyhow::Result;

use super::guest::{Comparison, Figures};
use super::load::Metric;
use super::report::Report;

/// xpm's devices, all of whose daemons are in the guest, as those of the peers are.
const OURS: [&str; 3] = ["ublk-tcp", "ublk-shm", "nbd-direct"];
/// xpm's devices whose daemons are on the host, where nothing is emulated: they compare with a disk of the host only.
const ON_HOST: [&str; 2] = ["vhost-tcp", "vhost-shm"];
/// Other ways to give a program memory of another machine; xpm has to be faster than each.
const REMOTE: [&str; 3] = ["nbd-tcp", "nbd-unix", "nvme-tcp"];
/// Devices with the memory, or a disk, in the same machine.
const LOCAL: [&str; 2] = ["zram", "brd"];
/// A disk of the host.
const DISK: &str = "virtio-file";
/// ublk over TCP takes at most 1.2 times what ublk takes whose memory its daemon has mapped.
const TCP_GOAL: f64 = 1.0 / 1.2;

/// Boots a guest, measures in it, and compares.
pub(crate) fn run(report: &mut Report) -> Result<()> {
    let figures = Figures::measure("swap", report)?;
    for device in OURS {
        let remote = REMOTE.map(|peer| (peer, Some(1.0)));
        let local = LOCAL.map(|peer| (peer, None));
        for (peer, goal) in remote.into_iter().chain(local).chain([(DISK, None), ("none", None)]) {
            compare(&figures, device, (peer, goal), report)?;
        }
    }
    for device in ON_HOST {
        compare(&figures, device, (DISK, None), report)?;
    }
    compare(&figures, "ublk-tcp", ("ublk-shm", Some(TCP_GOAL)), report)
}

fn compare(
    figures: &Figures,
    device: &'static str,
    (peer, goal): (&'static str, Option<f64>),
    report: &mut Report,
) -> Result<()> {
    let figure = "run_s".to_owned();
    let metric = Metric::RunTime;
    Comparison { bench: "swap", device, peer, load: "", figure, metric, goal }.report(figures, report)
}
