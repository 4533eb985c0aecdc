//! Measures the memory that mapping takes in addition to the local pages.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use xpm_mapping::{Access, Budget, Faults, Space, SpaceOptions};

use super::{MIB, Outcome, PAGE, attach, is_shared, say, words};

/// The library is at rest when no page has left or come for this long: longer than it keeps the memory of pages that
/// have left.
const CALM: Duration = Duration::from_secs(1);

/// Writes to each page of `mib` MiB, of which `part` percent may be local, and reads them in a row. Prints, after the
/// reads and again at rest, how much memory this process has more than before the space was opened, less the pages
/// that are local.
pub(super) fn run(url: &str, name: &str, faults: Faults, mib: u64, part: u64) -> Outcome<()> {
    let (attachment, volume) = attach(url, name, "tcp")?;
    let (before, len) = (taken()?, mib * MIB);
    // If all pages may be local, the budget is twice as large, so that no page leaves.
    let budget = Budget::Fixed(if part < 100 { len * part / 100 } else { 2 * len });
    let space = Space::open(volume, &SpaceOptions { budget, faults, kept: len })?;
    let mapping = space.map(0..len, Access::ReadWrite)?;
    let firsts = || words(&mapping).iter().step_by(PAGE / 8);
    firsts().for_each(|word| word.store(1, Ordering::Relaxed));
    assert!(firsts().all(|word| word.load(Ordering::Relaxed) == 1));
    for when in ["in a scan", "at rest"] {
        if when == "at rest" {
            settle(&space)?;
        }
        // `taken` does not count pages of a memfd.
        let content = if is_shared()? { 0 } else { space.stats().resident };
        let over = taken()? as f64 - before as f64 - content as f64;
        say(&format!("memory {when}, {part} % local, {mib} MiB"), "mib", over / MIB as f64);
    }
    drop((mapping, space));
    Ok(attachment.detach()?)
}

/// Waits until no page leaves or comes any more.
fn settle(space: &Space) -> Outcome<()> {
    let (began, mut last) = (Instant::now(), None);
    while last.replace(space.stats()) != Some(space.stats()) {
        if began.elapsed() > 20 * CALM {
            return Err("pages go on leaving local memory".into());
        }
        std::thread::sleep(CALM);
    }
    Ok(())
}

/// Bytes of private memory and of page tables that this process has. External memory itself, which a transport may
/// map, is not private memory and is not counted.
fn taken() -> Outcome<u64> {
    let kib = |file: &str, key: &str| -> Outcome<u64> {
        let text = std::fs::read_to_string(file)?;
        let line = text.lines().find_map(|line| line.strip_prefix(key)).ok_or_else(|| format!("no {key}"))?;
        Ok(line.split_whitespace().next().ok_or("no figure")?.parse()?)
    };
    // Not VmRSS of the status: the kernel counts it for each processor, and so it changes in steps.
    Ok((kib("/proc/self/smaps_rollup", "Anonymous:")? + kib("/proc/self/status", "VmPTE:")?) << 10)
}
