//! Markdown: prose, links between documents, and the files that docs/dev names.

use std::collections::HashSet;

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

use super::comments::Prose;
use super::files::{File, Kind};
use super::{Finding, Rule};

/// Folder of the documents for developers, whose code spans are checked for files that do not exist.
const DEV: &str = "docs/dev/";

/// Checks links, and in docs/dev the files that are named.
pub(super) fn check(file: &File, files: &[File]) -> Vec<Finding> {
    if file.kind() != Kind::Markdown {
        return Vec::new();
    }
    let mut findings = links(file, files);
    if file.path.starts_with(DEV) {
        findings.extend(named_files(file, files));
    }
    findings
}

fn parser(text: &str) -> impl Iterator<Item = (Event<'_>, usize)> {
    let line = |offset: usize| text[..offset].matches('\n').count() + 1;
    let events = Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter();
    events.map(move |(event, range)| (event, line(range.start)))
}

/// Paragraphs, list items and cells of tables, without headings and code.
pub(super) fn prose(text: &str) -> Vec<Prose> {
    let mut blocks = Vec::new();
    let mut block: Option<Prose> = None;
    for (event, line) in parser(text) {
        match event {
            Event::Start(Tag::Paragraph | Tag::Item | Tag::TableCell) => {
                blocks.extend(block.replace(Prose { line, text: String::new() }));
            }
            Event::End(TagEnd::Paragraph | TagEnd::Item | TagEnd::TableCell) => blocks.extend(block.take()),
            // The heading of a section is no sentence.
            Event::Start(Tag::Heading { .. } | Tag::CodeBlock(_)) => blocks.extend(block.take()),
            Event::Text(text) => extend(&mut block, &text),
            Event::Code(_) => extend(&mut block, "`code`"),
            Event::SoftBreak | Event::HardBreak => extend(&mut block, " "),
            _ => (),
        }
    }
    blocks.extend(block);
    blocks.retain(|block| !block.text.trim().is_empty());
    blocks
}

fn extend(block: &mut Option<Prose>, text: &str) {
    if let Some(block) = block {
        block.text.push_str(text);
    }
}

/// Lines that a writer can wrap: not those of tables, headings and code.
pub(super) fn lines(text: &str) -> Vec<(usize, &str)> {
    let mut fixed = HashSet::new();
    for (event, range) in Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter() {
        if let Event::Start(Tag::Table(_) | Tag::CodeBlock(_) | Tag::Heading { .. }) = event {
            let first = text[..range.start].matches('\n').count();
            fixed.extend(first..=first + text[range].trim_end().matches('\n').count());
        }
    }
    let lines = text.lines().enumerate().filter(|(index, _)| !fixed.contains(index));
    lines.map(|(index, line)| (index + 1, line)).collect()
}

/// Links that lead to no file of the repository, or to no heading of it. Links into the network are not followed.
fn links(file: &File, files: &[File]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (event, line) in parser(&file.text) {
        let (Event::Start(Tag::Link { dest_url, .. }) | Event::Start(Tag::Image { dest_url, .. })) = event
        else {
            continue;
        };
        if dest_url.contains(':') {
            continue;
        }
        let (target, anchor) = dest_url.split_once('#').unwrap_or((&dest_url, ""));
        let path = match target {
            "" => file.path.clone(),
            _ => resolved(&file.path, target),
        };
        let found = files.iter().find(|other| other.path == path);
        let folder = format!("{}/", path.trim_end_matches('/'));
        if found.is_none() && !files.iter().any(|other| other.path.starts_with(&folder)) {
            findings.push(Finding::new(Rule::Link, file, line, format!("{dest_url}: no such file")));
        } else if !anchor.is_empty() && !found.is_some_and(|other| anchors(&other.text).contains(anchor)) {
            findings.push(Finding::new(Rule::Link, file, line, format!("{dest_url}: no such heading")));
        }
    }
    findings
}

/// A link's target as a path from the root of the repository.
fn resolved(from: &str, target: &str) -> String {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "." | "" => (),
            ".." => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    parts.join("/")
}

/// Anchors of a document's headings, as web front ends of git make them.
fn anchors(text: &str) -> HashSet<String> {
    let mut anchors = HashSet::new();
    let mut heading: Option<String> = None;
    for (event, _) in parser(text) {
        match event {
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::End(TagEnd::Heading(_)) => add(&mut anchors, &heading.take().unwrap_or_default()),
            Event::Text(text) | Event::Code(text) => heading.iter_mut().for_each(|all| all.push_str(&text)),
            _ => (),
        }
    }
    anchors
}

/// Adds the anchor of a heading; a second heading of the same text gets a number.
fn add(anchors: &mut HashSet<String>, heading: &str) {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    let anchor = kept.collect::<String>().to_lowercase().replace(' ', "-");
    let mut unique = anchor.clone();
    for number in 1.. {
        if anchors.insert(unique) {
            return;
        }
        unique = format!("{anchor}-{number}");
    }
}

/// Code spans that name a file (`folder/file.rs`), a folder (`folder/`) or an item of a file
/// (`folder/file.rs::item`) that does not exist. A placeholder in capitals (`transport/src/NAME/`) is no name.
fn named_files(file: &File, files: &[File]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (event, line) in parser(&file.text) {
        let Event::Code(code) = event else { continue };
        let (path, item) = code.split_once("::").unwrap_or((&code, ""));
        if !looks_like_a_path(path) {
            continue;
        }
        match files
            .iter()
            .find(|other| other.path == path || other.path.starts_with(path) && path.ends_with('/'))
        {
            None => findings.push(Finding::new(Rule::NamedFile, file, line, format!("{path}: no such file"))),
            Some(other) if !item.is_empty() && !defines(&other.text, item) => {
                findings.push(Finding::new(Rule::NamedFile, file, line, format!("{code}: no such item")));
            }
            Some(_) => (),
        }
    }
    findings
}

fn looks_like_a_path(text: &str) -> bool {
    let plain = text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "/._-".contains(c));
    let ends = [".rs", ".md", ".sh", ".toml", ".c", ".h", "/"].iter().any(|end| text.ends_with(end));
    plain && ends && text.contains('/') && !text.starts_with(['/', '.']) && !text.starts_with("target/")
}

/// Whether Rust source or a shell script defines the last name of `A::b`.
fn defines(text: &str, item: &str) -> bool {
    let name = item.rsplit("::").next().unwrap_or_default().trim_end_matches("()");
    let starts = ["fn ", "struct ", "enum ", "trait ", "const ", "static ", "type ", "mod ", "union "];
    let follows = |rest: &str| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_');
    let word = |start: &str| {
        let definition = format!("{start}{name}");
        text.match_indices(&definition).any(|(at, _)| follows(&text[at + definition.len()..]))
    };
    starts.iter().any(|start| word(start)) || text.contains(&format!("\n{name}() {{"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(path: &str, text: &str) -> Vec<String> {
        let files = [
            File::new(path, text),
            File::new("docs/life.md", "# Life\n\n## Two `words`, here\n\n## A\n\n## A\n"),
            File::new("vm/src/lib.rs", "fn other() {}\npub(crate) fn start<T>() {}\nstruct Machine;\n"),
        ];
        check(&files[0], &files).into_iter().map(|finding| finding.text).collect()
    }

    #[test]
    fn links_to_files_and_headings() {
        let good = "[a](life.md) [b](life.md#two-words-here) [c](life.md#a-1) [d](../vm/src/lib.rs) [e](../vm) [f](https://x/y)";
        assert_eq!(texts("docs/x.md", good), [""; 0]);
        let bad = "[a](nosuch.md) [b](life.md#nosuch) [c](#nosuch)";
        assert_eq!(
            texts("docs/x.md", bad),
            ["nosuch.md: no such file", "life.md#nosuch: no such heading", "#nosuch: no such heading"]
        );
    }

    #[test]
    fn files_and_items_that_docs_dev_names() {
        let good = "`vm/src/lib.rs::start` `vm/src/lib.rs::Machine` `vm/src/` `transport/src/NAME/` `a/b` `/dev/x.c`";
        assert_eq!(texts("docs/dev/x.md", good), [""; 0]);
        let bad = "`vm/src/gone.rs` `vm/src/lib.rs::star` `gone/`";
        assert_eq!(
            texts("docs/dev/x.md", bad),
            ["vm/src/gone.rs: no such file", "vm/src/lib.rs::star: no such item", "gone/: no such file"]
        );
        assert_eq!(texts("docs/x.md", bad), [""; 0]);
    }

    #[test]
    fn prose_is_what_a_reader_reads_as_sentences() {
        let text = "# Head\n\nOne `x`\ntwo.\n\n- item\n\n| a | b |\n|---|---|\n| c | d |\n\n    code\n";
        let blocks: Vec<String> = prose(text).into_iter().map(|block| block.text).collect();
        assert_eq!(blocks, ["One `code` two.", "item", "a", "b", "c", "d"]);
    }
}
