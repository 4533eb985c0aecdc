//! The files as they have to be, and the operations on them and on the real ones.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{
    Advice, CWD, FallocateFlags, RenameFlags, copy_file_range, fadvise, fallocate, renameat_with,
};

use super::operation::{Operation, PAGE, SLOTS};
use super::{Header, Shape};
use crate::mapped::Mapped;

/// The content that a file has to have, with the count of its names.
#[derive(Default)]
struct Node {
    data: Vec<u8>,
    links: u64,
}

type Shared = Rc<RefCell<Node>>;

/// An open file.
struct Open {
    file: File,
    /// The same without the page cache.
    direct: File,
    mapped: Option<(Mapped, usize)>,
    node: Shared,
}

/// The real files, and the model.
pub struct Site {
    header: Header,
    root: PathBuf,
    open: [Option<Open>; SLOTS],
    /// Paths below the root.
    names: BTreeMap<String, Shared>,
    directories: BTreeSet<String>,
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Bytes of a write, which tell their offset.
fn content(fill: u64, at: usize, len: usize) -> Vec<u8> {
    let byte = |offset: usize| {
        let word = (fill ^ (offset as u64 / 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.to_le_bytes()[offset % 8]
    };
    (at..at + len).map(byte).collect()
}

/// A buffer for direct I/O.
struct Aligned(Vec<u8>);

impl Aligned {
    fn new(len: usize) -> Aligned {
        Aligned(vec![0; len + PAGE])
    }

    fn pages(&mut self) -> &mut [u8] {
        let start = self.0.as_ptr().align_offset(PAGE);
        let len = self.0.len() - PAGE;
        &mut self.0[start..start + len]
    }
}

/// Compares bytes that were read at an offset.
fn compare(at: usize, found: &[u8], wanted: &[u8]) -> Result<(), String> {
    if found.len() != wanted.len() {
        return Err(format!("{} bytes at {at} in place of {}", found.len(), wanted.len()));
    }
    let Some(first) = found.iter().zip(wanted).position(|(found, wanted)| found != wanted) else {
        return Ok(());
    };
    let bad = found.iter().zip(wanted).filter(|(found, wanted)| found != wanted).count();
    let shown = |bytes: &[u8]| format!("{:02x?}", &bytes[first..bytes.len().min(first + 8)]);
    Err(format!("{bad} bad bytes from {:#x}: {} in place of {}", at + first, shown(found), shown(wanted)))
}

/// Compares how an operation on names ended.
fn outcome(done: &io::Result<()>, wanted: Option<i32>) -> Result<(), String> {
    let found = done.as_ref().err().map(|error| error.raw_os_error().unwrap_or_default());
    let shown = |errno: Option<i32>| {
        errno.map_or("success".to_owned(), |errno| io::Error::from_raw_os_error(errno).to_string())
    };
    if found == wanted { Ok(()) } else { Err(format!("{} in place of {}", shown(found), shown(wanted))) }
}

impl Site {
    pub(super) fn new(header: Header, path: &Path) -> io::Result<Site> {
        let mut names = BTreeMap::new();
        if header.shape == Shape::File {
            let len = usize::try_from(fs::metadata(path)?.len()).map_err(io::Error::other)?;
            if len != header.max {
                return Err(io::Error::other(format!(
                    "{} has {len} bytes, not {}",
                    path.display(),
                    header.max
                )));
            }
            names.insert(String::new(), Rc::new(RefCell::new(Node { data: vec![0; len], links: 1 })));
        }
        let root = path.to_owned();
        Ok(Site { header, root, open: [const { None }; SLOTS], names, directories: BTreeSet::new() })
    }

    /// The length that an open file has to have; none for a slot without one.
    pub(super) fn len_of(&self, slot: usize) -> Option<usize> {
        Some(self.open.get(slot)?.as_ref()?.node.borrow().data.len())
    }

    /// The length of the mapping that can be accessed.
    pub(super) fn mapped_of(&self, slot: usize) -> Option<usize> {
        let (_, len) = self.open.get(slot)?.as_ref()?.mapped.as_ref()?;
        Some(self.len_of(slot)?.min(*len))
    }

    fn path(&self, name: &str) -> PathBuf {
        // A path with a `/` at its end would be a directory.
        if name.is_empty() { self.root.clone() } else { self.root.join(name) }
    }

    pub(super) fn close_all(&mut self) {
        self.open = [const { None }; SLOTS];
    }

    /// Does an operation, and compares its outcome. One that is not possible is skipped.
    pub(super) fn apply(&mut self, operation: &Operation) -> Result<(), String> {
        match operation {
            Operation::Create { slot, path } => self.create(*slot, path),
            Operation::Open { slot, path } => self.open(*slot, path),
            Operation::Nameless { slot } => {
                let mut options = OpenOptions::new();
                let options = options.read(true).write(true).custom_flags(libc::O_TMPFILE);
                let file = options.open(&self.root).map_err(said)?;
                self.put(*slot, file, Shared::default())
            }
            Operation::Close { slot } => {
                self.open[*slot] = None;
                Ok(())
            }
            Operation::Remove { path } => {
                let wanted = (!self.names.contains_key(path)).then_some(libc::ENOENT);
                outcome(&fs::remove_file(self.path(path)), wanted)?;
                self.unlink(path);
                Ok(())
            }
            Operation::Rename { from, to } => self.rename(from, to),
            Operation::Exchange { from, to } => {
                let both = self.names.contains_key(from) && self.names.contains_key(to);
                let done = renameat_with(CWD, self.path(from), CWD, self.path(to), RenameFlags::EXCHANGE);
                outcome(&done.map_err(Into::into), (!both).then_some(libc::ENOENT))?;
                if both && from != to {
                    let (first, second) = (self.names[from].clone(), self.names[to].clone());
                    self.names.extend([(from.clone(), second), (to.clone(), first)]);
                }
                Ok(())
            }
            Operation::Link { from, to } => {
                let node = self.names.get(from).cloned();
                let wanted = match (&node, self.names.contains_key(to)) {
                    (Some(_), true) => Some(libc::EEXIST),
                    (Some(_), false) if self.has_parent(to) => None,
                    _ => Some(libc::ENOENT),
                };
                outcome(&fs::hard_link(self.path(from), self.path(to)), wanted)?;
                if let (Some(node), None) = (node, wanted) {
                    node.borrow_mut().links += 1;
                    self.names.insert(to.clone(), node);
                }
                Ok(())
            }
            Operation::MakeDirectory { path } => {
                let wanted = self.directories.contains(path).then_some(libc::EEXIST);
                outcome(&fs::create_dir(self.path(path)), wanted)?;
                self.directories.insert(path.clone());
                Ok(())
            }
            Operation::RemoveDirectory { path } => {
                let wanted = if self.directories.contains(path) {
                    self.is_full(path).then_some(libc::ENOTEMPTY)
                } else {
                    Some(libc::ENOENT)
                };
                outcome(&fs::remove_dir(self.path(path)), wanted)?;
                if wanted.is_none() {
                    self.directories.remove(path);
                }
                Ok(())
            }
            Operation::RenameDirectory { from, to } => self.rename_directory(from, to),
            Operation::List => self.list(),
            _ => self.access(operation),
        }
    }

    fn put(&mut self, slot: usize, file: File, node: Shared) -> Result<(), String> {
        let mut options = OpenOptions::new();
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        let direct = options.read(true).write(true).custom_flags(libc::O_DIRECT).open(own).map_err(said)?;
        self.open[slot] = Some(Open { file, direct, mapped: None, node });
        Ok(())
    }

    fn has_parent(&self, path: &str) -> bool {
        path.rsplit_once('/').is_none_or(|(parent, _)| self.directories.contains(parent))
    }

    fn is_full(&self, directory: &str) -> bool {
        self.names.keys().any(|path| path.rsplit_once('/').is_some_and(|(parent, _)| parent == directory))
    }

    fn unlink(&mut self, path: &str) {
        if let Some(node) = self.names.remove(path) {
            node.borrow_mut().links -= 1;
        }
    }

    fn create(&mut self, slot: usize, path: &str) -> Result<(), String> {
        let wanted = if self.names.contains_key(path) {
            Some(libc::EEXIST)
        } else {
            (!self.has_parent(path)).then_some(libc::ENOENT)
        };
        let made = OpenOptions::new().read(true).write(true).create_new(true).open(self.path(path));
        match made {
            Ok(file) => {
                outcome(&Ok(()), wanted)?;
                let node = Rc::new(RefCell::new(Node { data: Vec::new(), links: 1 }));
                self.names.insert(path.to_owned(), node.clone());
                self.put(slot, file, node)
            }
            Err(error) => outcome(&Err(error), wanted),
        }
    }

    fn open(&mut self, slot: usize, path: &str) -> Result<(), String> {
        let node = self.names.get(path).cloned();
        let opened = OpenOptions::new().read(true).write(true).open(self.path(path));
        match (opened, node) {
            (Ok(file), Some(node)) => self.put(slot, file, node),
            (opened, node) => outcome(&opened.map(drop), node.is_none().then_some(libc::ENOENT)),
        }
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<(), String> {
        let node = self.names.get(from).cloned();
        let wanted = (node.is_none() || !self.has_parent(to)).then_some(libc::ENOENT);
        outcome(&fs::rename(self.path(from), self.path(to)), wanted)?;
        let (Some(node), None) = (node, wanted) else { return Ok(()) };
        // Two names of one file: both stay (rename(2)).
        if self.names.get(to).is_none_or(|old| !Rc::ptr_eq(old, &node)) {
            self.unlink(to);
            self.names.remove(from);
            self.names.insert(to.to_owned(), node);
        }
        Ok(())
    }

    fn rename_directory(&mut self, from: &str, to: &str) -> Result<(), String> {
        let wanted = match (self.directories.contains(from), from == to) {
            (false, _) => Some(libc::ENOENT),
            (true, true) => None,
            (true, false) => self.is_full(to).then_some(libc::ENOTEMPTY),
        };
        outcome(&fs::rename(self.path(from), self.path(to)), wanted)?;
        if wanted.is_none() && from != to {
            self.directories.remove(from);
            self.directories.insert(to.to_owned());
            let moved =
                |path: &str| path.strip_prefix(from)?.strip_prefix('/').map(|name| format!("{to}/{name}"));
            let names = std::mem::take(&mut self.names).into_iter();
            self.names = names.map(|(path, node)| (moved(&path).unwrap_or(path), node)).collect();
        }
        Ok(())
    }

    /// Compares names, lengths and links.
    fn list(&self) -> Result<(), String> {
        if self.header.shape == Shape::File {
            return Ok(());
        }
        let mut wanted: BTreeSet<String> = self.names.keys().cloned().collect();
        wanted.extend(self.directories.iter().cloned());
        let mut found = BTreeSet::new();
        for directory in std::iter::once("").chain(self.directories.iter().map(String::as_str)) {
            for entry in fs::read_dir(self.path(directory)).map_err(said)? {
                let name = entry.map_err(said)?.file_name().to_string_lossy().into_owned();
                found.insert(if directory.is_empty() { name } else { format!("{directory}/{name}") });
            }
        }
        if found != wanted {
            return Err(format!("the names are {found:?} in place of {wanted:?}"));
        }
        for (path, node) in &self.names {
            let (facts, node) = (fs::metadata(self.path(path)).map_err(said)?, node.borrow());
            let found = (facts.len(), facts.nlink());
            let wanted = (node.data.len() as u64, node.links);
            if found != wanted {
                return Err(format!("{path} has length and links {found:?} in place of {wanted:?}"));
            }
        }
        Ok(())
    }

    pub(super) fn check_all(&self) -> Result<(), String> {
        self.list()?;
        for (path, node) in &self.names {
            let at = |why: String| format!("file {path:?}: {why}");
            let file = File::open(self.path(path)).map_err(said).map_err(at)?;
            file.sync_all().map_err(said).map_err(at)?;
            fadvise(&file, 0, None, Advice::DontNeed).map_err(said)?;
            let wanted = &node.borrow().data;
            // Beyond the end there has to be nothing.
            let found = read_at(&file, 0, wanted.len() + 1).map_err(at)?;
            compare(0, &found, wanted).map_err(at)?;
        }
        Ok(())
    }

    /// Operations on the content of open files.
    fn access(&mut self, operation: &Operation) -> Result<(), String> {
        if let Operation::Copy { from, from_at, to, to_at, len } = *operation {
            return self.copy((from, from_at), (to, to_at), len);
        }
        let (is_fixed, max) = (self.header.shape == Shape::File, self.header.max);
        let Some(slot) = slot_of(operation) else { return Ok(()) };
        let mapped = self.mapped_of(slot);
        let Some(open) = self.open.get_mut(slot).and_then(Option::as_mut) else { return Ok(()) };
        let mut node = open.node.borrow_mut();
        let data = &mut node.data;
        match *operation {
            Operation::Read { at, len, .. } => {
                compare(at, &read_at(&open.file, at, len)?, piece(data, at, len))?;
            }
            Operation::ReadDirect { at, len, .. } => {
                let mut buffer = Aligned::new(len);
                let read = open.direct.read_at(buffer.pages(), at as u64).map_err(said)?;
                compare(at, &buffer.pages()[..read], piece(data, at, len))?;
            }
            Operation::Write { at, len, fill, .. } => {
                let bytes = content(fill, at, len.min(max.saturating_sub(at)));
                open.file.write_all_at(&bytes, at as u64).map_err(said)?;
                put(data, at, &bytes);
            }
            Operation::WriteDirect { at, len, fill, .. } => {
                let bytes = content(fill, at, len.min(max.saturating_sub(at)));
                let mut buffer = Aligned::new(bytes.len());
                buffer.pages().copy_from_slice(&bytes);
                open.direct.write_all_at(buffer.pages(), at as u64).map_err(said)?;
                put(data, at, &bytes);
            }
            Operation::Map { .. } => {
                open.mapped = (!data.is_empty()).then(|| (Mapped::new(&open.file, data.len()), data.len()));
            }
            Operation::ReadMapped { at, len, .. } if mapped.is_some_and(|end| at + len <= end) => {
                let mut bytes = vec![0; len];
                open.mapped.iter().for_each(|(mapped, _)| mapped.read(at, &mut bytes));
                compare(at, &bytes, piece(data, at, len))?;
            }
            Operation::WriteMapped { at, len, fill, .. } if mapped.is_some_and(|end| at + len <= end) => {
                let bytes = content(fill, at, len);
                open.mapped.iter().for_each(|(mapped, _)| mapped.write(at, &bytes));
                put(data, at, &bytes);
            }
            Operation::Truncate { len, .. } if !is_fixed => {
                open.file.set_len(len as u64).map_err(said)?;
                data.resize(len, 0);
            }
            Operation::Punch { at, len, .. } => {
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&open.file, how, at as u64, len as u64).map_err(said)?;
                let end = data.len();
                data[at.min(end)..(at + len).min(end)].fill(0);
            }
            Operation::Zero { at, len, .. } => {
                let mut how = FallocateFlags::ZERO_RANGE;
                how.set(FallocateFlags::KEEP_SIZE, is_fixed);
                fallocate(&open.file, how, at as u64, len as u64).map_err(said)?;
                put(data, at, &vec![0; len]);
            }
            Operation::Allocate { at, len, .. } if !is_fixed => {
                fallocate(&open.file, FallocateFlags::empty(), at as u64, len as u64).map_err(said)?;
                data.resize(data.len().max(at + len), 0);
            }
            Operation::Sync { .. } => open.file.sync_all().map_err(said)?,
            Operation::Forget { .. } => {
                open.file.sync_all().map_err(said)?;
                fadvise(&open.file, 0, None, Advice::DontNeed).map_err(said)?;
            }
            _ => return Ok(()),
        }
        let len = open.file.metadata().map_err(said)?.len();
        if len == data.len() as u64 {
            Ok(())
        } else {
            Err(format!("the file has {len} bytes in place of {}", data.len()))
        }
    }

    fn copy(&mut self, from: (usize, usize), to: (usize, usize), len: usize) -> Result<(), String> {
        let open = |slot: usize| self.open.get(slot).and_then(Option::as_ref);
        let (Some(source), Some(target)) = (open(from.0), open(to.0)) else { return Ok(()) };
        if Rc::ptr_eq(&source.node, &target.node) {
            return Ok(());
        }
        let wanted = piece(&source.node.borrow().data, from.1, len).to_vec();
        let (mut at, mut to_at) = (from.1 as u64, to.1 as u64);
        let mut done = 0;
        while done < wanted.len() {
            let left = wanted.len() - done;
            let copied = copy_file_range(&source.file, Some(&mut at), &target.file, Some(&mut to_at), left);
            match copied.map_err(said)? {
                0 => return Err(format!("the copy ends after {done} bytes in place of {}", wanted.len())),
                more => done += more,
            }
        }
        if done > 0 {
            put(&mut target.node.borrow_mut().data, to.1, &wanted);
        }
        Ok(())
    }
}

/// The slot of an operation on content.
fn slot_of(operation: &Operation) -> Option<usize> {
    match *operation {
        Operation::Read { slot, .. }
        | Operation::Write { slot, .. }
        | Operation::ReadDirect { slot, .. }
        | Operation::WriteDirect { slot, .. }
        | Operation::Map { slot }
        | Operation::ReadMapped { slot, .. }
        | Operation::WriteMapped { slot, .. }
        | Operation::Truncate { slot, .. }
        | Operation::Punch { slot, .. }
        | Operation::Zero { slot, .. }
        | Operation::Allocate { slot, .. }
        | Operation::Sync { slot }
        | Operation::Forget { slot } => Some(slot),
        _ => None,
    }
}

/// The bytes of a range that are there.
fn piece(data: &[u8], at: usize, len: usize) -> &[u8] {
    let end = data.len();
    &data[at.min(end)..(at + len).min(end)]
}

/// Writes bytes, with zeros before them where there was nothing.
fn put(data: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    data.resize(data.len().max(at + bytes.len()), 0);
    data[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Reads up to the end of the file.
fn read_at(file: &File, at: usize, len: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    while done < len {
        match file.read_at(&mut bytes[done..], (at + done) as u64).map_err(said)? {
            0 => break,
            more => done += more,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}
