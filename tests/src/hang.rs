//! One thread of a process is stopped, and the others go on: ptrace(2) can do that, signals stop all.
#![allow(unsafe_code)]

use std::sync::mpsc::sync_channel;
use std::{fs, io, ptr};

/// Stops the thread of this name, for ever; it ends when its process is killed. Blocks until it stands still.
///
/// # Panics
/// When there is no such thread, or this process may not stop it.
pub fn hang_thread(process: u64, name: &str) {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("the process is there");
    let mut threads = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse::<libc::pid_t>().ok());
    let named = |thread: &libc::pid_t| {
        fs::read_to_string(format!("/proc/{process}/task/{thread}/comm"))
            .is_ok_and(|comm| comm.trim_end() == name)
    };
    let thread = threads.find(named).unwrap_or_else(|| panic!("process {process} has no thread {name}"));
    let (stands, stood) = sync_channel(1);
    // Only who has stopped it may wait for it, and it is not wholly dead before somebody has.
    std::thread::spawn(move || {
        let _ = stands.send(stop(thread));
        while wait(thread).is_ok() {}
    });
    stood
        .recv()
        .expect("the other thread tells")
        .unwrap_or_else(|error| panic!("cannot stop thread {name}: {error}"));
}

fn stop(thread: libc::pid_t) -> io::Result<()> {
    let none: *mut libc::c_void = ptr::null_mut();
    // SAFETY: neither request reads or writes memory of this process.
    check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, thread, none, none) })?;
    // SAFETY: as above.
    check(unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, thread, none, none) })?;
    wait(thread)
}

fn wait(thread: libc::pid_t) -> io::Result<()> {
    // SAFETY: a null pointer asks for no status.
    check(unsafe { libc::waitpid(thread, ptr::null_mut(), libc::__WALL) }.into())
}

fn check(answer: libc::c_long) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
