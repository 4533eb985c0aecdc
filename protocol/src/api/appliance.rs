//! Messages of the appliance's control interface.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | | [`Status`] |
//! | `GET /v1/regions` | | list of [`Region`] |
//! | `POST /v1/regions` | [`Reserve`] | list of [`Region`], in the order of their use |
//! | `DELETE /v1/regions/{id}` | | nothing; refused while the region belongs to a grant |
//! | `GET /v1/grants` | | list of [`Grant`] |
//! | `PUT /v1/grants/{id}?lose=BOOL` | [`Commit`] | [`Grant`] |
//! | `DELETE /v1/grants/{id}` | | nothing; revokes, then clears and frees the regions |
//! | `GET /v1/grants/{id}/living/{life}` | | list of [`Holder`]: other lives than this one that are connected and answer; takes up to 3 s |
//! | `POST /v1/grants/{id}/copies` | [`struct@Copy`] | [`Digest`] of what was copied |
//! | `POST /v1/grants/{id}/digests` | [`Range`] | [`Digest`] |
//!
//! Orders (`POST`, `PUT`, `DELETE`) may have `pool=ID&number=N` in their query: the newest state of the allocator's metadata, which
//! the appliance remembers. Appliances of before 0.2 ignore it.
//!
//! Memory is given in two phases: regions are reserved with a time limit, and stay only if a
//! grant takes them before it ends. `PUT` and `DELETE` are idempotent.
//!
//! Memory that was ever given to a process of the appliance's host (shared memory) is moved when the epoch of its
//! grant is raised, because that process can keep it mapped. Where it cannot be moved, the order is refused as
//! `no-space` and nothing is changed; with `lose=true` the grant gets zeros in its place. Appliances of before 0.2
//! ignore `lose`.

use std::net::SocketAddr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::allocator::MetadataState;
use crate::policy::Labels;
use crate::speed::LinkSpeed;
use crate::text;
use crate::units::{ByteSize, Span};
use crate::{AllocationId, ApplianceId, Epoch, GrantId, GrantKey, HostId, Life, Name, RegionId};

/// Who an appliance is and where it is reached; part of each heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// The appliance's id, kept in its state directory.
    pub id: ApplianceId,
    /// Its name, by default the host's.
    pub name: Name,
    /// Version of the program.
    #[serde(deserialize_with = "text::line")]
    pub version: String,
    /// Base URL of its control interface.
    pub control: String,
    /// Where its regions are reached.
    pub endpoints: Endpoints,
    /// What the lent memory lies on.
    pub medium: Medium,
    /// Size of the regions that it keeps ready, in bytes.
    pub region_len: ByteSize,
    /// What its operator calls it and where it is; see [`crate::policy::Labels`].
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Speed of the link behind its first address, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_speed: Option<LinkSpeed>,
    /// Its machine, its state directory and its start: what tells a copy of the appliance from the appliance. None in
    /// versions before 0.2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub life: Option<Life>,
}

impl Info {
    /// Where it is, for people: the address of its control interface, and the machine with the number of its life where
    /// they are known.
    pub fn place(&self) -> String {
        let control = text::short_line(&self.control, CONTROL_LEN_MAX);
        match &self.life {
            Some(life) => format!("{control} ({})", life.shown()),
            None => control,
        }
    }
}

/// Longest address of a control interface that is shown, in characters.
const CONTROL_LEN_MAX: usize = 200;

/// Where the data plane of an appliance is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    /// The kernel that the appliance runs on: on the same one, memory can be shared.
    pub host: HostId,
    /// NBD over TCP: addresses that clients connect to, in order of preference.
    pub nbd: Vec<SocketAddr>,
    /// NBD over TCP: `HOST:PORT` by names that the operator gave, which a client resolves anew each time that it connects. What
    /// they led to at the appliance is among `nbd`, for clients that do not know this field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// RDMA: addresses for the RDMA connection manager, in order of preference; none: no RDMA there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rdma: Vec<SocketAddr>,
    /// NBD over a unix socket, for clients of the same host.
    #[serde(default, deserialize_with = "text::maybe_path", skip_serializing_if = "Option::is_none")]
    pub nbd_unix: Option<PathBuf>,
    /// Socket that passes the memory of regions to clients of the same host.
    #[serde(default, deserialize_with = "text::maybe_path", skip_serializing_if = "Option::is_none")]
    pub shm: Option<PathBuf>,
}

/// What lent memory lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Medium {
    /// Anonymous memory in memfds, of base pages.
    Memory,
    /// Huge pages.
    HugePages,
    /// A file or a DAX device.
    File,
}

/// What an appliance has and does; part of each heartbeat.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its id; none in answers of versions before 0.2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ApplianceId>,
    /// Memory that it lends in all, in bytes.
    pub capacity: ByteSize,
    /// Memory of regions in grants, in bytes.
    pub granted: ByteSize,
    /// Memory of regions reserved and in no grant yet, in bytes.
    pub reserved: ByteSize,
    /// Memory that may still be asked for, in bytes: capacity less granted and reserved, and less
    /// what deleted regions still hold until they are cleared.
    pub free: ByteSize,
    /// Of the free memory, what is cleared, faulted in and locked already, in bytes.
    pub ready: ByteSize,
    /// Memory that granted regions really hold, in bytes: what clients trimmed is not in it.
    pub resident: ByteSize,
    /// Regions in grants.
    pub regions: u64,
    /// Grants.
    pub grants: u64,
    /// Connections of the data plane.
    pub connections: u64,
    /// Time since the daemon started.
    pub uptime: Span,
    /// Traffic on its link lately, the busier direction, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<LinkSpeed>,
    /// What passed since the daemon started.
    pub counters: Counters,
    /// What its operator should know, one line each: a limit that was lowered, memory that went bad, a record that was
    /// damaged. Lines stay as long as they are true; the allocator tells an event for each new one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The newest state of an allocator's metadata that it heard of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataState>,
}

/// Counters of the data plane since the daemon started; bytes where the name says so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Reads answered.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes answered.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Trims and zero writes answered.
    pub trims: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Connections that were refused or broke the protocol.
    pub refused: u64,
}

/// A life of a client that has connections to a grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Which one.
    pub life: Life,
    /// Its host, for people.
    pub host_name: String,
}

impl Holder {
    /// The host, the machine and the life, for people.
    pub fn shown(&self) -> String {
        format!("{} ({})", self.host_name, self.life.shown())
    }
}

/// Asks for regions. They are undone when no grant takes them before `ttl` is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reserve {
    /// The allocation that the regions are for.
    pub allocation: AllocationId,
    /// How many; 1 or more.
    pub count: u32,
    /// Size of each, in bytes; a power of two, 16 MiB to 64 GiB.
    pub region_len: ByteSize,
    /// How long they stay without a grant.
    pub ttl: Span,
}

/// One region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its id.
    pub id: RegionId,
    /// Its size in bytes.
    pub len: ByteSize,
    /// What it is used for.
    pub state: RegionState,
    /// The allocation that it is reserved or granted for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation: Option<AllocationId>,
    /// The grant that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grant: Option<GrantId>,
    /// Memory that it really holds, in bytes.
    pub resident: ByteSize,
}

/// What a region is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegionState {
    /// Cleared, faulted in, locked; belongs to nobody.
    Ready,
    /// Reserved with a time limit.
    Reserved,
    /// In a grant.
    Granted,
    /// Deleted, not cleared yet.
    Clearing,
}

/// Makes reserved regions a grant. The export's offsets run over the regions in the given order.
/// The same grant id with the same content again changes nothing; with a higher epoch, key and
/// epoch are replaced after every connection of the old epoch was closed; with a lower one it is
/// refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Commit {
    /// The allocation that the grant is part of.
    pub allocation: AllocationId,
    /// The allocation's name, for people.
    pub name: Name,
    /// The ownership that the grant is for.
    pub epoch: Epoch,
    /// The secret that clients show.
    pub key: GrantKey,
    /// The regions, in the order of the export's offsets; 1 or more.
    pub regions: Vec<RegionId>,
    /// A grant of the same allocation whose regions it may take over. What it takes is in both until
    /// one of them is deleted, and stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<GrantId>,
    /// What the grant is part of, for an allocator that lost its metadata: at most [`DESCRIPTOR_LEN_MAX`] bytes that
    /// only allocators read. A repeated order replaces it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub descriptor: Option<String>,
}

/// Longest descriptor, in bytes.
pub const DESCRIPTOR_LEN_MAX: usize = 256 << 10;

/// A run of bytes of a grant's export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes; 1 or more.
    pub len: u64,
}

/// Asks an appliance to write what a run of a grant holds into a grant of another appliance. What is
/// all zeros is not written: the target has to read as zeros there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Copy {
    /// What to copy; within one region, and at most [`COPY_LEN_MAX`].
    pub range: Range,
    /// Where the target's appliance is reached by NBD, in order of preference.
    pub nbd: Vec<SocketAddr>,
    /// The target's key.
    pub key: GrantKey,
    /// First byte in the target's export.
    pub to: u64,
}

/// Most bytes that one [`struct@Copy`] or [`Range`] is about.
pub const COPY_LEN_MAX: u64 = 64 << 20;

/// What a run of bytes holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest {
    /// XXH3, 128 bits, of its bytes, in hexadecimal digits.
    pub xxh3: String,
    /// Pages of 4096 bytes in it that are not all zeros, in bytes.
    pub data: ByteSize,
    /// First byte of the last such page, from the start of the export.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<u64>,
}

/// A grant as the appliance sees it; the key stays secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Its id.
    pub id: GrantId,
    /// The allocation that it is part of.
    pub allocation: AllocationId,
    /// The allocation's name.
    pub name: Name,
    /// The ownership that it is for.
    pub epoch: Epoch,
    /// Its regions, in the order of the export's offsets.
    pub regions: Vec<RegionId>,
    /// Size of the export: the regions together, in bytes.
    pub len: ByteSize,
    /// Memory that its regions really hold, in bytes.
    pub resident: ByteSize,
    /// Connections that use it now.
    pub connections: u64,
    /// What it is part of, as the allocator said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub descriptor: Option<String>,
    /// In the answer to an order with `lose`: how much of it was replaced by zeros, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<ByteSize>,
}
