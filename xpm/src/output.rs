//! Printing: JSON for programs, text for people.

use std::io::{self, IsTerminal as _, Write as _};

use serde::Serialize;
pub(crate) use xpm_protocol::text::one_line;

/// What the answers of a command are written as.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Output {
        Output { json }
    }

    /// Prints `value` as JSON, or the text that `text` makes of it.
    pub(crate) fn print<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        let mut out = match self.json {
            true => serde_json::to_string_pretty(value)?,
            false => text(value),
        };
        if !out.is_empty() && !out.ends_with('\n') {
            out.push('\n');
        }
        print(&out)
    }

    /// Prints lines for a person who watches; nothing for programs and pipes.
    pub(crate) fn hint(self, text: &str) {
        if !self.json && io::stderr().is_terminal() {
            eprintln!("{text}");
        }
    }
}

/// Writes to standard output. A closed pipe is an error here, unlike with `print!`.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(())
}

/// Whether the reader of our output went away, which is no failure: `xpm ... | head`.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// A warning that does not stop the command.
pub(crate) fn warn(text: &str) {
    eprintln!("xpm: warning: {}", one_line(text));
}
