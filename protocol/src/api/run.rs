//! What `xpm run` hands over to the program that it starts: by a file without a name, for it has keys.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::allocator::Map;
use crate::policy::Amount;
use crate::{ByteSize, ClientId};

/// Environment variable with the number of the file's descriptor.
pub const DESCRIPTOR: &str = "XPM_RUN_FD";

/// External memory for one program.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    /// The allocation, with its keys.
    pub map: Map,
    /// Who owns it.
    pub client: ClientId,
    /// URLs of the allocators, with commas between them.
    pub allocator: String,
    /// File with the secret of the control plane.
    pub token_file: Option<PathBuf>,
    /// Local memory that may be used as cache; a share is one of what is free, and follows it.
    pub local: Amount,
    /// What is shorter stays local.
    pub threshold: ByteSize,
    /// Threads that bring pages.
    pub threads: usize,
    /// Whether it is said at the end what was used.
    pub verbose: bool,
}
