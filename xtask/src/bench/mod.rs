//! `cargo xtask bench`: xpm and its peers, in the same run, as ratios.

mod blk;
mod fio;
mod report;
mod servers;
mod slab;

use std::path::Path;

use anyhow::{Result, bail};

use self::report::Report;

/// The benchmarks by name.
pub(crate) const NAMES: [&str; 2] = ["blk", "slab"];

/// Runs the named benchmarks, or all that run on the host, with release binaries in `bin`.
pub(crate) fn run(names: &[String], bin: &Path, json: bool) -> Result<()> {
    if let Some(unknown) = names.iter().find(|name| !NAMES.contains(&name.as_str())) {
        bail!("there is no benchmark `{unknown}`; there are: {}", NAMES.join(", "));
    }
    let mut report = Report::new(json);
    for name in NAMES.iter().filter(|name| names.is_empty() || names.iter().any(|asked| asked == *name)) {
        match *name {
            "blk" => blk::run(bin, &mut report)?,
            _ => slab::run(bin, &mut report)?,
        }
    }
    report.end();
    Ok(())
}
