//! Attributes of files, as stat(2) shows and SETATTR changes them, without changes of the size.

use rustix::io::Errno;
use xpm_fuse::wire::reply;
use xpm_fuse::wire::{Attr, FileKind, Setattr, TimeOrNow, Timestamp, Unique};

use super::super::super::PAGE;
use super::super::super::file::{from_nanoseconds, now, to_nanoseconds};
use super::super::table::{Change, Kind, Node};
use super::{ATTRIBUTES, Clerk};

impl Clerk {
    pub(super) fn tell_attributes(&self, unique: Unique, number: u64) -> Result<(), Errno> {
        match self.attributes(number) {
            Some(attributes) => self.send(&reply::attr(unique, &attributes, ATTRIBUTES)),
            None => self.send(&reply::error(unique, Errno::STALE)),
        }
    }

    pub(super) fn tell_change(
        &self,
        unique: Unique,
        number: u64,
        done: Result<(), Errno>,
    ) -> Result<(), Errno> {
        match done {
            Ok(()) => self.tell_attributes(unique, number),
            Err(errno) => self.send(&reply::error(unique, errno)),
        }
    }

    /// As stat(2) shows them.
    pub(in super::super) fn attributes(&self, number: u64) -> Option<Attr> {
        let node = self.table.node(number)?;
        let size = match node.kind {
            Kind::File => node.size,
            Kind::Symlink => node.target.as_bytes().len() as u64,
            Kind::Directory => PAGE,
        };
        // All of an allocation is reserved, whether anything was written there or not.
        let taken = if node.store == 0 { 0 } else { self.tree.capacity(node.store).unwrap_or(size) };
        Some(Attr {
            ino: number,
            size,
            blocks: taken / 512,
            atime: from_nanoseconds(node.accessed),
            mtime: from_nanoseconds(node.modified),
            ctime: from_nanoseconds(node.changed),
            mode: kind(node.kind).mode_bits() | node.mode,
            nlink: self.table.links(number),
            uid: node.uid,
            gid: node.gid,
            blksize: PAGE as u32,
        })
    }

    /// All but the size.
    pub(super) fn set_attributes(&mut self, number: u64, change: &Setattr) -> Result<(), Errno> {
        let node = self.table.node(number).ok_or(Errno::STALE)?.clone();
        let time = |wanted: Option<TimeOrNow>, before: u64| match wanted {
            Some(TimeOrNow::Now) => to_nanoseconds(now()),
            Some(TimeOrNow::At(time)) => to_nanoseconds(time),
            None => before,
        };
        let changed: Timestamp = change.ctime.unwrap_or_else(now);
        let is = Node {
            mode: change.mode.map_or(node.mode, |mode| mode & 0o7777),
            uid: change.uid.unwrap_or(node.uid),
            gid: change.gid.unwrap_or(node.gid),
            accessed: time(change.atime, node.accessed),
            modified: time(change.mtime, node.modified),
            changed: to_nanoseconds(changed),
            ..node
        };
        self.commit(&[Change::Node { node: number, is }])
    }
}

pub(in super::super) const fn kind(kind: Kind) -> FileKind {
    match kind {
        Kind::File => FileKind::Regular,
        Kind::Directory => FileKind::Directory,
        Kind::Symlink => FileKind::Symlink,
    }
}
