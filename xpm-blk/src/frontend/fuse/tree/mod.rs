//! A tree: a directory that is mounted, in which each file that holds data has an allocation of its own.
//!
//! The mount belongs to an allocation that carries the tree's name: its record holds the mount's descriptor, so that
//! the mount has a standby, a successor and a guard as a single file has. Each allocation of a file is a device of its
//! own in the daemon ([`TreeFile`]), of the form `in-tree=NAME`, with record, orders, guard and resizing as all others.
//! They meet in [`Trees`].
//!
//! * `table.rs`: files, directories, and which allocation a file has. `journal.rs`: the table on disk.
//! * `clerk.rs`: the thread that owns the table and answers all that is not data. `names.rs`: what it does to names.
//! * `queue.rs`: the threads that serve data.
//! * [`crate::daemon`], `trees.rs`: asks the allocator for what the clerk wants ([`Wish`]).
//!
//! In which order the table and the allocator are told is [decision
//! 0081](../../../../../docs/decisions/0081-a-tree-of-files.md).

mod clerk;
mod journal;
mod names;
mod queue;
mod table;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use xpm_client_core::Volume;
use xpm_fuse::{Connection, Device, RootKind};
use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::blk::DeviceState;
use xpm_transport::spin::Spin;

use self::clerk::{Clerk, ClerkParts, Note};
use self::queue::{Inbox, QueueParts};
use super::{Mounted, Mounting, limit, prepare, take_off, unmount_or_abort, users};
use crate::error::{DeviceError, Step};
use crate::frontend::{Health, Shape, Shown};
use crate::lifecycle;
use crate::watch::Pulse;

/// Stack of the clerk, in bytes; all of it is locked. It writes JSON.
const CLERK_STACK_LEN: usize = 512 << 10;

/// A request to the daemon, which the allocator has to fulfil. The daemon answers by [`Tree::tell`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    /// An allocation of at least so many bytes, shown.
    Make { store: u64, size: u64 },
    /// The same as before, shown again.
    Show { store: u64 },
    /// At least so many bytes.
    Grow { store: u64, size: u64 },
    /// No allocation.
    Free { store: u64 },
    /// How much memory there is.
    Look,
}

/// How a wish ended.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fate {
    /// The allocation is shown; or why it is not.
    Made { store: u64, made: Result<(), ErrorKind> },
    /// It has its new size; or why not.
    Grown { store: u64, grown: Result<(), ErrorKind> },
    /// The allocator has it no more.
    Freed { store: u64 },
    /// All memory and what is free of it, in bytes; none where the allocator does not say.
    Seen { space: Option<(u64, u64)> },
}

/// All trees of a daemon, by their names.
pub(crate) struct Trees {
    trees: Mutex<BTreeMap<Name, Arc<Tree>>>,
    wishes: UnboundedSender<(Name, Wish)>,
    /// Until somebody tends to them.
    untended: Mutex<Option<UnboundedReceiver<(Name, Wish)>>>,
}

impl Trees {
    pub(crate) fn new() -> Trees {
        let (wishes, untended) = unbounded_channel();
        Trees { trees: Mutex::default(), wishes, untended: Mutex::new(Some(untended)) }
    }

    /// The wishes of all trees, for the one who tends to them; none at further calls.
    pub(crate) fn wishes(&self) -> Option<UnboundedReceiver<(Name, Wish)>> {
        self.untended.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The tree of this name, mounted or not.
    pub(crate) fn tree(&self, name: &Name) -> Arc<Tree> {
        let mut trees = self.trees.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(trees.entry(name.clone()).or_insert_with(|| Arc::new(Tree::new(name))))
    }
}

/// A tree: what its clerk, its queues and the devices of its files share.
pub(crate) struct Tree {
    name: Name,
    /// Allocations that are shown, by their numbers.
    stores: Mutex<BTreeMap<u64, Volume>>,
    /// Files, by the numbers of their nodes.
    files: Mutex<HashMap<u64, Arc<FileState>>>,
    /// To the clerk, while the tree is mounted.
    clerk: Mutex<Option<Sender<Note>>>,
}

/// The state of a file that its queues read.
#[derive(Default)]
struct FileState {
    /// In bytes, as it is written down.
    size: AtomicU64,
    /// Bytes that its allocation has room for; 0 while that is not shown.
    capacity: AtomicU64,
    /// Number of its allocation; 0: it has none, or none that is shown.
    store: AtomicU64,
    /// It has an allocation, shown or not.
    stored: AtomicBool,
    volume: Mutex<Option<(u64, Volume)>>,
}

impl FileState {
    fn has_store(&self) -> bool {
        self.stored.load(Ordering::Acquire)
    }

    fn volume(&self, store: u64) -> Option<Volume> {
        let volume = self.volume.lock().unwrap_or_else(PoisonError::into_inner);
        volume.as_ref().filter(|(number, _)| store != 0 && *number == store).map(|(_, volume)| volume.clone())
    }

    /// Its data are in this allocation from now on.
    fn show(&self, store: u64, volume: &Volume) {
        *self.volume.lock().unwrap_or_else(PoisonError::into_inner) = Some((store, volume.clone()));
        self.stored.store(true, Ordering::Release);
        self.capacity.store(volume.size(), Ordering::Release);
        self.store.store(store, Ordering::Release);
    }

    /// It has no allocation that is shown; `stored` says whether it has one.
    fn hide(&self, stored: bool) {
        self.capacity.store(0, Ordering::Release);
        self.store.store(0, Ordering::Release);
        self.stored.store(stored, Ordering::Release);
        *self.volume.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Tree {
    fn new(name: &Name) -> Tree {
        Tree {
            name: name.clone(),
            stores: Mutex::default(),
            files: Mutex::default(),
            clerk: Mutex::default(),
        }
    }

    /// Name of an allocation of this tree.
    ///
    /// # Errors
    /// When the tree's name leaves no room for it.
    pub(crate) fn allocation(&self, store: u64) -> Result<Name, DeviceError> {
        let text = format!("{}.{store}", self.name);
        text.parse().map_err(|_| {
            let what = format!("the name of tree {} is too long: it can have 40 characters", self.name);
            DeviceError::new(ErrorKind::Invalid, what)
        })
    }

    /// Tells the clerk how a wish ended. The answer is dropped where the tree is not mounted.
    pub(crate) fn tell(&self, fate: Fate) {
        self.note(Note::Fate(fate));
    }

    fn note(&self, note: Note) {
        if let Some(clerk) = &*self.clerk.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = clerk.send(note);
        }
    }

    fn stores(&self) -> MutexGuard<'_, BTreeMap<u64, Volume>> {
        self.stores.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that an allocation has room for; none while it is not shown.
    pub(crate) fn capacity(&self, store: u64) -> Option<u64> {
        self.stores().get(&store).map(Volume::size)
    }

    fn volume(&self, store: u64) -> Option<Volume> {
        self.stores().get(&store).cloned()
    }

    fn files(&self) -> MutexGuard<'_, HashMap<u64, Arc<FileState>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, node: u64) -> Option<Arc<FileState>> {
        self.files().get(&node).cloned()
    }
}

/// The allocation of a file in a tree, as a device of the daemon.
pub(crate) struct TreeFile {
    tree: Arc<Tree>,
    number: u64,
    volume: Volume,
}

impl TreeFile {
    /// Gives an allocation to its tree.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where its name is not that of an allocation of this tree.
    pub(crate) fn show(name: &Name, volume: Volume, tree: Arc<Tree>) -> Result<TreeFile, DeviceError> {
        let number = name.as_str().strip_prefix(tree.name.as_str()).and_then(|rest| rest.strip_prefix('.'));
        let Some(number) = number.and_then(|number| number.parse().ok()) else {
            let what = format!("allocation {name} belongs to no file of tree {}", tree.name);
            return Err(DeviceError::new(ErrorKind::Invalid, what));
        };
        tree.stores().insert(number, volume.clone());
        tree.note(Note::Shown { store: number });
        Ok(TreeFile { tree, number, volume })
    }
}

impl Shown for TreeFile {
    fn path(&self) -> String {
        format!("tree {}", self.tree.name)
    }

    fn waits_for_next_process(&self) -> bool {
        true
    }

    fn health(&self) -> Health {
        Health::of(&self.volume)
    }

    fn volume(&self) -> Option<&Volume> {
        Some(&self.volume)
    }

    fn resize(&self, _size: u64) -> Result<Option<String>, DeviceError> {
        self.tree.note(Note::Shown { store: self.number });
        Ok(None)
    }

    fn can_shrink(&self) -> bool {
        false
    }

    fn hide(&self, _give_up: bool) -> Result<(), DeviceError> {
        self.tree.stores().remove(&self.number);
        Ok(())
    }
}

/// A mounted tree that this process serves.
pub(crate) struct TreeMount {
    path: PathBuf,
    mounted: Mounted,
    connection: Connection,
    volume: Volume,
    tree: Arc<Tree>,
    device: Arc<Device>,
    give_up: Arc<OwnedFd>,
    ended: Arc<AtomicBool>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Where a tree keeps its table, in the state directory of its daemon.
pub(crate) fn table_path(state: &Path, tree: &Name) -> PathBuf {
    state.join("trees").join(format!("{tree}.table"))
}

impl TreeMount {
    /// Mounts a tree, or goes on with the mount that a dead process left. `volume` is that of the allocation that
    /// carries its name. Blocks until it can be used.
    ///
    /// # Errors
    /// As for a single file, and where its table cannot be used.
    pub(crate) fn show(
        volume: Volume,
        shape: &Shape,
        mut mounting: Mounting<'_>,
        (trees, state): (&Trees, &Path),
    ) -> Result<TreeMount, DeviceError> {
        let path = mounting.path;
        let tree = trees.tree(&shape.name);
        // One that is too long is refused now and not at the first file.
        tree.allocation(u64::MAX >> 1)?;
        let prepared = prepare(&mut mounting, shape, RootKind::Directory)?;
        let takes_over = prepared.takes_over;
        let (notes, noted) = channel();
        let served = (|| {
            let inboxes: Vec<Arc<Inbox>> = (0..shape.queues)
                .map(|_| Inbox::new().map(Arc::new))
                .collect::<Result<_, _>>()
                .at("make the inboxes of a tree")?;
            let device = Arc::new(prepared.device);
            let parts = ClerkParts {
                tree: Arc::clone(&tree),
                device: Arc::clone(&device),
                inboxes: inboxes.clone(),
                notes: notes.clone(),
                wishes: trees.wishes.clone(),
                io_len: prepared.mounted.io_len,
                takes_over,
            };
            let clerk = Clerk::new(parts, &table_path(state, &shape.name), &prepared.mounted)?;
            let at = || format!("serve {}", path.display());
            let mount = TreeMount {
                path: path.to_owned(),
                mounted: prepared.mounted,
                connection: prepared.connection,
                volume,
                tree: Arc::clone(&tree),
                device,
                give_up: Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).at(at())?),
                ended: Arc::default(),
                threads: Mutex::default(),
            };
            mount.serve(shape, clerk, noted, &notes, &inboxes, takes_over)?;
            limit(mount.connection, path, mounting.page_cache);
            Ok(mount)
        })();
        served.inspect_err(|_: &DeviceError| {
            tree.clerk.lock().unwrap_or_else(PoisonError::into_inner).take();
            if !takes_over {
                take_off(path);
            }
        })
    }

    fn serve(
        &self,
        shape: &Shape,
        clerk: Clerk,
        noted: Receiver<Note>,
        notes: &Sender<Note>,
        inboxes: &[Arc<Inbox>],
        takes_over: bool,
    ) -> Result<(), DeviceError> {
        let at = || format!("serve {}", self.path.display());
        if takes_over {
            super::resend(&self.device, &self.path)?;
        }
        *self.tree.clerk.lock().unwrap_or_else(PoisonError::into_inner) = Some(notes.clone());
        let short: String = shape.name.as_str().chars().take(24).collect();
        let named = |name: String| thread::Builder::new().name(name).stack_size(lifecycle::STACK_LEN);
        let name = format!("xpm-fs-c-{short}");
        let clerk = named(name).stack_size(CLERK_STACK_LEN).spawn(move || clerk.run(&noted)).at(at())?;
        let mut threads = vec![clerk];
        let mut started = Vec::new();
        for (number, inbox) in (0..).zip(inboxes) {
            let name = format!("xpm-fs-{number}-{short}");
            let parts = QueueParts {
                number,
                depth: shape.depth,
                io_len: self.mounted.io_len,
                device: Arc::clone(&self.device),
                tree: Arc::clone(&self.tree),
                inbox: Arc::clone(inbox),
                clerk: notes.clone(),
                ended: Arc::clone(&self.ended),
                give_up: Arc::clone(&self.give_up),
                spin: Spin::new(shape.spin),
                pulse: Pulse::new(name.clone()).at(at())?,
            };
            let (tell, told) = sync_channel(1);
            threads.push(named(name).spawn(move || queue::run(parts, &tell)).at(at())?);
            started.push(told);
        }
        *self.threads.lock().unwrap_or_else(PoisonError::into_inner) = threads;
        for ready in started {
            ready.recv().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())).at(at())?;
        }
        Ok(())
    }
}

impl Shown for TreeMount {
    fn path(&self) -> String {
        self.path.display().to_string()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.device.as_fd())
    }

    fn mounted(&self) -> Option<Mounted> {
        Some(self.mounted)
    }

    fn users(&self) -> Vec<String> {
        if self.ended.load(Ordering::Acquire) { Vec::new() } else { users::of(&self.path, self.connection) }
    }

    fn waits_for_next_process(&self) -> bool {
        true
    }

    fn health(&self) -> Health {
        let health = Health::of(&self.volume);
        if self.ended.load(Ordering::Acquire) {
            Health { state: DeviceState::Lost, ..health }
        } else {
            health
        }
    }

    fn volume(&self) -> Option<&Volume> {
        Some(&self.volume)
    }

    fn abort(&self) -> Result<(), DeviceError> {
        self.connection.abort().at(format!("abort {}", self.path.display()))
    }

    fn can_shrink(&self) -> bool {
        false
    }

    fn hide(&self, give_up: bool) -> Result<(), DeviceError> {
        unmount_or_abort(&self.path, self.connection, &self.give_up, give_up)?;
        self.tree.note(Note::Stop);
        self.tree.clerk.lock().unwrap_or_else(PoisonError::into_inner).take();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                return Err(DeviceError::new(ErrorKind::Internal, "a thread of a tree failed; see the log"));
            }
        }
        self.tree.files().clear();
        Ok(())
    }
}
