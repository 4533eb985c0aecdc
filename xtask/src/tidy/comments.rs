//! Comments and prose: their width, and the words that sentences begin with.

use super::files::{File, Kind};
use super::{Finding, Rule, markdown};

/// Most columns of a line of a comment or of prose.
const WIDTH_MAX: usize = 120;

/// Files that are generated from comments, which are checked where they are written.
const GENERATED: [&str; 2] = ["docs/json.md", "libxpm/include/xpm.h"];

/// Words that say nothing about the subject of a sentence that they begin.
const BARE: [&str; 5] = ["What", "Who", "Whose", "Nobody", "Those"];

/// Text without breaks: a comment of several lines, a paragraph, a cell of a table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Prose {
    /// Line where it begins, counted from 1.
    pub(super) line: usize,
    pub(super) text: String,
}

/// Checks width and beginnings of one file.
pub(super) fn check(file: &File) -> Vec<Finding> {
    let (prose, wide) = match file.kind() {
        _ if GENERATED.contains(&file.path.as_str()) => return Vec::new(),
        Kind::Markdown => (markdown::prose(&file.text), markdown::lines(&file.text)),
        Kind::Other => return Vec::new(),
        kind => (blocks(&file.text, kind), comment_lines(&file.text, kind)),
    };
    let mut findings = Vec::new();
    for (line, text) in wide.into_iter().filter(|(_, text)| text.chars().count() > WIDTH_MAX) {
        if text.contains(' ') && !is_only_a_link(text) {
            findings.push(Finding::new(Rule::Width, file, line, format!("{} columns", text.chars().count())));
        }
    }
    for block in &prose {
        for sentence in sentences(&block.text).filter(|sentence| begins_bare(sentence)) {
            findings.push(Finding::new(Rule::Beginning, file, block.line, start(sentence)));
        }
    }
    findings
}

/// A line that cannot be broken, since one word fills it.
fn is_only_a_link(text: &str) -> bool {
    let longest = text.split_whitespace().map(|word| word.chars().count()).max().unwrap_or(0);
    longest > WIDTH_MAX - 20
}

fn start(sentence: &str) -> String {
    sentence.chars().take(90).collect()
}

/// The comment in a line of source, without its marks; `None` in a line without a comment.
fn comment(line: &str, kind: Kind) -> Option<&str> {
    let line = line.trim_start();
    let text = match kind {
        Kind::Rust => line.strip_prefix("//").map(|text| text.trim_start_matches(['/', '!'])),
        Kind::C => ["/**", "/*", "//", "* "].iter().find_map(|mark| line.strip_prefix(mark)),
        Kind::Shell | Kind::Settings => line.strip_prefix('#').filter(|text| !text.starts_with('!')),
        Kind::Markdown | Kind::Other => None,
    }?;
    Some(text.trim().trim_end_matches("*/").trim_end())
}

fn comment_lines(text: &str, kind: Kind) -> Vec<(usize, &str)> {
    let lines = text.lines().enumerate().map(|(index, line)| (index + 1, line));
    lines.filter(|(_, line)| comment(line, kind).is_some()).collect()
}

/// The comments of a file. An empty line, a list item and a line of code each begin a new block.
fn blocks(text: &str, kind: Kind) -> Vec<Prose> {
    let mut blocks: Vec<Prose> = Vec::new();
    let mut open = false;
    for (index, line) in text.lines().enumerate() {
        let comment = comment(line, kind).filter(|text| !text.is_empty());
        let Some(words) = comment else {
            open = false;
            continue;
        };
        let item = words.strip_prefix("- ").or_else(|| words.strip_prefix("* "));
        match blocks.last_mut() {
            Some(block) if open && item.is_none() => {
                block.text.push(' ');
                block.text.push_str(words);
            }
            _ => blocks.push(Prose { line: index + 1, text: item.unwrap_or(words).to_owned() }),
        }
        open = true;
    }
    blocks
}

/// The sentences of a text: they end with a full stop, a question mark or an exclamation mark before a space.
fn sentences(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive(". ").flat_map(|part| part.split_inclusive("? ")).map(str::trim)
}

/// Whether a sentence begins with a bare word of [`BARE`]. A question may.
fn begins_bare(sentence: &str) -> bool {
    let sentence = sentence.trim_start_matches(['*', '_', '(', '"']);
    let word = sentence.split(|c: char| !c.is_alphabetic()).next().unwrap_or_default();
    BARE.contains(&word) && !sentence.ends_with('?')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beginnings(path: &str, text: &str) -> Vec<String> {
        let findings = check(&File::new(path, text)).into_iter();
        findings.filter(|finding| finding.rule == Rule::Beginning).map(|finding| finding.text).collect()
    }

    #[test]
    fn sentences_that_begin_with_a_bare_word_are_found() {
        let text = "/// Reads a page. What is absent\n/// is fetched. Nobody waits.\nlet x = 1; \n// Who asks\n// waits.\n";
        assert_eq!(
            beginnings("a.rs", text),
            ["What is absent is fetched.", "Nobody waits.", "Who asks waits."]
        );
        assert_eq!(beginnings("a.sh", "#!/bin/sh\n# Those\n# that wait\n"), ["Those that wait"]);
        assert_eq!(beginnings("a.c", "/* Whose page it is */\n"), ["Whose page it is"]);
        assert_eq!(beginnings("a.md", "# What it is\n\nNobody waits. | x\n\n- Who asks waits.\n").len(), 2);
    }

    #[test]
    fn other_sentences_are_not_found() {
        for text in [
            "// Whatever happens, it ends.",
            "// It says what it does.",
            "// What is it?",
            "let s = \"What\";",
        ] {
            assert_eq!(beginnings("a.rs", text), [""; 0], "{text}");
        }
        assert_eq!(beginnings("a.md", "    What is code\n\n```\nWhat is code\n```\n"), [""; 0]);
    }

    fn wide(path: &str, text: &str) -> usize {
        check(&File::new(path, text)).iter().filter(|finding| finding.rule == Rule::Width).count()
    }

    #[test]
    fn width_counts_comments_and_prose_only() {
        let long = "word ".repeat(24);
        assert_eq!(wide("a.rs", &format!("// {long}\n")), 1);
        assert_eq!(wide("a.rs", &format!("let s = \"{long}\";\n")), 0);
        assert_eq!(wide("a.md", &format!("{long}x\n")), 1);
        assert_eq!(wide("a.md", &format!("| a | b |\n|---|---|\n| {long} | {long} |\n")), 0);
        assert_eq!(wide("a.md", &format!("```\n{long}{long}\n```\n")), 0);
        assert_eq!(wide("a.md", &format!("[a](http://{})\n", "x".repeat(130))), 0);
    }
}
