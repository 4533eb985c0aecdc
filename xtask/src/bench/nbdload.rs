//! The project's own lean client, `nbdload`, as the client of every server alike.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::client::{Cost, Sample};
use super::load::Load;
use crate::util;

/// Bytes of every operation; the loads that it is for have no others.
pub(crate) const BLOCK: &str = "4k";

/// Runs a load of random places on an NBD server; `bin` is where the program is.
pub(crate) fn run(bin: &Path, uri: &str, load: Load, seconds: u32) -> Result<Sample> {
    let output = util::output(
        Command::new(bin.join("nbdload"))
            .args(["--len", "4096", "--ramp-ms", "300"])
            .args(["--op", load.rw.trim_start_matches("rand")])
            .args(["--depth", &load.depth.to_string()])
            .args(["--seconds", &seconds.to_string()])
            .arg(uri),
    )?;
    let said: Value = serde_json::from_str(&output).context("nbdload's report cannot be read")?;
    sample(&said).with_context(|| format!("nbdload's report on {uri} lacks figures"))
}

fn sample(said: &Value) -> Option<Sample> {
    let cost =
        Cost { micros: said["cpu_ns_per_op"].as_f64()? / 1000.0, percent: said["cpu_percent"].as_f64()? };
    Some(Sample { value: said["iops"].as_f64()?, cost })
}
