//! `cargo xtask sanitize`: the layers with unsafe code under AddressSanitizer.
//!
//! The stable toolchain has the sanitizer's runtime, and uses it where it is told that it may use what is unstable.
//! The standard library is as it was installed, so what goes wrong within it is found at the calls that the C library
//! serves only. Programs, libraries and tests lie in a target directory of their own, since none of them fits to what
//! is built otherwise.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::{setup, util};

/// The only target whose programs this command runs, and names: flags for the target are then not those of build
/// scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// End-to-end tests that go through unsafe code at both ends: pages that come and go, and the appliance's memory.
const TESTS: [&str; 4] = ["mapping", "mapping_edges", "named_slabs", "containers"];
/// Has a library put into a program that knows nothing of the sanitizer.
const LEFT_OUT: &str = "no_permission_for_programs";
/// Takes the place of malloc and mmap in whatever it is linked into, where the sanitizer does that already.
const REPLACES: &str = "xpm-preload";
/// Locks all of its memory, which would be the sanitizer's shadow of all addresses, too: as it is built otherwise.
const LOCKS: &str = "xpm-blk";

/// - SIGBUS is how absent pages tell of themselves, and SIGSEGV is what some tests expect: their handlers are those
///   of the programs.
/// - Tests forget what they own, as a crash would.
const OPTIONS: &str = "handle_sigbus=0:allow_user_segv_handler=1:detect_leaks=0:abort_on_error=1";

/// Options of `cargo xtask sanitize`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run the unit tests only.
    #[arg(long)]
    units: bool,
    /// Run the tests only whose names contain this.
    filter: Option<String>,
}

/// Runs them; false when a test failed, or the sanitizer found something.
pub(crate) fn main(args: &Args) -> Result<bool> {
    setup::run(&[])?;
    let start = Instant::now();
    let directory = util::target_dir()?.join("sanitize");
    let reports = directory.join("reports");
    // The reports of the last run.
    let _ = fs::remove_dir_all(&reports);
    fs::create_dir_all(&reports).with_context(|| format!("cannot make {}", reports.display()))?;

    // The daemons of the end-to-end tests, together with the tests: by itself either would be built with other
    // features, and all that they depend on twice.
    util::run(cargo(&directory, "build").args(["--workspace", "--lib", "--bins"]).args(selected(args)))?;
    util::build(&util::target_dir()?, false)?;
    let place = directory.join(TARGET).join("debug").join(LOCKS);
    // The file is another name of one that Cargo keeps.
    fs::remove_file(&place).with_context(|| format!("cannot remove {}", place.display()))?;
    fs::copy(util::target_dir()?.join("debug").join(LOCKS), &place)
        .with_context(|| format!("cannot make {}", place.display()))?;
    let passed = tests(&directory, &reports, args).status()?.success();
    let found = print(&reports)?;
    let verdict = if passed && found == 0 { "passed" } else { "FAILED" };
    println!("sanitize: {verdict}, {found} reports, {}", util::human_time(start.elapsed()));
    Ok(passed && found == 0)
}

fn tests(directory: &Path, reports: &Path, args: &Args) -> Command {
    let words: &[&str] = match util::find_program("cargo-nextest") {
        Some(_) => &["nextest", "run"],
        None => &["test"],
    };
    let mut command = cargo(directory, words[0]);
    // Unit tests of libraries: programs have no unsafe code that the end-to-end tests do not go through.
    command.args(&words[1..]).args(["--workspace", "--exclude", REPLACES, "--no-fail-fast", "--lib"]);
    command.args(selected(args));
    command.args(&args.filter).args(["--", "--skip", LEFT_OUT]);
    command.env("ASAN_OPTIONS", format!("{OPTIONS}:log_path={}", reports.join("asan").display()));
    command
}

fn selected(args: &Args) -> Vec<&'static str> {
    let tests: &[&str] = if args.units { &[] } else { &TESTS };
    tests.iter().flat_map(|test| ["--test", *test]).collect()
}

/// Cargo, with the sanitizer in all that it makes for the target.
fn cargo(directory: &Path, command: &str) -> Command {
    let mut cargo = util::command("cargo");
    cargo.current_dir(util::repository()).arg(command);
    cargo.env("CARGO_TARGET_DIR", directory).env("CARGO_BUILD_TARGET", TARGET);
    cargo.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", "-Zsanitizer=address");
    cargo
}

/// Prints what the sanitizer wrote, of daemons too, whose end a test may have taken for granted; says how many there
/// are.
fn print(reports: &Path) -> Result<usize> {
    let files: Vec<PathBuf> = fs::read_dir(reports)?.flatten().map(|entry| entry.path()).collect();
    for file in &files {
        println!("\n--- {}\n{}", file.display(), fs::read_to_string(file)?);
    }
    Ok(files.len())
}
