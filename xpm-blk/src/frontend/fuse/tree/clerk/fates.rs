//! The ends of wishes: allocations that are made, shown, grown, freed or refused, and the files that waited for them.

use rustix::io::Errno;
use xpm_fuse::wire::reply::{self, Statfs};
use xpm_protocol::api::ErrorKind;

use super::super::super::PAGE;
use super::super::Fate;
use super::super::table::{Change, Node, StoreState};
use super::{Clerk, Step, Work};

impl Clerk {
    pub(super) fn node_of(&self, store: u64) -> Option<u64> {
        self.table.nodes().find(|(_, node)| node.store == store).map(|(number, _)| number)
    }

    pub(super) fn shown(&mut self, store: u64) -> Result<(), Errno> {
        let Some(number) = self.node_of(store) else { return Ok(()) };
        let is_growing = matches!(self.work.get(&number), Some(Work { step: Step::Growing, .. }));
        if self.look_at(number) && is_growing {
            return self.settle(number);
        }
        Ok(())
    }

    pub(super) fn fate(&mut self, fate: Fate) -> Result<(), Errno> {
        match fate {
            Fate::Made { store, made } => {
                let Some(number) = self.node_of(store) else { return Ok(()) };
                let wanted = self.table.store(store) == Some(StoreState::Wanted);
                match made {
                    Ok(()) => {
                        if wanted {
                            let made = self.commit(&[Change::Store { store, is: StoreState::Made }]);
                            if let Err(errno) = made.and_then(|()| self.sync()) {
                                return self.refuse(number, errno);
                            }
                        }
                        self.look_at(number);
                        self.settle(number)
                    }
                    Err(kind) => {
                        if wanted {
                            let node = self.table.node(number).cloned();
                            let is = node.map(|node| Node { store: 0, ..node });
                            let node = is.map(|is| Change::Node { node: number, is });
                            let doomed = Change::Store { store, is: StoreState::Doomed };
                            let changes: Vec<Change> = node.into_iter().chain([doomed]).collect();
                            if self.commit(&changes).is_ok() {
                                let _ = self.free(number, store);
                            }
                        }
                        self.refuse(number, refusal(kind))
                    }
                }
            }
            Fate::Grown { store, grown } => {
                let Some(number) = self.node_of(store) else { return Ok(()) };
                match grown {
                    Ok(()) => {
                        self.look_at(number);
                        self.settle(number)
                    }
                    Err(kind) => self.refuse(number, refusal(kind)),
                }
            }
            Fate::Freed { store } => {
                let _ = self.commit(&[Change::NoStore { store }]);
                Ok(())
            }
            Fate::Seen { space } => {
                self.space = space.unwrap_or(self.space);
                let blocks = |bytes: u64| bytes / PAGE;
                let sizes = Statfs {
                    blocks: blocks(self.space.0),
                    bfree: blocks(self.space.1),
                    bavail: blocks(self.space.1),
                    files: self.table.nodes().count() as u64 + blocks(self.space.1),
                    ffree: blocks(self.space.1),
                    bsize: PAGE as u32,
                    frsize: PAGE as u32,
                    namelen: xpm_fuse::wire::NAME_LEN_MAX as u32,
                };
                let looking = std::mem::take(&mut self.looking);
                looking.into_iter().try_for_each(|unique| self.send(&reply::statfs(unique, &sizes)))
            }
        }
    }
}

/// The error that a program gets when the allocator refuses.
const fn refusal(kind: ErrorKind) -> Errno {
    match kind {
        ErrorKind::NoSpace => Errno::NOSPC,
        ErrorKind::Denied => Errno::DQUOT,
        // More regions than an allocation may have.
        ErrorKind::Invalid => Errno::FBIG,
        _ => Errno::IO,
    }
}
