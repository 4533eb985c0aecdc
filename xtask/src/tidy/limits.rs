//! The committed limits: how many findings of a rule each folder may have. A limit falls when findings are mended
//! (`cargo xtask tidy --write`). It rises only where code has moved, by what the other folders' limits fall.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use super::{Counts, Rule};

/// Path of the file from the root of the repository.
pub(super) const FILE: &str = "xtask/tidy.limits";

const HEAD: &str = "\
# The most findings of a rule that `cargo xtask tidy` accepts in a folder: rule, folder, count.
# These numbers only fall. `cargo xtask tidy --write` lowers them to what the tree has.
";

/// Limits by rule and folder; a pair without a line has the limit 0.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Limits(BTreeMap<(Rule, String), usize>);

impl Limits {
    /// Reads the file of limits; one that does not exist has no limits.
    pub(super) fn read(file: &Path) -> Result<Limits> {
        match std::fs::read_to_string(file) {
            Ok(text) => Limits::parse(&text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Limits::default()),
            Err(error) => Err(error).context(FILE),
        }
    }

    pub(super) fn parse(text: &str) -> Result<Limits> {
        let mut limits = BTreeMap::new();
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.starts_with('#')) {
            let (rule, folder, count) = entry(line)
                .with_context(|| format!("{FILE}, line {}: expected RULE FOLDER COUNT", index + 1))?;
            if limits.insert((rule, folder), count).is_some() {
                bail!("{FILE}, line {}: rule and folder have a limit already", index + 1);
            }
        }
        Ok(Limits(limits))
    }

    pub(super) fn of(&self, rule: Rule, folder: &str) -> usize {
        self.0.get(&(rule, folder.to_owned())).copied().unwrap_or(0)
    }

    pub(super) fn sum(&self, rule: Rule) -> usize {
        self.0.iter().filter(|((of, _), _)| *of == rule).map(|(_, count)| count).sum()
    }

    /// Whether a folder has fewer findings than its limit.
    pub(super) fn are_above(&self, counts: &Counts) -> bool {
        self.0.iter().any(|(key, limit)| counts.get(key).map_or(0, Vec::len) < *limit)
    }

    /// New limits that are exactly the counts.
    ///
    /// # Errors
    /// When the sum of a rule that has limits would rise. A rule without any limit gets its first ones.
    pub(super) fn lowered(&self, counts: &Counts) -> Result<Limits> {
        let new = Limits(counts.iter().map(|(key, found)| (key.clone(), found.len())).collect());
        for rule in Rule::value_variants() {
            let (old, found) = (self.sum(*rule), new.sum(*rule));
            if found > old && !self.0.is_empty() {
                bail!(
                    "{}: {found} findings, and the limits allow {old} in all folders together; mend what is new first \
                     (cargo xtask tidy prints it)",
                    rule.name()
                );
            }
        }
        Ok(new)
    }

    pub(super) fn write(&self, file: &Path) -> Result<()> {
        let mut text = HEAD.to_owned();
        for ((rule, folder), count) in &self.0 {
            writeln!(text, "{} {folder} {count}", rule.name())?;
        }
        std::fs::write(file, text).context(FILE)
    }
}

fn entry(line: &str) -> Option<(Rule, String, usize)> {
    let mut words = line.split_whitespace();
    let rule = Rule::from_str(words.next()?, false).ok()?;
    let entry = (rule, words.next()?.to_owned(), words.next()?.parse().ok()?);
    words.next().is_none().then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::{File, Finding};

    fn counts(of: &[(&str, usize)]) -> Counts {
        let file = |folder: &str| File::new(&format!("{folder}/x"), "");
        let findings = |folder, count| vec![Finding::new(Rule::Width, &file(folder), 1, ""); count];
        of.iter()
            .map(|(folder, count)| ((Rule::Width, (*folder).to_owned()), findings(folder, *count)))
            .collect()
    }

    #[test]
    fn limits_fall() {
        let limits = Limits::parse("# text\nwidth a 3\nwidth b 1\n").unwrap();
        assert_eq!(limits.lowered(&counts(&[("a", 2)])).unwrap(), Limits::parse("width a 2\n").unwrap());
        assert!(limits.are_above(&counts(&[("a", 2), ("b", 1)])));
        assert!(!limits.are_above(&counts(&[("a", 3), ("b", 1)])));
    }

    #[test]
    fn limits_move_with_code_but_their_sum_does_not_rise() {
        let limits = Limits::parse("width a 3\n").unwrap();
        let moved = limits.lowered(&counts(&[("a", 1), ("new", 2)])).unwrap();
        assert_eq!(moved.of(Rule::Width, "new"), 2);
        let error = limits.lowered(&counts(&[("a", 3), ("new", 1)])).unwrap_err().to_string();
        assert!(error.contains("4 findings"), "{error}");
    }

    #[test]
    fn broken_lines_are_named() {
        for text in ["width a\n", "width a b\n", "nosuch a 1\n", "width a 1 2\n", "width a 1\nwidth a 2\n"] {
            let error = format!("{:#}", Limits::parse(text).unwrap_err());
            assert!(error.contains("line "), "{error}");
        }
    }
}
