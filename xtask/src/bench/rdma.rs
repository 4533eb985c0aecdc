//! Bench `rdma`: one-sided access over Soft-RoCE in a guest, against perftest's programs in the same boot.

use anyhow::Result;

use super::guest::Figures;
use super::load::Metric;
use super::report::{Report, Row};

/// The least ratio of latencies: xpm's median is at most 1.15 times the peer's.
const LATENCY_GOAL: f64 = 1.0 / 1.15;
/// The upper limit of attaching 1 GiB, in milliseconds.
const ATTACH_GOAL_MS: f64 = 5.0;

/// Loads of the scenario's script, and the program to compare with; `ib_write_lat` cannot wait for events.
const LOADS: [(&str, Metric, Option<&str>); 5] = [
    ("read-spin", Metric::Latency, Some("ib_read_lat")),
    ("read-event", Metric::Latency, Some("ib_read_lat -e")),
    ("write-spin", Metric::Latency, Some("ib_write_lat")),
    ("write-event", Metric::Latency, None),
    ("read-qd16", Metric::Iops, Some("ib_read_bw")),
];

/// Boots a guest, measures in it, and compares.
pub(crate) fn run(report: &mut Report) -> Result<()> {
    let figures = Figures::measure("rdma", report)?;
    for (load, metric, peer) in LOADS {
        compare(report, &figures, load, metric, peer)?;
    }
    attach(report, figures.get("xpm.attach-1g.ms")?);
    Ok(())
}

fn compare(
    report: &mut Report,
    figures: &Figures,
    load: &str,
    metric: Metric,
    peer: Option<&str>,
) -> Result<()> {
    let (figure, goal) = match metric {
        Metric::Latency => ("p50_us", Some(LATENCY_GOAL)),
        _ => ("iops", None),
    };
    let ours = figures.get(&format!("xpm.{load}.{figure}"))?;
    let theirs = peer.map(|_| figures.get(&format!("perftest.{load}.{figure}"))).transpose()?;
    let ratio = theirs.map(|theirs| metric.ratio(ours, theirs));
    let goal = goal.filter(|_| peer.is_some());
    report.row(&Row {
        bench: "rdma",
        case: format!("4k {load}"),
        metric: metric.name(),
        unit: metric.unit(),
        xpm: ours,
        peer: peer.map(str::to_owned),
        peer_value: theirs,
        ratio,
        goal,
        ok: ratio.zip(goal).map(|(ratio, goal)| ratio >= goal),
    });
    Ok(())
}

fn attach(report: &mut Report, milliseconds: f64) {
    report.row(&Row {
        bench: "rdma",
        case: "attach 1 GiB".to_owned(),
        metric: "time",
        unit: "ms",
        xpm: milliseconds,
        peer: None,
        peer_value: None,
        ratio: None,
        goal: Some(ATTACH_GOAL_MS),
        ok: Some(milliseconds <= ATTACH_GOAL_MS),
    });
}
