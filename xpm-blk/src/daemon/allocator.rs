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
        owned.map_err(|error| refused(&error))
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
