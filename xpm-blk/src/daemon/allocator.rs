//! What the daemon asks of the allocator: to own an allocation, and to own it no more.

use std::sync::PoisonError;

use xpm_client::owner::Taking;
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
    /// Stands by for an allocation. Its map, without keys.
    pub(super) async fn stand_by(&self, request: &AttachDevice) -> Result<Map, DeviceError> {
        let AttachDevice { name, form, force, block_size, .. } = request;
        let blocks = block_size.map_or(BlockWish::Kept, BlockWish::Is);
        let how = Taking { force: *force, lose: false, blocks: Some(blocks), has: None };
        self.owner.stand_by(name, form.to_string(), how).await.map_err(|error| refused(&error))
    }

    /// The same for a device that is not shown yet. What was owed of the allocation is not owed any more.
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

    /// `has` is the epoch of a map that is here already; the one that is answered is not to be used then.
    async fn own_with(&self, request: &AttachDevice, has: Option<Epoch>) -> Result<Map, DeviceError> {
        let AttachDevice { name, form, force, lose, block_size, .. } = request;
        let blocks = block_size.map_or(BlockWish::Kept, BlockWish::Is);
        let how = Taking { force: *force, lose: *lose, blocks: Some(blocks), has };
        let owned = self.owner.own_with(name, form.to_string(), how).await;
        let map = owned.map_err(|error| refused(&error))?;
        self.registered().insert(request.name.clone(), None);
        Ok(map)
    }

    /// Whether the allocator knows that this life has the allocation. Tells it so first, where it was shown from a record: what a
    /// life says that it does not know is not heard.
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

    /// Becomes the owner for a device that is not shown yet. What was owed of it is not owed any more.
    pub(super) async fn own_anew(&self, request: &AttachDevice) -> Result<Map, DeviceError> {
        let mut debts = self.debts.lock().await;
        let map = self.own(request).await?;
        debts.settle(&request.name);
        self.show_debts(&debts);
        Ok(map)
    }

    /// Notes that an allocation is to be given back: from now on it is, whatever dies.
    pub(super) async fn owe(&self, name: &Name, given_up: Vec<ApplianceId>) {
        let mut debts = self.debts.lock().await;
        if let Err(error) = debts.add(name, given_up) {
            tracing::warn!(
                "allocation {name} stays this client's if the allocator does not answer now: {error}"
            );
        }
        self.show_debts(&debts);
    }

    /// Gives an allocation back that is owed. Where the allocator does not answer, it is told later.
    pub(super) async fn give_back(&self, name: &Name) {
        let mut debts = self.debts.lock().await;
        self.deliver(&mut debts, name).await;
        self.show_debts(&debts);
    }

    /// Gives back what is owed of allocations that have no device here.
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
            // One that cannot be told so, but can take the allocation back, is of a version that knows of no such thing.
            let _ = self.owner.say(name, &Report::GaveUp { appliance }).await;
        }
        let error = match self.owner.disown(name).await {
            Ok(()) => return debts.settle(name),
            // There is nothing to give back.
            Err(error) if is_settled(error.kind()) => {
                tracing::warn!("allocation {name} is not given back: {}", error_line(&error));
                return debts.settle(name);
            }
            Err(error) => error_line(&error),
        };
        if debts.explain(name, error.clone()) || !debts.has(name) {
            tracing::warn!(
                "allocation {name} could not be given back: {error}; it is when the allocator answers"
            );
        }
    }

    pub(super) fn show_debts(&self, debts: &Debts) {
        *self.owed.lock().unwrap_or_else(PoisonError::into_inner) = debts.shown();
    }
}

/// Whether a refusal says what holds, so that asking again brings nothing else.
const fn is_settled(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::Conflict | ErrorKind::Invalid | ErrorKind::Denied)
}

fn refused(error: &ClientError) -> DeviceError {
    DeviceError::new(error.kind(), format!("allocator: {}", error_line(error)))
}
