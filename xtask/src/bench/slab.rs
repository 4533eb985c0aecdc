//! Bench `slab`: carving and freeing slabs at the client, with no message to anyone.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::report::{Report, Row};

/// The upper limit of one call, in nanoseconds, with a million live slabs.
const GOAL_NS: f64 = 200.0;

/// Runs the measuring program of the client library, which prints a JSON object a line with a
/// `case` and its `ns_p50`.
pub(crate) fn run(bin: &Path, report: &mut Report) -> Result<()> {
    let output = Command::new(bin.join("examples/slab_bench")).output().context("cannot run slab_bench")?;
    if !output.status.success() {
        bail!("slab_bench failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let case: Value =
            serde_json::from_str(line).with_context(|| format!("slab_bench printed `{line}`"))?;
        let nanoseconds = case["ns_p50"].as_f64().with_context(|| format!("no ns_p50 in `{line}`"))?;
        report.row(&Row {
            bench: "slab",
            case: case["case"].as_str().unwrap_or("?").to_owned(),
            metric: "p50",
            unit: "ns",
            xpm: nanoseconds,
            peer: None,
            peer_value: None,
            ratio: None,
            goal: Some(GOAL_NS),
            ok: Some(nanoseconds <= GOAL_NS),
        });
    }
    Ok(())
}
