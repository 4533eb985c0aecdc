//! Asks the kernel whether it still knows files without a name.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use rustix::io::Errno;
use xpm_fuse::Device;
use xpm_fuse::wire::notify;

use super::Note;

/// Starts a thread that asks the kernel whether it still knows files without a name. The kernel may have to wait for the data
/// of such a file, so that the clerk cannot ask. It ends with the clerk.
pub(super) fn start(device: Arc<Device>, notes: Sender<Note>) -> Sender<u64> {
    let (ask, asked) = channel::<u64>();
    let named =
        thread::Builder::new().name("xpm-fs-prober".to_owned()).stack_size(crate::lifecycle::STACK_LEN);
    let started = named.spawn(move || {
        for node in asked {
            // No pages, only attributes: it says ENOENT where the kernel has no such file.
            let known = device.notify(&[std::io::IoSlice::new(&notify::inval_inode(node, -1, 0))]);
            if known == Err(Errno::NOENT) && notes.send(Note::Forgotten { node }).is_err() {
                return;
            }
        }
    });
    if let Err(error) = started {
        tracing::error!("files without a name are freed at the next mount: {error}");
    }
    ask
}
