//! Bench `blk`: xpm's NBD servers against those that people would use else, on this host.

use anyhow::Result;
use tempfile::TempDir;

use super::fio::{self, LOADS, Load, Metric};
use super::report::{Report, Row, median};
use super::servers::{Bench, Server, Way};

/// Pairs of runs whose median counts.
const ROUNDS: usize = 3;
/// Length of one run in seconds.
const SECONDS: u32 = 2;
const SIZE: (&str, u64) = ("512M", 512 << 20);

/// Who is measured, against whom, and how much better it has to be.
struct Contest<'a> {
    name: &'a str,
    xpm: &'a str,
    peers: &'a [&'a Server],
    latency_goal: f64,
    iops_goal: f64,
}

pub(crate) fn run(bin: &std::path::Path, report: &mut Report) -> Result<()> {
    for part in [appliance, shm, proxy] {
        // A directory for each: sockets of servers that are gone are in the way of their followers.
        let dir = TempDir::with_prefix("xpm-bench-")?;
        part(&Bench { dir: dir.path(), bin, size: SIZE }, report)?;
    }
    Ok(())
}

/// (1) The appliance itself.
fn appliance(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let appliance = bench.appliance()?;
    for (number, way) in (1..).zip([Way::Unix, Way::Tcp]) {
        let xpm = appliance.grant(number, SIZE.1, way)?;
        let (nbdkit, qemu) = (bench.nbdkit_memory(way)?, bench.qemu_nbd(way)?);
        let name = format!("appliance {}", way.name());
        let contest =
            Contest { name: &name, xpm: &xpm, peers: &[&nbdkit, &qemu], latency_goal: 1.0, iops_goal: 1.3 };
        contest.run(report)?;
    }
    Ok(())
}

/// (2) xpm-blk's socket on an appliance of the same host.
fn shm(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let (_allocator, url) = bench.allocator()?;
    let _appliance = bench.appliance()?;
    let (_blk, control) = bench.blk(&url)?;
    let xpm = bench.attach(&control, &url, "shm", "shm")?;
    let nbdkit = bench.nbdkit_memory(Way::Unix)?;
    Contest { name: "blk -> shm", xpm: &xpm, peers: &[&nbdkit], latency_goal: 1.0, iops_goal: 1.3 }
        .run(report)
}

/// (3) xpm-blk's socket on an appliance over TCP, against a proxy of the same kind.
fn proxy(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let (_allocator, url) = bench.allocator()?;
    let _appliance = bench.appliance()?;
    let (_blk, control) = bench.blk(&url)?;
    let xpm = bench.attach(&control, &url, "proxied", "nbd-tcp")?;
    let memory = bench.nbdkit_memory(Way::Tcp)?;
    let nbdkit = bench.nbdkit_proxy(Way::Unix, &memory.uri)?;
    Contest { name: "blk -> tcp", xpm: &xpm, peers: &[&nbdkit], latency_goal: 1.5, iops_goal: 1.5 }
        .run(report)
}

impl Contest<'_> {
    fn run(&self, report: &mut Report) -> Result<()> {
        for load in LOADS {
            report.note(&format!("{}: {} ...", self.name, load.name));
            self.load(load, report)?;
        }
        Ok(())
    }

    /// Runs the load on all in turn, so that what disturbs the machine disturbs all of them, and
    /// compares within each turn.
    fn load(&self, load: Load, report: &mut Report) -> Result<()> {
        let mut ours = Vec::new();
        let mut theirs = vec![Vec::new(); self.peers.len()];
        for _ in 0..ROUNDS {
            ours.push(fio::run(self.xpm, load, SIZE.0, SECONDS)?);
            for (peer, values) in self.peers.iter().zip(&mut theirs) {
                values.push(fio::run(&peer.uri, load, SIZE.0, SECONDS)?);
            }
        }
        let goal = match load.metric {
            Metric::Latency => Some(self.latency_goal),
            Metric::Iops => Some(self.iops_goal),
            Metric::Throughput => None,
        };
        for (peer, values) in self.peers.iter().zip(&theirs) {
            let pairs = ours.iter().zip(values).map(|(ours, theirs)| load.metric.ratio(*ours, *theirs));
            let ratio = median(&pairs.collect::<Vec<_>>());
            report.row(&Row {
                bench: "blk",
                case: format!("{} {}", self.name, load.name),
                metric: load.metric.name(),
                unit: load.metric.unit(),
                xpm: median(&ours),
                peer: Some(peer.name.to_owned()),
                peer_value: Some(median(values)),
                ratio: Some(ratio),
                goal,
                ok: goal.map(|goal| ratio >= goal),
            });
        }
        Ok(())
    }
}
