//! Bench `allocator`: decisions, durable allocations, memory and restart, with 100, 1,000 and 10,000
//! appliances, so that it shows how each grows.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::report::{Report, Row};

/// Upper limits with ten thousand appliances, by metric.
const GOALS: [(&str, f64); 4] =
    [("decision p50", 100.0), ("decision p99", 1000.0), ("memory", 1024.0), ("restart", 5000.0)];

/// Runs the measuring program of the allocator, which prints a JSON object a line.
pub(crate) fn run(bin: &Path, report: &mut Report) -> Result<()> {
    report.note("allocator: pools of 100, 1,000 and 10,000 appliances are filled; this takes two minutes");
    let output =
        Command::new(bin.join("examples/allocator_bench")).output().context("cannot run allocator_bench")?;
    if !output.status.success() {
        bail!("allocator_bench failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let row: Value =
            serde_json::from_str(line).with_context(|| format!("allocator_bench printed `{line}`"))?;
        report.row(&measured(&row).with_context(|| format!("allocator_bench printed `{line}`"))?);
    }
    Ok(())
}

fn measured(row: &Value) -> Option<Row> {
    let metric = row["metric"].as_str()?;
    let value = row["value"].as_f64()?;
    let large = row["appliances"].as_u64()? >= 10_000;
    let goal = GOALS.into_iter().find(|(of, _)| large && *of == metric).map(|(_, goal)| goal);
    let metric = METRICS.into_iter().find(|one| *one == metric)?;
    let unit = UNITS.into_iter().find(|one| Some(*one) == row["unit"].as_str())?;
    Some(Row {
        bench: "allocator",
        case: row["case"].as_str()?.to_owned(),
        metric,
        unit,
        xpm: value,
        peer: None,
        peer_value: None,
        ratio: None,
        goal,
        ok: goal.map(|goal| value <= goal),
    })
}

const METRICS: [&str; 8] = [
    "decision p50",
    "decision p99",
    "with intent",
    "all explained",
    "filled at",
    "durable",
    "memory",
    "restart",
];
const UNITS: [&str; 4] = ["us", "/s", "MiB", "ms"];
