//! `cargo xtask bench`: xpm and its peers, in the same run, as ratios.

mod allocator;
mod blk;
mod client;
mod fio;
mod fs;
mod guest;
mod kernel_memory;
mod lab_blk;
mod life;
mod load;
mod map;
mod nbdload;
mod programs;
mod qmp;
mod rdma;
mod report;
mod servers;
mod slab;
mod swap;
mod vhost;
mod vm;

use std::path::PathBuf;

use anyhow::{Result, bail};

use self::report::Report;
use crate::{setup, util};

/// The benchmarks by name.
const NAMES: [&str; 11] =
    ["blk", "slab", "map", "fs", "allocator", "life", "vm", "lab-blk", "rdma", "vhost", "swap"];

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Benchmarks to run: blk, slab, map, fs, allocator, life, vm, lab-blk, rdma, vhost, swap; all when none is named.
    names: Vec<String>,
    /// One JSON object a line instead of a table.
    #[arg(long)]
    json: bool,
}

/// Builds with optimization and runs the named benchmarks. A goal that is missed is shown and is no
/// failure: a timing depends on the machine.
pub(crate) fn main(args: &Args) -> Result<bool> {
    if let Some(unknown) = args.names.iter().find(|name| !NAMES.contains(&name.as_str())) {
        bail!("there is no benchmark `{unknown}`; there are: {}", NAMES.join(", "));
    }
    setup::run(setup::ALL)?;
    let programs = build()?;
    let mut report = Report::new(args.json);
    let asked = |name: &&&str| args.names.is_empty() || args.names.iter().any(|asked| asked == **name);
    for name in NAMES.iter().filter(asked) {
        match *name {
            "blk" => blk::run(&programs, &mut report)?,
            "slab" => slab::run(&programs, &mut report)?,
            "map" => map::run(&programs, &mut report)?,
            "allocator" => allocator::run(&programs, &mut report)?,
            "life" => life::run(&programs, &mut report)?,
            "fs" => fs::run(&programs, &mut report)?,
            "vm" => vm::run(&programs, &mut report)?,
            "lab-blk" => lab_blk::run(&mut report)?,
            "rdma" => rdma::run(&mut report)?,
            "vhost" => vhost::run(&mut report)?,
            _ => swap::run(&mut report)?,
        }
    }
    report.end();
    Ok(true)
}

/// Builds the programs; the directory that they are in.
fn build() -> Result<PathBuf> {
    let target = util::target_dir()?;
    util::build(&target, true)?;
    Ok(target.join("release"))
}
