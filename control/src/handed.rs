//! Descriptors that the service manager passes at the start: descriptors that it kept, and listening sockets
//! (sd_listen_fds(3)).

#![allow(unsafe_code)]

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::sockopt::socket_acceptconn;

use crate::manager;

/// Number of the first passed descriptor.
const FIRST: RawFd = 3;

/// Descriptors that were not taken yet.
struct Handed {
    kept: Vec<(String, OwnedFd)>,
    listening: Vec<OwnedFd>,
}

/// Takes the descriptors that are not listening sockets, with their names. Further calls return nothing.
pub fn take() -> Vec<(String, OwnedFd)> {
    std::mem::take(&mut handed().kept)
}

/// Takes the listening socket of this address.
pub(crate) fn tcp(address: SocketAddr) -> Option<io::Result<TcpListener>> {
    let at = |socket: &OwnedFd| {
        let listener = TcpListener::from(socket.try_clone().ok()?);
        listener.local_addr().ok().filter(|found| *found == address)
    };
    listening(|socket| at(socket).is_some()).map(|socket| socket.map(TcpListener::from))
}

/// Takes the listening socket of this path.
pub(crate) fn unix(path: &Path) -> Option<io::Result<UnixListener>> {
    let at = |socket: &OwnedFd| {
        let address = UnixListener::from(socket.try_clone().ok()?).local_addr().ok()?;
        (address.as_pathname() == Some(path)).then_some(())
    };
    listening(|socket| at(socket).is_some()).map(|socket| socket.map(UnixListener::from))
}

fn listening(is_it: impl Fn(&OwnedFd) -> bool) -> Option<io::Result<OwnedFd>> {
    let mut handed = handed();
    let place = handed.listening.iter().position(is_it)?;
    let socket = handed.listening.swap_remove(place);
    Some(rustix::io::ioctl_fionbio(&socket, true).map(|()| socket).map_err(Into::into))
}

/// All passed descriptors, owned from the first call on.
fn handed() -> MutexGuard<'static, Handed> {
    static HANDED: OnceLock<Mutex<Handed>> = OnceLock::new();
    let all = HANDED.get_or_init(|| {
        let all = (FIRST..).zip(manager::handed()).filter_map(|(number, name)| Some((name, own(number)?)));
        let (listening, kept): (Vec<_>, Vec<_>) =
            all.partition(|(_, descriptor)| socket_acceptconn(descriptor) == Ok(true));
        let listening = listening.into_iter().map(|(_, socket)| socket).collect();
        Mutex::new(Handed { kept, listening })
    });
    all.lock().unwrap_or_else(PoisonError::into_inner)
}

/// None if there is no such descriptor: then the environment was wrong.
fn own(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: the borrowed value does not leave this function, and the kernel checks the number: for a number without
    // a descriptor it returns an error, without undefined behaviour.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl_setfd(borrowed, FdFlags::CLOEXEC).ok()?;
    // SAFETY: the descriptor is open, as the call above showed. The environment passes it to this process, and each
    // number is taken only once. It was open when the process began, so no other part of the process got that number.
    // So this process is its only owner.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}
