//! `iogap DEVICE FILE`: how long I/O on a block device stands still. Reads 4 KiB past the page cache every few
//! milliseconds, at places all over the device, until FILE is there; then prints the longest reads in milliseconds,
//! and when since the start of the machine the longest of all began. Ends with status 1 when a read failed.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::OFlags;
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::time::{ClockId, clock_gettime};

const PAUSE: Duration = Duration::from_millis(5);
const PAGE_BYTES: usize = 4096;
/// Reads that are shown.
const SHOWN: usize = 6;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [device, file] = arguments.as_slice() else {
        eprintln!("usage: iogap DEVICE FILE");
        return ExitCode::from(2);
    };
    match run(device, Path::new(file)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("iogap: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Direct I/O wants a page that begins where one does.
#[repr(align(4096))]
struct Page([u8; PAGE_BYTES]);

fn run(device: &str, file: &Path) -> Result<()> {
    // It must not wait for a page of its own, which may be on the device.
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE).context("mlockall")?;
    fs::write("/proc/self/oom_score_adj", "-1000").context("oom_score_adj")?;
    let direct = OFlags::DIRECT.bits().cast_signed();
    let mut opened: File = OpenOptions::new()
        .read(true)
        .custom_flags(direct)
        .open(device)
        .with_context(|| format!("open {device}"))?;
    let pages = opened.seek(SeekFrom::End(0))? / PAGE_BYTES as u64;
    let mut page = Page([0; PAGE_BYTES]);
    let mut longest = [(Duration::ZERO, 0); SHOWN];
    let (mut reads, mut place) = (0_u64, 0_u64);
    while !file.exists() {
        // A step that shares no factor with a power of two gets everywhere.
        place = (place + 104_729) % pages;
        let (begin, uptime) = (Instant::now(), clock_gettime(ClockId::Boottime).tv_sec);
        opened
            .read_exact_at(&mut page.0, place * PAGE_BYTES as u64)
            .with_context(|| format!("page {place}"))?;
        reads += 1;
        let took = begin.elapsed();
        if took > longest[SHOWN - 1].0 {
            longest[SHOWN - 1] = (took, uptime);
            longest.sort_unstable_by(|one, other| other.cmp(one));
        }
        std::thread::sleep(PAUSE);
    }
    let times: Vec<String> = longest.iter().map(|(took, _)| format!("{}", took.as_millis())).collect();
    println!("longest of {reads} reads of 4 KiB: {} ms, the first at {} s", times.join(", "), longest[0].1);
    Ok(())
}
