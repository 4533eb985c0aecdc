//! Makes, shows, grows and frees the allocations that trees of files ask for, each on a task of its own, so that no
//! file waits for the allocation of another file.
//!
//! The daemon asks an allocator that does not answer again, without a limit: the data that a program has written wait
//! meanwhile, as they do for an appliance. A refusal of the allocator is reported to the tree, and so to the program.

use std::sync::Arc;
use std::time::{Duration, Instant};

use xpm_control::client::ClientError;
use xpm_control::error_line;
use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{self, Allocation, Create, Resize};
use xpm_protocol::api::blk::{AttachDevice, Form};
use xpm_protocol::units::ByteSize;

use super::Daemon;
use crate::error::DeviceError;
use crate::frontend::fuse::tree::{Fate, Wish};

const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_LONGEST: Duration = Duration::from_secs(5);
/// How often it is looked whether an allocation has grown, and whether it still is to.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const ASK_EVERY: Duration = Duration::from_secs(2);
/// Pause before what did not fit is asked for again, and how long it is, while an appliance is silent that may have
/// room.
const ROOM_PAUSE: Duration = Duration::from_millis(300);
const ROOM_LIMIT: Duration = Duration::from_secs(30);

/// Fulfils the wishes of all trees until it is dropped.
pub(crate) async fn tend(daemon: Arc<Daemon>) {
    let Some(mut wishes) = daemon.trees.wishes() else { return };
    while let Some((tree, wish)) = wishes.recv().await {
        tokio::spawn(Arc::clone(&daemon).fulfil(tree, wish));
    }
}

impl Daemon {
    async fn fulfil(self: Arc<Daemon>, name: Name, wish: Wish) {
        let tree = self.trees.tree(&name);
        let fate = match wish {
            Wish::Make { store, size } => {
                let made = match tree.allocation(store) {
                    Ok(file) => self.make_file(&name, &file, size).await,
                    Err(error) => Err(error),
                };
                Fate::Made { store, made: said(made) }
            }
            Wish::Show { store } => {
                let shown = match tree.allocation(store) {
                    Ok(file) => self.show_file(&name, &file).await,
                    Err(error) => Err(error),
                };
                match shown {
                    // It says itself that it is shown.
                    Ok(()) => return,
                    error => Fate::Made { store, made: said(error) },
                }
            }
            Wish::Grow { store, size } => {
                let grown = match tree.allocation(store) {
                    Ok(file) => self.grow_file(&file, size, || tree.capacity(store)).await,
                    Err(error) => Err(error),
                };
                Fate::Grown { store, grown: said(grown) }
            }
            Wish::Free { store } => {
                let Ok(file) = tree.allocation(store) else { return };
                self.free_file(&file).await;
                Fate::Freed { store }
            }
            Wish::Look => {
                let status = self.owner.allocator.get::<allocator::Status>("/v1/status").await;
                Fate::Seen { space: status.ok().map(|status| (status.capacity.0, status.free.0)) }
            }
        };
        tree.tell(fate);
    }

    async fn make_file(self: &Arc<Daemon>, tree: &Name, file: &Name, size: u64) -> Result<(), DeviceError> {
        let (mut patience, mut scarce) = (Patience::default(), None);
        loop {
            let made = match self.owner.allocator.get::<Allocation>(&format!("/v1/allocations/{tree}")).await
            {
                Ok(of_tree) => {
                    let create =
                        Create { account: of_tree.account, ..Create::new(file.clone(), ByteSize(size)) };
                    self.owner.allocator.post::<_, Allocation>("/v1/allocations", &create).await.map(drop)
                }
                Err(error) => Err(error),
            };
            match made {
                Ok(()) => break,
                // An answer was lost: numbers are given once, so that it is this one.
                Err(error) if error.kind() == ErrorKind::Conflict => break,
                Err(error) if self.may_find_room(&error, &mut scarce).await => {}
                Err(error) => patience.with(file, refused(&error)).await?,
            }
        }
        self.show_file(tree, file).await
    }

    async fn show_file(self: &Arc<Daemon>, tree: &Name, file: &Name) -> Result<(), DeviceError> {
        let mut patience = Patience::default();
        loop {
            if self.slots().contains_key(file) {
                // It is shown, or about to be.
                return Ok(());
            }
            // As the tree is shown itself.
            let of_tree = self.slots().get(tree).and_then(super::Slot::record);
            let request = AttachDevice::new(file.clone(), Form::InTree(tree.clone()));
            let request = match of_tree.map(|record| record.request) {
                Some(like) => AttachDevice {
                    queues: like.queues,
                    depth: like.depth,
                    transport: like.transport,
                    hold: like.hold,
                    ..request
                },
                None => request,
            };
            match self.attach(request).await {
                Ok(_) => return Ok(()),
                Err(error) => patience.with(file, error).await?,
            }
        }
    }

    async fn grow_file(
        self: &Arc<Daemon>,
        file: &Name,
        size: u64,
        capacity: impl Fn() -> Option<u64>,
    ) -> Result<(), DeviceError> {
        // An allocation that was freed meanwhile counts as grown: no request waits for its room.
        let has_grown = || capacity().is_none_or(|capacity| capacity >= size);
        let (mut patience, mut scarce) = (Patience::default(), None);
        while !has_grown() {
            let path = format!("/v1/allocations/{file}/size");
            let order = Resize { size: ByteSize(size) };
            match self.owner.allocator.put::<_, Allocation>(&path, &order).await {
                Ok(_) => {}
                // It is being changed already.
                Err(error) if matches!(error.kind(), ErrorKind::Conflict | ErrorKind::InUse) => {
                    patience.pause(file, &refused(&error)).await;
                    continue;
                }
                Err(error) if self.may_find_room(&error, &mut scarce).await => continue,
                Err(error) => {
                    patience.with(file, refused(&error)).await?;
                    continue;
                }
            }
            self.obey(file);
            let since = Instant::now();
            while !has_grown() && since.elapsed() < ASK_EVERY {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
        Ok(())
    }

    /// Whether there may be room soon for what did not fit: an appliance that was silent for a moment has it again.
    /// Waits for that moment. A program that wrote would lose what it wrote by an error.
    async fn may_find_room(&self, error: &ClientError, since: &mut Option<Instant>) -> bool {
        if error.kind() != ErrorKind::NoSpace {
            return false;
        }
        let first = since.is_none();
        let asked = since.get_or_insert_with(Instant::now);
        let status = self.owner.allocator.get::<allocator::Status>("/v1/status").await;
        let is_silent = status.is_ok_and(|status| status.appliances_silent > 0);
        let again = first || is_silent && asked.elapsed() < ROOM_LIMIT;
        if again {
            tokio::time::sleep(ROOM_PAUSE).await;
        }
        again
    }

    async fn free_file(self: &Arc<Daemon>, file: &Name) {
        let mut patience = Patience::default();
        loop {
            match self.detach(file.clone(), true).await {
                Ok(()) => break,
                Err(error) if error.kind() == ErrorKind::NotFound => break,
                Err(error) => patience.pause(file, &error).await,
            }
        }
        loop {
            match self.owner.allocator.delete(&format!("/v1/allocations/{file}")).await {
                Ok(()) => return,
                Err(error) if error.kind() == ErrorKind::NotFound => return,
                Err(error) => {
                    // An earlier life died when it had become the owner and had not written that down yet.
                    let _ = self.owner.disown(file).await;
                    patience.pause(file, &refused(&error)).await;
                }
            }
        }
    }

    /// Allocations of files in this tree that are shown, or are about to be.
    pub(super) fn files_of(&self, tree: &Name) -> Vec<Name> {
        let is_of = |slot: &super::Slot| {
            slot.record().is_some_and(|record| record.request.form == Form::InTree(tree.clone()))
        };
        self.slots().iter().filter(|(_, slot)| is_of(slot)).map(|(name, _)| name.clone()).collect()
    }
}

fn said(done: Result<(), DeviceError>) -> Result<(), ErrorKind> {
    done.map_err(|error| {
        tracing::error!("{error}");
        error.kind()
    })
}

fn refused(error: &ClientError) -> DeviceError {
    DeviceError::new(error.kind(), format!("allocator: {}", error_line(error)))
}

/// Trying again, less and less often.
#[derive(Default)]
struct Patience {
    pause: Duration,
}

impl Patience {
    /// Waits before another try, where it may succeed.
    ///
    /// # Errors
    /// The given error, where a later try cannot succeed.
    async fn with(&mut self, file: &Name, error: DeviceError) -> Result<(), DeviceError> {
        match error.kind() {
            ErrorKind::Unavailable | ErrorKind::NotLeader => {
                self.pause(file, &error).await;
                Ok(())
            }
            kind => Err(DeviceError::new(kind, format!("allocation {file}: {error}"))),
        }
    }

    async fn pause(&mut self, file: &Name, error: &DeviceError) {
        self.pause = (self.pause * 2).clamp(PAUSE_FIRST, PAUSE_LONGEST);
        if self.pause == PAUSE_LONGEST {
            tracing::warn!("allocation {file}: {error}; trying again");
        }
        tokio::time::sleep(self.pause).await;
    }
}
