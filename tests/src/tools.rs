//! Programs of the system that tests use, and tests that are skipped since one of them is missing.

/// Whether a program that `cargo xtask setup` installs is here; prints a line when it is not.
///
/// # Panics
/// When it is not here and the environment variable `CI` is set: see [`skip_without`].
pub fn have(program: &str) -> bool {
    let found = is_installed(program);
    if !found {
        skip_without(program);
    }
    found
}

/// Whether a program that `cargo xtask setup` does not install is here; prints a line when it is not.
pub fn have_by_chance(program: &str) -> bool {
    let found = is_installed(program);
    if !found {
        eprintln!("skipped: {program} is not installed, and cargo xtask setup does not install it");
    }
    found
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Prints that a test is skipped, since something that `cargo xtask setup` installs is missing.
///
/// # Panics
/// When the environment variable `CI` is set: there, a test that does not run must not pass.
pub fn skip_without(tool: &str) {
    skip(tool, std::env::var_os("CI").is_some());
}

fn skip(tool: &str, ci: bool) {
    let text = format!("{tool} is not installed: cargo xtask setup");
    assert!(!ci, "{text}");
    eprintln!("skipped: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_skipped_outside_of_ci_only() {
        skip("no-such-program", false);
        std::panic::catch_unwind(|| skip("no-such-program", true)).unwrap_err();
    }

    #[test]
    fn programs_are_found_in_the_path() {
        assert!(is_installed("sh") && !is_installed("no-such-program"));
        assert!(!have_by_chance("no-such-program"));
    }
}
