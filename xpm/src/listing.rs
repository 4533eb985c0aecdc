//! Lists of things: which columns they have, how they are sorted.

use std::cmp::Ordering;

use anyhow::bail;

use crate::cli::ListArgs;
use crate::output::{Output, WIDTH, shortened};
use crate::table::{Align, Table};

/// The columns of a list of `T`.
pub(crate) struct Column<T> {
    pub(crate) name: &'static str,
    pub(crate) align: Align,
    /// Only where all columns are asked for.
    pub(crate) wide: bool,
    pub(crate) cell: fn(&T) -> Cell,
}

impl<T> Column<T> {
    /// A column of texts.
    pub(crate) const fn text(name: &'static str, cell: fn(&T) -> Cell) -> Column<T> {
        Column { name, align: Align::Left, wide: false, cell }
    }

    /// A column of sizes or counts.
    pub(crate) const fn number(name: &'static str, cell: fn(&T) -> Cell) -> Column<T> {
        Column { name, align: Align::Right, wide: false, cell }
    }

    /// A column of texts that is shown where all columns are asked for.
    pub(crate) const fn wide_text(name: &'static str, cell: fn(&T) -> Cell) -> Column<T> {
        Column { name, align: Align::Left, wide: true, cell }
    }

    /// A column of sizes or counts that is shown where all columns are asked for.
    pub(crate) const fn wide_number(name: &'static str, cell: fn(&T) -> Cell) -> Column<T> {
        Column { name, align: Align::Right, wide: true, cell }
    }

    /// The sort key.
    fn key(&self) -> String {
        self.name.to_ascii_lowercase().replace(' ', "-")
    }
}

/// The text of a column for one item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cell {
    text: String,
    /// The sort key, where the text is not enough.
    rank: u64,
}

#[expect(clippy::needless_pass_by_value, reason = "names come by reference, sizes and counts by value")]
impl Cell {
    /// Sorted as text.
    pub(crate) fn text(text: impl ToString) -> Cell {
        Cell { text: text.to_string(), rank: 0 }
    }

    /// Sorted by `rank`.
    pub(crate) fn ranked(text: impl ToString, rank: u64) -> Cell {
        Cell { text: text.to_string(), rank }
    }

    /// An absent value.
    pub(crate) fn none() -> Cell {
        Cell::text("")
    }

    fn compare(&self, other: &Cell) -> Ordering {
        self.rank.cmp(&other.rank).then_with(|| self.text.cmp(&other.text))
    }
}

/// A list of things of one kind.
pub(crate) struct Listing<T: 'static> {
    pub(crate) columns: &'static [Column<T>],
    /// The text in place of an empty table.
    pub(crate) empty: &'static str,
}

impl<T: serde::Serialize> Listing<T> {
    /// Prints the things as a command was asked to.
    pub(crate) fn print(&self, mut things: Vec<T>, args: &ListArgs, output: Output) -> anyhow::Result<()> {
        self.sort(&mut things, args.sort_by.as_deref())?;
        output.print(&things, |things| self.text(things, output.is_wide(), !args.no_headers))
    }

    fn sort(&self, things: &mut [T], by: Option<&str>) -> anyhow::Result<()> {
        let Some(by) = by else { return Ok(()) };
        let (by, backwards) = by.strip_prefix('-').map_or((by, false), |by| (by, true));
        let Some(column) = self.columns.iter().find(|column| column.key() == by.to_ascii_lowercase()) else {
            let keys: Vec<String> = self.columns.iter().map(Column::key).collect();
            bail!("there is no column `{by}` to sort by: choose {}", keys.join(", "));
        };
        things.sort_by(|one, other| {
            let order = (column.cell)(one).compare(&(column.cell)(other));
            if backwards { order.reverse() } else { order }
        });
        Ok(())
    }

    /// The things as a table.
    pub(crate) fn text(&self, things: &[T], wide: bool, headers: bool) -> String {
        if things.is_empty() {
            return if headers { self.empty.to_owned() } else { String::new() };
        }
        let columns: Vec<&Column<T>> = self.columns.iter().filter(|column| wide || !column.wide).collect();
        let mut table = Table::of(columns.iter().map(|column| (column.name, column.align)).collect());
        for thing in things {
            table.row(columns.iter().map(|column| (column.cell)(thing).text));
        }
        let text = table.render();
        let lines = text.lines().skip(usize::from(!headers));
        lines
            .map(|line| if wide { format!("{line}\n") } else { format!("{}\n", shortened(line, WIDTH)) })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: Listing<(&str, u64)> = Listing {
        columns: &[
            Column::text("NAME", |(name, _)| Cell::text(name)),
            Column::number("IN FLIGHT", |(_, count)| Cell::ranked(count, *count)),
            Column::wide_text("MORE", |_| Cell::text("x")),
        ],
        empty: "none\n",
    };

    #[test]
    fn numbers_are_sorted_as_numbers_and_wide_columns_are_asked_for() {
        let mut things = [("b", 10), ("a", 9), ("c", 9)];
        LISTING.sort(&mut things, Some("in-flight")).unwrap();
        assert_eq!(things.map(|(name, _)| name), ["a", "c", "b"]);
        LISTING.sort(&mut things, Some("-name")).unwrap();
        assert_eq!(things.map(|(name, _)| name), ["c", "b", "a"]);
        let error = LISTING.sort(&mut things, Some("age")).unwrap_err().to_string();
        assert!(error.contains("name, in-flight, more"), "{error}");
        assert_eq!(LISTING.text(&things[..1], false, true), "NAME  IN FLIGHT\nc             9\n");
        assert_eq!(LISTING.text(&things[..1], true, false), "c             9  x\n");
        assert_eq!(LISTING.text(&[], false, true), "none\n");
    }
}
