//! The text of each document of a file, as its author wrote it.
//!
//! A file is cut into pieces, one for each document; joined, they give the file again. The comments directly above a
//! document belong to it, and text between documents is kept beside the document. Each piece is read by itself, and
//! is kept only if it gives the same document as the whole file: a form that cannot be cut (`account = [{...}]` in
//! TOML) has no pieces.

use std::collections::HashMap;

use serde_json::Value;
use xpm_protocol::api::policy::{EDIT_MARK, PolicyFile, PolicyFormat, Written};
use xpm_protocol::policy::{Content, DocumentName, Kind};

use super::{document, json, toml};

/// The piece of each document, by its kind and its index among documents of that kind.
pub(super) type Pieces = HashMap<(Kind, usize), Piece>;

/// A piece of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    format: PolicyFormat,
    /// Position among the pieces of the file.
    position: u64,
    before: String,
    text: String,
    after: String,
}

impl Piece {
    /// The piece as it is stored for a document, if it gives the same content.
    pub(super) fn of(self, content: &Content) -> Option<Written> {
        let DocumentName { kind, name } = content.document_name();
        if self.format == PolicyFormat::Toml && !says(&self.text, content) {
            return None;
        }
        let Piece { format, position, before, text, after } = self;
        Some(Written {
            document: DocumentName { kind, name },
            version: 0,
            format,
            position,
            before,
            text,
            after,
        })
    }
}

pub(super) fn pieces(file: &PolicyFile) -> Pieces {
    let found = match file.format {
        PolicyFormat::Toml => of_toml(&file.text),
        PolicyFormat::Json => json::spans(&file.text),
    };
    let mut counts: HashMap<Kind, usize> = HashMap::new();
    let mut pieces = Pieces::new();
    let mut end = 0;
    let last = found.len().saturating_sub(1);
    for (position, (kind, start, stop)) in found.into_iter().enumerate() {
        let index = counts.entry(kind).or_default();
        let part = |range: std::ops::Range<usize>| file.text.get(range).unwrap_or_default().to_owned();
        let after = if position == last { part(stop..file.text.len()) } else { String::new() };
        let piece = Piece {
            format: file.format,
            position: position as u64,
            before: part(end..start),
            text: without_edit_mark(&part(start..stop)),
            after,
        };
        pieces.insert((kind, *index), piece);
        *index += 1;
        end = stop;
    }
    pieces
}

/// Whether the text contains just this document.
fn says(text: &str, content: &Content) -> bool {
    let Ok((Value::Object(mut kinds), _)) = toml::parse(text) else { return false };
    let list = kinds.remove(content.kind().as_str());
    match (list, kinds.is_empty()) {
        (Some(Value::Array(mut list)), true) if list.len() == 1 => {
            let read = document(content.kind(), list.remove(0));
            read.is_ok_and(|read| read.with_version(None) == content.clone().with_version(None))
        }
        _ => false,
    }
}

/// Removes the line that `xpm edit` adds: the version that was read, so that two editors do not undo each other's
/// changes. It is not the author's text.
fn without_edit_mark(text: &str) -> String {
    text.split_inclusive('\n').filter(|line| !line.trim_end().ends_with(EDIT_MARK)).collect()
}

/// Positions of the documents in a TOML text: kind, first byte and end.
fn of_toml(text: &str) -> Vec<(Kind, usize, usize)> {
    let mut lines: Vec<(usize, &str)> = Vec::new();
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        lines.push((at, line));
        at += line.len();
    }
    let is_comment = |index: usize| lines[index].1.trim_start().starts_with('#');
    let is_blank = |index: usize| lines[index].1.trim().is_empty();
    let headers: Vec<(usize, Kind)> =
        lines.iter().enumerate().filter_map(|(index, (_, line))| Some((index, header(line)?))).collect();
    // For each header, the first line of the comments directly above it.
    let starts: Vec<usize> = headers
        .iter()
        .map(|(header, _)| {
            (0..*header).rev().take_while(|index| is_comment(*index)).last().unwrap_or(*header)
        })
        .collect();
    let mut found = Vec::with_capacity(headers.len());
    for (number, (header, kind)) in headers.iter().enumerate() {
        let limit = starts.get(number + 1).copied().unwrap_or(lines.len());
        let last =
            (*header..limit).rev().find(|index| !is_blank(*index) && !is_comment(*index)).unwrap_or(*header);
        let stop = (last + 1..limit).find(|index| !is_comment(*index)).unwrap_or(limit);
        let byte = |line: usize| lines.get(line).map_or(text.len(), |(at, _)| *at);
        found.push((*kind, byte(starts[number]), byte(stop)));
    }
    found
}

/// The kind of the document whose header this line is.
fn header(line: &str) -> Option<Kind> {
    let line = line.split('#').next().unwrap_or_default().trim();
    line.strip_prefix("[[")?.strip_suffix("]]")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(format: PolicyFormat, text: &str) -> PolicyFile {
        PolicyFile { name: "f".into(), format, text: text.into() }
    }

    fn whole(pieces: &Pieces) -> String {
        let mut all: Vec<&Piece> = pieces.values().collect();
        all.sort_by_key(|piece| piece.position);
        all.iter().map(|piece| format!("{}{}{}", piece.before, piece.text, piece.after)).collect()
    }

    const TEXT: &str = "# The pool.\n\n# Batch jobs:\n# at night.\n[[account]] # b\nname = 'b'\n[[account.hours]]\nfrom = '1:00'\n# tail\n\n\n# Detached.\n\n[[strategy]]\nname = 's'\n\n[[account]]\nname = 'a'\n# end\n\n# bye\n";

    #[test]
    fn joined_pieces_give_the_file() {
        let pieces = pieces(&file(PolicyFormat::Toml, TEXT));
        assert_eq!(whole(&pieces), TEXT);
        let text = |kind, index| pieces[&(kind, index)].text.as_str();
        assert_eq!(
            text(Kind::Account, 0),
            "# Batch jobs:\n# at night.\n[[account]] # b\nname = 'b'\n[[account.hours]]\nfrom = '1:00'\n# tail\n"
        );
        assert_eq!(text(Kind::Strategy, 0), "[[strategy]]\nname = 's'\n");
        assert_eq!(text(Kind::Account, 1), "[[account]]\nname = 'a'\n# end\n");
        let json = "{\n  \"strategy\": [{\"name\": \"s\"}],\n  \"account\": [ {\"name\":\"a\"} , {\"name\":\"b\"} ]\n}\n";
        let found = super::pieces(&file(PolicyFormat::Json, json));
        assert_eq!((whole(&found).as_str(), found.len()), (json, 3));
        assert_eq!(found[&(Kind::Account, 1)].text, "{\"name\":\"b\"}");
    }

    #[test]
    fn a_piece_with_other_content_is_not_kept() {
        let content =
            document(Kind::Account, serde_json::json!({ "name": "a", "description": "x\n[[account]]\n" }))
                .unwrap();
        let tricky = "[[account]]\nname = 'a'\ndescription = '''x\n[[account]]\n'''\n";
        let pieces = pieces(&file(PolicyFormat::Toml, tricky));
        assert!(pieces.into_values().all(|piece| piece.of(&content).is_none()));
        let plain = document(Kind::Account, serde_json::json!({ "name": "a", "version": 3 })).unwrap();
        let marked = format!("[[account]]\nversion = 3 {EDIT_MARK}\nname = 'a'\n");
        let mut pieces = super::pieces(&file(PolicyFormat::Toml, &marked));
        let written = pieces.remove(&(Kind::Account, 0)).unwrap().of(&plain).unwrap();
        assert_eq!(written.text, "[[account]]\nname = 'a'\n");
    }
}
