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
//! | `GET /v1/grants/{id}/living/{life}` | | list of [`Holder`]: other lives that are connected and answer; up to 3 s |
//! | `POST /v1/grants/{id}/copies` | [`struct@Copy`] | [`Digest`] of what was copied |
//! | `POST /v1/grants/{id}/digests` | [`Range`] | [`Digest`] |
//!
//! Orders (`POST`, `PUT`, `DELETE`) may have `pool=ID&number=N` in their query: the newest state of the allocator's
//! metadata, which the appliance remembers. Appliances of versions before 0.2 ignore it.
//!
//! Memory is given in two phases: regions are reserved with a time limit, and stay only if a grant takes them before
//! it ends. `PUT` and `DELETE` are idempotent.
//!
//! Memory that was ever shared with a process on the appliance's host is moved when the epoch of its grant is raised,
//! because that process can keep it mapped. If it cannot be moved, the order is refused as `no-space` and nothing is
//! changed; with `lose=true` the grant gets zeros in its place. Appliances of versions before 0.2 ignore `lose`.

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

/// Identity and addresses of an appliance; part of each heartbeat.
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
    /// Addresses of its data plane.
    pub endpoints: Endpoints,
    /// Medium of the lent memory.
    pub medium: Medium,
    /// Size of the regions that it keeps ready, in bytes.
    pub region_len: ByteSize,
    /// Labels that its operator gave it; see [`crate::policy::Labels`].
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Speed of the link behind its first address, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_speed: Option<LinkSpeed>,
    /// Its machine, its state directory and its start, by which a copy of the appliance is told apart. None in
    /// versions before 0.2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub life: Option<Life>,
}

impl Info {
    /// Its place, for people: the address of its control interface, and, if known, the machine and the number of
    /// its life.
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

/// Addresses of an appliance's data plane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    /// The kernel that the appliance runs on: a client on the same kernel can share memory with it.
    pub host: HostId,
    /// NBD over TCP: addresses that clients connect to, in order of preference.
    pub nbd: Vec<SocketAddr>,
    /// NBD over TCP: `HOST:PORT` by names that the operator gave, which a client resolves at each connection. The
    /// addresses that the appliance itself resolved them to are also in `nbd`, for clients without this field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// RDMA: addresses for the RDMA connection manager, in order of preference; empty without RDMA.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rdma: Vec<SocketAddr>,
    /// NBD over a unix socket, for clients of the same host.
    #[serde(default, deserialize_with = "text::maybe_path", skip_serializing_if = "Option::is_none")]
    pub nbd_unix: Option<PathBuf>,
    /// Socket that passes the memory of regions to clients of the same host.
    #[serde(default, deserialize_with = "text::maybe_path", skip_serializing_if = "Option::is_none")]
    pub shm: Option<PathBuf>,
}

/// Medium of lent memory.
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

/// Memory and activity of an appliance; part of each heartbeat.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its id; none in answers of versions before 0.2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ApplianceId>,
    /// All memory that it lends, in bytes.
    pub capacity: ByteSize,
    /// Memory of regions in grants, in bytes.
    pub granted: ByteSize,
    /// Memory of regions reserved and in no grant yet, in bytes.
    pub reserved: ByteSize,
    /// Memory that may still be requested, in bytes: capacity less granted and reserved, and less the memory of
    /// deleted regions until it is cleared.
    pub free: ByteSize,
    /// Part of the free memory that is cleared, faulted in and locked already, in bytes.
    pub ready: ByteSize,
    /// Memory that granted regions really occupy, in bytes: trimmed parts are not included.
    pub resident: ByteSize,
    /// Number of regions in grants.
    pub regions: u64,
    /// Number of grants.
    pub grants: u64,
    /// Number of connections of the data plane.
    pub connections: u64,
    /// Time since the daemon started.
    pub uptime: Span,
    /// Recent traffic on its link, of the busier direction, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<LinkSpeed>,
    /// Counters since the daemon started.
    pub counters: Counters,
    /// Warnings for its operator, one line each: a limit that was lowered, a memory error, a damaged record. A line
    /// stays as long as it is true; the allocator reports an event for each new one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The newest state of an allocator's metadata that it has heard of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataState>,
}

/// Counters of the data plane since the daemon started.
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
    /// The life.
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

/// Reserves regions. The reservation is undone if no grant takes the regions before `ttl` is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reserve {
    /// The allocation that the regions are for.
    pub allocation: AllocationId,
    /// Number of regions; 1 or more.
    pub count: u32,
    /// Size of each region in bytes; a power of two, 16 MiB to 64 GiB.
    pub region_len: ByteSize,
    /// How long they stay reserved without a grant.
    pub ttl: Span,
}

/// A region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its id.
    pub id: RegionId,
    /// Its size in bytes.
    pub len: ByteSize,
    /// Its state.
    pub state: RegionState,
    /// The allocation that it is reserved or granted for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation: Option<AllocationId>,
    /// The grant that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grant: Option<GrantId>,
    /// Memory that it really occupies, in bytes.
    pub resident: ByteSize,
}

/// State of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegionState {
    /// Cleared, faulted in, locked; free.
    Ready,
    /// Reserved with a time limit.
    Reserved,
    /// In a grant.
    Granted,
    /// Deleted, not cleared yet.
    Clearing,
}

/// Makes reserved regions a grant. The export's offsets run over the regions in the given order. Repeating the order
/// with the same grant id and content changes nothing. With a higher epoch, key and epoch are replaced after every
/// connection of the old epoch was closed; a lower epoch is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Commit {
    /// The allocation that the grant is part of.
    pub allocation: AllocationId,
    /// The allocation's name, for people.
    pub name: Name,
    /// The ownership that the grant is for.
    pub epoch: Epoch,
    /// The secret key that clients show.
    pub key: GrantKey,
    /// The regions, in the order of the export's offsets; 1 or more.
    pub regions: Vec<RegionId>,
    /// A grant of the same allocation whose regions this grant may take over. Such regions are in both grants until
    /// one of them is deleted, and keep their content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<GrantId>,
    /// Description of the allocation, for an allocator that lost its metadata: at most [`DESCRIPTOR_LEN_MAX`] bytes
    /// that only allocators read. A repeated order replaces it.
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
    /// Number of bytes; 1 or more.
    pub len: u64,
}

/// Copies a run of a grant into a grant of another appliance. Pages of zeros are not written: the target has to read
/// as zeros there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Copy {
    /// The run to copy; within one region, and at most [`COPY_LEN_MAX`].
    pub range: Range,
    /// NBD addresses of the target's appliance, in order of preference.
    pub nbd: Vec<SocketAddr>,
    /// The target's key.
    pub key: GrantKey,
    /// First byte in the target's export.
    pub to: u64,
}

/// Most bytes of one [`struct@Copy`] or [`Range`].
pub const COPY_LEN_MAX: u64 = 64 << 20;

/// Digest of a run of bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest {
    /// XXH3, 128 bits, of the bytes, in hexadecimal digits.
    pub xxh3: String,
    /// Total size of its pages of 4096 bytes that are not all zeros, in bytes.
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
    /// Memory that its regions really occupy, in bytes.
    pub resident: ByteSize,
    /// Number of connections that use it now.
    pub connections: u64,
    /// Description of the allocation, as the allocator sent it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub descriptor: Option<String>,
    /// In the answer to an order with `lose`: bytes that were replaced by zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<ByteSize>,
}
