//! The memory of a grant, registered with one device.

use std::io;
use std::sync::Arc;

use super::super::pages::Pages;
use super::super::verbs::{Access, Device, Domain, Registration};
use super::super::wire::{ENTRY_LEN, Entry, Welcome};
use crate::io::IoBuf;

/// Lent memory, which stays mapped at the same address for as long as the value lives.
pub trait Lent: Send + Sync {
    /// All of the memory; its length is a power of two.
    fn buffer(&self) -> IoBuf;
}

/// A job for the registration thread.
pub(super) enum Job {
    Register { group: u128, ticket: u64, regions: Vec<Arc<dyn Lent>> },
    Stop,
}

/// A grant's regions, registered in a protection domain of its own.
pub(super) struct DeviceGrant {
    // Field order is drop order: the registrations end before the memory is released.
    _regions: Vec<Registration>,
    table: Registration,
    table_pages: Pages,
    _memory: Vec<Arc<dyn Lent>>,
    domain: Arc<Domain>,
    device: Arc<Device>,
    count: u32,
    shift: u8,
}

impl DeviceGrant {
    /// Registers regions of equal length; at least one. Fails with [`io::ErrorKind::Interrupted`] as soon as
    /// `wanted` returns false.
    pub(super) fn register(
        device: &Arc<Device>,
        memory: &[Arc<dyn Lent>],
        wanted: impl Fn() -> bool,
    ) -> io::Result<DeviceGrant> {
        let domain = Domain::new(device.clone())?;
        let mut regions = Vec::with_capacity(memory.len());
        let table_pages = Pages::new((memory.len() * ENTRY_LEN).max(1))?;
        for (index, region) in memory.iter().enumerate() {
            if !wanted() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let buffer = region.buffer();
            let registration = Registration::new(&domain, buffer, Access::RemoteWrite)?;
            let entry = Entry { address: buffer.as_ptr().addr() as u64, rkey: registration.remote_key() };
            table_pages.whole().part(index * ENTRY_LEN, ENTRY_LEN).copy_from_slice(&entry.encode());
            regions.push(registration);
        }
        let table = Registration::new(&domain, table_pages.whole(), Access::RemoteRead)?;
        Ok(DeviceGrant {
            shift: memory.first().map_or(0, |region| region.buffer().len().trailing_zeros() as u8),
            count: u32::try_from(memory.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
            _regions: regions,
            table,
            table_pages,
            _memory: memory.to_vec(),
            domain,
            device: device.clone(),
        })
    }

    pub(super) const fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(super) const fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// The message with which a client is admitted.
    pub(super) fn welcome(&self) -> Welcome {
        Welcome {
            table: self.table_pages.whole().as_ptr().addr() as u64,
            rkey: self.table.remote_key(),
            regions: self.count,
            region_shift: self.shift,
        }
    }
}
