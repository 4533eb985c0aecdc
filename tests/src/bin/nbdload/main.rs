//! A lean NBD client that loads any server with operations at random places, so that the server is
//! what is measured also where a client of more comfort takes a whole core for itself.
//!
//! One thread, one connection; it sleeps in poll(2) when nothing has ended. It prints one JSON object:
//! operations a second, their times from post to end, and the processor time that it used itself.

mod load;
mod times;
mod uri;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use serde_json::json;
use xpm_transport::Kind;
use xpm_transport::nbd::client::{NbdLink, connect_to};

use self::load::Load;

/// Longest wait for a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Loads an NBD server and prints what it achieved, as one JSON object.
#[derive(Parser)]
struct Args {
    /// `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`
    uri: String,
    /// The operation; writes change the export.
    #[arg(long, value_enum, default_value_t = Direction::Read)]
    op: Direction,
    /// Bytes of one operation, up to 1 MiB.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    len: u32,
    /// Operations in flight, up to 1024.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    depth: u16,
    /// Seconds that count.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Milliseconds before them that do not count.
    #[arg(long, default_value_t = 300)]
    ramp_ms: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Direction {
    Read,
    Write,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nbdload: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let place = uri::parse(&args.uri).with_context(|| format!("`{}` is no NBD URI", args.uri))?;
    let connected = connect_to(&place.target, &place.export, CONNECT_LIMIT)
        .with_context(|| format!("cannot connect to {}", args.uri))?;
    let (len, depth) = (usize::try_from(args.len)?, usize::from(args.depth));
    let kind = match args.op {
        Direction::Read => Kind::Read,
        Direction::Write => Kind::Write,
    };
    let load = Load::new(NbdLink::new(connected, depth)?, kind, len, depth)?;
    let ramp = Duration::from_millis(args.ramp_ms.into());
    let measured = load.run(ramp, Duration::from_secs(args.seconds.into()))?;
    let count = measured.times.count();
    ensure!(count > 0, "no operation ended in {} s", args.seconds);
    println!(
        "{}",
        json!({
            "iops": count as f64 / measured.elapsed.as_secs_f64(),
            "p50_ns": measured.times.percentile(50),
            "p99_ns": measured.times.percentile(99),
            "cpu_ns_per_op": measured.cpu.as_nanos() as f64 / count as f64,
            "cpu_percent": 100.0 * measured.cpu.as_secs_f64() / measured.elapsed.as_secs_f64(),
        })
    );
    Ok(())
}
