//! The operations, and the choice of the next one.

use serde::{Deserialize, Serialize};

use super::model::Site;
use super::{Header, Shape};

/// Slots for open files.
pub(super) const SLOTS: usize = 4;
pub(super) const PAGE: usize = 4096;
/// Names below the directories, and the directories below the root.
const NAMES: [&str; 3] = ["x", "y", "z"];
const DIRECTORIES: [&str; 2] = ["d", "e"];
/// The longest transfer in bytes.
const TRANSFER_MAX: usize = 256 << 10;
/// A boundary of regions lies at multiples of this; a file that grows gets its second allocation there.
const REGION: usize = 16 << 20;

/// One operation. Offsets and lengths are in bytes; a slot is the number of an open file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[allow(missing_docs)]
pub enum Operation {
    Read {
        slot: usize,
        at: usize,
        len: usize,
    },
    /// Writes bytes that follow from `fill` and their offsets.
    Write {
        slot: usize,
        at: usize,
        len: usize,
        fill: u64,
    },
    /// Reads past the page cache; offset and length are multiples of a page.
    ReadDirect {
        slot: usize,
        at: usize,
        len: usize,
    },
    WriteDirect {
        slot: usize,
        at: usize,
        len: usize,
        fill: u64,
    },
    /// Maps the file as long as it is now. The mapping stays until the slot is closed or mapped again.
    Map {
        slot: usize,
    },
    ReadMapped {
        slot: usize,
        at: usize,
        len: usize,
    },
    WriteMapped {
        slot: usize,
        at: usize,
        len: usize,
        fill: u64,
    },
    Truncate {
        slot: usize,
        len: usize,
    },
    Punch {
        slot: usize,
        at: usize,
        len: usize,
    },
    Zero {
        slot: usize,
        at: usize,
        len: usize,
    },
    Allocate {
        slot: usize,
        at: usize,
        len: usize,
    },
    Copy {
        from: usize,
        from_at: usize,
        to: usize,
        to_at: usize,
        len: usize,
    },
    Sync {
        slot: usize,
    },
    /// Syncs the file and drops its pages from the cache.
    Forget {
        slot: usize,
    },
    Create {
        slot: usize,
        path: String,
    },
    Open {
        slot: usize,
        path: String,
    },
    /// Opens a new file that has no name.
    Nameless {
        slot: usize,
    },
    Close {
        slot: usize,
    },
    Remove {
        path: String,
    },
    Rename {
        from: String,
        to: String,
    },
    Exchange {
        from: String,
        to: String,
    },
    Link {
        from: String,
        to: String,
    },
    MakeDirectory {
        path: String,
    },
    RemoveDirectory {
        path: String,
    },
    RenameDirectory {
        from: String,
        to: String,
    },
    /// Compares names, lengths and counts of links in all directories.
    List,
}

impl Operation {
    /// Whether slots and ranges are such as the generator makes.
    pub(super) fn fits(&self, max: usize) -> bool {
        let range = |at: usize, len: usize| len <= max + PAGE && at <= max;
        match *self {
            Operation::Read { slot, at, len }
            | Operation::Write { slot, at, len, .. }
            | Operation::ReadMapped { slot, at, len }
            | Operation::WriteMapped { slot, at, len, .. }
            | Operation::Punch { slot, at, len }
            | Operation::Zero { slot, at, len }
            | Operation::Allocate { slot, at, len } => slot < SLOTS && range(at, len),
            Operation::ReadDirect { slot, at, len } | Operation::WriteDirect { slot, at, len, .. } => {
                slot < SLOTS && range(at, len) && at % PAGE == 0 && len % PAGE == 0
            }
            Operation::Truncate { slot, len } => slot < SLOTS && len <= max,
            Operation::Copy { from, from_at, to, to_at, len } => {
                from.max(to) < SLOTS && range(from_at, len) && range(to_at, len)
            }
            Operation::Map { slot }
            | Operation::Sync { slot }
            | Operation::Forget { slot }
            | Operation::Create { slot, .. }
            | Operation::Open { slot, .. }
            | Operation::Nameless { slot }
            | Operation::Close { slot } => slot < SLOTS,
            _ => true,
        }
    }
}

/// Chooses operations: the same ones for the same seed and outcomes.
pub struct Generator {
    header: Header,
    random: u64,
    /// Operations that follow the last one, the next one last.
    next: Vec<Operation>,
}

impl Generator {
    /// Begins with the seed of a header.
    pub fn new(header: Header) -> Generator {
        Generator { header, random: header.seed.max(1), next: Vec::new() }
    }

    /// The generator xorshift64.
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// A number below `end`; 0 when that is 0.
    fn below(&mut self, end: usize) -> usize {
        // The upper bits are the better ones.
        ((self.random() >> 16) % end.max(1) as u64) as usize
    }

    /// The next operation.
    pub fn next(&mut self, site: &Site) -> Operation {
        if let Some(next) = self.next.pop() {
            return next;
        }
        let chosen = self.choose(site);
        if let Operation::Punch { slot, at, len }
        | Operation::Zero { slot, at, len }
        | Operation::WriteDirect { slot, at, len, .. }
        | Operation::Write { slot, at, len, .. } = chosen
            && self.below(3) == 0
        {
            // Cached pages would hide that the file's own bytes differ.
            let (at, len) = (at.saturating_sub(100), len + 200);
            let read = Operation::Read { slot, at, len: len.min(TRANSFER_MAX) };
            self.next = vec![read, Operation::Forget { slot }];
        }
        chosen
    }

    fn choose(&mut self, site: &Site) -> Operation {
        let open: Vec<usize> = (0..SLOTS).filter(|slot| site.len_of(*slot).is_some()).collect();
        if self.header.shape == Shape::Tree && (open.is_empty() || self.below(100) < 30) {
            return self.next_name();
        }
        if open.is_empty() {
            return Operation::Open { slot: self.below(SLOTS), path: String::new() };
        }
        let slot = open[self.below(open.len())];
        let len = site.len_of(slot).unwrap_or_default();
        let fill = self.random();
        let kind = self.below(if self.header.shape == Shape::Tree { 100 } else { 84 });
        let otherwise =
            if (48..63).contains(&kind) { Operation::Map { slot } } else { Operation::Sync { slot } };
        match kind {
            0..15 => self.span(len).map(|(at, len)| Operation::Read { slot, at, len }),
            15..34 => self.span(len).map(|(at, len)| Operation::Write { slot, at, len, fill }),
            34..39 => self.span(len).map(|(at, len)| {
                let (at, len) = to_pages(at, len);
                Operation::ReadDirect { slot, at, len }
            }),
            39..45 => self.span(len).map(|(at, len)| {
                let (at, len) = to_pages(at, len);
                Operation::WriteDirect { slot, at, len, fill }
            }),
            45..48 => Some(Operation::Map { slot }),
            48..55 => self.mapped(site, slot).map(|(at, len)| Operation::ReadMapped { slot, at, len }),
            55..63 => self.mapped(site, slot).map(|(at, len)| Operation::WriteMapped { slot, at, len, fill }),
            63..70 => self.span(len).map(|(at, len)| Operation::Punch { slot, at, len }),
            70..74 => self.span(len).map(|(at, len)| Operation::Zero { slot, at, len }),
            74..79 => Some(Operation::Sync { slot }),
            79..83 => Some(Operation::Forget { slot }),
            83 => Some(if self.header.shape == Shape::Tree {
                Operation::Close { slot }
            } else {
                Operation::Open { slot: self.below(SLOTS), path: String::new() }
            }),
            84..92 => Some(Operation::Truncate { slot, len: self.length(len) }),
            92..95 => self.span(len).map(|(at, len)| Operation::Allocate { slot, at, len }),
            _ => self.span(len).map(|(from_at, len)| {
                let (to, to_at) = (open[self.below(open.len())], self.below(self.header.max - len));
                Operation::Copy { from: slot, from_at, to, to_at, len }
            }),
        }
        .unwrap_or(otherwise)
    }

    /// A range within the largest length, in or near the `now` bytes that the file has.
    fn span(&mut self, now: usize) -> Option<(usize, usize)> {
        let max = self.header.max;
        let len = match self.below(4) {
            0 => 1 + self.below(64),
            1 => 1 + self.below(4 * PAGE),
            2 => PAGE * (1 + self.below(8)),
            _ => 1 + self.below(TRANSFER_MAX),
        };
        let len = len.min(max);
        let at = match self.below(8) {
            0 => self.below(max),
            1 => now.saturating_sub(self.below(2 * len)),
            2 => (REGION * (1 + self.below(max / REGION))).saturating_sub(self.below(2 * len)),
            3 => PAGE * self.below(max / PAGE),
            // A place with many operations, where they meet.
            4 | 5 => self.below((1 << 20).min(max)),
            _ => self.below(now),
        };
        let len = len.min(max.saturating_sub(at));
        (len > 0).then_some((at, len))
    }

    /// A range of the mapping that the file has, too.
    fn mapped(&mut self, site: &Site, slot: usize) -> Option<(usize, usize)> {
        let end = site.mapped_of(slot)?;
        let (at, len) = self.span(end)?;
        let len = len.min(end.saturating_sub(at));
        (len > 0).then_some((at, len))
    }

    fn length(&mut self, now: usize) -> usize {
        match self.below(6) {
            0 => 0,
            1 => self.below(self.header.max),
            2 => PAGE * self.below(self.header.max / PAGE),
            3 => (now + self.below(4 * PAGE)).min(self.header.max),
            _ => self.below(now + 1),
        }
    }

    fn next_name(&mut self) -> Operation {
        let slot = self.below(SLOTS);
        match self.below(100) {
            0..22 => Operation::Create { slot, path: self.path() },
            22..42 => Operation::Open { slot, path: self.path() },
            42..46 => Operation::Nameless { slot },
            46..52 => Operation::Close { slot },
            52..60 => Operation::Remove { path: self.path() },
            60..72 => Operation::Rename { from: self.path(), to: self.path() },
            72..76 => Operation::Exchange { from: self.path(), to: self.path() },
            76..82 => Operation::Link { from: self.path(), to: self.path() },
            82..88 => Operation::MakeDirectory { path: self.directory() },
            88..91 => Operation::RemoveDirectory { path: self.directory() },
            91..95 => Operation::RenameDirectory { from: self.directory(), to: self.directory() },
            _ => Operation::List,
        }
    }

    fn directory(&mut self) -> String {
        DIRECTORIES[self.below(DIRECTORIES.len())].to_owned()
    }

    fn path(&mut self) -> String {
        let name = NAMES[self.below(NAMES.len())];
        match self.below(2) {
            0 => name.to_owned(),
            _ => format!("{}/{name}", self.directory()),
        }
    }
}

/// The pages that a range begins in, and no more than it has.
fn to_pages(at: usize, len: usize) -> (usize, usize) {
    (at / PAGE * PAGE, len.div_ceil(PAGE) * PAGE)
}
