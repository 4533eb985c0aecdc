//! `filetouch MODE FILE`: touches pages of a mapped file for the first time, for bench `fs`. It prints JSON, one figure
//! a line, in the manner of `map_bench`.
//!
//! `fill` writes every page. `random` touches some thousand pages, each once; `row` all of them, one after the other.
//! Both begin with none of them in the page cache.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{Advice, fadvise};
use serde_json::json;
use xpm_tests::mapped::Mapped;

const PAGE: usize = 4096;
const FILL: usize = 1 << 20;
/// Pages that are touched at random.
const TOUCHES: usize = 4000;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [mode, path] = &words[..] else { bail!("usage: filetouch fill|random|row FILE") };
    let file =
        File::options().read(true).write(true).open(path).with_context(|| format!("cannot open {path}"))?;
    let len = usize::try_from(file.metadata()?.len())? / PAGE * PAGE;
    ensure!(len >= PAGE * TOUCHES * 2, "{path} has less than {} bytes", PAGE * TOUCHES * 2);
    if mode == "fill" {
        let block = vec![0xa5_u8; FILL];
        (0..len / FILL).try_for_each(|index| file.write_all_at(&block, (index * FILL) as u64))?;
        return Ok(file.sync_all()?);
    }
    // Pages that are mapped or changed would stay.
    file.sync_all()?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    let mapped = Mapped::new(&file, len);
    let touch = |page: usize| {
        let mut byte = [0];
        mapped.read(page * PAGE, &mut byte);
        ensure!(byte[0] == 0xa5, "page {page} was not filled");
        Ok(())
    };
    match &mode[..] {
        "random" => {
            let (mut seen, mut times) = (vec![false; len / PAGE], Vec::with_capacity(TOUCHES));
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            while times.len() < TOUCHES {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let page = usize::try_from(state % seen.len() as u64)?;
                if !std::mem::replace(&mut seen[page], true) {
                    let begun = Instant::now();
                    touch(page)?;
                    times.push(begun.elapsed());
                }
            }
            times.sort_unstable();
            let micros = |time: Duration| time.as_secs_f64() * 1e6;
            say("fault", "p50", micros(times[times.len() / 2]));
            say("fault", "p99", micros(times[times.len() * 99 / 100]));
            say("fault", "touches", times.len() as f64);
        }
        "row" => {
            let begun = Instant::now();
            (0..len / PAGE).try_for_each(touch)?;
            say("row", "mib_s", len as f64 / f64::from(1 << 20) / begun.elapsed().as_secs_f64());
        }
        other => bail!("there is no mode `{other}`: fill, random or row"),
    }
    Ok(())
}

fn say(case: &str, metric: &str, value: f64) {
    println!("{}", json!({"case": case, "metric": metric, "value": value}));
}
