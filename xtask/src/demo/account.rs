//! What the demo says: steps, the commands as an operator would type them, and checks.

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
        for line in wrap(why) {
            println!("        {line}");
        }
    }

    /// A command that is about to run.
    pub(super) fn command(&self, command: &Command) {
        self.typed(&typed(command));
    }

    /// A line of shell that stands for what is about to happen.
    pub(super) fn typed(&self, line: &str) {
        let names = self.names.borrow();
        let short = names.iter().fold(line.to_owned(), |line, (value, name)| line.replace(value, name));
        println!("    $ {short}");
    }

    /// Output of a command.
    pub(super) fn output(&self, text: &str) {
        for line in text.lines() {
            println!("      {line}");
        }
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
        println!("    ok  {what}");
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

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+%@".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// Columns of the running text.
const WIDTH: usize = 88;

fn wrap(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= WIDTH => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
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
        command.args(["--size", "nbd+unix:///?socket=/a", "it's", ""]);
        assert_eq!(typed(&command), r"nbdinfo --size 'nbd+unix:///?socket=/a' 'it'\''s' ''");
    }

    #[test]
    fn text_is_wrapped_at_words() {
        let text = "word ".repeat(40);
        let lines = wrap(&text);
        assert!(lines.len() > 1 && lines.iter().all(|line| line.len() <= WIDTH));
        assert_eq!(lines.join(" "), text.trim_end());
    }

    #[test]
    fn a_failed_check_is_an_error_and_not_counted() {
        let account = Account::new();
        account.check(true, "fine").unwrap();
        assert!(account.check(false, "broken").is_err());
        assert_eq!(account.checks(), 1);
    }
}
