//! `/proc/swaps`.

use super::unescape;

/// Paths of the active swap areas; the first line of the table is its head. A device whose node is
/// gone is still swap, under its old path.
pub(super) fn paths(table: &str) -> impl Iterator<Item = String> {
    let paths = table.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next());
    paths.map(unescape).map(|path| path.strip_suffix(" (deleted)").map_or(path.clone(), str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_real_table() {
        let table = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
                     /dev/ublkb0                             partition\t1048572\t\t0\t\t-2\n\
                     /swap\\040file                          file\t\t1024\t\t0\t\t5\n\
                     /dev/nbd0\\040(deleted)                 partition\t8\t\t0\t\t-3\n";
        assert_eq!(paths(table).collect::<Vec<_>>(), ["/dev/ublkb0", "/swap file", "/dev/nbd0"]);
        assert_eq!(paths("").count(), 0);
    }
}
