//! The table of a tree: its files and directories, and the allocations behind them. Pure: [`super::journal`] keeps it
//! on disk.
//!
//! A change says what holds afterwards and not how to get there, so that a change which is applied twice does no harm.
//!
//! An allocation of the tree has a state. The table always hears of it before the allocator does:
//!
//! ```text
//!             (written down)         the allocator made it             its file was removed, or cut to 0 bytes
//!   no store -----------------> wanted --------------------> made --------------------+
//!                                  |                                                  v
//!                                  +-- refused, or found after a crash ----------> doomed --(the allocator freed it)--> no store
//! ```

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The first number that files and allocations get. The numbers below it are places of "." and ".." in a listing, and
/// the root.
const FIRST: u64 = 16;
/// Number of the root directory, as FUSE has it.
pub(super) const ROOT: u64 = 1;

/// The kind of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
}

/// A file, a directory or a symbolic link, without the entries of a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Node {
    pub(super) kind: Kind,
    /// Permissions, without the kind.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Names that lead to it. One without a name lives until the kernel forgets it.
    pub(super) names: u32,
    /// Of a file: its size, in bytes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) size: u64,
    /// Of a file: the number of its allocation; 0 while it has none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) store: u64,
    /// Of a directory: the one that it is in; the root is in itself.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) parent: u64,
    /// Of a symbolic link: its target.
    #[serde(default, skip_serializing_if = "Text::is_empty")]
    pub(super) target: Text,
    /// Times, in nanoseconds since 1970.
    pub(super) accessed: u64,
    pub(super) modified: u64,
    pub(super) changed: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde calls")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Bytes that need not be UTF-8, as JSON: each byte is the character of that number.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Text(Vec<u8>);

impl Text {
    pub(super) fn new(bytes: &[u8]) -> Text {
        Text(bytes.to_vec())
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl TryFrom<String> for Text {
    type Error = std::char::TryFromCharError;

    fn try_from(text: String) -> Result<Text, Self::Error> {
        text.chars().map(u8::try_from).collect::<Result<_, _>>().map(Text)
    }
}

impl From<Text> for String {
    fn from(text: Text) -> String {
        text.0.into_iter().map(char::from).collect()
    }
}

/// How far an allocation of the tree is; see the module's picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum StoreState {
    /// The allocator may or may not have made it. Nothing that was written to it has been acknowledged.
    Wanted,
    /// It holds data.
    Made,
    /// It is to be freed.
    Doomed,
}

/// A change of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Change {
    Node {
        node: u64,
        is: Node,
    },
    NoNode {
        node: u64,
    },
    /// The directory `of` has this name for the node. `place` is where the entry is in a listing.
    Name {
        of: u64,
        name: Text,
        node: u64,
        place: u64,
    },
    NoName {
        of: u64,
        name: Text,
    },
    Store {
        store: u64,
        is: StoreState,
    },
    NoStore {
        store: u64,
    },
    /// Numbers below this one were given away. Only in a table that is written anew: else each change tells.
    Next {
        number: u64,
    },
}

/// An entry of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) node: u64,
    /// Where it is in a listing: unique in the tree, never given twice, so that a listing goes on rightly while entries
    /// go.
    pub(super) place: u64,
}

/// The table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Table {
    nodes: BTreeMap<u64, Node>,
    names: BTreeMap<(u64, Text), Entry>,
    places: BTreeMap<(u64, u64), Text>,
    stores: BTreeMap<u64, StoreState>,
    next: u64,
}

impl Table {
    /// A tree without files. The root has these permissions and owners.
    pub(super) fn new(mode: u32, (uid, gid): (u32, u32), now: u64) -> Table {
        let root = Node { parent: ROOT, names: 1, ..Node::new(Kind::Directory, mode, (uid, gid), now) };
        let mut table = Table { next: FIRST, ..Table::default() };
        table.apply(&Change::Node { node: ROOT, is: root });
        table
    }

    /// A number that nothing in this tree has had, for a file, an allocation or a place in a listing.
    pub(super) fn number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    pub(super) fn node(&self, node: u64) -> Option<&Node> {
        self.nodes.get(&node)
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = (u64, &Node)> {
        self.nodes.iter().map(|(&number, node)| (number, node))
    }

    pub(super) fn stores(&self) -> impl Iterator<Item = (u64, StoreState)> + '_ {
        self.stores.iter().map(|(&number, &state)| (number, state))
    }

    pub(super) fn store(&self, store: u64) -> Option<StoreState> {
        self.stores.get(&store).copied()
    }

    pub(super) fn entry(&self, of: u64, name: &[u8]) -> Option<Entry> {
        self.names.get(&(of, Text::new(name))).copied()
    }

    /// Entries of a directory behind a place, in the order of a listing.
    pub(super) fn listing(&self, of: u64, behind: u64) -> impl Iterator<Item = (&Text, Entry)> {
        let from = (of, behind.saturating_add(1));
        let run = self.places.range(from..=(of, u64::MAX));
        run.filter_map(move |(_, name)| Some((name, *self.names.get(&(of, name.clone()))?)))
    }

    pub(super) fn is_empty_directory(&self, of: u64) -> bool {
        self.listing(of, 0).next().is_none()
    }

    /// Whether `inner` is `outer`, or lies anywhere below it.
    pub(super) fn is_within(&self, inner: u64, outer: u64) -> bool {
        let mut at = inner;
        // No path is longer than all nodes are many.
        for _ in 0..=self.nodes.len() {
            match self.nodes.get(&at) {
                _ if at == outer => return true,
                Some(node) if at != ROOT => at = node.parent,
                _ => return false,
            }
        }
        false
    }

    /// Links that stat(2) shows: names of a file; of a directory its name, "." and the ".." of those in it.
    pub(super) fn links(&self, number: u64) -> u32 {
        match self.nodes.get(&number) {
            Some(node) if node.kind == Kind::Directory && node.names > 0 => {
                let inner = self.listing(number, 0).filter(|(_, entry)| {
                    self.nodes.get(&entry.node).is_some_and(|node| node.kind == Kind::Directory)
                });
                2 + inner.count() as u32
            }
            Some(node) => node.names,
            None => 0,
        }
    }

    pub(super) fn apply(&mut self, change: &Change) {
        match change {
            Change::Node { node, is } => drop(self.nodes.insert(*node, is.clone())),
            Change::NoNode { node } => drop(self.nodes.remove(node)),
            Change::Name { of, name, node, place } => {
                let entry = Entry { node: *node, place: *place };
                if let Some(before) = self.names.insert((*of, name.clone()), entry) {
                    self.places.remove(&(*of, before.place));
                }
                self.places.insert((*of, *place), name.clone());
            }
            Change::NoName { of, name } => {
                if let Some(before) = self.names.remove(&(*of, name.clone())) {
                    self.places.remove(&(*of, before.place));
                }
            }
            Change::Store { store, is } => drop(self.stores.insert(*store, *is)),
            Change::NoStore { store } => drop(self.stores.remove(store)),
            Change::Next { .. } => {}
        }
        let given = match change {
            Change::Node { node, .. } => node + 1,
            Change::Name { place, .. } => place + 1,
            Change::Store { store, .. } => store + 1,
            Change::Next { number } => *number,
            Change::NoNode { .. } | Change::NoName { .. } | Change::NoStore { .. } => 0,
        };
        self.next = self.next.max(given).max(FIRST);
    }

    /// Changes that make this table out of an empty one.
    pub(super) fn all(&self) -> Vec<Change> {
        let nodes = self.nodes.iter().map(|(&node, is)| Change::Node { node, is: is.clone() });
        let names = self.names.iter().map(|((of, name), entry)| Change::Name {
            of: *of,
            name: name.clone(),
            node: entry.node,
            place: entry.place,
        });
        let stores = self.stores.iter().map(|(&store, &is)| Change::Store { store, is });
        let next = Change::Next { number: self.next };
        nodes.chain(names).chain(stores).chain([next]).collect()
    }

    /// Whether everything that is named is there.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.nodes.get(&ROOT).is_none_or(|root| root.kind != Kind::Directory) {
            return Err("it has no root directory".to_owned());
        }
        for ((of, name), entry) in &self.names {
            let name = name.as_bytes().escape_ascii();
            if self.nodes.get(of).is_none_or(|node| node.kind != Kind::Directory) {
                return Err(format!("`{name}` is in directory {of}, which does not exist"));
            }
            if !self.nodes.contains_key(&entry.node) {
                return Err(format!("`{name}` leads to file {}, which does not exist", entry.node));
            }
        }
        for (number, node) in &self.nodes {
            if node.store != 0 && !self.stores.contains_key(&node.store) {
                return Err(format!("file {number} has allocation {}, which does not exist", node.store));
            }
        }
        Ok(())
    }
}

impl Node {
    /// One without a name.
    pub(super) fn new(kind: Kind, mode: u32, (uid, gid): (u32, u32), now: u64) -> Node {
        Node {
            kind,
            mode: mode & 0o7777,
            uid,
            gid,
            names: 0,
            size: 0,
            store: 0,
            parent: 0,
            target: Text::default(),
            accessed: now,
            modified: now,
            changed: now,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(table: &mut Table, of: u64, name: &[u8]) -> u64 {
        let (node, place) = (table.number(), table.number());
        let is = Node { names: 1, ..Node::new(Kind::File, 0o644, (0, 0), 7) };
        table.apply(&Change::Node { node, is });
        table.apply(&Change::Name { of, name: Text::new(name), node, place });
        node
    }

    fn listed(table: &Table, behind: u64) -> Vec<Vec<u8>> {
        table.listing(ROOT, behind).map(|(name, _)| name.as_bytes().to_vec()).collect()
    }

    #[test]
    fn a_listing_goes_on_where_it_was_while_entries_come_and_go() {
        let mut table = Table::new(0o755, (0, 0), 1);
        for name in [b"c", b"a", b"b"] {
            file(&mut table, ROOT, name);
        }
        let first = table.entry(ROOT, b"c").unwrap().place;
        assert_eq!(listed(&table, 0), [b"c", b"a", b"b"]);
        table.apply(&Change::NoName { of: ROOT, name: Text::new(b"c") });
        table.apply(&Change::NoName { of: ROOT, name: Text::new(b"a") });
        file(&mut table, ROOT, b"d");
        assert_eq!(listed(&table, first), [b"b", b"d"]);
        // A name that leads elsewhere is listed once.
        let node = table.entry(ROOT, b"d").unwrap().node;
        let place = table.number();
        table.apply(&Change::Name { of: ROOT, name: Text::new(b"b"), node, place });
        assert_eq!(listed(&table, 0), [b"d", b"b"]);
    }

    #[test]
    fn all_changes_make_the_same_table_and_no_number_is_given_twice() {
        let mut table = Table::new(0o755, (3, 4), 1);
        let node = file(&mut table, ROOT, b"caf\xe9 \n\"");
        let store = table.number();
        table.apply(&Change::Store { store, is: StoreState::Made });
        let gone = table.number();
        let mut again = Table::default();
        let text = serde_json::to_string(&table.all()).unwrap();
        assert!(!text.contains('\n'));
        let changes: Vec<Change> = serde_json::from_str(&text).unwrap();
        changes.iter().for_each(|change| again.apply(change));
        assert_eq!(again, table);
        assert!(again.number() > gone);
        assert_eq!(again.entry(ROOT, b"caf\xe9 \n\"").unwrap().node, node);
    }

    #[test]
    fn what_is_named_and_not_there_is_found() {
        let table = Table::new(0o755, (0, 0), 1);
        table.check().unwrap();
        assert!(Table::default().check().unwrap_err().contains("root"));
        let mut lost = table.clone();
        lost.apply(&Change::Name { of: ROOT, name: Text::new(b"x"), node: 99, place: 100 });
        assert!(lost.check().unwrap_err().contains("`x` leads to file 99"));
        let mut lost = table;
        let node = file(&mut lost, ROOT, b"y");
        let is = Node { store: 77, ..lost.node(node).unwrap().clone() };
        lost.apply(&Change::Node { node, is });
        assert!(lost.check().unwrap_err().contains("allocation 77"));
    }

    #[test]
    fn a_directory_lies_within_those_above_it() {
        let mut table = Table::new(0o755, (0, 0), 1);
        let mut below = ROOT;
        let made: Vec<u64> = (0..3)
            .map(|_| {
                let (node, place) = (table.number(), table.number());
                let is = Node { parent: below, names: 1, ..Node::new(Kind::Directory, 0o755, (0, 0), 1) };
                table.apply(&Change::Node { node, is });
                table.apply(&Change::Name { of: below, name: Text::new(b"d"), node, place });
                below = node;
                node
            })
            .collect();
        assert!(table.is_within(made[2], made[0]) && table.is_within(made[0], made[0]));
        assert!(!table.is_within(made[0], made[2]) && !table.is_within(ROOT, made[0]));
        assert_eq!((table.links(ROOT), table.links(made[2])), (3, 2));
    }
}
