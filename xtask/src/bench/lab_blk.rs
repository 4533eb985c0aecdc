//! Bench `lab-blk`: kernel block devices side by side in one guest, with the memory in the same guest.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};

use super::fio::Metric;
use super::report::{Report, Row};
use crate::lab;

/// xpm's devices, and those of others; the first peer is the one to be level with.
const OURS: [&str; 2] = ["ublk-tcp", "nbd-direct"];
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
    report.note("lab-blk: booting a guest and measuring in it takes some minutes ...");
    let reports = lab::run_all(&lab::Args::release("lab-blk"))?;
    let result = reports.first().context("the lab ran nothing")?;
    if let Some(failure) = &result.failure {
        bail!("scenario lab-blk failed: {failure}");
    }
    let values = parse(&result.tagged)?;
    for device in OURS {
        for (load, figure, metric) in LOADS {
            for (peer, goal) in PEERS {
                compare(report, &values, (device, peer), (load, figure, metric), goal)?;
            }
        }
    }
    Ok(())
}

/// Lines `DEVICE.LOAD.METRIC VALUE`.
fn parse(lines: &[String]) -> Result<HashMap<String, f64>> {
    let pair = |line: &String| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), value.trim().parse().ok()?))
    };
    lines.iter().map(|line| pair(line).with_context(|| format!("`{line}` is no measurement"))).collect()
}

fn compare(
    report: &mut Report,
    values: &HashMap<String, f64>,
    (device, peer): (&str, &str),
    (load, figure, metric): (&str, &str, Metric),
    goal: Option<f64>,
) -> Result<()> {
    let value = |name: &str| {
        let key = format!("{name}.{load}.{figure}");
        values.get(&key).copied().with_context(|| format!("the guest did not measure {key}"))
    };
    let (ours, theirs) = (value(device)?, value(peer)?);
    let ratio = metric.ratio(ours, theirs);
    report.row(&Row {
        bench: "lab-blk",
        case: format!("{device} {load}"),
        metric: metric.name(),
        unit: metric.unit(),
        xpm: ours,
        peer: Some(peer.to_owned()),
        peer_value: Some(theirs),
        ratio: Some(ratio),
        goal,
        ok: goal.map(|goal| ratio >= goal),
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_are_read_or_refused() {
        let values = parse(&["a.read-qd1.p50_us 12.5".to_owned()]).unwrap();
        assert_eq!(values["a.read-qd1.p50_us"], 12.5);
        assert!(parse(&["a.read-qd1.p50_us fast".to_owned()]).is_err());
        assert!(parse(&["rubbish".to_owned()]).is_err());
    }
}
