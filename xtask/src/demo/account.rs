//! The output of the demo: steps, the commands as an operator would type them, and checks.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::util::human_time;

/// Prints the account and counts the checks.
#[derive(Debug)]
pub(super) struct Account {
    start: Instant,
    checks: Cell<u32>,
    /// Directories that are shown by a short name.
    names: RefCell<Vec<(String, String)>>,
}

impl Account {
    pub(super) fn new() -> Account {
        Account { start: Instant::now(), checks: Cell::new(0), names: RefCell::default() }
    }

    /// From now on, shows `name` where `value` stands in a command.
    pub(super) fn name(&self, value: &str, name: &str) {
        self.names.borrow_mut().push((value.to_owned(), name.to_owned()));
    }

    /// A new step: what happens next and why.
    pub(super) fn step(&self, title: &str, why: &str) {
        println!("\n[{:>5}] {title}", human_time(self.start.elapsed()));
        let words: Vec<String> = why.split_whitespace().map(str::to_owned).collect();
        for line in lines(&words, WIDTH) {
            println!("        {line}");
        }
    }

    /// A command that is about to run.
    pub(super) fn command(&self, command: &Command) {
        self.typed(&typed(command));
    }

    /// A line of shell that stands for what is about to happen.
    pub(super) fn typed(&self, line: &str) {
        println!("    $ {}", lines(&with_values(&self.short(line)), WIDTH).join(" \\\n        "));
    }

    /// Output of a command.
    pub(super) fn output(&self, text: &str) {
        for line in self.short(text).lines() {
            println!("      {line}");
        }
    }

    fn short(&self, text: &str) -> String {
        self.names.borrow().iter().fold(text.to_owned(), |text, (value, name)| text.replace(value, name))
    }

    /// A fact worth knowing that is no check.
    pub(super) fn note(&self, text: &str) {
        println!("    - {text}");
    }

    /// A check: counted when it holds; an error that ends the demo when not.
    pub(super) fn check(&self, holds: bool, what: &str) -> Result<()> {
        if !holds {
            println!("    FAILED  {what}");
            bail!("a check failed: {what}");
        }
        self.checks.set(self.checks.get() + 1);
        println!("    ok  {}", self.short(what));
        Ok(())
    }

    /// Checks that held.
    pub(super) fn checks(&self) -> u32 {
        self.checks.get()
    }
}

/// A command line with quotes where a shell needs them.
fn typed(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| quoted(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

/// Double quotes, in which the shell still puts the value of `$DEMO` in.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+%@".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    let escaped = word.chars().flat_map(|c| "\"\\$`".contains(c).then_some('\\').into_iter().chain([c]));
    format!("\"{}\"", escaped.collect::<String>())
}

/// The words of a command line, an option together with its value.
fn with_values(line: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for word in line.split(' ') {
        match words.last_mut() {
            Some(last) if last.starts_with("--") && !last.contains(' ') && !word.starts_with('-') => {
                last.push(' ');
                last.push_str(word);
            }
            _ => words.push(word.to_owned()),
        }
    }
    words
}

/// Columns of the running text.
const WIDTH: usize = 92;

/// Puts words into lines of at most `width` columns, or of one word.
fn lines(words: &[String], width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.clone()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_can_be_typed_as_they_are_shown() {
        let mut command = Command::new("/usr/bin/nbdinfo");
        command.args(["--size", "nbd+unix:///?socket=/a", "it's \"$x\"", ""]);
        assert_eq!(typed(&command), r#"nbdinfo --size "nbd+unix:///?socket=/a" "it's \"\$x\"" """#);
    }

    #[test]
    fn text_is_wrapped_at_words() {
        let words: Vec<String> = ["one", "two", "three", "a-long-word"].map(str::to_owned).into();
        assert_eq!(lines(&words, 8), ["one two", "three", "a-long-word"]);
        assert!(lines(&[], 8).is_empty());
        assert_eq!(with_values("a --b c d --e -f"), ["a", "--b c", "d", "--e", "-f"]);
    }

    #[test]
    fn a_failed_check_is_an_error_and_not_counted() {
        let account = Account::new();
        account.check(true, "fine").unwrap();
        assert!(account.check(false, "broken").is_err());
        assert_eq!(account.checks(), 1);
    }
}
