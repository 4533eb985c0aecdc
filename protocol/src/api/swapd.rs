//! Messages of xpm-swapd's control socket.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | | [`Status`] |
//! | `POST /v1/grow` | [`Grow`] | [`Area`]: the new area, which is on |
//! | `POST /v1/shrink` | [`Shrink`] | list of the names of areas that are being taken away |
//! | `POST /v1/drain` | [`Drain`] | list of the names of areas that are being taken away |
//! | `DELETE /v1/drain` | | nothing; areas that were being taken away stay |
//! | `POST /v1/resume` | | nothing; the policy is followed again |

use serde::{Deserialize, Serialize};

use super::blk::{DeviceState, Form, SafetyItem};
use crate::Name;
use crate::units::{ByteSize, Span};

/// Adds swap, which stays until it is taken away by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grow {
    /// Size of the added swap in bytes.
    pub size: ByteSize,
}

/// Takes away the emptiest areas whose sizes together are at most `size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shrink {
    /// Largest sum of their sizes, in bytes.
    pub size: ByteSize,
}

/// Takes areas away, one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Drain {
    /// Names of their allocations or paths of their devices.
    pub areas: Vec<String>,
    /// All areas; from then on the policy is suspended.
    pub all: bool,
}

/// Status of xpm-swapd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Time since it started.
    pub uptime: Span,
    /// The policy.
    pub policy: Policy,
    /// The areas of xpm-swapd.
    pub areas: Vec<Area>,
    /// Swap that xpm-swapd did not make.
    pub others: Vec<Other>,
    /// The local fallback swap, if it is configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Fallback>,
    /// Memory of the machine.
    pub memory: Memory,
    /// Memory pressure.
    pub pressure: Pressure,
    /// The last decision, and its reason.
    pub decision: Decision,
    /// Present while the policy is suspended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rest: Option<Rest>,
    /// Present problems. Empty if all is well.
    pub troubles: Vec<Trouble>,
    /// Checked settings of the kernel and of control groups.
    pub settings: Vec<Setting>,
    /// Whether the daemon can go on when memory runs out, item by item.
    pub safety: Vec<SafetyItem>,
}

/// The policy in effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Size of swap that is always present, in bytes.
    pub base: ByteSize,
    /// Largest total size of its areas, in bytes.
    pub maximum: ByteSize,
    /// Priority of its areas, against other swap.
    pub priority: u16,
    /// Size of the next step of growth, in bytes.
    pub next_step: ByteSize,
    /// It grows when less swap than this is free, in bytes.
    pub free_below: ByteSize,
    /// It shrinks after this much time of calm.
    pub shrink_after: Span,
}

/// A swap area: swap on one allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    /// The allocation.
    pub name: Name,
    /// The device, while there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Form of the device.
    #[serde(rename = "as")]
    pub form: Form,
    /// Its size in bytes.
    pub size: ByteSize,
    /// Used part, in bytes.
    pub used: ByteSize,
    /// Its state.
    pub state: AreaState,
    /// Reason for which it was made.
    pub origin: Origin,
    /// State of its device, by xpm-blk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceState>,
    /// The UUID in its swap header.
    pub uuid: String,
    /// Present while it is being taken away, or waits for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaving: Option<Leaving>,
    /// Present if its allocation is going to end: the announcement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<String>,
}

/// State of an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AreaState {
    /// It is being made, or made again after the machine was restarted.
    Making,
    /// It is on.
    On,
    /// It is being taken away.
    Leaving,
    /// It was turned off by another program.
    Off,
    /// It is off for good, and its memory was given back.
    Gone,
}

/// Reason for which an area was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Part of the base.
    Base,
    /// Added when it was needed, and taken away when it is not.
    Step,
    /// Requested by hand.
    Hand,
}

/// Progress of taking an area away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaving {
    /// Reason, in one line.
    pub why: String,
    /// Used bytes when it began.
    pub from: ByteSize,
    /// Time since it began.
    pub since: Span,
}

/// Swap that xpm-swapd did not make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Other {
    /// Its device or file.
    pub path: String,
    /// Its size in bytes.
    pub size: ByteSize,
    /// Used part, in bytes.
    pub used: ByteSize,
    /// Its priority.
    pub priority: i32,
}

/// The local fallback swap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fallback {
    /// Its file or partition.
    pub path: String,
    /// Whether it is on.
    pub on: bool,
    /// Its size in bytes, while it is on.
    pub size: ByteSize,
    /// Used part, in bytes.
    pub used: ByteSize,
    /// Its priority in the kernel.
    pub priority: i32,
}

/// Memory of the machine, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// All memory.
    pub total: ByteSize,
    /// Memory available without swapping (`MemAvailable`).
    pub available: ByteSize,
}

/// Memory pressure, as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pressure {
    /// Whether the kernel reports it.
    pub told: bool,
    /// Share of the last ten seconds in which some task waited for memory, in hundredths of a percent.
    pub some_avg10: u64,
    /// Time since the threshold was exceeded last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<Span>,
}

/// A decision of the policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The action.
    pub action: String,
    /// The reason.
    pub reason: String,
    /// Time since this decision was made first.
    pub since: Span,
}

/// The policy is suspended: no area is made or taken away until it is resumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rest {
    /// Reason, in one line, with what ends the suspension.
    pub why: String,
}

/// A present problem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// Its subject: `grow`, `drain`, `xpm-blk`, `fallback`, `area NAME`, ...
    pub what: String,
    /// Reason, in one line.
    pub why: String,
    /// Time since it began.
    pub since: Span,
    /// Number of attempts.
    pub tries: u64,
    /// Time until the next attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub again: Option<Span>,
}

/// A setting that xpm-swapd checks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Its file.
    pub path: String,
    /// Its present value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
    /// The wanted value.
    pub wanted: String,
    /// Whether it has the wanted value.
    pub ok: bool,
    /// Purpose of the setting, or why it cannot be changed.
    pub note: String,
}
