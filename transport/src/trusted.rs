//! The check of a unix socket's path and of the peer that listens there, before a client sends a key.
//!
//! The path comes from the network: a party that can pose as an appliance of this host chooses it. And the
//! first bytes that the client sends there are the key of a grant. So only root or the user of this process
//! may be able to have put the socket there: the socket and every directory above it belong to one of these
//! two, and no other user may write to those directories. In a directory with the sticky bit (`/tmp`) others
//! may write, but not replace files of other users; so such a directory is accepted for directories below it,
//! and not for the socket itself. The listening process has to belong to root or to the user of this process,
//! too, before the client sends anything.

use std::fs::Metadata;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::net::sockopt::socket_peercred;
use rustix::process::{getegid, geteuid};

const STICKY: u32 = 0o1000;
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;

/// Returns the socket's path without symbolic links, if it can be trusted. Blocks for a moment.
///
/// # Errors
/// In one line: the untrusted part of the path and the reason.
pub(crate) fn socket(path: &Path) -> Result<PathBuf, String> {
    let at = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    let path = path.canonicalize().map_err(|error| at(path, error))?;
    let mut is_socket = true;
    for part in path.ancestors() {
        let found = part.symlink_metadata().map_err(|error| at(part, error))?;
        if is_socket && !found.file_type().is_socket() {
            return Err(format!("{} is no socket", part.display()));
        }
        let sticky_will_do = !is_socket && part != path.parent().unwrap_or(&path);
        check(&found, is_socket, sticky_will_do).map_err(|what| {
            format!(
                "{} {what}, so that it may be a trap: the key of a grant is not sent there",
                part.display()
            )
        })?;
        is_socket = false;
    }
    Ok(path)
}

fn check(found: &Metadata, is_socket: bool, sticky_will_do: bool) -> Result<(), String> {
    let (owner, mode) = (found.uid(), found.mode());
    if !is_trusted(owner) {
        return Err(format!("belongs to user {owner}, not to root or this process's user"));
    }
    // Write permission on a socket allows connecting to it, and not replacing it.
    if is_socket || (sticky_will_do && mode & STICKY != 0) {
        return Ok(());
    }
    let of_group = mode & GROUP_WRITES != 0 && found.gid() != 0 && found.gid() != getegid().as_raw();
    match mode & OTHERS_WRITE != 0 || of_group {
        true => Err("can be written to by others".to_owned()),
        false => Ok(()),
    }
}

fn is_trusted(user: u32) -> bool {
    user == 0 || user == geteuid().as_raw()
}

/// Checks that the process that listens at the other end of a connected socket can be trusted.
///
/// # Errors
/// In one line: the user that the process belongs to.
pub(crate) fn peer(socket: BorrowedFd<'_>) -> Result<(), String> {
    let peer =
        socket_peercred(socket).map_err(|error| format!("cannot tell who listens at a socket: {error}"))?;
    match is_trusted(peer.uid.as_raw()) {
        true => Ok(()),
        false => Err(format!(
            "a process of user {} listens there, not of root or this process's user: the key of a grant is not sent there",
            peer.uid.as_raw()
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::fd::AsFd;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_socket_that_others_can_replace_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("run");
        fs::create_dir(&below).unwrap();
        mode(&below, 0o755);
        let path = below.join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        assert_eq!(socket(&path).unwrap(), path.canonicalize().unwrap());
        for (writable, part) in [(0o777, &below), (0o1777, &below), (0o777, &directory.path().to_owned())] {
            mode(part, writable);
            let refused = socket(&path).unwrap_err();
            assert!(refused.contains("written to by others"), "{writable:o}: {refused}");
            mode(part, 0o755);
        }
        mode(directory.path(), 0o1777);
        socket(&path).expect("nobody can replace what is not theirs");
        let link = directory.path().join("link");
        symlink(&path, &link).unwrap();
        assert_eq!(socket(&link).unwrap(), path.canonicalize().unwrap(), "what a link leads to counts");
        let file = below.join("file");
        fs::write(&file, "").unwrap();
        assert!(socket(&file).unwrap_err().contains("no socket"));
        assert!(socket(&below.join("nothing")).is_err());
    }

    #[test]
    fn the_socket_of_another_user_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        if std::os::unix::fs::chown(&path, Some(65534), None).is_err() {
            return eprintln!("skipped: only root can give a file away");
        }
        assert!(socket(&path).unwrap_err().contains("belongs to user 65534"));
    }

    #[test]
    fn a_peer_of_the_same_user_is_trusted() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        peer(ours.as_fd()).unwrap();
    }
}
