//! Printing: JSON and YAML for programs, text for people.

use std::io::{self, IsTerminal as _, Write as _};

use serde::Serialize;
use serde_json::Value;
pub(crate) use xpm_protocol::text::one_line;

use crate::json;

/// The form of a command's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Text for people, in lines of at most [`WIDTH`] columns.
    Text,
    /// Text for people, with all there is.
    Wide,
    /// The form that docs/json.md describes.
    Json,
    /// The same, as YAML.
    Yaml,
    /// JSON as the daemons send it.
    Wire,
}

/// Columns of text for people.
pub(crate) const WIDTH: usize = 80;

/// Where answers of a command go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    form: Form,
}

impl Output {
    pub(crate) fn new(form: Form) -> Output {
        Output { form }
    }

    /// Whether people are to have all columns.
    pub(crate) fn is_wide(self) -> bool {
        self.form == Form::Wide
    }

    /// Prints `value` for programs, or the text that `text` makes of it.
    pub(crate) fn print<T: Serialize + ?Sized>(
        self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        let out = match self.form {
            Form::Text | Form::Wide => text(value),
            Form::Wire => serde_json::to_string_pretty(value)?,
            Form::Json | Form::Yaml => self.structured(&json::documented(serde_json::to_value(value)?))?,
        };
        print_line(out)
    }

    /// [`Output::print`] of what operators wrote themselves: its keys stay as they are.
    pub(crate) fn print_as_written<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        let out = match self.form {
            Form::Text | Form::Wide => text(value),
            _ => self.structured(&serde_json::to_value(value)?)?,
        };
        print_line(out)
    }

    /// Separates two answers: YAML has a mark for that, and text a blank line.
    pub(crate) fn separate(self) -> anyhow::Result<()> {
        print(match self.form {
            Form::Yaml => "---\n",
            Form::Text | Form::Wide => "\n",
            Form::Json | Form::Wire => "",
        })
    }

    fn structured(self, value: &Value) -> anyhow::Result<String> {
        Ok(match self.form {
            Form::Yaml => serde_saphyr::to_string(value)?,
            _ => serde_json::to_string_pretty(value)?,
        })
    }

    /// Says on standard error why the command failed.
    pub(crate) fn fail(self, error: &anyhow::Error) {
        let line = one_line(&format!("{error:#}"));
        let told = match self.form {
            Form::Text | Form::Wide | Form::Wire => None,
            Form::Json | Form::Yaml => self.structured(&json::failure(error, &line)).ok(),
        };
        match told {
            Some(told) => eprintln!("{}", told.trim_end()),
            None => eprintln!("xpm: {line}"),
        }
    }

    /// Prints lines for a person who watches; nothing for programs and pipes.
    pub(crate) fn hint(self, text: &str) {
        if matches!(self.form, Form::Text | Form::Wide) && io::stderr().is_terminal() {
            eprintln!("{text}");
        }
    }
}

/// Writes to standard output, ending with the end of a line.
fn print_line(mut out: String) -> anyhow::Result<()> {
    if !out.is_empty() && !out.ends_with('\n') {
        out.push('\n');
    }
    print(&out)
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

/// `text` after `first`, in lines of at most `width` columns that are broken at spaces; further lines stand below its
/// start.
pub(crate) fn wrapped(first: &str, text: &str, width: usize) -> String {
    let indent = first.chars().count();
    let mut lines = first.to_owned();
    let mut column = indent;
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        let len = word.chars().count();
        match column {
            start if start == indent => {}
            column_now if column_now.saturating_add(1 + len) > width => {
                lines.push('\n');
                lines.push_str(&" ".repeat(indent));
                column = indent;
            }
            _ => {
                lines.push(' ');
                column += 1;
            }
        }
        lines.push_str(word);
        column += len;
    }
    format!("{}\n", lines.trim_end())
}

/// `text`, or its start and `...` where it is longer than `width` columns.
pub(crate) fn shortened(text: &str, width: usize) -> String {
    match text.chars().count() > width {
        true => text.chars().take(width.saturating_sub(3)).chain("...".chars()).collect(),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_broken_or_cut() {
        assert_eq!(wrapped("> ", "one two three", 9), "> one two\n  three\n");
        assert_eq!(wrapped("", "a-word-that-is-too-long x", 8), "a-word-that-is-too-long\nx\n");
        assert_eq!(wrapped("x ", "", 8), "x\n");
        assert_eq!(shortened("one two three", 8), "one t...");
        assert_eq!(shortened("one two", 8), "one two");
    }
}
