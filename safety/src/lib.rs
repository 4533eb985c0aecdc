//! What makes this process safe to serve swap: set up once, before any thread starts, in an order
//! that matters, and read back from the kernel whenever somebody asks.
//!
//! The process takes nothing of the kernel's reserve to begin with. Its memory is locked first, so that nothing it
//! does from then on can need the device that it serves. Then its allocations are kept from waiting for I/O, the kernel
//! from choosing it as a victim, its mounts from those of others, and its pages from swap. Last, when it has all memory
//! that it needs to begin, it gets a part of the kernel's reserve: what it took before would be missing to the one that
//! serves now.
//!
//! A process that looks after swap without serving it needs less: it stays among the others' mounts,
//! and takes nothing of the reserve from those who serve.

mod cgroup;
mod memory;
mod namespace;
mod process;
mod reserve;

use xpm_protocol::api::blk::SafetyItem;

/// Sets every item up, as far as the kernel lets it. Must be called while the process has a single
/// thread: flags of a process here are those of its first thread, which later ones inherit. Where the process has no
/// cgroup of its own it gets one of this name.
pub fn set_up(cgroup: &str) {
    set_up_with(cgroup, namespace::leave);
}

/// Like [`set_up`], for a process that serves files: its mounts have to be seen by others, so it stays among theirs.
pub fn set_up_for_files(cgroup: &str) {
    set_up_with(cgroup, || {});
}

fn set_up_with(cgroup: &str, leave_mounts: fn()) {
    reserve::leave_alone();
    memory::prepare_heap();
    memory::lock();
    process::set_io_flusher(true);
    process::set_oom_score();
    leave_mounts();
    cgroup::enter(cgroup);
    memory::fault_in_stack();
    reserve::raise();
}

/// Every item of [`set_up_for_files`] as the kernel has it now.
pub fn file_items() -> Vec<SafetyItem> {
    vec![
        memory::locked(),
        process::io_flusher(),
        process::oom_score(),
        cgroup::swap_max(),
        reserve::kept_free(),
        reserve::real_time(),
    ]
}

/// Gives the threads that there are, and those that they start, a part of the kernel's reserve of memory. To be called when
/// everything is there that can be there before it is needed.
pub fn use_reserve() {
    reserve::set_real_time();
}

/// Has so much heap ready, in bytes, that what a process needs to go on comes from it.
pub fn reserve_heap(len: usize) {
    memory::reserve_heap(len);
}

/// Has the calling thread do what needs much memory, while another process serves: its allocations may wait for I/O meanwhile.
/// No thread is to be started in it, which would be left so.
pub fn while_others_serve<T>(fill: impl FnOnce() -> T) -> T {
    process::set_io_flusher(false);
    let filled = fill();
    process::set_io_flusher(true);
    filled
}

/// Memory of this process that is locked, in bytes; 0 where the kernel does not say.
pub fn locked_bytes() -> u64 {
    memory::locked_bytes()
}

/// Like [`set_up`], what a process needs that looks after swap and serves none.
pub fn set_up_keeper(cgroup: &str) {
    memory::prepare_heap();
    memory::lock();
    process::set_io_flusher(true);
    process::set_oom_score();
    cgroup::enter(cgroup);
    memory::fault_in_stack();
}

/// Every item of [`set_up_keeper`] as the kernel has it now.
pub fn keeper_items() -> Vec<SafetyItem> {
    vec![memory::locked(), process::io_flusher(), process::oom_score(), cgroup::swap_max()]
}

/// Every item as the kernel has it now.
pub fn items() -> Vec<SafetyItem> {
    vec![
        memory::locked(),
        process::io_flusher(),
        process::oom_score(),
        namespace::own(),
        cgroup::swap_max(),
        reserve::kept_free(),
        reserve::real_time(),
    ]
}

/// The items that do not hold, as one line for an error; none when all hold.
pub fn missing(items: &[SafetyItem]) -> Option<String> {
    let missing: Vec<String> = items
        .iter()
        .filter(|item| !item.ok)
        .map(|item| {
            let remedy = item.remedy.as_deref().unwrap_or("see the log");
            format!("{} ({}; {remedy})", item.item, item.found)
        })
        .collect();
    (!missing.is_empty()).then(|| missing.join(", "))
}

/// An item that was read back as `found`, or could not be read.
fn item(name: &str, found: Result<(bool, String), String>, remedy: &str) -> SafetyItem {
    let (ok, found) = found.unwrap_or_else(|error| (false, error));
    SafetyItem { item: name.to_owned(), ok, found, remedy: (!ok).then(|| remedy.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_read_and_those_that_do_not_hold_have_a_remedy() {
        let items = items();
        let names: Vec<&str> = items.iter().map(|item| item.item.as_str()).collect();
        assert_eq!(
            names[..5],
            ["mlockall", "io-flusher", "oom-score-adj", "mount-namespace", "cgroup-swap-max"]
        );
        assert_eq!(names[5..], ["memory-reserve", "real-time"]);
        for item in items {
            assert_eq!(item.ok, item.remedy.is_none(), "{item:?}");
            assert!(!item.found.is_empty(), "{item:?}");
        }
    }

    #[test]
    fn what_is_missing_in_one_line() {
        let good = item("a", Ok((true, "fine".to_owned())), "-");
        let bad = item("b", Err("not there".to_owned()), "do this");
        assert_eq!(missing(std::slice::from_ref(&good)), None);
        assert_eq!(missing(&[good, bad]).unwrap(), "b (not there; do this)");
    }
}
