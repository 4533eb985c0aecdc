//! Makes this process safe to serve swap: everything is set up once, before any thread starts, in an order that
//! matters, and can be read back from the kernel at any time.
//!
//! At first the process takes nothing of the kernel's memory reserve. Its memory is locked first, so that nothing it
//! does later can need the device that it serves. Then its allocations are kept from waiting for I/O, it is taken out
//! of the OOM killer's choice, its mounts are separated from those of others, and its pages are kept out of swap.
//! Last, when it has all memory that it needs at the start, it may use a part of the kernel's reserve: any part taken
//! earlier would be missing to the process that serves now.
//!
//! A process that looks after swap without serving it needs less: it stays in the common mount namespace, and takes
//! nothing of the reserve from processes that serve.

mod cgroup;
mod memory;
mod namespace;
mod process;
mod reserve;

use xpm_protocol::api::blk::SafetyItem;

/// Sets up every item, as far as the kernel permits. Must be called while the process has a single thread: the flags
/// of a process are in fact those of its first thread, which later threads inherit. If the process has no cgroup of
/// its own, it gets one of this name.
pub fn set_up(cgroup: &str) {
    set_up_with(cgroup, namespace::leave);
}

/// Like [`set_up`], for a process that serves files: other processes have to see its mounts, so it stays in their
/// mount namespace.
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

/// The present state of every item of [`set_up_for_files`], read from the kernel.
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

/// Gives all threads, and threads that they start, a part of the kernel's reserve of memory. To be called when
/// everything that can be allocated in advance is allocated.
pub fn use_reserve() {
    reserve::set_real_time();
}

/// Prepares this much free heap, in bytes, for the memory that a process needs later to go on.
pub fn reserve_heap(len: usize) {
    memory::reserve_heap(len);
}

/// Runs work that needs much memory while another process serves: its allocations may wait for I/O meanwhile. Do not
/// spawn threads inside: they would inherit the cleared flag.
pub fn while_others_serve<T>(fill: impl FnOnce() -> T) -> T {
    process::set_io_flusher(false);
    let filled = fill();
    process::set_io_flusher(true);
    filled
}

/// Locked memory of this process, in bytes; 0 if the kernel does not report it.
pub fn locked_bytes() -> u64 {
    memory::locked_bytes()
}

/// Like [`set_up`], for a process that looks after swap and serves none.
pub fn set_up_keeper(cgroup: &str) {
    memory::prepare_heap();
    memory::lock();
    process::set_io_flusher(true);
    process::set_oom_score();
    cgroup::enter(cgroup);
    memory::fault_in_stack();
}

/// The present state of every item of [`set_up_keeper`], read from the kernel.
pub fn keeper_items() -> Vec<SafetyItem> {
    vec![memory::locked(), process::io_flusher(), process::oom_score(), cgroup::swap_max()]
}

/// The present state of every item of [`set_up`], read from the kernel.
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

/// The items that are not met, as one line for an error; none if all are met.
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

/// An item with its state `found`, or with the error of reading it.
fn item(name: &str, found: Result<(bool, String), String>, remedy: &str) -> SafetyItem {
    let (ok, found) = found.unwrap_or_else(|error| (false, error));
    SafetyItem { item: name.to_owned(), ok, found, remedy: (!ok).then(|| remedy.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_read_and_unmet_items_have_a_remedy() {
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
    fn unmet_items_are_listed_in_one_line() {
        let good = item("a", Ok((true, "fine".to_owned())), "-");
        let bad = item("b", Err("not there".to_owned()), "do this");
        assert_eq!(missing(std::slice::from_ref(&good)), None);
        assert_eq!(missing(&[good, bad]).unwrap(), "b (not there; do this)");
    }
}
