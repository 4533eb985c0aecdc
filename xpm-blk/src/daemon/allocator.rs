//! The daemon's requests to the allocator: to own an allocation, to stand by for it, and to give it back.

use std::sync::PoisonError;

use xpm_client_core::owner::Taking;
use xpm_control::client::ClientError;
use xpm_control::error_line;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Map, Report};
use xpm_protocol::api::blk::AttachDevice;
use xpm_protocol::{ApplianceId, BlockWish, Epoch, Name};

use super::Daemon;
use crate::error::DeviceError;
use crate::owed::Debts;
use crate::records::Record;

impl Daemon {
    /// Stands by for an allocation. Returns its map, without keys.
    pub(super) async fn stand_by(&self, request: &AttachDevice) -> Result<Map, DeviceError> {
        let AttachDevice { name, form, force, block_size, .. } = request;
        let blocks = block_size.map_or(BlockWish::Kept, BlockWish::Is);
        let how = Taking { force: *force, lose: false, blocks: Some(blocks), has: None };
        self.owner.stand_by(name, form.to_string(), how).await.map_err(|error| refused(&error))
    }

    /// As [`Daemon::stand_by`], for a device that is not shown yet. A pending give-back of the allocation is
    /// cancelled.
    pub(super) async fn stand_by_anew(&self, request: &AttachDevice) -> Result<Map, DeviceError> {
        let mut debts = self.debts.lock().await;
        let map = self.stand_by(request).await?;
        debts.settle(&request.name);
        self.show_debts(&debts);
        Ok(map)
    }

    pub(super) async fn own(&self, request: &AttachDevice) -> Result<Map, DeviceError> {
        self.own_with(request, None).await
    }

    /// `has` is the epoch of a map that exists here already; then the map in the answer must not be used.
    async fn own_with(&self, request: &AttachDevice, has: Option<Epoch>) -> Result<Map, DeviceError> {
        let AttachDevice { name, form, force, lose, block_size, .. } = request;
        let blocks = block_size.map_or(BlockWish::Kept, BlockWish::Is);
        let how = Taking { force: *force, lose: *lose, blocks: Some(blocks), has };
        let owned = self.owner.own_with(name, form.to_string(), how).await;
        let map = owned.map_err(|error| refused(&error))?;
        self.registered().insert(request.name.clone(), None);
        Ok(map)
    }

    /// Whether the allocator knows that this life has the allocation. Registers it first if it was shown from
    /// a record, because the allocator ignores statements of a life that it does not know.
    pub(super) async fn is_registered(&self, record: &Record) -> bool {
        let request = &record.request;
        if matches!(self.registered().get(&request.name), Some(None)) {
            return true;
        }
        let Err(error) = self.own_with(request, Some(record.map.epoch)).await else { return true };
        let (name, why) = (&request.name, error.to_string());
        let said = self.registered().insert(name.clone(), Some(why.clone()));
        if said.flatten().as_ref() != Some(&why) {
            tracing::warn!("allocation {name}: {why}");
        }
        false
    }

    /// Becomes the owner for a device that is not shown yet. A pending give-back of the allocation is
    /// cancelled.
    pub(super) async fn own_anew(&self, request: &AttachDevice) -> Result<Map, DeviceError> {
        let mut debts = self.debts.lock().await;
        let map = self.own(request).await?;
        debts.settle(&request.name);
        self.show_debts(&debts);
        Ok(map)
    }

    /// Records that an allocation has to be given back: from now on it will be, whichever process dies.
    pub(super) async fn owe(&self, name: &Name, given_up: Vec<ApplianceId>) {
        let mut debts = self.debts.lock().await;
        if let Err(error) = debts.add(name, given_up) {
            tracing::warn!(
                "allocation {name} stays this client's if the allocator does not answer now: {error}"
            );
        }
        self.show_debts(&debts);
    }

    /// Gives an allocation back that was detached. If the allocator does not answer, this is repeated later.
    pub(super) async fn give_back(&self, name: &Name) {
        let mut debts = self.debts.lock().await;
        self.deliver(&mut debts, name).await;
        self.show_debts(&debts);
    }

    /// Gives back all detached allocations that have no device here.
    pub(super) async fn give_all_back(&self) {
        let mut debts = self.debts.lock().await;
        for name in debts.names() {
            if !self.slots().contains_key(&name) {
                self.deliver(&mut debts, &name).await;
            }
        }
        self.show_debts(&debts);
    }

    async fn deliver(&self, debts: &mut Debts, name: &Name) {
        for appliance in debts.given_up(name) {
            // An allocator that refuses this report, but can take the allocation back, is of a version
            // without this report.
            let _ = self.owner.say(name, &Report::GaveUp { appliance }).await;
        }
        let error = match self.owner.disown(name).await {
            Ok(()) => return debts.settle(name),
            // The allocator has no allocation of this client to take back.
            Err(error) if is_settled(error.kind()) => {
                tracing::warn!("allocation {name} is not given back: {}", error_line(&error));
                return debts.settle(name);
            }
            Err(error) => error_line(&error),
        };
        if debts.explain(name, error.clone()) || !debts.has(name) {
            tracing::warn!(
                "allocation {name} could not be given back: {error}; this is repeated until the allocator \
                 answers"
            );
        }
    }

    pub(super) fn show_debts(&self, debts: &Debts) {
        *self.owed.lock().unwrap_or_else(PoisonError::into_inner) = debts.shown();
    }
}

/// Whether a refusal is definite, so that repeating the request is useless.
const fn is_settled(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::Conflict | ErrorKind::Invalid | ErrorKind::Denied)
}

fn refused(error: &ClientError) -> DeviceError {
    DeviceError::new(error.kind(), format!("allocator: {}", error_line(error)))
}
