//! Asking `xpm run` for the external memory, which one process has at a time.

use std::io::{self, IoSliceMut, Read as _, Seek as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use xpm_protocol::api::run::{Account, MEMORY, Place, Run, YES};

/// The right to use the external memory: it lasts until this is dropped, or the process ends.
pub(crate) struct Lease {
    stream: UnixStream,
}

/// The data that comes with the right.
pub(crate) struct Terms {
    pub(crate) lease: Lease,
    pub(crate) run: Run,
    /// Where messages for people go.
    pub(crate) messages: OwnedFd,
}

impl Lease {
    /// Asks; none where another process has the memory. Blocks until `xpm run` has answered.
    pub(crate) fn ask(place: &Place) -> io::Result<Option<Terms>> {
        let address = SocketAddr::from_abstract_name(&place.socket)?;
        let mut stream = UnixStream::connect_addr(&address)?;
        stream.write_all(format!("{} {MEMORY}\n", place.secret).as_bytes())?;
        let Some([file, messages]) = answer(&stream)? else { return Ok(None) };
        let mut file = std::fs::File::from(file);
        let mut text = String::new();
        file.rewind()?;
        file.read_to_string(&mut text)?;
        let run: Run = serde_json::from_str(&text).map_err(|error| {
            io::Error::other(format!(
                "`xpm run` and this library do not fit together: install the same version of both ({error})"
            ))
        })?;
        Ok(Some(Terms { lease: Lease { stream }, run, messages }))
    }

    /// Says what was used. A report that does not fit into the socket's buffer is dropped: the next report contains
    /// its numbers.
    pub(crate) fn say(&self, account: &Account) {
        let Ok(mut line) = serde_json::to_vec(account) else { return };
        line.push(b'\n');
        let _ = send(&self.stream, &line, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}

/// The descriptors of a yes.
fn answer(stream: &UnixStream) -> io::Result<Option<[OwnedFd; 2]>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.bytes != 1 || byte[0] != YES {
        return Ok(None);
    }
    let both: Result<[OwnedFd; 2], _> = descriptors.try_into();
    both.map(Some).map_err(|_| io::Error::other("`xpm run` handed no memory over"))
}
