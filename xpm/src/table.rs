//! Tables and field lists for people.

use crate::output::one_line;

/// On which side of its column a text stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Rows under a heading, aligned by column.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

/// Spaces between two columns.
const GAP: usize = 2;

impl Table {
    /// A table with these headings. A heading that starts with `>` is of a right-aligned column,
    /// as numbers and sizes are.
    pub(crate) fn new(headings: &[&'static str]) -> Table {
        let column = |heading: &&'static str| match heading.strip_prefix('>') {
            Some(heading) => (heading, Align::Right),
            None => (*heading, Align::Left),
        };
        Table { columns: headings.iter().map(column).collect(), rows: Vec::new() }
    }

    /// A table with these columns.
    pub(crate) fn of(columns: Vec<(&'static str, Align)>) -> Table {
        Table { columns, rows: Vec::new() }
    }

    /// Adds a row; an empty cell shows as `-`.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cell = |text: String| match one_line(&text) {
            line if line.is_empty() => "-".to_owned(),
            line => line,
        };
        self.rows.push(cells.into_iter().map(cell).collect());
    }

    /// The table as lines.
    pub(crate) fn render(&self) -> String {
        let widths = self.widths();
        let headings: Vec<&str> = self.columns.iter().map(|(heading, _)| *heading).collect();
        let mut text = self.line(&headings, &widths);
        for row in &self.rows {
            let cells: Vec<&str> = row.iter().map(String::as_str).collect();
            text.push_str(&self.line(&cells, &widths));
        }
        text
    }

    fn widths(&self) -> Vec<usize> {
        let width = |(index, (heading, _)): (usize, &(&str, Align))| {
            let cells = self.rows.iter().filter_map(|row| row.get(index));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0).max(heading.chars().count())
        };
        self.columns.iter().enumerate().map(width).collect()
    }

    fn line(&self, cells: &[&str], widths: &[usize]) -> String {
        let mut line = String::new();
        for ((cell, width), (_, align)) in cells.iter().zip(widths).zip(&self.columns) {
            match align {
                Align::Left => line.push_str(&format!("{cell:<width$}")),
                Align::Right => line.push_str(&format!("{cell:>width$}")),
            }
            line.push_str(&" ".repeat(GAP));
        }
        format!("{}\n", line.trim_end())
    }
}

/// Names with values, one a line, the values aligned.
pub(crate) fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0) + GAP;
    pairs.iter().map(|(name, value)| format!("{name:<width$}{}\n", one_line(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_tail() {
        let mut table = Table::new(&["NAME", ">SIZE", "OWNER"]);
        table.row(["a".into(), "1GiB".into(), String::new()]);
        table.row(["long-name".into(), "16MiB".into(), "x\ny".into()]);
        assert_eq!(table.render(), "NAME        SIZE  OWNER\na           1GiB  -\nlong-name  16MiB  x y\n");
    }

    #[test]
    fn field_lists() {
        assert_eq!(fields(&[("a", "1".into()), ("long", "2".into())]), "a     1\nlong  2\n");
        assert_eq!(fields(&[]), "");
    }
}
