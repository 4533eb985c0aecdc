//! `cargo xtask tidy`: rules about the form of the source tree that no compiler and no linter checks.
//!
//! Each rule returns findings. The findings of a rule are counted for each top-level folder and compared with the
//! limits in `xtask/tidy.limits`: a count above its limit is an error, and a limit never rises ([`limits`]). A rule
//! without limits in that file accepts no finding at all.

mod comments;
mod files;
mod form;
mod limits;
mod markdown;
mod shell;

use std::collections::BTreeMap;

use anyhow::Result;
use clap::ValueEnum;

use files::File;
use limits::Limits;

use crate::util;

/// Most findings of one rule and folder that a failed check prints; `--list` prints all of them.
const PRINTED_MAX: usize = 20;

/// Checks the form of the source tree.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Lower the limits in xtask/tidy.limits to what the tree has now, or move them between folders; never raise a sum.
    #[arg(long)]
    write: bool,
    /// Print all findings of this rule instead of checking.
    #[arg(long, value_name = "RULE")]
    list: Option<Rule>,
    /// With --list: only findings in files whose path begins with this text.
    #[arg(requires = "list", default_value = "")]
    path: String,
}

/// The rule that a finding violates. The variants' names, in lower case with hyphens, are the names in
/// `xtask/tidy.limits`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Rule {
    /// A sentence in a comment or document begins with a bare What, Who, Whose, Nobody or Those.
    Beginning,
    /// A comment, or prose of a Markdown document, is wider than 120 columns.
    Width,
    /// A Rust file does not begin with a `//!` header.
    Header,
    /// A Rust file has more than 650 lines.
    Length,
    /// A `match` on a `bool`; `if` and `else` say the same.
    MatchBool,
    /// A module is `NAME.rs` beside a folder `NAME/` instead of `NAME/mod.rs`.
    ModuleStyle,
    /// A link in a document leads to no file or to no heading.
    Link,
    /// docs/dev names a file, or an item of a file, that does not exist.
    NamedFile,
    /// CHANGELOG.md does not have the form that its first lines describe.
    Changelog,
    /// A file contains the path of somebody's own machine.
    MachinePath,
    /// shellcheck complains about a script.
    Shell,
}

impl Rule {
    /// Name of the rule on the command line and in the file of limits.
    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// One place that violates a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    rule: Rule,
    /// Path from the root of the repository.
    path: String,
    /// Counted from 1.
    line: usize,
    text: String,
}

impl Finding {
    fn new(rule: Rule, file: &File, line: usize, text: impl Into<String>) -> Finding {
        Finding { rule, path: file.path.clone(), line, text: text.into() }
    }

    /// The top-level folder of the file; `.` for files that lie in none.
    fn folder(&self) -> &str {
        self.path.split_once('/').map_or(".", |(folder, _)| folder)
    }
}

/// Findings by rule and folder.
type Counts = BTreeMap<(Rule, String), Vec<Finding>>;

/// Checks the tree, lists findings, or writes limits; false when a count is above its limit.
///
/// # Errors
/// When the tree cannot be read, or a tool is missing while the environment variable `CI` is set.
pub(crate) fn main(args: &Args) -> Result<bool> {
    let files = files::tracked(&util::repository())?;
    if let Some(rule) = args.list {
        list(&findings(&files)?, rule, &args.path);
        return Ok(true);
    }
    let counts = count(findings(&files)?);
    let file = util::repository().join(limits::FILE);
    let limits = Limits::read(&file)?;
    if args.write {
        limits.lowered(&counts)?.write(&file)?;
        println!("tidy: wrote {}", limits::FILE);
        return Ok(true);
    }
    Ok(report(&counts, &limits))
}

/// All findings of all rules.
fn findings(files: &[File]) -> Result<Vec<Finding>> {
    let mut all = Vec::new();
    for file in files {
        all.extend(form::check(file));
        all.extend(comments::check(file));
        all.extend(markdown::check(file, files));
    }
    all.extend(form::module_style(files));
    all.extend(shell::check(files)?);
    Ok(all)
}

fn count(findings: Vec<Finding>) -> Counts {
    let mut counts = Counts::new();
    for finding in findings {
        counts.entry((finding.rule, finding.folder().to_owned())).or_default().push(finding);
    }
    counts
}

fn list(findings: &[Finding], rule: Rule, path: &str) {
    for finding in findings.iter().filter(|finding| finding.rule == rule && finding.path.starts_with(path)) {
        print(finding);
    }
}

fn print(finding: &Finding) {
    println!("{}:{}: {}", finding.path, finding.line, finding.text);
}

/// Prints the number of findings of each rule, and those of each folder that is above its limit.
fn report(counts: &Counts, limits: &Limits) -> bool {
    let mut good = true;
    for ((rule, folder), found) in counts {
        let limit = limits.of(*rule, folder);
        if found.len() > limit {
            good = false;
            println!("tidy: {} in {folder}: {} findings, {limit} allowed:", rule.name(), found.len());
            found.iter().take(PRINTED_MAX).for_each(print);
            if found.len() > PRINTED_MAX {
                println!("... all of them: cargo xtask tidy --list {} {folder}", rule.name());
            }
        }
    }
    for rule in Rule::value_variants() {
        let sum: usize = counts.iter().filter(|((of, _), _)| of == rule).map(|(_, found)| found.len()).sum();
        println!("tidy: {:<13} {sum:>5} of at most {}", rule.name(), limits.sum(*rule));
    }
    if good && limits.are_above(counts) {
        println!("tidy: some limits can fall: cargo xtask tidy --write");
    }
    good
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(path: &str) -> Finding {
        Finding::new(Rule::Width, &File::new(path, ""), 1, "")
    }

    #[test]
    fn findings_belong_to_the_first_folder_of_their_path() {
        assert_eq!(finding("volume/src/lib.rs").folder(), "volume");
        assert_eq!(finding("README.md").folder(), ".");
    }

    #[test]
    fn a_count_above_its_limit_fails() {
        let counts = count(vec![finding("a/x.rs"), finding("a/y.rs")]);
        assert!(report(&counts, &Limits::parse("width a 2\n").unwrap()));
        assert!(!report(&counts, &Limits::parse("width a 1\n").unwrap()));
        assert!(!report(&counts, &Limits::parse("width b 2\n").unwrap()));
    }
}
