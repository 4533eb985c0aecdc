//! `cargo xtask package`: Debian packages of the programs, with units, rules, manual pages, completions and
//! configuration.
//!
//! Each package is a tree of files that is made here, out of this build and of `packaging/`, and `dpkg-deb` makes the
//! package.

mod contents;
mod deb;
mod man;
mod stage;
#[cfg(test)]
mod units;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{setup, util};
use deb::Version;

/// Options of `cargo xtask package`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Build of the programs.
    #[arg(long, value_name = "release|dev", default_value = "release", value_parser = ["release", "dev"])]
    profile: String,
    /// Added to the packages' version, for example +local1.
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = parse_suffix)]
    version_suffix: String,
    /// Directory for the packages. [default: debian in the target directory]
    #[arg(long, value_name = "DIRECTORY")]
    output: Option<PathBuf>,
    /// Does not have lintian check them.
    #[arg(long)]
    no_lintian: bool,
}

/// The characters that Debian accepts at the end of a version (deb-version(7)).
fn parse_suffix(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '.' | '~');
    match text.chars().all(allowed) {
        true => Ok(text.to_owned()),
        false => Err("a version ends with letters, digits, `+`, `.` and `~`".to_owned()),
    }
}

/// Makes the packages, and prints where they are; false when lintian finds an error in them.
pub(crate) fn main(args: &Args) -> Result<bool> {
    setup::run(setup::ALL)?;
    let target = util::target_dir()?;
    let release = args.profile == "release";
    util::build(&target, release)?;
    let output = args.output.clone().unwrap_or_else(|| target.join("debian"));
    let programs = target.join(if release { "release" } else { "debug" });
    let packages = make(&programs, &args.version_suffix, &output, release)?;
    for package in &packages {
        println!("{}", package.display());
    }
    Ok(args.no_lintian || lintian(&packages)?)
}

/// Makes the packages out of programs that are built already. `small` takes time to compress them well.
pub(crate) fn make(programs: &Path, suffix: &str, output: &Path, small: bool) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(output).with_context(|| format!("cannot make {}", output.display()))?;
    let work = tempfile::tempdir_in(output)?;
    let version = Version::of_repository(suffix)?;
    let shared = contents::Shared::make(programs, work.path())?;
    let all = contents::all(&shared)?;
    all.iter().map(|package| deb::make(package, &version, work.path(), output, small)).collect()
}

/// Has lintian look at packages; false when it finds an error.
pub(crate) fn lintian(packages: &[PathBuf]) -> Result<bool> {
    let mut lintian = util::command("lintian");
    // Lintian may report that it runs as root; its reports about the packages count.
    lintian.args(["--allow-root", "--tag-display-limit", "0", "--fail-on", "error"]).args(packages);
    Ok(lintian.status().context("cannot run lintian")?.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_of_versions() {
        for good in ["", "+local1", "~rc1", ".2"] {
            assert_eq!(parse_suffix(good).unwrap(), good);
        }
        assert!(parse_suffix("-1").is_err() && parse_suffix("a b").is_err());
    }
}
