//! fio's nbd engine as the client of every server alike.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::client::{Cost, Sample};
use super::load::{Load, Metric};
use crate::util;

/// Runs a load on an NBD server.
pub(crate) fn run(uri: &str, load: Load, size: &str, seconds: u32) -> Result<Sample> {
    let output = util::output(
        Command::new("fio")
            .args(["--name=bench", "--ioengine=nbd", "--time_based", "--ramp_time=300ms", "--norandommap"])
            .args(["--output-format=json", "--randseed=7", "--lat_percentiles=0", "--clat_percentiles=1"])
            .arg(format!("--uri={uri}"))
            .arg(format!("--rw={}", load.rw))
            .arg(format!("--bs={}", load.block))
            .arg(format!("--iodepth={}", load.depth))
            .arg(format!("--size={size}"))
            .arg(format!("--runtime={seconds}")),
    )?;
    let json = output.find('{').map_or("", |start| &output[start..]);
    let report: Value = serde_json::from_str(json).context("fio's report cannot be read")?;
    sample(&report["jobs"][0], load).with_context(|| format!("fio's report on {uri} lacks figures"))
}

/// One job of the report.
fn sample(job: &Value, load: Load) -> Option<Sample> {
    let part = &job[if load.rw.ends_with("read") { "read" } else { "write" }];
    let value = match load.metric {
        Metric::Latency => part["clat_ns"]["percentile"]["50.000000"].as_f64().map(|ns| ns / 1000.0),
        Metric::Iops => part["iops"].as_f64(),
        Metric::Throughput => part["bw_bytes"].as_f64().map(|bytes| bytes / f64::from(1 << 20)),
        Metric::RunTime => None,
    };
    // Both are percent of the job's run time, as getrusage(2) has them.
    let percent = job["usr_cpu"].as_f64()? + job["sys_cpu"].as_f64()?;
    let micros_of_percent = 10_000.0 / part["iops"].as_f64()?;
    let cost = Cost { micros: percent * micros_of_percent, percent };
    value.filter(|value| *value > 0.0).map(|value| Sample { value, cost })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::load::LOADS;
    use super::*;

    #[test]
    fn the_cost_of_an_operation_is_the_clients_share_of_the_time_by_their_number() {
        let deep = LOADS.into_iter().find(|load| load.name == "4k read qd32").unwrap();
        let mut job = json!({"usr_cpu": 30.0, "sys_cpu": 60.0, "read": {"iops": 100_000.0}});
        let found = sample(&job, deep).unwrap();
        assert_eq!((found.value, found.cost.percent), (100_000.0, 90.0));
        assert!((found.cost.micros - 9.0).abs() < 1e-9, "{}", found.cost.micros);
        job["read"] = json!({"iops": 0.0});
        assert!(sample(&job, deep).is_none());
    }
}
