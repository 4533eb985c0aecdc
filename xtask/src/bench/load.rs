//! The ways to load a server, and what counts of each.

/// One way to load a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) name: &'static str,
    /// As fio names it: `read`, `randwrite`.
    pub(crate) rw: &'static str,
    /// Bytes of a request, as fio takes them: `4k`.
    pub(crate) block: &'static str,
    /// Requests in flight.
    pub(crate) depth: u32,
    pub(crate) metric: Metric,
}

/// The metric of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Metric {
    /// Median latency of a request; smaller is better.
    Latency,
    /// Requests per second.
    Iops,
    /// Bytes per second.
    Throughput,
    /// How long a program takes; smaller is better.
    RunTime,
}

impl Metric {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Metric::Latency => "p50",
            Metric::Iops => "iops",
            Metric::Throughput => "rate",
            Metric::RunTime => "run time",
        }
    }

    pub(crate) fn unit(self) -> &'static str {
        match self {
            Metric::Latency => "us",
            Metric::Iops => "/s",
            Metric::Throughput => "MiB/s",
            Metric::RunTime => "s",
        }
    }

    /// Larger than 1 when `ours` is better.
    pub(crate) fn ratio(self, ours: f64, theirs: f64) -> f64 {
        match self {
            Metric::Latency | Metric::RunTime => theirs / ours,
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
