//! shellcheck for the scripts of the lab, of the packages and of the continuous integration.

use std::io::ErrorKind;

use anyhow::{Context, Result, bail};

use super::files::{File, Kind};
use super::{Finding, Rule};
use crate::util;

/// Findings of shellcheck that mean nothing here: scripts are sourced by others, which set and use their variables
/// (SC2034, SC2154) and are found by a variable (SC1090, SC1091); filters of jq and awk have variables of their own
/// (SC2016).
const EXCLUDED: &str = "SC1090,SC1091,SC2016,SC2034,SC2154";

/// Runs shellcheck over all shell scripts.
///
/// # Errors
/// When shellcheck is not installed and the environment variable `CI` is set; without `CI`, a line says that the
/// check is skipped.
pub(super) fn check(files: &[File]) -> Result<Vec<Finding>> {
    let scripts = files.iter().filter(|file| file.kind() == Kind::Shell);
    // Scripts that others source have no `#!` line; they are bash, as are the scripts that source them.
    let (posix, bash): (Vec<&File>, Vec<&File>) =
        scripts.partition(|file| file.text.starts_with("#!/bin/sh"));
    let ci = std::env::var_os("CI").is_some();
    let mut findings = Vec::new();
    for (shell, scripts) in [("sh", posix), ("bash", bash)] {
        let mut shellcheck = util::command("shellcheck");
        shellcheck.current_dir(util::repository()).args([
            "--format=gcc",
            "--exclude",
            EXCLUDED,
            "--shell",
            shell,
        ]);
        findings.extend(run(shellcheck.args(scripts.iter().map(|file| &file.path)), &scripts, ci)?);
    }
    Ok(findings)
}

fn run(shellcheck: &mut std::process::Command, scripts: &[&File], ci: bool) -> Result<Vec<Finding>> {
    let output = match shellcheck.output() {
        Ok(output) => output,
        Err(error) if error.kind() == ErrorKind::NotFound && ci => {
            bail!("shellcheck is not installed: cargo xtask setup")
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("tidy: scripts are not checked, since shellcheck is not installed (cargo xtask setup)");
            return Ok(Vec::new());
        }
        Err(error) => return Err(error).context("cannot run shellcheck"),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() && text.trim().is_empty() {
        bail!("shellcheck failed: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    text.lines()
        .map(|line| parsed(line, scripts).with_context(|| format!("shellcheck wrote: {line}")))
        .collect()
}

/// A line of the form `path:line:column: severity: text [code]`.
fn parsed(line: &str, scripts: &[&File]) -> Option<Finding> {
    let mut parts = line.splitn(4, ':');
    let path = parts.next()?;
    let number = parts.next()?.parse().ok()?;
    let file = scripts.iter().find(|file| file.path == path)?;
    Some(Finding::new(Rule::Shell, file, number, parts.nth(1)?.trim()))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_missing_tool_fails_under_ci_only() {
        let missing = || Command::new("no-such-shellcheck");
        assert!(run(&mut missing(), &[], true).unwrap_err().to_string().contains("cargo xtask setup"));
        assert_eq!(run(&mut missing(), &[], false).unwrap(), []);
    }

    #[test]
    fn lines_of_shellcheck_become_findings() {
        let file = File::new("tests/lab/x.sh", "");
        let mut fake = Command::new("sh");
        fake.args(["-c", "echo 'tests/lab/x.sh:3:7: warning: Quote this. [SC2086]'; exit 1"]);
        let findings = run(&mut fake, &[&file], true).unwrap();
        assert_eq!(findings, [Finding::new(Rule::Shell, &file, 3, "warning: Quote this. [SC2086]")]);
    }

    #[test]
    fn a_tool_that_breaks_is_an_error() {
        let mut fake = Command::new("sh");
        fake.args(["-c", "echo broken >&2; exit 3"]);
        assert!(run(&mut fake, &[], true).unwrap_err().to_string().contains("broken"));
    }
}
