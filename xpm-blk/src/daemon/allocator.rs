//! What the daemon asks of the allocator: to own an allocation, and to own it no more.

use xpm_control::client::ClientError;
use xpm_control::error_line;
use xpm_protocol::Name;
use xpm_protocol::api::allocator::Map;
use xpm_protocol::api::blk::AttachDevice;

use super::Daemon;
use crate::error::DeviceError;

impl Daemon {
    pub(super) async fn own(&self, request: &AttachDevice) -> Result<Map, DeviceError> {
        let AttachDevice { name, form, force, lose, .. } = request;
        let owned = self.owner.own_with(name, form.to_string(), *force, *lose).await;
        let map = owned.map_err(|error| refused(&error))?;
        self.registered().insert(request.name.clone(), None);
        Ok(map)
    }

    /// Whether the allocator knows that this life has the allocation. Tells it so first, where it was shown from a record: what a
    /// life says that it does not know is not heard.
    pub(super) async fn is_registered(&self, request: &AttachDevice) -> bool {
        if matches!(self.registered().get(&request.name), Some(None)) {
            return true;
        }
        let Err(error) = self.own(request).await else { return true };
        let (name, why) = (&request.name, error.to_string());
        let said = self.registered().insert(name.clone(), Some(why.clone()));
        if said.flatten().as_ref() != Some(&why) {
            tracing::warn!("allocation {name}: {why}");
        }
        false
    }

    /// Gives an allocation back. What cannot be reached is logged only: the allocation stays ours
    /// there, which harms nobody, and can be taken with force.
    pub(super) async fn disown(&self, name: &Name) {
        if let Err(error) = self.owner.disown(name).await {
            tracing::warn!("allocation {name} could not be given back: {}", error_line(&error));
        }
    }
}

fn refused(error: &ClientError) -> DeviceError {
    DeviceError::new(error.kind(), format!("allocator: {}", error_line(error)))
}
