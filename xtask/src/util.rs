//! Paths, child processes and times, for all commands.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// The root of the source tree.
pub(crate) fn repository() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// Cargo's target directory, which this program was built into.
pub(crate) fn target_dir() -> Result<PathBuf> {
    let program = std::env::current_exe().context("cannot find my own program file")?;
    let target = program.ancestors().nth(2).context("my program file lies in no target directory")?;
    Ok(target.to_path_buf())
}

/// The file of a program, found as a shell does it, and in the directories of the superuser too.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let superuser = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(superuser).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Starts a command line of `program` wherever it lies.
pub(crate) fn command(program: &str) -> Command {
    Command::new(find_program(program).unwrap_or_else(|| PathBuf::from(program)))
}

/// Runs a command to its end, with its output shown; an error when it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", shown(command)))?;
    match status.success() {
        true => Ok(()),
        false => bail!("{} failed: {status}", shown(command)),
    }
}

/// Builds all programs into a target directory: with all that the tests build, or, optimized, with all that benchmarks do. For
/// any smaller set, dependencies would be built once more, with other features.
pub(crate) fn build(target: &Path, release: bool) -> Result<()> {
    let mut cargo = command("cargo");
    cargo
        .current_dir(repository())
        .args(["build", "--locked", "--quiet", "--workspace", "--target-dir"])
        .arg(target);
    match release {
        true => cargo.args(["--release", "--bins", "--lib", "--examples"]),
        false => cargo.arg("--all-targets"),
    };
    run(&mut cargo)
}

/// Runs a command to its end and gives its standard output; an error, with what it wrote to
/// standard error, when it fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {}", shown(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed: {}: {}", shown(command), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A command line as a person would type it, without quoting.
fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(OsStr::new("?"));
    let words = std::iter::once(program).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Memory that programs of this machine can get, in bytes.
pub(crate) fn available_memory() -> Result<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    available(&meminfo).context("/proc/meminfo does not say what is available")
}

fn available(meminfo: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    value.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// A duration as `12.3 s` or `4 min 05 s`.
pub(crate) fn human_time(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..120 => format!("{:.1} s", time.as_secs_f64()),
        _ => format!("{} min {:02} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_for_people() {
        assert_eq!(human_time(Duration::from_millis(1250)), "1.2 s");
        assert_eq!(human_time(Duration::from_secs(245)), "4 min 05 s");
    }

    #[test]
    fn a_failed_command_says_what_it_said() {
        let error = output(Command::new("sh").args(["-c", "echo no such thing >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("no such thing") && text.contains("exit status: 3"), "{text}");
    }

    #[test]
    fn available_memory_is_read() {
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   4 kB\n"), Some(4096));
        for bad in ["", "MemAvailable:", "MemAvailable: x kB", "MemAvailable: 18446744073709551615 kB"] {
            assert_eq!(available(bad), None, "{bad}");
        }
    }
}
