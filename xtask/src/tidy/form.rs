//! Rules about a file as a whole: header, length, module style, `match` on a `bool`, paths of machines, the change log.

use super::files::{File, Kind};
use super::{Finding, Rule};

/// Most lines of a Rust file.
const LINES_MAX: usize = 650;

/// Beginnings of paths that exist on one developer's machine only.
const MACHINE_PATHS: [&str; 3] = [concat!("/", "home/"), concat!("/", "Users/"), concat!("/", "work/")];

/// Sections of a version in CHANGELOG.md, in their order.
const SECTIONS: [&str; 3] = ["### Added", "### Changed", "### Fixed"];

/// Checks one file.
pub(super) fn check(file: &File) -> Vec<Finding> {
    let mut findings = machine_paths(file);
    if file.kind() == Kind::Rust {
        findings.extend(header(file));
        findings.extend(length(file));
        findings.extend(match_bool(file));
    }
    if file.path == "CHANGELOG.md" {
        findings.extend(changelog(file));
    }
    findings
}

fn header(file: &File) -> Option<Finding> {
    let first = file.text.lines().find(|line| !line.trim().is_empty() && !line.starts_with("#!["))?;
    let missing = !first.starts_with("//!");
    missing.then(|| Finding::new(Rule::Header, file, 1, "begin with `//!` and what the file is for"))
}

fn length(file: &File) -> Option<Finding> {
    let lines = file.text.lines().count();
    (lines > LINES_MAX).then(|| Finding::new(Rule::Length, file, 1, format!("{lines} lines")))
}

fn match_bool(file: &File) -> Vec<Finding> {
    let lines = file.text.lines().enumerate();
    let arms = lines.filter(|(_, line)| line.trim_start().starts_with("true =>"));
    arms.map(|(index, _)| Finding::new(Rule::MatchBool, file, index + 1, "write `if` and `else`")).collect()
}

/// Paths with one of [`MACHINE_PATHS`] that begin a word. A name in capitals is a placeholder.
fn machine_paths(file: &File) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        for start in MACHINE_PATHS {
            let found = line.match_indices(start).any(|(at, _)| {
                let before = line[..at].chars().next_back();
                let after = line[at + start.len()..].chars().next();
                !before.is_some_and(|c| c.is_alphanumeric() || "._-$}*".contains(c))
                    && after.is_some_and(char::is_lowercase)
            });
            if found {
                findings.push(Finding::new(Rule::MachinePath, file, index + 1, line.trim()));
            }
        }
    }
    findings
}

/// Modules that are a file beside a folder of the same name.
pub(super) fn module_style(files: &[File]) -> Vec<Finding> {
    let beside = |file: &&File| {
        let folder = file.path.strip_suffix(".rs").map(|path| format!("{path}/"));
        folder.is_some_and(|folder| {
            files.iter().any(|other| other.path.starts_with(&folder) && other.path.ends_with(".rs"))
        })
    };
    files
        .iter()
        .filter(beside)
        .map(|file| Finding::new(Rule::ModuleStyle, file, 1, "move it into the folder as mod.rs"))
        .collect()
}

/// CHANGELOG.md: a version is a heading of level 2, its sections are [`SECTIONS`] in this order, and every entry
/// is an item of a section.
fn changelog(file: &File) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut version = false;
    let mut section = None;
    for (index, line) in file.text.lines().enumerate() {
        let mut bad = |text: &str| findings.push(Finding::new(Rule::Changelog, file, index + 1, text));
        if line.starts_with("## ") {
            (version, section) = (true, None);
            if !is_version(line) {
                bad("a version is `## Unreleased` or `## N.N.N`, with ` - YYYY-MM-DD` when it was released");
            }
        } else if line.starts_with("###") {
            let place = SECTIONS.iter().position(|name| *name == line);
            match place {
                None => {
                    bad("a section is `### Added`, `### Changed` or `### Fixed`");
                    section = section.or(Some(0));
                }
                Some(place) if section.is_some_and(|last| last >= place) => {
                    bad("sections are in the wrong order");
                }
                Some(place) => section = Some(place),
            }
        } else if version && section.is_none() && !line.is_empty() {
            bad("an entry belongs to a section");
        } else if section.is_some() && !line.is_empty() && !line.starts_with("- ") && !line.starts_with("  ")
        {
            bad("an entry is a list item; its further lines begin with two spaces");
        }
    }
    findings
}

fn is_version(heading: &str) -> bool {
    let name = &heading["## ".len()..];
    let (number, date) = name.split_once(" - ").unwrap_or((name, "2000-01-01"));
    let numbers = |text: &str, mark: char| {
        let parts = text.split(mark);
        parts.clone().count() == 3 && parts.into_iter().all(|part| part.parse::<u32>().is_ok())
    };
    name == "Unreleased" || numbers(number, '.') && numbers(date, '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(path: &str, text: &str) -> Vec<Rule> {
        check(&File::new(path, text)).into_iter().map(|finding| finding.rule).collect()
    }

    #[test]
    fn headers_and_lengths() {
        assert_eq!(rules("a.rs", "//! Text.\nuse x;\n"), []);
        assert_eq!(rules("a.rs", "#![no_main]\n//! Text.\n"), []);
        assert_eq!(rules("a.rs", "use x;\n//! Text.\n"), [Rule::Header]);
        assert_eq!(rules("a.rs", &format!("//! Text.\n{}", "x\n".repeat(LINES_MAX))), [Rule::Length]);
        assert_eq!(rules("a.rs", &format!("//! Text.\n{}", "x\n".repeat(LINES_MAX - 1))), []);
    }

    #[test]
    fn match_on_a_bool() {
        assert_eq!(
            rules("a.rs", "//! T.\nmatch x {\n    true => 1,\n    false => 2,\n}\n"),
            [Rule::MatchBool]
        );
        assert_eq!(rules("a.rs", "//! T.\nmatch x {\n    Some(true) => 1,\n}\n"), []);
    }

    #[test]
    fn paths_of_a_machine() {
        let path = |rest: &str| format!("see {}{rest}\n", MACHINE_PATHS[0]);
        assert_eq!(rules("a.md", &path("ann/xpm")), [Rule::MachinePath]);
        assert_eq!(rules("a.md", &path("USER/xpm")), []);
        assert_eq!(rules("a.md", &format!("see /run{}ann", MACHINE_PATHS[0])), []);
    }

    #[test]
    fn one_style_of_modules() {
        let files = [File::new("a/b.rs", ""), File::new("a/b/c.rs", ""), File::new("a/d.rs", "")];
        let found: Vec<_> = module_style(&files).into_iter().map(|finding| finding.path).collect();
        assert_eq!(found, ["a/b.rs"]);
    }

    #[test]
    fn form_of_the_change_log() {
        let good = "# Changelog\n\nText.\n\n## Unreleased\n\n### Added\n\n- One,\n  and more.\n\n## 0.1.0 - 2026-12-01\n\n### Fixed\n\n- Two.\n";
        assert_eq!(rules("CHANGELOG.md", good), []);
        for (old, new) in [
            ("## Unreleased", "## Next"),
            ("## 0.1.0 - 2026-12-01", "## 0.1"),
            ("### Added", "### New"),
            ("### Added\n\n- One,\n  and more.", "- One."),
            ("  and more", "and more"),
            ("### Fixed", "### Fixed\n\n### Added"),
        ] {
            assert_eq!(rules("CHANGELOG.md", &good.replace(old, new)), [Rule::Changelog], "{new}");
        }
    }
}
