//! fio's nbd engine as the client of every server alike.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// One way to load a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
    pub(crate) metric: Metric,
}

/// What counts of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Metric {
    /// Median latency of a request; smaller is better.
    Latency,
    /// Requests per second.
    Iops,
    /// Bytes per second.
    Throughput,
}

impl Metric {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Metric::Latency => "p50",
            Metric::Iops => "iops",
            Metric::Throughput => "rate",
        }
    }

    pub(crate) fn unit(self) -> &'static str {
        match self {
            Metric::Latency => "us",
            Metric::Iops => "/s",
            Metric::Throughput => "MiB/s",
        }
    }

    /// Larger than 1 when `ours` is better.
    pub(crate) fn ratio(self, ours: f64, theirs: f64) -> f64 {
        match self {
            Metric::Latency => theirs / ours,
            Metric::Iops | Metric::Throughput => ours / theirs,
        }
    }
}

const fn load(name: &'static str, rw: &'static str, block: &'static str, depth: u32, metric: Metric) -> Load {
    Load { name, rw, block, depth, metric }
}

/// 4 KiB at depth 1 and 32, and 1 MiB in sequence.
pub(crate) const LOADS: [Load; 6] = [
    load("4k read qd1", "randread", "4k", 1, Metric::Latency),
    load("4k write qd1", "randwrite", "4k", 1, Metric::Latency),
    load("4k read qd32", "randread", "4k", 32, Metric::Iops),
    load("4k write qd32", "randwrite", "4k", 32, Metric::Iops),
    load("1m read seq", "read", "1m", 4, Metric::Throughput),
    load("1m write seq", "write", "1m", 4, Metric::Throughput),
];

/// Runs a load on an NBD server and returns the value of its metric.
pub(crate) fn run(uri: &str, load: Load, size: &str, seconds: u32) -> Result<f64> {
    let output = Command::new("fio")
        .args(["--name=bench", "--ioengine=nbd", "--time_based", "--ramp_time=300ms", "--norandommap"])
        .args(["--output-format=json", "--randseed=7", "--lat_percentiles=0", "--clat_percentiles=1"])
        .arg(format!("--uri={uri}"))
        .arg(format!("--rw={}", load.rw))
        .arg(format!("--bs={}", load.block))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--size={size}"))
        .arg(format!("--runtime={seconds}"))
        .output()
        .context("cannot run fio")?;
    if !output.status.success() {
        bail!("fio on {uri} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').map_or("", |start| &text[start..]);
    let report: Value = serde_json::from_str(json).context("fio's report cannot be read")?;
    let direction = if load.rw.ends_with("read") { "read" } else { "write" };
    let job = &report["jobs"][0][direction];
    let value = match load.metric {
        Metric::Latency => job["clat_ns"]["percentile"]["50.000000"].as_f64().map(|ns| ns / 1000.0),
        Metric::Iops => job["iops"].as_f64(),
        Metric::Throughput => job["bw_bytes"].as_f64().map(|bytes| bytes / f64::from(1 << 20)),
    };
    value
        .filter(|value| *value > 0.0)
        .with_context(|| format!("fio's report on {uri} has no {direction} figures"))
}
