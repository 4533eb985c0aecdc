//! Becoming the owner of an allocation, for programs that use one themselves.

use std::sync::Arc;
use std::time::Duration;

use xpm_control::client::{Client, ClientError};
use xpm_control::settings::{Settings, SettingsError};
use xpm_control::token::Token;
use xpm_control::urls::Urls;
use xpm_control::{error_line, host, random};
use xpm_protocol::api::allocator::Map;
use xpm_protocol::api::blk::{Hold, TransportKind};
use xpm_protocol::{ClientId, Name};

use crate::owner::{Follower, Known, Owner};
use crate::volume::{OpenError, REFUSAL_LIMIT, Volume, VolumeOptions};

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
    /// The usual way to use an allocation, at the allocators and with the token that the environment (`XPM_ALLOCATOR`,
    /// `XPM_TOKEN_FILE`), `~/.config/xpm/xpm.toml` or `/etc/xpm/xpm.toml` names. Reads files, so it blocks.
    ///
    /// # Errors
    /// When none of them names an allocator, or a file that is named cannot be used.
    pub fn configured(name: Name) -> Result<AttachOptions, SettingsError> {
        let settings = Settings::load()?;
        let token = settings.token()?;
        let allocator = settings.allocator.ok_or(SettingsError::NoAllocator)?;
        Ok(AttachOptions { token, ..AttachOptions::new(allocator, name) })
    }

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

/// Ownership of an allocation. It lasts until [`Attachment::detach`], also beyond the end of the process. While it
/// is there, and the allocation was opened by it, what the allocator orders is carried out: regions move to other
/// appliances while they are used.
pub struct Attachment {
    owner: Owner,
    map: Map,
    follower: Option<Follower>,
}

impl Attachment {
    /// Becomes the owner, and connects to the appliances. Blocks until that is done.
    ///
    /// # Errors
    /// [`AttachError`]; nothing is owned then, unless the allocator could not be told so.
    pub fn attach(options: &AttachOptions) -> Result<(Attachment, Volume), AttachError> {
        let mut attachment = Attachment::own(options)?;
        match attachment.open(options) {
            Ok(volume) => Ok((attachment, volume)),
            Err(error) => {
                // It was not used.
                let _ = attachment.detach();
                Err(error)
            }
        }
    }

    /// Becomes the owner, and no more: for one who hands the map to a process that is to use it by
    /// [`Attachment::adopt`].
    ///
    /// # Errors
    /// [`AttachError`]; nothing is owned then.
    pub fn own(options: &AttachOptions) -> Result<Attachment, AttachError> {
        let owner = owner(options)?;
        let map = block_on(owner.own(&options.name, options.purpose.clone(), options.force))?;
        Ok(Attachment { owner, map, follower: None })
    }

    /// Uses an allocation that another process has become the owner of, as the client that `options` name: one
    /// process may do so. Asks no allocator.
    ///
    /// # Errors
    /// [`AttachError`]; it is still owned.
    pub fn adopt(options: &AttachOptions, map: Map) -> Result<(Attachment, Volume), AttachError> {
        let mut attachment = Attachment { owner: owner(options)?, map, follower: None };
        let volume = attachment.open(options)?;
        Ok((attachment, volume))
    }

    /// Connects to the appliances, and carries out what the allocator orders from then on.
    fn open(&mut self, options: &AttachOptions) -> Result<Volume, AttachError> {
        let volume = Volume::open(
            &self.map,
            VolumeOptions {
                hold: options.hold,
                transport: options.transport,
                forbidden: Vec::new(),
                connect_limit: options.limit,
                depth: options.depth.max(16),
                session: random::u128().map_err(AttachError::System)?,
                generation: 0,
                host: Some(self.owner.host),
                refusal_limit: REFUSAL_LIMIT,
                // Its map is in no file, so no copy of it can come back with the same keys.
                visitor: None,
                held: None,
                contested: false,
            },
        )?;
        volume.wait_ready(options.limit)?;
        let (owner, name) = (self.owner.clone(), self.map.name.clone());
        let follower = Follower::new(owner, name, Known::from(&self.map), volume.clone());
        self.follower = Some(follower.map_err(AttachError::System)?);
        Ok(volume)
    }

    /// Where the allocation lay when it was attached, with its keys: whoever has it can use the allocation.
    pub const fn map(&self) -> &Map {
        &self.map
    }

    /// Who owns it, as the allocator knows it.
    pub(crate) const fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Who this is.
    pub const fn client(&self) -> ClientId {
        self.owner.client
    }

    /// Gives the allocation back: to be called when nothing uses it any more. Blocks until the allocator has answered.
    ///
    /// # Errors
    /// [`AttachError::Allocator`]: it stays this program's then.
    pub fn detach(mut self) -> Result<(), AttachError> {
        self.follower = None;
        block_on(self.owner.disown(&self.map.name))
    }
}

fn owner(options: &AttachOptions) -> Result<Owner, AttachError> {
    let allocator = Client::one_of(&options.allocator, options.token.clone())
        .map_err(|error| AttachError::Url(error.to_string()))?
        .with_patience(Duration::from_secs(10));
    let client = match options.client {
        Some(id) => id,
        None => ClientId::from_u128(random::u128().map_err(AttachError::System)?),
    };
    Ok(Owner {
        allocator,
        token: options.token.clone(),
        client,
        host: host::host_id().map_err(AttachError::System)?,
        host_name: host::host_name().map_err(AttachError::System)?,
        life: Some(host::life_of_kernel().map_err(AttachError::System)?),
        known: Arc::default(),
    })
}

/// On a thread of its own: the caller may be within a runtime.
pub(crate) fn block_on<T: Send>(
    future: impl Future<Output = Result<T, ClientError>> + Send,
) -> Result<T, AttachError> {
    std::thread::scope(|scope| {
        let run = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            Ok(runtime.map_err(AttachError::System)?.block_on(future)?)
        };
        let ran = crate::signals::blocked(|| scope.spawn(run));
        ran.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
