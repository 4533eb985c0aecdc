//! The hot set of a machine that moves: the pages of its RAM that the source has cached. The destination fetches them
//! while the guest runs, so that the guest's first pass over its memory does not wait for each page.
//!
//! The page cache has no order of use that a process could read (mincore(2) and cachestat(2) tell only what is there),
//! so the pages are fetched in the order of their addresses. The list is advice: a lost or wrong one costs time and
//! nothing else.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, fadvise};
use serde::{Deserialize, Serialize};

use crate::Error;

/// The unit of the list, in bytes: a page of the kernel.
pub(crate) const PAGE: u64 = 4096;
/// The part of a file that is looked at first, in pages.
const CHUNK: u64 = 512;
/// Most messages of one list. With [`RUNS_MAX`] this bounds the list to about 300 kB.
pub(crate) const MESSAGES_MAX: usize = 32;
/// Most runs of one message: with 10 bytes for each of two numbers a message stays below 11 kB.
const RUNS_MAX: usize = 512;
/// Bytes that are requested with one read. The kernel makes one FUSE request of them.
const PIECE: u64 = 128 << 10;
/// Bytes under way at a time. A page that the guest waits for queues behind at most this much.
const WINDOW: u64 = 512 << 10;

/// Some cached pages of a file of RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runs {
    /// The number of the file among those of the machine, from 0.
    pub file: u32,
    /// The page that the first gap starts at.
    pub start: u64,
    /// Pages to skip and pages that are cached, in turn.
    pub runs: Vec<(u32, u32)>,
}

/// Cached pages as ranges of page numbers, in order: first page and page behind the last.
type Ranges = Vec<(u64, u64)>;

/// The cached pages of a file with this many pages. `count` returns how many pages of a range are cached.
pub(crate) fn cached_ranges(
    pages: u64,
    mut count: impl FnMut(u64, u64) -> io::Result<u64>,
) -> io::Result<Ranges> {
    let mut ranges = Ranges::new();
    for first in (0..pages).step_by(CHUNK as usize) {
        split(first, (first + CHUNK).min(pages), &mut count, &mut ranges)?;
    }
    Ok(ranges)
}

/// Adds the cached pages between two page numbers. Halves a part that is cached in part.
fn split(
    first: u64,
    end: u64,
    count: &mut impl FnMut(u64, u64) -> io::Result<u64>,
    ranges: &mut Ranges,
) -> io::Result<()> {
    let cached = count(first, end)?;
    if cached == 0 {
        return Ok(());
    }
    if cached >= end - first {
        match ranges.last_mut() {
            Some(last) if last.1 == first => last.1 = end,
            _ => ranges.push((first, end)),
        }
        return Ok(());
    }
    let middle = first + (end - first) / 2;
    if middle == first {
        return Ok(());
    }
    split(first, middle, count, ranges)?;
    split(middle, end, count, ranges)
}

/// Merges ranges over the shortest gaps until there are at most this many.
fn merge(mut ranges: Ranges, most: usize) -> Ranges {
    let mut gap = 1;
    while ranges.len() > most {
        let mut merged = Ranges::with_capacity(ranges.len());
        for (first, end) in ranges {
            match merged.last_mut() {
                Some(last) if first - last.1 <= gap => last.1 = end,
                _ => merged.push((first, end)),
            }
        }
        (ranges, gap) = (merged, gap * 2);
    }
    ranges
}

/// The messages for the cached pages of all files of a machine.
pub(crate) fn messages(files: Vec<Ranges>) -> Vec<Runs> {
    let most = MESSAGES_MAX * RUNS_MAX / files.len().max(1);
    let mut messages = Vec::new();
    for (file, ranges) in (0..).zip(files) {
        // Each file may leave its last message partly empty.
        let ranges = merge(ranges, most.saturating_sub(RUNS_MAX).max(RUNS_MAX));
        let mut at = 0;
        for part in ranges.chunks(RUNS_MAX) {
            let start = at;
            let mut runs = Vec::with_capacity(part.len());
            for &(first, end) in part {
                // A file of RAM has fewer than 2^32 pages (16 TiB); a longer one loses the rest of its list.
                let (Ok(skip), Ok(len)) = (u32::try_from(first - at), u32::try_from(end - first)) else {
                    return messages;
                };
                runs.push((skip, len));
                at = end;
            }
            messages.push(Runs { file, start, runs });
        }
    }
    messages
}

/// The files of a machine at its destination, and where the list of each has come to.
struct Target {
    file: File,
    pages: u64,
    at: u64,
}

/// Reads lists from `input`, one JSON message per line, and has the kernel cache these pages of the files. Every page
/// is read once at most. Returns the bytes that were read. Blocks until the input has ended and all pages are cached.
///
/// # Errors
/// When a file cannot be opened or read, or a line is no message.
pub fn fetch(files: &[PathBuf], input: impl BufRead) -> Result<u64, Error> {
    let mut targets = Vec::new();
    for path in files {
        let file = open_with_read_ahead(path).map_err(Error::io("open", path))?;
        let pages = file.metadata().map_err(Error::io("look at", path))?.len() / PAGE;
        targets.push(Target { file, pages, at: 0 });
    }
    let mut read = 0;
    for line in input.lines() {
        let line = line.map_err(Error::io("read", Path::new("standard input")))?;
        let runs: Runs = serde_json::from_str(&line)
            .map_err(|error| Error::Usage(format!("no list of pages: {error}")))?;
        let number = runs.file as usize;
        let Some(target) = targets.get_mut(number) else { continue };
        let pieces = pieces(&runs, target);
        read += read_pieces(&target.file, &pieces).map_err(Error::io("fetch pages of", &files[number]))?;
    }
    Ok(read)
}

/// The pieces of a list in bytes, offset and length. Pages beyond the end of the file, and pages before those of an
/// earlier list, are left out.
fn pieces(runs: &Runs, target: &mut Target) -> Vec<(u64, u64)> {
    let mut pieces = Vec::new();
    let mut at = runs.start;
    for &(skip, len) in &runs.runs {
        let first = at.saturating_add(skip.into());
        at = first.saturating_add(len.into());
        let (first, end) = (first.max(target.at) * u64::from(first < target.pages), at.min(target.pages));
        if first >= end || first < target.at {
            continue;
        }
        target.at = end;
        let mut offset = first * PAGE;
        while offset < end * PAGE {
            let len = PIECE.min(end * PAGE - offset);
            pieces.push((offset, len));
            offset += len;
        }
    }
    pieces
}

fn read_pieces(file: &File, pieces: &[(u64, u64)]) -> io::Result<u64> {
    let mut buffer = vec![0; PIECE as usize];
    let (mut under_way, mut bytes, mut read) = (VecDeque::new(), 0, 0);
    let mut left = pieces.iter();
    loop {
        while bytes < WINDOW
            && let Some(&(offset, len)) = left.next()
        {
            fadvise(file, offset, std::num::NonZeroU64::new(len), Advice::WillNeed)?;
            under_way.push_back((offset, len));
            bytes += len;
        }
        let Some((offset, len)) = under_way.pop_front() else { return Ok(read) };
        // Waits for the pages.
        file.read_exact_at(&mut buffer[..len as usize], offset)?;
        bytes -= len;
        read += len;
    }
}

/// Opens a file so that its requested pages come with requests of up to [`PIECE`] bytes.
///
/// A file of xpm-fs has no read-ahead, because a fault of the guest is to fetch one page. The kernel copies the limit
/// into each open file (file_ra_state_init of the kernel), so it is raised for the moment of this open. The files that
/// QEMU has open keep theirs.
fn open_with_read_ahead(path: &Path) -> io::Result<File> {
    let open = || File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(path);
    let device = std::fs::metadata(path)?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let limit = PathBuf::from(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"));
    let before = std::fs::read_to_string(&limit).unwrap_or_default();
    // Another number is the administrator's wish, or that of an ordinary file system.
    if before.trim() != "0" || std::fs::write(&limit, (PIECE >> 10).to_string()).is_err() {
        return open();
    }
    let file = open();
    std::fs::write(&limit, before.trim())?;
    file
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    fn ranges_of(cached: &[bool]) -> Ranges {
        let count = |first: u64, end: u64| {
            Ok(cached[first as usize..end as usize].iter().filter(|c| **c).count() as u64)
        };
        cached_ranges(cached.len() as u64, count).unwrap()
    }

    fn pages_of(ranges: &Ranges) -> Vec<u64> {
        ranges.iter().flat_map(|&(first, end)| first..end).collect()
    }

    /// The numbers of the pages that a destination with files of this many pages would read.
    fn read_of(messages: &[Runs], file: u32, pages: u64) -> Vec<u64> {
        let mut target = Target { file: tempfile::tempfile().unwrap(), pages, at: 0 };
        let of_file = messages.iter().filter(|message| message.file == file);
        let all: Vec<_> = of_file.flat_map(|message| pieces(message, &mut target)).collect();
        all.iter().flat_map(|&(offset, len)| offset / PAGE..(offset + len) / PAGE).collect()
    }

    proptest! {
        #[test]
        fn all_cached_pages_are_listed_and_no_others(cached in prop::collection::vec(any::<bool>(), 0..2000)) {
            let ranges = ranges_of(&cached);
            let expected: Vec<u64> = (0..cached.len() as u64).filter(|page| cached[*page as usize]).collect();
            prop_assert_eq!(&pages_of(&ranges), &expected);
            let messages = messages(vec![ranges.clone(), ranges]);
            prop_assert!(messages.len() <= MESSAGES_MAX);
            prop_assert_eq!(read_of(&messages, 0, cached.len() as u64), expected.clone());
            prop_assert_eq!(read_of(&messages, 1, cached.len() as u64), expected);
        }

        #[test]
        fn no_list_reads_a_page_twice_or_beyond_the_end(
            lists in prop::collection::vec((any::<u64>(), prop::collection::vec(any::<(u32, u32)>(), 0..9)), 0..5)
        ) {
            let lists: Vec<Runs> = lists.into_iter().map(|(start, runs)| Runs { file: 0, start, runs }).collect();
            let near = lists.iter().cloned().map(|runs| Runs { start: runs.start % 90, ..runs });
            let near: Vec<Runs> = near
                .map(|mut list| {
                    list.runs.iter_mut().for_each(|(skip, len)| (*skip, *len) = (*skip % 9, *len % 40));
                    list
                })
                .collect();
            for lists in [lists, near] {
                let read = read_of(&lists, 0, 100);
                prop_assert!(read.windows(2).all(|pair| pair[0] < pair[1]), "{:?}", read);
                prop_assert!(read.last().is_none_or(|last| *last < 100), "{:?}", read);
            }
        }
    }

    #[test]
    fn a_scattered_cache_has_a_bounded_list() {
        let every_other: Ranges = (0..1_000_000).map(|page| (2 * page, 2 * page + 1)).collect();
        let messages = messages(vec![every_other, vec![(3, 4)]]);
        assert!(messages.len() <= MESSAGES_MAX, "{}", messages.len());
        let longest = messages.iter().map(|message| serde_json::to_vec(message).unwrap().len()).max();
        assert!(longest < Some(11 << 10), "{longest:?}");
        assert!(messages.iter().any(|message| message.file == 1));
    }

    #[test]
    fn listed_pages_are_read() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![7; 1 << 20]).unwrap();
        let line = r#"{"file":0,"start":2,"runs":[[0,100],[50,500]]}"#;
        let foreign = r#"{"file":9,"start":0,"runs":[[0,1]]}"#;
        let input = format!("{line}\n{foreign}\n{line}\n");
        let files = [file.path().to_owned()];
        // 100 pages, and the 104 of the 500 that the file has; the second list has none that are new.
        assert_eq!(fetch(&files, input.as_bytes()).unwrap(), 204 * PAGE);
        assert!(fetch(&files, "rubbish\n".as_bytes()).unwrap_err().to_string().contains("no list of pages"));
        assert!(fetch(&["/nonexistent".into()], input.as_bytes()).is_err());
    }
}
