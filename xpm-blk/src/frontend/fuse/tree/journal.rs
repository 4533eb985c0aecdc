//! The file that a tree's table is kept in: a line for each set of changes that belong together, appended.
//!
//! ```text
//! xpm-tree 1
//! HASH NUMBER DURABLE [changes]        the whole table
//! HASH NUMBER DURABLE [changes]
//! ...
//! ```
//!
//! HASH is XXH3-64 of what follows it in the line, in 16 hexadecimal digits. Lines are numbered from 1. DURABLE is the
//! number of the last line that was known to be on disk when this one was written.
//!
//! A line is written with one call and survives the death of the process; [`Journal::sync`] has it survive that of the
//! machine. After a power failure the last lines may be missing, or be garbage: they are cut off. A line that is no
//! line although a later one says that it was durable was damaged, and the table is refused.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use xpm_control::state;
use xpm_protocol::api::ErrorKind;
use xxhash_rust::xxh3::xxh3_64;

use super::table::{Change, Table};
use crate::error::{DeviceError, Step};

/// The first line, with the version of the format.
const HEADER: &str = "xpm-tree 1";
const HEADER_ANY: &str = "xpm-tree ";
/// The file is written anew when it is longer than this, in bytes, and than twice what it was when it was written anew
/// last.
const LEN_MIN: u64 = 1 << 20;

/// The open file. Each appended change was applied to the table, or is about to be.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    /// In bytes.
    len: u64,
    len_anew: u64,
    /// Of the last line.
    number: u64,
    durable: u64,
    /// A line could not be written, nor what there is of it be removed.
    broken: bool,
}

impl Journal {
    /// Reads the table at a path; where there is none, `new` is kept there. Blocks.
    ///
    /// # Errors
    /// When it cannot be read or written; [`ErrorKind::Conflict`] where it is of a newer version or damaged.
    pub(super) fn open(path: &Path, new: impl FnOnce() -> Table) -> Result<(Journal, Table), DeviceError> {
        let at = || format!("open the table {}", path.display());
        let (table, read) = match fs::read(path) {
            Ok(bytes) => read(&bytes).map_err(|why| refusal(path, &why))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => (new(), Read::default()),
            Err(error) => return Err(error.at(at())),
        };
        if read.number == 0 {
            if let Some(directory) = path.parent() {
                fs::create_dir_all(directory).at(at())?;
            }
            state::write(path, &whole(&table, 1)).at(at())?;
        }
        let file = OpenOptions::new().read(true).write(true).mode(0o600).open(path).at(at())?;
        let len = file.metadata().at(at())?.len();
        let mut journal = Journal {
            path: path.to_owned(),
            file,
            len,
            len_anew: len,
            number: read.number.max(1),
            durable: 1,
            broken: false,
        };
        if read.number > 0 && read.len < len {
            tracing::warn!(
                "{}: {} bytes at the end were not written wholly, and are cut off",
                path.display(),
                len - read.len
            );
            journal.file.set_len(read.len).at(at())?;
            journal.len = read.len;
        }
        // This process is about to rely on the lines that the last process wrote, which may not be on disk yet.
        journal.sync().at(at())?;
        Ok((journal, table))
    }

    /// Writes changes down that belong together. They survive this process from now on.
    ///
    /// # Errors
    /// When the file system of the state directory refuses; nothing was written.
    pub(super) fn append(&mut self, changes: &[Change]) -> io::Result<()> {
        if self.broken {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let line = line(changes, self.number + 1, self.durable);
        if let Err(error) = self.file.write_all_at(&line, self.len) {
            // Half a line would be taken for the last one.
            self.broken = self.file.set_len(self.len).is_err();
            return Err(error);
        }
        self.number += 1;
        self.len += line.len() as u64;
        Ok(())
    }

    /// Has what was appended survive the machine. Blocks.
    ///
    /// # Errors
    /// When the file system refuses. It cannot be known then what of it is on disk, so nothing is appended any more.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        if self.broken {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.file.sync_data().inspect_err(|_| self.broken = true)?;
        self.durable = self.number;
        Ok(())
    }

    /// Writes the whole table anew where the file has become long for what it says. Blocks.
    pub(super) fn shorten(&mut self, table: &Table) {
        if self.broken || self.len < LEN_MIN.max(2 * self.len_anew) {
            return;
        }
        let bytes = whole(table, self.number + 1);
        let opened = state::write(&self.path, &bytes)
            .and_then(|()| OpenOptions::new().read(true).write(true).open(&self.path));
        match opened {
            Ok(file) => {
                self.file = file;
                self.number += 1;
                (self.len, self.len_anew, self.durable) =
                    (bytes.len() as u64, bytes.len() as u64, self.number);
            }
            // The long one is as good, unless it is not known which one there is.
            Err(error) => {
                tracing::warn!("{} is not written anew: {error}", self.path.display());
                self.len_anew = self.len;
                self.broken = !self.is_at_its_path();
            }
        }
    }

    fn is_at_its_path(&self) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        let number = |facts: io::Result<fs::Metadata>| facts.map(|facts| (facts.dev(), facts.ino())).ok();
        let ours = number(self.file.metadata());
        ours.is_some() && ours == number(fs::metadata(&self.path))
    }
}

fn refusal(path: &Path, why: &str) -> DeviceError {
    let what = format!(
        "the table {} cannot be used: {why}; put a good copy of it there, or move it away and read the tree's allocations by \
         `xpm fs attach`",
        path.display()
    );
    DeviceError::new(ErrorKind::Conflict, what)
}

fn line(changes: &[Change], number: u64, durable: u64) -> Vec<u8> {
    let json = serde_json::to_string(changes).expect("a table is JSON");
    let rest = format!("{number} {durable} {json}");
    let mut line = Vec::with_capacity(rest.len() + 18);
    writeln!(line, "{:016x} {rest}", xxh3_64(rest.as_bytes())).expect("memory takes it");
    line
}

/// A file that says this table and nothing else.
fn whole(table: &Table, number: u64) -> Vec<u8> {
    let mut bytes = format!("{HEADER}\n").into_bytes();
    bytes.extend(line(&table.all(), number, number));
    bytes
}

/// How far a file is good.
#[derive(Debug, Default)]
struct Read {
    /// Of the last good line.
    number: u64,
    /// Up to its end, in bytes.
    len: u64,
}

struct Line {
    number: u64,
    durable: u64,
    changes: Vec<Change>,
}

fn read(bytes: &[u8]) -> Result<(Table, Read), String> {
    let header_len = HEADER.len() + 1;
    match bytes.split(|byte| *byte == b'\n').next() {
        Some(first) if first == HEADER.as_bytes() && bytes.len() >= header_len => {}
        Some(first) if first.starts_with(HEADER_ANY.as_bytes()) && first != HEADER.as_bytes() => {
            return Err("a newer version of xpm wrote it: use that one".to_owned());
        }
        _ => return Err("it is no table of a tree".to_owned()),
    }
    let mut table = Table::default();
    let mut read = Read { number: 0, len: header_len as u64 };
    let mut good = true;
    let mut at = 2;
    for text in bytes[header_len..].split_inclusive(|byte| *byte == b'\n') {
        match parse(text).filter(|line| read.number == 0 || !good || line.number == read.number + 1) {
            Some(line) if good => {
                line.changes.iter().for_each(|change| table.apply(change));
                read.number = line.number;
                read.len += text.len() as u64;
                at += 1;
            }
            Some(line) if line.durable > read.number => return Err(format!("its line {at} is damaged")),
            Some(_) => {}
            // The first line says the whole table, and was durable before the file had its name.
            None if read.number == 0 => return Err(format!("its line {at} is damaged")),
            None => good = false,
        }
    }
    if read.number == 0 {
        return Err("it is empty".to_owned());
    }
    table.check().map_err(|why| format!("it contradicts itself: {why}"))?;
    Ok((table, read))
}

fn parse(text: &[u8]) -> Option<Line> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('\n')?;
    let (hash, rest) = text.split_once(' ')?;
    if hash.len() != 16 || u64::from_str_radix(hash, 16).ok()? != xxh3_64(rest.as_bytes()) {
        return None;
    }
    let mut words = rest.splitn(3, ' ');
    let (number, durable) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some(Line { number, durable, changes: serde_json::from_str(words.next()?).ok()? })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::table::{Kind, Node, ROOT, Text};
    use super::*;

    fn new() -> Table {
        Table::new(0o755, (0, 0), 1)
    }

    /// Makes a file, and what the table is then.
    fn make(journal: &mut Journal, table: &mut Table, name: &str) {
        let (node, place) = (table.number(), table.number());
        let is = Node { names: 1, ..Node::new(Kind::File, 0o644, (0, 0), 7) };
        let changes = [
            Change::Node { node, is },
            Change::Name { of: ROOT, name: Text::new(name.as_bytes()), node, place },
        ];
        journal.append(&changes).unwrap();
        changes.iter().for_each(|change| table.apply(change));
    }

    struct Filled {
        directory: tempfile::TempDir,
        /// The table after each line.
        tables: Vec<Table>,
    }

    impl Filled {
        fn path(&self) -> PathBuf {
            self.directory.path().join("a.table")
        }

        fn bytes(&self) -> Vec<u8> {
            fs::read(self.path()).unwrap()
        }

        fn open(&self) -> Result<Table, DeviceError> {
            Journal::open(&self.path(), new).map(|(_, table)| table)
        }
    }

    /// A file with six files in it, synced after `synced` of them.
    fn filled(synced: usize) -> Filled {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, mut table) = Journal::open(&directory.path().join("a.table"), new).unwrap();
        let mut tables = vec![table.clone()];
        for number in 0..6 {
            if number == synced {
                journal.sync().unwrap();
            }
            make(&mut journal, &mut table, &format!("file {number}"));
            tables.push(table.clone());
        }
        Filled { directory, tables }
    }

    #[test]
    fn it_comes_back_and_goes_on() {
        let filled = filled(3);
        assert_eq!(filled.open().unwrap(), filled.tables[6]);
        let (mut journal, mut table) = Journal::open(&filled.path(), new).unwrap();
        make(&mut journal, &mut table, "one more");
        assert_eq!(filled.open().unwrap(), table);
    }

    #[test]
    fn what_a_dead_machine_did_not_write_wholly_is_cut_off() {
        let filled = filled(6);
        let bytes = filled.bytes();
        // Ends of lines, without that of the header.
        let ends: Vec<usize> =
            (0..bytes.len()).filter(|&at| bytes[at] == b'\n').map(|at| at + 1).skip(1).collect();
        for cut in (ends[0]..=bytes.len()).step_by(7).chain(ends.iter().copied()) {
            fs::write(filled.path(), &bytes[..cut]).unwrap();
            let whole = ends.iter().filter(|&&end| end <= cut).count();
            assert_eq!(filled.open().unwrap(), filled.tables[whole - 1], "cut at {cut}");
            assert_eq!(filled.bytes().len(), ends[whole - 1], "the rest is gone");
        }
        // Blocks of the disk that were never written, within lines of which none was durable.
        let filled = self::filled(0);
        let mut bytes = filled.bytes();
        bytes[ends[2] + 4..ends[3] - 4].fill(0);
        fs::write(filled.path(), &bytes).unwrap();
        assert_eq!(filled.open().unwrap(), filled.tables[2]);
    }

    #[test]
    fn damage_of_what_was_durable_is_refused_in_one_line() {
        let filled = filled(3);
        let good = filled.bytes();
        let mut ends = (0..good.len()).filter(|&at| good[at] == b'\n');
        let (first, second) = (ends.next().unwrap() + 30, ends.nth(1).unwrap() + 30);
        for (at, number) in [(first, 2), (second, 4)] {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            fs::write(filled.path(), &bytes).unwrap();
            let error = filled.open().unwrap_err().to_string();
            let parts = [&format!("line {number} is damaged"), "a.table", "xpm fs attach"];
            assert!(parts.iter().all(|part| error.contains(part)) && !error.contains('\n'), "{error}");
            assert_eq!(filled.bytes(), bytes, "it is left alone");
        }
        for (text, part) in [
            ("", "no table"),
            ("xpm-tree 2\n", "newer"),
            ("xpm-tree 1\n", "empty"),
            ("xpm-tree 1", "no table"),
        ] {
            fs::write(filled.path(), text).unwrap();
            let error = filled.open().unwrap_err().to_string();
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_long_file_is_written_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.table");
        let (mut journal, mut table) = Journal::open(&path, new).unwrap();
        let name = Text::new(&[b'x'; 200]);
        let (node, place) = (table.number(), table.number());
        let is = Node { names: 1, ..Node::new(Kind::File, 0o644, (0, 0), 7) };
        for _ in 0..3000 {
            let changes = [
                Change::Node { node, is: is.clone() },
                Change::Name { of: ROOT, name: name.clone(), node, place },
            ];
            journal.append(&changes).unwrap();
            changes.iter().for_each(|change| table.apply(change));
            journal.shorten(&table);
        }
        assert!(fs::metadata(&path).unwrap().len() < LEN_MIN + 1000);
        make(&mut journal, &mut table, "after that");
        drop(journal);
        assert_eq!(Journal::open(&path, new).unwrap().1, table);
    }

    proptest! {
        #[test]
        fn any_file_is_answered(text in ".{0,80}", bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
            let _ = read(format!("{HEADER}\n{text}").as_bytes());
            let _ = read(&line_of(&text));
        }
    }

    /// A line whose hash is right, whatever it says.
    fn line_of(rest: &str) -> Vec<u8> {
        format!("{HEADER}\n{:016x} {rest}\n", xxh3_64(rest.as_bytes())).into_bytes()
    }
}
