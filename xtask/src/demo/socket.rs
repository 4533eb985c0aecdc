//! The workload on an NBD socket: NBD clients of other projects.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::fio::Target;
use super::site::Site;
use super::{MIB, load};
use crate::util;

/// All of it.
pub(super) fn workload(site: &Site, uri: &str) -> Result<()> {
    look(site, uri)?;
    copy(site, uri)?;
    let target = Target::Nbd(uri.to_owned());
    load::survive_the_allocator(site, &target)?;
    load::figures(site, &target)?;
    load::give_back(site, &target)?;
    reads_zeros(site, uri)
}

fn look(site: &Site, uri: &str) -> Result<()> {
    site.account.step(
        "Look at it with libnbd's nbdinfo",
        "The device is a plain NBD server: any NBD client can use it.",
    );
    let text = site.run(util::command("nbdinfo").args(["--json", uri]))?;
    let info: Value = serde_json::from_str(&text).context("nbdinfo printed no JSON")?;
    let export = &info["exports"][0];
    site.account.check(
        export["export-size"].as_u64() == Some(site.size),
        &format!("it has {} MiB", site.size / MIB),
    )?;
    site.account.check(export["is_read_only"] == false, "it can be written")?;
    site.account.check(export["can_trim"] == true, "it takes TRIM, so that memory can be given back")
}

/// How much random data goes in and out.
fn sample_len(site: &Site) -> u64 {
    (site.size / 4).min(256 * MIB)
}

fn copy(site: &Site, uri: &str) -> Result<()> {
    let why = "Random data makes every misplaced block visible: it is striped over three appliances on its way in and \
               put together again on its way out.";
    site.account.step("Copy random data in and out with libnbd's nbdcopy, and compare", why);
    let (original, copy) = (site.dir().join("original"), site.dir().join("copy"));
    let len = sample_len(site);
    let mut dd = util::command("dd");
    dd.arg("if=/dev/urandom").arg(format!("of={}", original.display()));
    site.run(dd.args(["bs=1M", &format!("count={}", len / MIB), "status=none"]))?;
    let into = timed(|| site.run(util::command("nbdcopy").arg(&original).arg(uri)))?;
    let out = timed(|| site.run(util::command("nbdcopy").arg(uri).arg(&copy)))?;
    site.account.note(&format!(
        "in at {}, the whole device out at {}",
        rate(len, into),
        rate(site.size, out)
    ));
    let mut cmp = util::command("cmp");
    let same = site.same(cmp.args(["-n", &len.to_string()]).arg(&original).arg(&copy))?;
    std::fs::remove_file(&copy)?;
    site.account.check(same, &format!("{} MiB came back as they went in", len / MIB))
}

fn timed(action: impl FnOnce() -> Result<String>) -> Result<Duration> {
    let start = Instant::now();
    action().map(|_| start.elapsed())
}

fn rate(bytes: u64, time: Duration) -> String {
    format!("{:.0} MiB/s", bytes as f64 / MIB as f64 / time.as_secs_f64().max(1e-6))
}

fn reads_zeros(site: &Site, uri: &str) -> Result<()> {
    let copy = site.dir().join("copy");
    site.run(util::command("nbdcopy").arg(uri).arg(&copy))?;
    let mut cmp = util::command("cmp");
    let zero = site.same(cmp.args(["-n", &site.size.to_string()]).arg(&copy).arg("/dev/zero"))?;
    std::fs::remove_file(&copy)?;
    site.account.check(zero, "what was trimmed reads back as zeros")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates() {
        assert_eq!(rate(512 * MIB, Duration::from_secs(2)), "256 MiB/s");
        assert!(rate(1, Duration::ZERO).ends_with("MiB/s"));
    }
}
