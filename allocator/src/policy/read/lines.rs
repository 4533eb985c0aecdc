//! Lines of values in a text.

use std::collections::BTreeMap;

/// The line of a value, and of its inner values.
#[derive(Debug, Default)]
pub(super) struct Lines {
    pub(super) line: u64,
    pub(super) table: BTreeMap<String, Lines>,
    pub(super) list: Vec<Lines>,
}

impl Lines {
    pub(super) fn at(line: u64) -> Lines {
        Lines { line, ..Lines::default() }
    }

    /// The line of a key below this value, or of its innermost part that exists.
    pub(super) fn of(&self, key: &str) -> u64 {
        let (mut here, mut rest) = (self, key);
        while let Some((next, behind)) = here.below(rest) {
            (here, rest) = (next, behind);
        }
        here.line
    }

    /// The value that the key begins with, and the rest of the key.
    fn below<'k>(&self, key: &'k str) -> Option<(&Lines, &'k str)> {
        let key = key.strip_prefix('.').unwrap_or(key);
        if let Some(index) = key.strip_prefix('[') {
            let (index, rest) = index.split_once(']')?;
            return Some((self.list.get(index.parse::<usize>().ok()?)?, rest));
        }
        // A name may itself have dots: the longest existing name counts.
        let ends = key.char_indices().filter(|(_, c)| matches!(c, '.' | '[')).map(|(at, _)| at);
        let ends = ends.chain([key.len()]).filter(|&end| end > 0);
        ends.rev().find_map(|end| Some((self.table.get(&key[..end])?, &key[end..])))
    }
}

/// Line ends of a text, to find the line of a position.
pub(super) struct Index(Vec<usize>);

impl Index {
    pub(super) fn new(text: &str) -> Index {
        Index(text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect())
    }

    /// The line of the byte at this position, from 1.
    pub(super) fn line(&self, at: usize) -> u64 {
        self.0.partition_point(|&end| end < at) as u64 + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(line: u64, below: Vec<(&str, Lines)>) -> Lines {
        let below = below.into_iter().map(|(key, lines)| (key.to_owned(), lines));
        Lines { line, table: below.collect(), list: Vec::new() }
    }

    #[test]
    fn the_line_of_the_innermost_existing_part_counts() {
        let labels = table(3, vec![("a", Lines::at(4)), ("a.b", Lines::at(5))]);
        let list = Lines { line: 6, table: BTreeMap::new(), list: vec![Lines::at(7), labels] };
        let whole = table(1, vec![("rule", list)]);
        for (key, line) in [
            ("", 1),
            ("none", 1),
            ("rule", 6),
            ("rule[0]", 7),
            ("rule[0].x", 7),
            ("rule[2].x", 6),
            ("rule[1].a", 4),
            ("rule[1].a.b", 5),
            ("rule[1].a.c", 4),
            ("rule[x", 6),
            ("[", 1),
            ("é.ü[", 1),
        ] {
            assert_eq!(whole.of(key), line, "{key}");
        }
    }

    #[test]
    fn positions_have_lines() {
        let index = Index::new("a\nbc\n\nd");
        let lines: Vec<u64> = (0..8).map(|at| index.line(at)).collect();
        assert_eq!(lines, [1, 1, 2, 2, 2, 3, 4, 4]);
    }
}
