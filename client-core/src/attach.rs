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

/// The allocation to use, and the parameters of its use.
#[derive(Clone)]
pub struct AttachOptions {
    /// The allocators, of which one leads.
    pub allocator: Urls,
    /// The secret of the control plane, where there is one.
    pub token: Option<Token>,
    /// The allocation.
    pub name: Name,
    /// The client's id. None creates a new client, which is the owner until [`Attachment::detach`]; after a
    /// crash, other clients then need `force`. A program that passes the same id again after a crash becomes
    /// the owner again.
    pub client: Option<ClientId>,
    /// The purpose of the use, for display.
    pub purpose: String,
    /// Takes the allocation from another owner, who is cut off.
    pub force: bool,
    /// The only transport to use; none: the best one for each appliance.
    pub transport: Option<TransportKind>,
    /// How long I/O is held while an appliance cannot be reached.
    pub hold: Hold,
    /// Time limit for connecting to every appliance.
    pub limit: Duration,
    /// Most operations in flight on one channel, at least 16.
    pub depth: usize,
}

impl AttachOptions {
    /// Default options for an allocation, with the allocators and the token that the environment
    /// (`XPM_ALLOCATOR`, `XPM_TOKEN_FILE`), `~/.config/xpm/xpm.toml` or `/etc/xpm/xpm.toml` names. Reads
    /// files, so it blocks.
    ///
    /// # Errors
    /// When none of them names an allocator, or a named file cannot be used.
    pub fn configured(name: Name) -> Result<AttachOptions, SettingsError> {
        let settings = Settings::load()?;
        let token = settings.token()?;
        let allocator = settings.allocator.ok_or(SettingsError::NoAllocator)?;
        Ok(AttachOptions { token, ..AttachOptions::new(allocator, name) })
    }

    /// Default options for an allocation.
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

/// Why a program could not become the owner of an allocation.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The URL of an allocator is invalid.
    #[error("{0}")]
    Url(String),
    /// The allocator refused, or did not answer.
    #[error("allocator: {}", error_line(.0))]
    Allocator(#[from] ClientError),
    /// The appliances cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A system call failed.
    #[error("{0}")]
    System(std::io::Error),
}

/// Ownership of an allocation. It lasts until [`Attachment::detach`], even beyond the end of the process.
/// While the attachment exists and its volume is open, it executes the allocator's orders: regions move to
/// other appliances while they are used.
pub struct Attachment {
    owner: Owner,
    map: Map,
    follower: Option<Follower>,
}

impl Attachment {
    /// Becomes the owner, and connects to the appliances. Blocks until all are connected.
    ///
    /// # Errors
    /// [`AttachError`]; the ownership is given back then, unless the allocator cannot be reached.
    pub fn attach(options: &AttachOptions) -> Result<(Attachment, Volume), AttachError> {
        let mut attachment = Attachment::own(options)?;
        match attachment.open(options) {
            Ok(volume) => Ok((attachment, volume)),
            Err(error) => {
                // The allocation was not used.
                let _ = attachment.detach();
                Err(error)
            }
        }
    }

    /// Becomes the owner without connecting: for a program that passes the map to a process which uses it by
    /// [`Attachment::adopt`].
    ///
    /// # Errors
    /// [`AttachError`]; the program is not the owner then.
    pub fn own(options: &AttachOptions) -> Result<Attachment, AttachError> {
        let owner = owner(options)?;
        let map = block_on(owner.own(&options.name, options.purpose.clone(), options.force))?;
        Ok(Attachment { owner, map, follower: None })
    }

    /// Uses an allocation that another process has become the owner of, as the client that `options` name.
    /// Only one process may do so. Asks no allocator.
    ///
    /// # Errors
    /// [`AttachError`]; the ownership stays.
    pub fn adopt(options: &AttachOptions, map: Map) -> Result<(Attachment, Volume), AttachError> {
        let mut attachment = Attachment { owner: owner(options)?, map, follower: None };
        let volume = attachment.open(options)?;
        Ok((attachment, volume))
    }

    /// Connects to the appliances, and executes the allocator's orders from then on.
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
                // The map is in no file, so no copy of it can come back with the same keys.
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

    /// The map as of the time of attaching, with its keys: a process that has the map can use the allocation.
    pub const fn map(&self) -> &Map {
        &self.map
    }

    /// The owner, as recorded by the allocator.
    pub const fn owner(&self) -> &Owner {
        &self.owner
    }

    /// The client's id.
    pub const fn client(&self) -> ClientId {
        self.owner.client
    }

    /// Gives the allocation back. To be called when the program has stopped using it. Blocks until the
    /// allocator has answered.
    ///
    /// # Errors
    /// [`AttachError::Allocator`]: the program is still the owner then.
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

/// Runs the future on a thread of its own, because the caller may be within a runtime.
///
/// # Errors
/// The error of the future, and [`AttachError::System`] when no runtime can be made.
pub fn block_on<T: Send>(
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
