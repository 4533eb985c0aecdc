//! The buffers of a queue, registered once for all of the queue's links over the same device.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::cm::Id;
use super::plain::Port;
use super::verbs::{Access, Device, Domain, Registration};
use crate::io::IoBuf;

/// Registered buffers of one link.
pub(super) struct Buffers {
    registered: Vec<Arc<Registration>>,
    local: Arc<LocalDevice>,
}

impl Buffers {
    pub(super) const fn new(local: Arc<LocalDevice>) -> Buffers {
        Buffers { registered: Vec::new(), local }
    }

    /// The key of a buffer that lies within a registered one.
    pub(super) fn key(&self, buffer: IoBuf) -> Option<u32> {
        self.registered.iter().find_map(|registered| registered.local_key(buffer))
    }

    /// Registers a buffer, unless another link has registered it already. The data of a buffer that cannot be
    /// registered are copied.
    pub(super) fn register(&mut self, buffer: IoBuf) {
        match self.local.register(buffer) {
            Ok(registered) => self.registered.push(registered),
            Err(error) => tracing::warn!(
                "{} KiB of buffers cannot be registered for RDMA ({error}) and are copied; see `ulimit -l`",
                buffer.len() >> 10
            ),
        }
    }
}

/// The client's view of a device: one protection domain for all links of this process over it.
pub(super) struct LocalDevice {
    domain: Arc<Domain>,
    registered: Mutex<Vec<(IoBuf, Weak<Registration>)>>,
}

/// The devices in use.
static DEVICES: Mutex<Vec<Weak<LocalDevice>>> = Mutex::new(Vec::new());

impl LocalDevice {
    /// The device that an identifier is bound to. `keeper` creates another identifier that is bound to the
    /// same device.
    pub(super) fn of(
        id: &Id,
        keeper: impl FnOnce() -> std::io::Result<Id>,
    ) -> std::io::Result<Arc<LocalDevice>> {
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        devices.retain(|device| device.strong_count() > 0);
        if let Some(known) =
            devices.iter().filter_map(Weak::upgrade).find(|known| known.domain.device().is_of(id))
        {
            return Ok(known);
        }
        let device =
            Device::of(keeper()?).ok_or_else(|| std::io::Error::other("the address is on no RDMA device"))?;
        let local = Arc::new(LocalDevice { domain: Domain::new(device)?, registered: Mutex::default() });
        devices.push(Arc::downgrade(&local));
        Ok(local)
    }

    /// The device and port of an address of this host, without the connection manager.
    pub(super) fn at(ip: IpAddr) -> std::io::Result<(Arc<LocalDevice>, Port)> {
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        let own = devices.iter().filter_map(Weak::upgrade).filter(|known| known.domain.device().is_own());
        for known in own {
            if let Some((_, port)) = Port::find(std::slice::from_ref(known.domain.device()), ip) {
                return Ok((known, port));
            }
        }
        let (device, port) = Port::find(&Device::all()?, ip)
            .ok_or_else(|| std::io::Error::other("no RDMA device of this host has that address"))?;
        let local = Arc::new(LocalDevice { domain: Domain::new(device)?, registered: Mutex::default() });
        devices.push(Arc::downgrade(&local));
        Ok((local, port))
    }

    pub(super) const fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    fn register(&self, buffer: IoBuf) -> std::io::Result<Arc<Registration>> {
        let mut registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        registered.retain(|(_, registration)| registration.strong_count() > 0);
        let known = registered.iter().find(|(known, _)| *known == buffer);
        if let Some(known) = known.and_then(|(_, registration)| registration.upgrade()) {
            return Ok(known);
        }
        let made = Arc::new(Registration::new(&self.domain, buffer, Access::Local)?);
        registered.push((buffer, Arc::downgrade(&made)));
        Ok(made)
    }
}
