//! Messages of xpm-swapd's control socket.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | | [`Status`] |
//! | `POST /v1/grow` | [`Grow`] | [`Area`]: the new one, which is on |
//! | `POST /v1/shrink` | [`Shrink`] | list of the names of areas that are being taken away |
//! | `POST /v1/drain` | [`Drain`] | list of the names of areas that are being taken away |
//! | `DELETE /v1/drain` | | nothing; areas that were being taken away stay |
//! | `POST /v1/resume` | | nothing; the policy is followed again |

use serde::{Deserialize, Serialize};

use super::blk::{DeviceState, Form, SafetyItem};
use crate::Name;
use crate::units::{ByteSize, Span};

/// Asks for more swap, which stays until it is taken away by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grow {
    /// By how much, in bytes.
    pub size: ByteSize,
}

/// Takes the emptiest areas away whose sizes together are at most this much.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shrink {
    /// At most so much, in bytes.
    pub size: ByteSize,
}

/// Takes areas away, one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Drain {
    /// By the names of their allocations or the paths of their devices.
    pub areas: Vec<String>,
    /// All of them; from then on the policy rests.
    pub all: bool,
}

/// What xpm-swapd has, sees and does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Time since it started.
    pub uptime: Span,
    /// The policy, in numbers.
    pub policy: Policy,
    /// Its areas.
    pub areas: Vec<Area>,
    /// Swap that others made.
    pub others: Vec<Other>,
    /// The last resort, where there is to be one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Fallback>,
    /// Memory of the machine.
    pub memory: Memory,
    /// Memory pressure.
    pub pressure: Pressure,
    /// What was decided last, and why.
    pub decision: Decision,
    /// That the policy rests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rest: Option<Rest>,
    /// What does not go as it should. Empty when all is well.
    pub troubles: Vec<Trouble>,
    /// Settings of the kernel and of control groups.
    pub settings: Vec<Setting>,
    /// Whether the daemon is fit for the moment when there is no memory, item by item.
    pub safety: Vec<SafetyItem>,
}

/// The policy that is followed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// There at once, in bytes.
    pub base: ByteSize,
    /// Never more than this, in bytes.
    pub maximum: ByteSize,
    /// Priority of its areas against other swap.
    pub priority: u16,
    /// The next step when it grows, in bytes.
    pub next_step: ByteSize,
    /// It grows when less than this is free now, in bytes.
    pub free_below: ByteSize,
    /// It shrinks after so much calm.
    pub shrink_after: Span,
}

/// Swap on one allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    /// The allocation.
    pub name: Name,
    /// The device, while there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// As what it is shown.
    #[serde(rename = "as")]
    pub form: Form,
    /// Its size in bytes.
    pub size: ByteSize,
    /// What of it is in use, in bytes.
    pub used: ByteSize,
    /// How far it is.
    pub state: AreaState,
    /// Why it is there.
    pub origin: Origin,
    /// Whether I/O passes, as xpm-blk says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceState>,
    /// The UUID in its swap header.
    pub uuid: String,
    /// That it is being taken away, or waits for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaving: Option<Leaving>,
    /// That its allocation is going to end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<String>,
}

/// How far an area is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AreaState {
    /// It is being made, or made again after a restart of the machine.
    Making,
    /// It is on.
    On,
    /// It is being taken away.
    Leaving,
    /// It was turned off by somebody else.
    Off,
    /// It is off for good, and its memory is given back.
    Gone,
}

/// Why an area is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Part of the base.
    Base,
    /// Added as it was needed, and taken away when it is not.
    Step,
    /// Asked for by hand.
    Hand,
}

/// How far the taking away of an area is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaving {
    /// Why, in one line.
    pub why: String,
    /// What was in use when it began, in bytes.
    pub from: ByteSize,
    /// Time since then.
    pub since: Span,
}

/// Swap that is none of xpm-swapd's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Other {
    /// Its device or file.
    pub path: String,
    /// Its size in bytes.
    pub size: ByteSize,
    /// What of it is in use, in bytes.
    pub used: ByteSize,
    /// Its priority.
    pub priority: i32,
}

/// The last resort.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fallback {
    /// Its file or partition.
    pub path: String,
    /// Whether it is on.
    pub on: bool,
    /// Its size in bytes, when it is on.
    pub size: ByteSize,
    /// What of it is in use, in bytes.
    pub used: ByteSize,
    /// Its priority as the kernel has it.
    pub priority: i32,
}

/// Memory of the machine, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// All.
    pub total: ByteSize,
    /// What could be had without swapping (`MemAvailable`).
    pub available: ByteSize,
}

/// Memory pressure by the kernel's account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pressure {
    /// Whether the kernel tells it.
    pub told: bool,
    /// Share of time of the last ten seconds in which some task waited for memory, in hundredths of a percent.
    pub some_avg10: u64,
    /// Time since the threshold was passed last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<Span>,
}

/// What was decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// What is done.
    pub action: String,
    /// Why.
    pub reason: String,
    /// Time since it was decided so first.
    pub since: Span,
}

/// That the policy rests: nothing is made or taken away until it is told to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rest {
    /// Why, in one line, with what ends it.
    pub why: String,
}

/// Something that does not go as it should.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// What: `grow`, `drain`, `xpm-blk`, `fallback`, `area NAME`, ...
    pub what: String,
    /// Why, in one line.
    pub why: String,
    /// Time since it began.
    pub since: Span,
    /// Times that it was tried.
    pub tries: u64,
    /// Time until it is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub again: Option<Span>,
}

/// A setting that is looked after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Its file.
    pub path: String,
    /// What it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
    /// What it should be.
    pub wanted: String,
    /// Whether it is so.
    pub ok: bool,
    /// What it is for, or why it cannot be so.
    pub note: String,
}
