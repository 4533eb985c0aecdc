//! fio as the load, and its figures.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::site::Site;
use crate::util;

/// The target of fio.
#[derive(Debug, Clone)]
pub(super) enum Target {
    /// An NBD server, through fio's own NBD client.
    Nbd(String),
    /// A block device or a file, past the page cache.
    File(String),
}

/// One way to load a device for a moment, for its figures.
struct Load {
    name: &'static str,
    words: [&'static str; 3],
    /// The part of fio's report that counts.
    direction: &'static str,
}

const LOADS: [Load; 4] = [
    Load {
        name: "4 KiB random reads, one at a time",
        words: ["--rw=randread", "--bs=4k", "--iodepth=1"],
        direction: "read",
    },
    Load {
        name: "4 KiB random reads, 32 at a time",
        words: ["--rw=randread", "--bs=4k", "--iodepth=32"],
        direction: "read",
    },
    Load {
        name: "4 KiB random writes, 32 at a time",
        words: ["--rw=randwrite", "--bs=4k", "--iodepth=32"],
        direction: "write",
    },
    Load {
        name: "1 MiB reads in sequence, 4 at a time",
        words: ["--rw=read", "--bs=1m", "--iodepth=4"],
        direction: "read",
    },
];

/// Longest run of fio.
const LIMIT: Duration = Duration::from_secs(180);

/// Writes blocks that carry checksums all over `size`, reads them back and compares.
pub(super) fn verify(site: &Site, target: &Target, size: u64) -> Result<()> {
    let words = [
        "--rw=randwrite",
        "--bs=4k-128k",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--randseed=7",
    ];
    let report = run(site, target, size, &words, true)?;
    let written = report["write"]["io_bytes"].as_u64().unwrap_or(0);
    let read = report["read"]["io_bytes"].as_u64().unwrap_or(0);
    let what = format!(
        "fio wrote {} MiB with checksums, read {} MiB back, no block differs",
        written >> 20,
        read >> 20
    );
    site.account.check(written > 0 && read >= written, &what)
}

/// Discards all of it.
pub(super) fn trim(site: &Site, target: &Target, size: u64) -> Result<()> {
    run(site, target, size, &["--rw=trim", "--bs=4m", "--iodepth=4"], true).map(|_| ())
}

/// Throughput and latency of some loads, as a table.
pub(super) fn figures(site: &Site, target: &Target, size: u64) -> Result<()> {
    let mut table = format!("{:<38} {:>10} {:>12} {:>9} {:>9}\n", "", "IOPS", "throughput", "p50", "p99");
    for load in &LOADS {
        let timed = ["--time_based", "--runtime=2", "--ramp_time=200ms", "--norandommap", "--randseed=7"];
        let report = run(site, target, size, &[&load.words[..], &timed[..]].concat(), false)?;
        let figures = Figures::read(&report[load.direction])
            .with_context(|| format!("fio has no figures for {}", load.name))?;
        table.push_str(&figures.row(load.name));
    }
    site.account.output(&table);
    Ok(())
}

fn run(site: &Site, target: &Target, size: u64, words: &[&str], shown: bool) -> Result<Value> {
    let mut fio = util::command("fio");
    // fio leaves files of its own where it runs.
    fio.current_dir(site.dir()).arg("--name=demo");
    match target {
        Target::Nbd(uri) => fio.arg("--ioengine=nbd").arg(format!("--uri={uri}")),
        Target::File(path) => fio.args(["--ioengine=libaio", "--direct=1"]).arg(format!("--filename={path}")),
    };
    fio.arg(format!("--size={}M", size >> 20)).args(words);
    if shown {
        site.account.command(&fio);
    }
    let output = site.runner.output(fio.args(["--output-format=json", "--lat_percentiles=1"]), LIMIT)?;
    report(&output)
}

/// The first job of fio's JSON, which warnings may stand before.
fn report(output: &str) -> Result<Value> {
    let json = output.find('{').map_or("", |start| &output[start..]);
    let report: Value = serde_json::from_str(json).context("fio's report cannot be read")?;
    let job = report["jobs"][0].clone();
    match job["error"].as_i64() {
        Some(0) => Ok(job),
        error => bail!("fio reports error {error:?}"),
    }
}

/// The figures of fio in one direction.
#[derive(Debug, PartialEq)]
struct Figures {
    iops: f64,
    bytes_per_second: f64,
    p50_us: f64,
    p99_us: f64,
}

impl Figures {
    fn read(job: &Value) -> Option<Figures> {
        let percentile = |name| job["lat_ns"]["percentile"][name].as_f64().map(|ns| ns / 1000.0);
        Some(Figures {
            iops: job["iops"].as_f64().filter(|iops| *iops > 0.0)?,
            bytes_per_second: job["bw_bytes"].as_f64()?,
            p50_us: percentile("50.000000")?,
            p99_us: percentile("99.000000")?,
        })
    }

    fn row(&self, name: &str) -> String {
        let rate = self.bytes_per_second / f64::from(1 << 20);
        format!(
            "{name:<38} {:>10.0} {rate:>6.0} MiB/s {:>6.0} us {:>6.0} us\n",
            self.iops, self.p50_us, self.p99_us
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_a_report() {
        let output = "fio: a warning\n{\"jobs\": [{\"error\": 0, \"read\": {\"iops\": 1000.5, \"bw_bytes\": 4096000, \"lat_ns\": \
                      {\"percentile\": {\"50.000000\": 80000, \"99.000000\": 250000}}}}]}";
        let job = report(output).unwrap();
        let expected = Figures { iops: 1000.5, bytes_per_second: 4_096_000.0, p50_us: 80.0, p99_us: 250.0 };
        assert_eq!(Figures::read(&job["read"]), Some(expected));
        assert_eq!(Figures::read(&job["write"]), None);
    }

    #[test]
    fn reports_that_are_none() {
        for output in
            ["", "fio: failed", "{}", "{\"jobs\": []}", "{\"jobs\": [{\"error\": 84}]}", "{\"jobs\""]
        {
            assert!(report(output).is_err(), "{output}");
        }
    }
}
