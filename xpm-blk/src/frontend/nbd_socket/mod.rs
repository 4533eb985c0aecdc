//! An NBD server at a unix socket or a TCP address, for any NBD client.

use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};

use xpm_client_core::Volume;
use xpm_control::listen::Place;
use xpm_protocol::BlockSize;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::blk::SocketPlace;
use xpm_transport::nbd::server::{Exports, Listener, Opened, Server};

use super::{Health, Shown, socket};
use crate::error::{DeviceError, Step};
use crate::export;

/// A socket at which an allocation is served.
pub struct NbdSocket {
    place: SocketPlace,
    server: Server,
    volume: Volume,
    group: u128,
    listener: Mutex<Option<Listener>>,
}

impl NbdSocket {
    /// Listens. The allocation is the export of its name, and the default export; clients that ask for the
    /// block size receive it. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`](xpm_protocol::api::ErrorKind) when another process listens there.
    pub fn show(
        (name, block_size): (&str, Option<BlockSize>),
        place: &SocketPlace,
        volume: Volume,
        server: Server,
        group: u128,
        insecure: bool,
    ) -> Result<NbdSocket, DeviceError> {
        check_exposure(place, insecure)?;
        if let Err(exposed) = check_exposure(place, false) {
            tracing::warn!("{exposed}");
        }
        let exports =
            Arc::new(OneExport { name: name.to_owned(), volume: volume.clone(), group, block_size });
        let (place, listener) = match place {
            SocketPlace::Unix(path) => {
                let listener = socket::bind(path).map_err(|error| socket::refused(error, place))?;
                (place.clone(), server.listen_unix(listener, exports))
            }
            SocketPlace::Tcp(address) => {
                let listener = TcpListener::bind(address).map_err(|error| socket::refused(error, place))?;
                let bound = listener.local_addr().at(format!("listen at {place}"))?;
                (SocketPlace::Tcp(bound), server.listen_tcp(listener, exports))
            }
        };
        let listener = Mutex::new(Some(listener.at(format!("listen at {place}"))?));
        Ok(NbdSocket { place, server, volume, group, listener })
    }
}

/// Refuses an address that other machines reach: the export has no secret, so any client that connects can
/// read and write it.
///
/// # Errors
/// [`ErrorKind::Denied`] with the remedy.
pub(crate) fn check_exposure(place: &SocketPlace, insecure: bool) -> Result<(), DeviceError> {
    let SocketPlace::Tcp(address) = place else { return Ok(()) };
    match Place::Tcp(*address).check_exposure(false, insecure) {
        Ok(()) => Ok(()),
        Err(_) => Err(DeviceError::new(
            ErrorKind::Denied,
            format!(
                "nbd-socket={place} can be reached from other machines, and whoever connects reads and writes the allocation: give \
                 an address of this machine (127.0.0.1) or a path, or accept it with `insecure = true` in xpm-blk's configuration"
            ),
        )),
    }
}

struct OneExport {
    name: String,
    volume: Volume,
    group: u128,
    block_size: Option<BlockSize>,
}

impl Exports for OneExport {
    fn open(&self, name: &str) -> Option<Opened> {
        if !name.is_empty() && name != self.name {
            return None;
        }
        let channel = match self.volume.channel() {
            Ok(channel) => channel,
            Err(error) => {
                tracing::warn!(export = self.name, %error, "cannot serve an NBD client");
                return None;
            }
        };
        let info = export::info(&self.volume, self.block_size);
        Some(Opened { info, store: Box::new(channel), group: self.group, session: None })
    }

    fn list(&self) -> Option<Vec<String>> {
        Some(vec![self.name.clone()])
    }
}

impl Shown for NbdSocket {
    fn path(&self) -> String {
        self.place.to_string()
    }

    fn health(&self) -> Health {
        Health::of(&self.volume)
    }

    fn volume(&self) -> Option<&Volume> {
        Some(&self.volume)
    }

    fn resize(&self, _size: u64) -> Result<Option<String>, DeviceError> {
        let clients = self.clients();
        Ok((clients > 0).then(|| format!("{clients} NBD clients see the new size when they connect again")))
    }

    fn clients(&self) -> usize {
        self.server.connections(Some(self.group))
    }

    fn hide(&self, _give_up: bool) -> Result<(), DeviceError> {
        let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(listener);
        self.server.close_group(self.group);
        if let SocketPlace::Unix(path) = &self.place {
            // The file may be gone already.
            let _ = std::fs::remove_file(path);
        }
        Ok(())
    }
}
