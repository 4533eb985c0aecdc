//! Bench `blk`: xpm's NBD servers against those that people would use else, on this host.
//!
//! fio is the client of all loads. With many requests in flight it can need more of the processor
//! than a server does, and then all servers look alike; those loads are run with a second client,
//! `nbdload`, too. Each row says whose it is, and a note how much of the processor the client took.

use anyhow::Result;
use tempfile::TempDir;

use super::client::{Client, Sample};
use super::load::{LOADS, Load, Metric};
use super::report::{Report, Row, median};
use super::servers::{Bench, Server, Way};

/// Pairs of runs whose median counts.
const ROUNDS: usize = 3;
/// Length of one run in seconds.
const SECONDS: u32 = 2;
const SIZE: (&str, u64) = ("512M", 512 << 20);

/// The measured device, its peer, and the required ratio.
struct Contest<'a> {
    /// Where xpm's programs are.
    bin: &'a std::path::Path,
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
        let contest = Contest {
            bin: bench.bin,
            name: &name,
            xpm: &xpm,
            peers: &[&nbdkit, &qemu],
            latency_goal: 1.0,
            iops_goal: 1.3,
        };
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
    let contest = Contest {
        bin: bench.bin,
        name: "blk -> shm",
        xpm: &xpm,
        peers: &[&nbdkit],
        latency_goal: 1.0,
        iops_goal: 1.3,
    };
    contest.run(report)
}

/// (3) xpm-blk's socket on an appliance over TCP, against a proxy of the same kind.
fn proxy(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let (_allocator, url) = bench.allocator()?;
    let _appliance = bench.appliance()?;
    let (_blk, control) = bench.blk(&url)?;
    let xpm = bench.attach(&control, &url, "proxied", "nbd-tcp")?;
    let memory = bench.nbdkit_memory(Way::Tcp)?;
    let nbdkit = bench.nbdkit_proxy(Way::Unix, &memory.uri)?;
    let contest = Contest {
        bin: bench.bin,
        name: "blk -> tcp",
        xpm: &xpm,
        peers: &[&nbdkit],
        latency_goal: 1.5,
        iops_goal: 1.5,
    };
    contest.run(report)
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
        let clients = Client::of(load);
        let mut turns = vec![Vec::new(); clients.len()];
        for _ in 0..ROUNDS {
            for (client, turns) in clients.iter().zip(&mut turns) {
                turns.push(self.turn(*client, load)?);
            }
        }
        for (client, turns) in clients.iter().zip(&turns) {
            self.compare(*client, load, turns, report);
        }
        Ok(())
    }

    /// One client on xpm, then on each peer.
    fn turn(&self, client: Client, load: Load) -> Result<Vec<Sample>> {
        let run = |uri: &str| client.run(self.bin, uri, load, SIZE.0, SECONDS);
        let uris = std::iter::once(self.xpm).chain(self.peers.iter().map(|peer| peer.uri.as_str()));
        uris.map(run).collect()
    }

    /// A row for each peer, and what the client itself took of the processor.
    fn compare(&self, client: Client, load: Load, turns: &[Vec<Sample>], report: &mut Report) {
        let case = match Client::of(load) {
            [_] => format!("{} {}", self.name, load.name),
            _ => format!("{} {} ({})", self.name, load.name, client.name()),
        };
        let goal = match load.metric {
            Metric::Latency => Some(self.latency_goal),
            Metric::Iops => Some(self.iops_goal),
            Metric::Throughput | Metric::RunTime => None,
        };
        let figure = |of: &dyn Fn(&[Sample]) -> f64| {
            median(&turns.iter().map(|samples| of(samples)).collect::<Vec<_>>())
        };
        let cost = |server: usize| {
            let micros = figure(&|samples| samples[server].cost.micros);
            let percent = figure(&|samples| samples[server].cost.percent);
            format!("{micros:.1} us an operation and {percent:.0} % of a core")
        };
        let mut costs = format!("{case}: the client itself took {} on xpm", cost(0));
        for (server, peer) in (1..).zip(self.peers) {
            let ratio = figure(&|samples| load.metric.ratio(samples[0].value, samples[server].value));
            costs += &format!(", {} on {}", cost(server), peer.name);
            report.row(&Row {
                bench: "blk",
                case: case.clone(),
                metric: load.metric.name(),
                unit: load.metric.unit(),
                xpm: figure(&|samples| samples[0].value),
                peer: Some(peer.name.to_owned()),
                peer_value: Some(figure(&|samples| samples[server].value)),
                ratio: Some(ratio),
                goal,
                ok: goal.map(|goal| ratio >= goal),
            });
        }
        if load.metric == Metric::Iops {
            report.note(&costs);
        }
    }
}
