//! Becoming the owner of an allocation, for programs that use one themselves.

use std::time::Duration;

use xpm_control::client::{Client, ClientError};
use xpm_control::token::Token;
use xpm_control::urls::Urls;
use xpm_control::{error_line, host, random};
use xpm_protocol::api::allocator::{Attach, Map};
use xpm_protocol::api::blk::{Hold, TransportKind};
use xpm_protocol::{ClientId, Name};

use crate::volume::{OpenError, Volume, VolumeOptions};

/// Which allocation is used, and how.
#[derive(Clone)]
pub struct AttachOptions {
    /// The allocators, of which one leads.
    pub allocator: Urls,
    /// The secret of the control plane, where there is one.
    pub token: Option<Token>,
    /// The allocation.
    pub name: Name,
    /// Who this is. None: somebody new, who is the owner until [`Attachment::detach`]; after a crash others need `force`.
    /// A program that gives the same one again after a crash is let in again.
    pub client: Option<ClientId>,
    /// What it is used as, for people.
    pub purpose: String,
    /// Takes it from another owner, who is cut off.
    pub force: bool,
    /// The only transport to use; none: the best for each appliance.
    pub transport: Option<TransportKind>,
    /// How long I/O is held while an appliance cannot be reached.
    pub hold: Hold,
    /// Longest time until every appliance has to be connected.
    pub limit: Duration,
    /// Operations in flight on one channel, at least 16.
    pub depth: usize,
}

impl AttachOptions {
    /// The usual way to use an allocation.
    pub fn new(allocator: Urls, name: Name) -> AttachOptions {
        AttachOptions {
            allocator,
            token: None,
            name,
            client: None,
            purpose: "a mapping".to_owned(),
            force: false,
            transport: None,
            hold: Hold::Forever,
            limit: Duration::from_secs(10),
            depth: 32,
        }
    }
}

/// Why an allocation is not this program's.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The URL of an allocator cannot be used.
    #[error("{0}")]
    Url(String),
    /// The allocator refused, or did not answer.
    #[error("allocator: {}", error_line(.0))]
    Allocator(#[from] ClientError),
    /// The appliances cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The system refused something.
    #[error("{0}")]
    System(std::io::Error),
}

/// Ownership of an allocation. It lasts until [`Attachment::detach`], also beyond the end of the process.
pub struct Attachment {
    client: Client,
    name: Name,
    id: ClientId,
    map: Map,
}

impl Attachment {
    /// Becomes the owner, and connects to the appliances. Blocks until that is done.
    ///
    /// # Errors
    /// [`AttachError`]; nothing is owned then, unless an appliance could not be reached in time.
    pub fn attach(options: &AttachOptions) -> Result<(Attachment, Volume), AttachError> {
        let client = Client::one_of(&options.allocator, options.token.clone())
            .map_err(|error| AttachError::Url(error.to_string()))?
            .with_patience(Duration::from_secs(10));
        let id = match options.client {
            Some(id) => id,
            None => ClientId::from_u128(random::u128().map_err(AttachError::System)?),
        };
        let attach = Attach {
            client: id,
            host: host::host_id().map_err(AttachError::System)?,
            host_name: host::host_name().map_err(AttachError::System)?,
            purpose: options.purpose.clone(),
            force: options.force,
        };
        let path = format!("/v1/allocations/{}/owner", options.name);
        let map: Map = block_on(client.put(&path, &attach))?;
        let attachment = Attachment { client, name: options.name.clone(), id, map };
        match open(&attachment.map, options) {
            Ok(volume) => Ok((attachment, volume)),
            Err(error) => {
                // It was not used.
                let _ = attachment.detach();
                Err(error)
            }
        }
    }

    /// Where the allocation lies, with its keys: whoever has it can use the allocation.
    pub const fn map(&self) -> &Map {
        &self.map
    }

    /// Who this is.
    pub const fn client(&self) -> ClientId {
        self.id
    }

    /// Gives the allocation back: to be called when nothing uses it any more. Blocks until the allocator has answered.
    ///
    /// # Errors
    /// [`AttachError::Allocator`]: it stays this program's then.
    pub fn detach(self) -> Result<(), AttachError> {
        let path = format!("/v1/allocations/{}/owner/{}", self.name, self.id);
        block_on(self.client.delete(&path))
    }
}

/// Opens an allocation whose map is known, and waits until its appliances are connected.
///
/// # Errors
/// [`AttachError::Open`], [`AttachError::System`].
pub fn open(map: &Map, options: &AttachOptions) -> Result<Volume, AttachError> {
    let volume = Volume::open(
        map,
        VolumeOptions {
            hold: options.hold,
            transport: options.transport,
            forbidden: Vec::new(),
            connect_limit: options.limit,
            depth: options.depth.max(16),
            session: random::u128().map_err(AttachError::System)?,
            host: host::host_id().ok(),
        },
    )?;
    volume.wait_ready(options.limit)?;
    Ok(volume)
}

/// On a thread of its own: the caller may be within a runtime.
fn block_on<T: Send>(future: impl Future<Output = Result<T, ClientError>> + Send) -> Result<T, AttachError> {
    std::thread::scope(|scope| {
        let ran = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            Ok(runtime.map_err(AttachError::System)?.block_on(future)?)
        });
        ran.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
