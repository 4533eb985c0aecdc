//! Bench `vhost`: the vhost-user-blk disks of a QEMU guest, served by xpm-blk and by QEMU's storage daemon.

use anyhow::Result;

use super::guest::{Comparison, Figures};
use super::load::Metric;
use super::report::Report;

/// A disk of xpm's, one that it is compared with, and the least ratio: what serves from memory of its own process or
/// host against shared memory, and what goes over the network against TCP.
const CONTESTS: [(&str, &str, Option<f64>); 5] = [
    ("vhost-shm", "qsd-memory", Some(1.0)),
    ("vhost-shm", "qsd-null", None),
    ("vhost-tcp", "qsd-nbd-tcp", Some(1.0)),
    ("vhost-tcp", "qsd-nbd-unix", None),
    ("vhost-tcp", "qsd-memory", None),
];
/// Loads of the scenario's script, and which of its figures counts.
const LOADS: [(&str, &str, Metric); 4] = [
    ("read-qd1", "p50_us", Metric::Latency),
    ("write-qd1", "p50_us", Metric::Latency),
    ("read-qd32", "iops", Metric::Iops),
    ("write-qd32", "iops", Metric::Iops),
];

/// Boots a guest, measures in it, and compares.
pub(crate) fn run(report: &mut Report) -> Result<()> {
    let figures = Figures::measure("vhost-disks", report)?;
    for (device, peer, goal) in CONTESTS {
        for (load, figure, metric) in LOADS {
            let figure = format!("{load}.{figure}");
            let comparison = Comparison { bench: "vhost", device, peer, load, figure, metric, goal };
            comparison.report(&figures, report)?;
        }
    }
    Ok(())
}
