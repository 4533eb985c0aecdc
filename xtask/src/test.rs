//! `cargo xtask test`: everything that can fail, in one go.

use std::process::Command;
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
    /// Run the long tests and lab scenarios, too, and repeat more often what the short form repeats: hours.
    #[arg(long)]
    all: bool,
}

/// Runs all tests; false when one failed.
pub(crate) fn main(args: &Args) -> Result<bool> {
    setup::run(setup::ALL)?;
    let start = Instant::now();
    let cargo_ok = cargo_tests(args.all)?;
    let cargo_time = start.elapsed();
    let mut reports = Vec::new();
    if !args.no_lab {
        reports = lab::run_all(&lab::Args::tests(args.all))?;
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

/// Name of the variable that tests read for how often they repeat a step (`rounds` of the crate `tests`).
const EXTENT: &str = "XPM_TESTS";
/// How the names of tests begin that only `--all` runs. They are marked as ignored.
const LONG: &str = "long_";

/// Builds the workspace and runs its tests, with nextest when it is installed.
fn cargo_tests(all: bool) -> Result<bool> {
    util::build(&util::target_dir()?, false)?;
    if !all {
        return Ok(tests(&[], &[]).status()?.success());
    }
    let passed = tests(&[], &[]).env(EXTENT, "all").status()?.success();
    // Other ignored tests are parts of tests, which run them in a process of their own.
    let long = format!("test(/(^|::){LONG}/)");
    let mut long = tests(&["--run-ignored", "only", "-E", &long], &["--ignored", LONG]);
    Ok(long.env(EXTENT, "all").status()?.success() && passed)
}

/// The command that runs tests: with nextest and these options of it when it is installed, or else by cargo with
/// those of the test programs.
fn tests(nextest: &[&str], plain: &[&str]) -> Command {
    let mut command = util::command("cargo");
    command.current_dir(util::repository());
    if util::find_program("cargo-nextest").is_some() {
        command.args(["nextest", "run", "--workspace", "--no-fail-fast"]).args(nextest);
    } else {
        command.args(["test", "--workspace", "--no-fail-fast", "--"]).args(plain);
    }
    command
}
