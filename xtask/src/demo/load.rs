//! The checks of every form of device: checked load, a dead allocator, figures, TRIM.

use anyhow::Result;

use super::MIB;
use super::fio::{self, Target};
use super::site::{NAME, Site};

/// How much of the device the loads use.
fn span(site: &Site) -> u64 {
    (site.size / 4).min(128 * MIB)
}

/// Writes and verifies while no allocator runs, then starts it again.
pub(super) fn survive_the_allocator(site: &Site, target: &Target) -> Result<()> {
    let why = "Nothing on the way of a read or write asks the allocator: with it dead, I/O goes on. Restarted, it knows \
               everything again.";
    site.account.step("Kill the allocator and write with checksums meanwhile", why);
    site.kill_allocator()?;
    fio::verify(site, target, span(site))?;
    site.start_allocator()?;
    let list = site.xpm(&["alloc", "list"])?;
    site.account.output(&list);
    let known = site.ask(&["alloc", "show", NAME])?["size"].as_u64() == Some(site.size);
    site.account.check(known, "the restarted allocator knows the allocation")
}

/// Throughput and latencies. Their value depends on this machine.
pub(super) fn figures(site: &Site, target: &Target) -> Result<()> {
    let why = "By fio, for orientation: daemons, load generator and device share this machine's processors.";
    site.account.step("Measure throughput and latency", why);
    fio::figures(site, target, span(site))
}

/// Trims all of it and sees the memory at the appliances go down.
pub(super) fn give_back(site: &Site, target: &Target) -> Result<()> {
    let why = "What a client discards is free at the appliance at once, while the allocation stays: RESIDENT goes down, \
               GRANTED does not.";
    site.account.step("Give memory back by TRIM", why);
    let before = site.resident()?;
    site.account.output(&site.xpm(&["appliance", "list"])?);
    fio::trim(site, target, site.size)?;
    // The last row of regions may reach beyond the device; that part is never trimmed.
    let beyond = site.granted()?.saturating_sub(site.size);
    // The appliances tell the allocator with their heartbeats, so that it follows a moment later.
    let free = || Ok(site.resident()? <= beyond + site.size / 64);
    site.wait_until("the trimmed memory did not become free", free)?;
    site.account.output(&site.xpm(&["appliance", "list"])?);
    let after = site.resident()?;
    let what = format!("the appliances hold {} MiB instead of {} MiB", after / MIB, before / MIB);
    site.account.check(after < before, &what)
}
