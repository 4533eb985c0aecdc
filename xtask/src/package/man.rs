//! Manual pages out of Markdown: of configuration files out of docs/config.md, and the overview.

use anyhow::{Context, Result};
use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};

/// A page of the manual.
pub(crate) struct Page<'a> {
    pub(crate) name: &'a str,
    pub(crate) section: u8,
    /// Its subject, in half a sentence.
    pub(crate) summary: &'a str,
    /// Its Markdown. Headings of level 2 are its sections; what comes before them is the description.
    pub(crate) text: &'a str,
    /// Other pages, as `name(8)`.
    pub(crate) see_also: &'a str,
}

/// The section of a document under a heading of level 2, without the heading.
pub(crate) fn section<'a>(document: &'a str, heading: &str) -> Result<&'a str> {
    let head = format!("\n## {heading}\n");
    let start = document.find(&head).with_context(|| format!("no section `{heading}`"))? + head.len();
    let rest = &document[start..];
    Ok(rest.find("\n## ").map_or(rest, |end| &rest[..=end]))
}

/// The page as man(7) has it.
pub(crate) fn render(page: &Page<'_>) -> String {
    let Page { name, section, summary, text, see_also } = page;
    let version = env!("CARGO_PKG_VERSION");
    let mut out = format!(
        ".TH {} {section} \"\" \"xpm {version}\" \"External primary memory\"\n.SH NAME\n{} \\- {}\n.SH DESCRIPTION\n",
        name.to_uppercase(),
        escaped(name),
        escaped(summary)
    );
    let mut writer = Writer::default();
    let options = Options::ENABLE_TABLES;
    Parser::new_ext(text, options).for_each(|event| writer.take(event));
    out.push_str(&writer.out);
    if !see_also.is_empty() {
        out.push_str(&format!(".SH SEE ALSO\n{}\n", escaped(see_also)));
    }
    out
}

/// Escapes text for a page, so that no part of it is a request or an escape.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => escaped.push_str("\\e"),
            '-' => escaped.push_str("\\-"),
            '\'' => escaped.push_str("\\(aq"),
            '`' => escaped.push_str("\\(ga"),
            '^' => escaped.push_str("\\(ha"),
            '~' => escaped.push_str("\\(ti"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[derive(Default)]
struct Writer {
    out: String,
    /// Text of what is being read: a paragraph, a heading, a cell.
    line: String,
    code: bool,
    headings: Vec<String>,
    cells: Vec<String>,
    /// Lists that this is in.
    depth: usize,
    /// Whether an item of a list has just begun.
    fresh: bool,
}

impl Writer {
    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Start(tag) => self.start(&tag),
            Event::End(tag) => self.end(tag),
            Event::Text(text) if self.code => {
                for line in text.lines() {
                    self.request(&escaped(line));
                }
            }
            Event::Text(text) => self.line.push_str(&escaped(&text)),
            Event::Code(text) => self.line.push_str(&format!("\\fB{}\\fP", escaped(&text))),
            Event::SoftBreak => self.line.push(' '),
            Event::HardBreak => self.line.push_str("\n.br\n"),
            _ => {}
        }
    }

    fn start(&mut self, tag: &Tag<'_>) {
        match tag {
            Tag::CodeBlock(_) => {
                self.flush();
                self.out.push_str(".PP\n.RS 4\n.nf\n");
                self.code = true;
            }
            Tag::List(_) => {
                self.flush();
                self.depth += 1;
                if self.depth > 1 {
                    self.out.push_str(".RS 2\n");
                }
            }
            Tag::Item => {
                self.out.push_str(".IP \\(bu 2\n");
                self.fresh = true;
            }
            Tag::Paragraph => {
                if !self.fresh {
                    self.out.push_str(if self.depth > 0 { ".IP\n" } else { ".PP\n" });
                }
                self.fresh = false;
            }
            Tag::Strong => self.line.push_str("\\fB"),
            Tag::Emphasis => self.line.push_str("\\fI"),
            _ => {}
        }
    }

    fn end(&mut self, tag: TagEnd) {
        match tag {
            TagEnd::Heading(level) => {
                let macro_name = if level <= HeadingLevel::H2 { "SH" } else { "SS" };
                let title = std::mem::take(&mut self.line);
                let title = if level <= HeadingLevel::H2 { title.to_uppercase() } else { title };
                self.out
                    .push_str(&format!(".{macro_name} {}\n", title.replace("\\FB", "").replace("\\FP", "")));
            }
            TagEnd::CodeBlock => {
                self.out.push_str(".fi\n.RE\n");
                self.code = false;
            }
            TagEnd::Paragraph => self.flush(),
            TagEnd::Item => {
                self.flush();
                self.fresh = false;
            }
            TagEnd::List(_) => {
                self.depth -= 1;
                if self.depth > 0 {
                    self.out.push_str(".RE\n");
                }
            }
            TagEnd::Strong | TagEnd::Emphasis => self.line.push_str("\\fP"),
            TagEnd::TableCell => self.cells.push(std::mem::take(&mut self.line)),
            TagEnd::TableHead => self.headings = std::mem::take(&mut self.cells),
            TagEnd::TableRow => self.row(),
            _ => {}
        }
    }

    /// A row of a table: its first cell is a term, the last one says what it is; what is between has its heading
    /// before it.
    fn row(&mut self) {
        let cells = std::mem::take(&mut self.cells);
        let Some((term, rest)) = cells.split_first() else { return };
        let Some((meaning, between)) = rest.split_last() else { return };
        let term = term.replace("\\fB", "").replace("\\fP", "");
        self.out.push_str(&format!(".TP\n.B \"{}\"\n", term.replace('"', "\\(dq")));
        self.request(if meaning.is_empty() { "\\&" } else { meaning });
        for (heading, cell) in self.headings.iter().skip(1).zip(between).filter(|(_, cell)| !cell.is_empty())
        {
            self.out.push_str(&format!(".br\n{heading}: {cell}\n"));
        }
    }

    fn flush(&mut self) {
        let line = std::mem::take(&mut self.line);
        if !line.trim().is_empty() {
            self.request(line.trim());
        }
    }

    /// A line of text, which is no request whatever it begins with.
    fn request(&mut self, line: &str) {
        if line.starts_with(['.', '\'']) {
            self.out.push_str("\\&");
        }
        self.out.push_str(line);
        self.out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_becomes_a_page() {
        let text = "Words, `code` and *more*.\n\n| key | default | meaning |\n|---|---|---|\n| `hold` | `forever` | how long |\n\n\
                    - one\n- two\n\n## Files\n\n    # /etc/x\n    .a = \"b\"\n";
        let page =
            render(&Page { name: "x.toml", section: 5, summary: "settings of x", text, see_also: "x(8)" });
        let expected = ".SH DESCRIPTION\n.PP\nWords, \\fBcode\\fP and \\fImore\\fP.\n.TP\n.B \"hold\"\nhow long\n.br\ndefault: \
                        \\fBforever\\fP\n.IP \\(bu 2\none\n.IP \\(bu 2\ntwo\n.SH FILES\n.PP\n.RS 4\n.nf\n# /etc/x\n\\&.a = \"b\"\n.fi\n.RE\n\
                        .SH SEE ALSO\nx(8)\n";
        assert_eq!(
            page.split_once(".SH DESCRIPTION").map(|(_, rest)| format!(".SH DESCRIPTION{rest}")).unwrap(),
            expected
        );
        assert!(page.starts_with(".TH X.TOML 5 "), "{page}");
    }

    /// groff finds nothing to warn of in the pages that packages have. Without groff there is nothing to ask.
    #[test]
    fn pages_of_the_documents_are_well_formed() {
        let repository = crate::util::repository();
        let config = std::fs::read_to_string(repository.join("docs/config.md")).unwrap();
        let overview = std::fs::read_to_string(repository.join("packaging/man/xpm.7.md")).unwrap();
        let headings =
            ["xpm and the libraries", "xpm-allocator", "xpm-appliance", "xpm-blk", "xpm-fs", "xpm-swapd"];
        let mut texts: Vec<&str> =
            headings.iter().map(|heading| section(&config, heading).unwrap()).collect();
        texts.push(&overview);
        for text in texts {
            let page =
                render(&Page { name: "x.toml", section: 5, summary: "settings", text, see_also: "xpm(1)" });
            assert!(page.contains(".TP\n.B \""), "its tables are lists: {page}");
            let Ok(mut groff) = std::process::Command::new("groff")
                .args(["-man", "-Tutf8", "-ww", "-z"])
                .stdin(std::process::Stdio::piped())
                .stderr(std::process::Stdio::piped())
                .spawn()
            else {
                return;
            };
            std::io::Write::write_all(&mut groff.stdin.take().unwrap(), page.as_bytes()).unwrap();
            let said = groff.wait_with_output().unwrap().stderr;
            assert_eq!(String::from_utf8_lossy(&said), "", "{page}");
        }
    }

    #[test]
    fn a_section_ends_where_the_next_begins() {
        let document = "# A\n\n## one\n\ntext\n\n### sub\n\n## two\n\nmore\n";
        assert_eq!(section(document, "one").unwrap(), "\ntext\n\n### sub\n\n");
        assert_eq!(section(document, "two").unwrap(), "\nmore\n");
        assert!(section(document, "three").is_err());
    }
}
