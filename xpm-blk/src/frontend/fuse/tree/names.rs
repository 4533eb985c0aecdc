//! Operations on names: looking up, making, removing, renaming and listing. The kernel has checked permissions, and
//! has the directories locked that a change concerns.

use rustix::io::Errno;
use xpm_fuse::wire::reply::{self, Entry as Reply, Opened, Validity};
use xpm_fuse::wire::{
    Dirents, FileKind, Full, Header, Name, OUT_HEADER_LEN, OpenFlags, Operation, ReadAt, RenameFlags,
    Request, Unique,
};

use super::super::file::{now, to_nanoseconds};
use super::clerk::{ATTRIBUTES, Clerk, kind};
use super::table::{Change, Kind, Node, ROOT, Text};

/// O_EXCL of open(2) in a CREATE.
const EXCLUSIVE: u32 = libc::O_EXCL as u32;

impl Clerk {
    /// Answers a request about names; any other one is refused.
    pub(super) fn names(&mut self, request: &Request<'_>) -> Result<(), Errno> {
        let Request { header, operation } = request;
        let (unique, of) = (header.unique, header.nodeid);
        let entry = match operation {
            Operation::Lookup { name } => {
                return match self.table.entry(of, name.as_bytes()) {
                    Some(entry) => self.tell_entry(unique, Ok(entry.node)),
                    None => self.send(&reply::error(unique, Errno::NOENT)),
                };
            }
            Operation::Mknod { name, mode, .. } => match mode & libc::S_IFMT {
                libc::S_IFREG => self.make(header, *name, Kind::File, *mode, b""),
                _ => Err(Errno::PERM),
            },
            Operation::Mkdir { name, mode, .. } => self.make(header, *name, Kind::Directory, *mode, b""),
            Operation::Symlink { name, target } => self.make(header, *name, Kind::Symlink, 0o777, target),
            Operation::Link { nodeid, new_name } => self.link(*nodeid, of, *new_name),
            Operation::Create(create) => {
                let there = self.table.entry(of, create.name.as_bytes());
                let made = match there {
                    Some(_) if create.flags & EXCLUSIVE != 0 => Err(Errno::EXIST),
                    Some(entry) => Ok(entry.node),
                    None => self.make(header, create.name, Kind::File, create.mode, b""),
                };
                return self.tell_created(unique, made);
            }
            Operation::Tmpfile { mode, .. } => {
                let made = self.make_nameless(header, *mode);
                return self.tell_created(unique, made);
            }
            Operation::Unlink { name } => {
                let done = self.remove(of, *name, false);
                return self.answer(unique, done);
            }
            Operation::Rmdir { name } => {
                let done = self.remove(of, *name, true);
                return self.answer(unique, done);
            }
            Operation::Rename { name, new_parent, new_name, flags } => {
                let done = self.rename((of, *name), (*new_parent, *new_name), *flags);
                return self.answer(unique, done);
            }
            Operation::Readlink => {
                return match self.table.node(of).filter(|node| node.kind == Kind::Symlink) {
                    Some(node) => {
                        let target = node.target.as_bytes();
                        self.send(&[&reply::header(unique, target.len())[..], target].concat())
                    }
                    None => self.send(&reply::error(unique, Errno::INVAL)),
                };
            }
            Operation::Readdir(read) => return self.list(unique, of, *read, false),
            Operation::Readdirplus(read) => return self.list(unique, of, *read, true),
            _ => return self.send(&reply::error(unique, Errno::NOSYS)),
        };
        self.tell_entry(unique, entry)
    }

    fn reply_of(&self, node: u64) -> Option<Reply> {
        let attr = self.attributes(node)?;
        // Numbers are never given twice, so that none needs a generation.
        Some(Reply {
            nodeid: node,
            generation: 0,
            entry_valid: Validity::FOREVER,
            attr_valid: ATTRIBUTES,
            attr,
        })
    }

    fn tell_entry(&self, unique: Unique, node: Result<u64, Errno>) -> Result<(), Errno> {
        match node.and_then(|node| self.reply_of(node).ok_or(Errno::STALE)) {
            Ok(entry) => self.send(&reply::entry(unique, &entry)),
            Err(errno) => self.send(&reply::error(unique, errno)),
        }
    }

    fn tell_created(&self, unique: Unique, node: Result<u64, Errno>) -> Result<(), Errno> {
        let flags = OpenFlags::KEEP_CACHE.with(OpenFlags::PARALLEL_DIRECT_WRITES);
        match node.and_then(|node| self.reply_of(node).ok_or(Errno::STALE)) {
            Ok(entry) => self.send(&reply::create(unique, &entry, Opened { fh: 0, flags })),
            Err(errno) => self.send(&reply::error(unique, errno)),
        }
    }

    /// A directory that files can be made in.
    fn directory(&self, number: u64) -> Result<Node, Errno> {
        let node = self.table.node(number).ok_or(Errno::STALE)?;
        match node.kind {
            Kind::Directory if node.names == 0 => Err(Errno::NOENT),
            Kind::Directory => Ok(node.clone()),
            Kind::File | Kind::Symlink => Err(Errno::NOTDIR),
        }
    }

    /// A node without a name, as it is made in a directory: its group is the directory's where that has the
    /// set-group-ID bit, which directories inherit.
    fn new_node(&self, header: &Header, of: &Node, kind: Kind, mode: u32) -> Node {
        let inherits = of.mode & libc::S_ISGID != 0;
        let gid = if inherits { of.gid } else { header.gid };
        let mode = if inherits && kind == Kind::Directory { mode | libc::S_ISGID } else { mode };
        Node::new(kind, mode, (header.uid, gid), to_nanoseconds(now()))
    }

    fn make(
        &mut self,
        header: &Header,
        name: Name<'_>,
        kind: Kind,
        mode: u32,
        target: &[u8],
    ) -> Result<u64, Errno> {
        let of = header.nodeid;
        let directory = self.directory(of)?;
        if self.table.entry(of, name.as_bytes()).is_some() {
            return Err(Errno::EXIST);
        }
        let node = self.table.number();
        let parent = if kind == Kind::Directory { of } else { 0 };
        let new = self.new_node(header, &directory, kind, mode);
        let is = Node { names: 1, parent, target: Text::new(target), ..new };
        self.name((of, directory), name, node, is)
    }

    /// Gives a node a name in a directory, and the node its new state.
    fn name(
        &mut self,
        (of, directory): (u64, Node),
        name: Name<'_>,
        node: u64,
        is: Node,
    ) -> Result<u64, Errno> {
        let place = self.table.number();
        self.commit(&[
            Change::Node { node, is },
            Change::Name { of, name: Text::new(name.as_bytes()), node, place },
            touched(of, directory),
        ])?;
        Ok(node)
    }

    fn make_nameless(&mut self, header: &Header, mode: u32) -> Result<u64, Errno> {
        let directory = self.directory(header.nodeid)?;
        let node = self.table.number();
        let is = self.new_node(header, &directory, Kind::File, mode);
        self.commit(&[Change::Node { node, is }])?;
        Ok(node)
    }

    fn link(&mut self, node: u64, of: u64, name: Name<'_>) -> Result<u64, Errno> {
        let directory = self.directory(of)?;
        let linked = self.table.node(node).ok_or(Errno::STALE)?.clone();
        if linked.kind == Kind::Directory {
            return Err(Errno::PERM);
        }
        if self.table.entry(of, name.as_bytes()).is_some() {
            return Err(Errno::EXIST);
        }
        let is = Node { names: linked.names + 1, changed: to_nanoseconds(now()), ..linked };
        self.name((of, directory), name, node, is)
    }

    fn remove(&mut self, of: u64, name: Name<'_>, is_directory: bool) -> Result<(), Errno> {
        let directory = self.directory(of)?;
        let entry = self.table.entry(of, name.as_bytes()).ok_or(Errno::NOENT)?;
        let node = self.table.node(entry.node).ok_or(Errno::STALE)?.clone();
        match (node.kind, is_directory) {
            (Kind::Directory, false) => return Err(Errno::ISDIR),
            (Kind::File | Kind::Symlink, true) => return Err(Errno::NOTDIR),
            (Kind::Directory, true) if !self.table.is_empty_directory(entry.node) => {
                return Err(Errno::NOTEMPTY);
            }
            _ => {}
        }
        // It lives on without a name, until the kernel forgets it.
        self.commit(&[
            Change::NoName { of, name: Text::new(name.as_bytes()) },
            unnamed(entry.node, node),
            touched(of, directory),
        ])
    }

    fn rename(
        &mut self,
        (from, name): (u64, Name<'_>),
        (to, new_name): (u64, Name<'_>),
        flags: RenameFlags,
    ) -> Result<(), Errno> {
        let (exchanges, new_only) =
            (flags.contains(RenameFlags::EXCHANGE), flags.contains(RenameFlags::NOREPLACE));
        if flags.contains(RenameFlags::WHITEOUT) || exchanges && new_only {
            return Err(Errno::INVAL);
        }
        let (source, target) = (self.directory(from)?, self.directory(to)?);
        let entry = self.table.entry(from, name.as_bytes()).ok_or(Errno::NOENT)?;
        let there = self.table.entry(to, new_name.as_bytes());
        let moved = self.table.node(entry.node).ok_or(Errno::STALE)?.clone();
        let replaced =
            there.map(|there| self.table.node(there.node).cloned().ok_or(Errno::STALE)).transpose()?;
        if there.is_some_and(|there| there.node == entry.node) {
            return Ok(());
        }
        let traps =
            |node: u64, kind: Kind, into: u64| kind == Kind::Directory && self.table.is_within(into, node);
        if traps(entry.node, moved.kind, to) {
            return Err(Errno::INVAL);
        }
        let (old, new) = (Text::new(name.as_bytes()), Text::new(new_name.as_bytes()));
        let mut changes = Vec::new();
        match (there, replaced) {
            (None, _) if exchanges => return Err(Errno::NOENT),
            (Some(_), _) if new_only => return Err(Errno::EXIST),
            (Some(there), Some(other)) if exchanges => {
                if traps(there.node, other.kind, from) {
                    return Err(Errno::INVAL);
                }
                changes.push(Change::Name {
                    of: from,
                    name: old,
                    node: there.node,
                    place: self.table.number(),
                });
                changes.push(moved_to(there.node, other, from));
            }
            (Some(there), Some(other)) => {
                match (moved.kind, other.kind) {
                    (Kind::Directory, Kind::Directory) if !self.table.is_empty_directory(there.node) => {
                        return Err(Errno::NOTEMPTY);
                    }
                    (Kind::Directory, Kind::File | Kind::Symlink) => return Err(Errno::NOTDIR),
                    (Kind::File | Kind::Symlink, Kind::Directory) => return Err(Errno::ISDIR),
                    _ => {}
                }
                changes.push(Change::NoName { of: from, name: old });
                changes.push(unnamed(there.node, other));
            }
            _ => changes.push(Change::NoName { of: from, name: old }),
        }
        let place = self.table.number();
        changes.push(Change::Name { of: to, name: new, node: entry.node, place });
        changes.push(moved_to(entry.node, moved, to));
        changes.push(touched(from, source));
        if to != from {
            changes.push(touched(to, target));
        }
        self.commit(&changes)
    }

    fn list(&self, unique: Unique, of: u64, read: ReadAt, plus: bool) -> Result<(), Errno> {
        let Some(node) = self.table.node(of).filter(|node| node.kind == Kind::Directory) else {
            return self.send(&reply::error(unique, Errno::STALE));
        };
        let mut buffer = vec![0; OUT_HEADER_LEN + read.size as usize];
        let mut listing = Dirents::new(&mut buffer, read.size);
        let dots = [(1, of, Name::DOT), (2, node.parent.max(ROOT), Name::DOT_DOT)];
        let dots = dots.into_iter().filter(|(place, ..)| *place > read.offset);
        let dots = dots.map(|(place, node, name)| (place, node, name, false));
        let entries = self.table.listing(of, read.offset.max(2)).filter_map(|(name, entry)| {
            Some((entry.place, entry.node, Name::new(name.as_bytes()).ok()?, true))
        });
        for (place, node, name, counts) in dots.chain(entries) {
            let pushed = match self.reply_of(node) {
                Some(entry) if plus => {
                    let nodeid = if counts { entry.nodeid } else { 0 };
                    listing.push_plus(&Reply { nodeid, ..entry }, place, self.kind_of(node), name)
                }
                _ => listing.push(node, place, self.kind_of(node), name),
            };
            if pushed == Err(Full) {
                break;
            }
        }
        self.send(listing.finish(unique))
    }

    fn kind_of(&self, node: u64) -> FileKind {
        self.table.node(node).map_or(FileKind::Regular, |node| kind(node.kind))
    }
}

/// A directory whose entries change.
fn touched(number: u64, node: Node) -> Change {
    let time = to_nanoseconds(now());
    Change::Node { node: number, is: Node { modified: time, changed: time, ..node } }
}

/// A node that loses a name. A directory has one.
fn unnamed(number: u64, node: Node) -> Change {
    let names = node.names.saturating_sub(1);
    Change::Node { node: number, is: Node { names, changed: to_nanoseconds(now()), ..node } }
}

fn moved_to(number: u64, node: Node, to: u64) -> Change {
    let parent = if node.kind == Kind::Directory { to } else { 0 };
    Change::Node { node: number, is: Node { parent, changed: to_nanoseconds(now()), ..node } }
}
