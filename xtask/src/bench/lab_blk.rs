//! Bench `lab-blk`: kernel block devices side by side in one guest, with the memory in the same guest.

use anyhow::Result;

use super::guest::{Comparison, Figures};
use super::load::Metric;
use super::report::Report;

/// xpm's devices, and those of others; the first peer is the one to be level with.
const OURS: [&str; 3] = ["ublk-shm", "ublk-tcp", "nbd-direct"];
const PEERS: [(&str, Option<f64>); 2] = [("nbd-nbdkit", Some(1.0)), ("nvme-tcp", None)];
/// Loads of the scenario's script, and which of its figures counts.
const LOADS: [(&str, &str, Metric); 6] = [
    ("read-qd1", "p50_us", Metric::Latency),
    ("write-qd1", "p50_us", Metric::Latency),
    ("read-qd32", "iops", Metric::Iops),
    ("write-qd32", "iops", Metric::Iops),
    ("read-seq", "mib_s", Metric::Throughput),
    ("write-seq", "mib_s", Metric::Throughput),
];

/// Boots a guest, measures in it, and compares.
pub(crate) fn run(report: &mut Report) -> Result<()> {
    let figures = Figures::measure("lab-blk", report)?;
    for device in OURS {
        for (load, figure, metric) in LOADS {
            for (peer, goal) in PEERS {
                let figure = format!("{load}.{figure}");
                let comparison = Comparison { bench: "lab-blk", device, peer, load, figure, metric, goal };
                comparison.report(&figures, report)?;
            }
        }
    }
    Ok(())
}
