//! `cargo xtask test`: everything that can fail, in one go.

use std::time::Instant;

use anyhow::Result;

use crate::lab::{self, Report};
use crate::{setup, util};

/// Options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave the lab out.
    #[arg(long)]
    no_lab: bool,
}

/// Runs all tests; false when one failed.
pub(crate) fn main(args: &Args) -> Result<bool> {
    setup::run(setup::ALL)?;
    let start = Instant::now();
    let cargo_ok = cargo_tests()?;
    let cargo_time = start.elapsed();
    let mut reports = Vec::new();
    if !args.no_lab {
        reports = lab::run_all(&lab::Args::default())?;
        // The kernel of the next Debian may treat swap on a device of user space in another way.
        reports.extend(lab::run_all(&lab::Args::newest("swap-ublk"))?);
    }

    println!("\n{:<24} {:<8} {}", "cargo tests", verdict(cargo_ok), util::human_time(cargo_time));
    println!("total time: {}", util::human_time(start.elapsed()));
    let lab_ok = args.no_lab || lab::summarize(&reports);
    Ok(cargo_ok && lab_ok && reports.iter().all(Report::passed))
}

fn verdict(ok: bool) -> &'static str {
    if ok { "passed" } else { "FAILED" }
}

/// Builds the workspace and runs its tests, with nextest when it is installed.
fn cargo_tests() -> Result<bool> {
    let root = util::repository();
    util::build(&util::target_dir()?, false)?;
    let mut tests = util::command("cargo");
    tests.current_dir(&root);
    match util::find_program("cargo-nextest") {
        Some(_) => tests.args(["nextest", "run", "--workspace", "--no-fail-fast"]),
        None => tests.args(["test", "--workspace", "--no-fail-fast"]),
    };
    Ok(tests.status()?.success())
}
