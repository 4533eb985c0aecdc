//! Messages of the control sockets of xpm-blk and xpm-fs.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | | [`Status`] |
//! | `GET /v1/devices` | | list of [`Device`] |
//! | `POST /v1/devices` | [`AttachDevice`] | [`Device`] |
//! | `GET /v1/devices/{name}` | | [`Device`] |
//! | `DELETE /v1/devices/{name}?force=true` | | nothing; refused while it is used, unless forced |
//! | `PUT /v1/devices/{name}/abort` | | [`Device`]; all its I/O ends with an error. Only xpm-fs |
//! | `GET /v1/devices/{name}/cache` | | [`Cache`]: its pages in this machine's page cache. Only xpm-fs |
//! | `PUT /v1/devices/{name}/cache` | | [`Cache`] that is left after write-back and drop. Only xpm-fs |
//! | `PUT /v1/lost/{appliance}` | | list of [`Device`]s with memory there, which is given up |
//!
//! `appliance` is a name or an id. Giving up its memory is refused while the appliance answers.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::text::serde_as_text;
use crate::units::{ByteSize, Span};
use crate::{ApplianceId, BlockSize, ClientId, Epoch, Name};

/// Shows an allocation as a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachDevice {
    /// The allocation.
    pub name: Name,
    /// The form of the device.
    #[serde(rename = "as")]
    pub form: Form,
    /// Number of queues. Default for ublk: one per core, at most 4. Default for the kernel's nbd: one, so that no
    /// request moves to another socket while the first may still carry it out. For vhost-user: the most that a guest
    /// can have; default 16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Most requests in flight on one queue; 1 to 1024, default 128.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<u16>,
    /// Transport to the appliances; default: the best one for each appliance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transport: Option<TransportKind>,
    /// How long I/O is held while an appliance cannot be reached, before it fails; default: the daemon's setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<Hold>,
    /// Take the allocation from another owner.
    #[serde(default)]
    pub force: bool,
    /// Take zeros in place of memory that cannot be moved away from a process that it was shared with.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lose: bool,
    /// Logical block size, 512 or 4096: needed once for an allocation that was made before block sizes could be
    /// chosen. All other allocations have a block size, and a different one is refused.
    #[serde(default, rename = "block-size", skip_serializing_if = "Option::is_none")]
    pub block_size: Option<BlockSize>,
    /// Stand by to take the allocation over from its owner: the device exists, and all its I/O waits until this
    /// client is the owner.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub standby: bool,
    /// Of files and trees: what the kernel reads ahead of a program that reads a file in order, in bytes; 0 to 16 MiB,
    /// default 0.
    #[serde(default, rename = "read-ahead", skip_serializing_if = "Option::is_none")]
    pub read_ahead: Option<ByteSize>,
}

impl AttachDevice {
    /// The allocation of this name in this form, with all defaults.
    pub const fn new(name: Name, form: Form) -> AttachDevice {
        AttachDevice {
            name,
            form,
            queues: None,
            depth: None,
            transport: None,
            hold: None,
            force: false,
            lose: false,
            block_size: None,
            standby: false,
            read_ahead: None,
        }
    }
}

/// How long I/O is held while an appliance cannot be reached. Written `forever` or as a duration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// For ever: on swap an error is worse than a wait.
    Forever,
    /// For this long; then the I/O fails with EIO.
    For(Span),
}

/// The form in which an allocation is shown. Written `ublk`, `nbd`, `nbd-direct`, `nbd-socket=/a/path`,
/// `nbd-socket=ADDRESS:PORT`, `vhost-user=/a/path` or `file=/a/path`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Form {
    /// A ublk device, served by xpm-blk.
    Ublk,
    /// A device of the kernel's nbd driver, served by xpm-blk over socket pairs.
    Nbd,
    /// A device of the kernel's nbd driver, which connects to the appliance directly.
    NbdDirect,
    /// An NBD server at a unix socket path or TCP address.
    NbdSocket(SocketPlace),
    /// A vhost-user-blk back-end at a unix socket path, for virtual machines.
    VhostUser(PathBuf),
    /// A file at a path, which xpm-fs serves.
    File(PathBuf),
    /// A tree of files at a path, which xpm-fs serves. The allocation carries its name; each file has one of its own.
    Tree(PathBuf),
    /// The data of a file in the tree of this name.
    InTree(Name),
}

/// Address at which an NBD socket listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SocketPlace {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(std::net::SocketAddr),
}

/// The text is no form, hold or transport; the message lists the valid texts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct ParseBlkError {
    text: String,
    expected: &'static str,
}

impl ParseBlkError {
    fn new(text: &str, expected: &'static str) -> ParseBlkError {
        ParseBlkError { text: text.chars().take(120).collect(), expected }
    }
}

impl FromStr for Form {
    type Err = ParseBlkError;

    fn from_str(text: &str) -> Result<Form, ParseBlkError> {
        match text {
            "ublk" => Ok(Form::Ublk),
            "nbd" => Ok(Form::Nbd),
            "nbd-direct" => Ok(Form::NbdDirect),
            _ => Form::parse_socket(text).ok_or_else(|| ParseBlkError::new(text, FORMS)),
        }
    }
}

const FORMS: &str = "a device form: ublk, nbd, nbd-direct, nbd-socket=/ABSOLUTE/PATH, nbd-socket=ADDRESS:PORT, \
                     vhost-user=/ABSOLUTE/PATH, file=/ABSOLUTE/PATH or tree=/ABSOLUTE/PATH";

impl Form {
    /// The logical block size of this form for allocations without one of their own; none for a socket whose clients
    /// choose.
    pub const fn block_size_of_before(&self) -> Option<BlockSize> {
        match self {
            Form::Ublk | Form::VhostUser(_) => Some(BlockSize::B512),
            Form::Nbd | Form::NbdDirect => Some(BlockSize::B4096),
            Form::NbdSocket(_) | Form::File(_) | Form::Tree(_) | Form::InTree(_) => None,
        }
    }

    /// Whether xpm-fs shows it, and not xpm-blk.
    pub const fn is_of_files(&self) -> bool {
        matches!(self, Form::File(_) | Form::Tree(_) | Form::InTree(_))
    }

    fn parse_socket(text: &str) -> Option<Form> {
        match text.split_once('=')? {
            ("nbd-socket", place) => SocketPlace::parse(place).map(Form::NbdSocket),
            ("vhost-user", path) => path.starts_with('/').then(|| Form::VhostUser(path.into())),
            ("file", path) => path.starts_with('/').then(|| Form::File(path.into())),
            ("tree", path) => path.starts_with('/').then(|| Form::Tree(path.into())),
            ("in-tree", name) => name.parse().ok().map(Form::InTree),
            _ => None,
        }
    }
}

impl SocketPlace {
    fn parse(text: &str) -> Option<SocketPlace> {
        match text.starts_with('/') {
            true => Some(SocketPlace::Unix(text.into())),
            false => text.parse().ok().map(SocketPlace::Tcp),
        }
    }
}

impl fmt::Display for SocketPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketPlace::Unix(path) => path.display().fmt(f),
            SocketPlace::Tcp(address) => address.fmt(f),
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Form::Ublk => f.write_str("ublk"),
            Form::Nbd => f.write_str("nbd"),
            Form::NbdDirect => f.write_str("nbd-direct"),
            Form::NbdSocket(place) => write!(f, "nbd-socket={place}"),
            Form::VhostUser(path) => write!(f, "vhost-user={}", path.display()),
            Form::File(path) => write!(f, "file={}", path.display()),
            Form::Tree(path) => write!(f, "tree={}", path.display()),
            Form::InTree(name) => write!(f, "in-tree={name}"),
        }
    }
}

impl FromStr for Hold {
    type Err = ParseBlkError;

    fn from_str(text: &str) -> Result<Hold, ParseBlkError> {
        match text {
            "forever" => Ok(Hold::Forever),
            _ => text
                .parse()
                .map(Hold::For)
                .map_err(|_| ParseBlkError::new(text, "`forever` or a duration like 30s or 5m")),
        }
    }
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Hold::Forever => f.write_str("forever"),
            Hold::For(span) => span.fmt(f),
        }
    }
}

serde_as_text!(Form, Hold, TransportKind);

impl FromStr for TransportKind {
    type Err = ParseBlkError;

    fn from_str(text: &str) -> Result<TransportKind, ParseBlkError> {
        match text {
            "shm" => Ok(TransportKind::Shm),
            "rdma" => Ok(TransportKind::Rdma),
            "nbd-unix" => Ok(TransportKind::NbdUnix),
            "nbd-tcp" => Ok(TransportKind::NbdTcp),
            _ => Err(ParseBlkError::new(text, "a transport: shm, rdma, nbd-unix or nbd-tcp")),
        }
    }
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            TransportKind::Shm => "shm",
            TransportKind::Rdma => "rdma",
            TransportKind::NbdUnix => "nbd-unix",
            TransportKind::NbdTcp => "nbd-tcp",
        })
    }
}

/// A transport of the data plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TransportKind {
    /// Shared memory, on one host.
    Shm,
    /// RDMA: no processor of the appliance touches a page.
    Rdma,
    /// NBD over a unix socket, on one host.
    NbdUnix,
    /// NBD over TCP.
    NbdTcp,
}

/// A device, as xpm-blk or xpm-fs shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The allocation that it shows.
    pub name: Name,
    /// Its form.
    #[serde(rename = "as")]
    pub form: Form,
    /// Its node (`/dev/ublkb0`) or its socket.
    pub path: String,
    /// Its size in bytes.
    pub size: ByteSize,
    /// The allocation's epoch that it uses.
    pub epoch: Epoch,
    /// Number of queues.
    pub queues: u16,
    /// Most requests in flight on one queue.
    pub depth: u16,
    /// Whether I/O passes.
    pub state: DeviceState,
    /// The appliances behind it.
    pub links: Vec<LinkStatus>,
    /// Its present users: `swap`, `mounted at /mnt`, `held by dm-0`, `2 NBD clients`.
    pub users: Vec<String>,
    /// Counters since it was attached.
    pub counters: super::appliance::Counters,
    /// Number of requests in flight.
    pub in_flight: u64,
    /// Time since it was attached.
    pub age: Span,
    /// The announced end of its allocation, as the allocator reported it last, with the remedy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<String>,
    /// Its logical block size in bytes; none if its clients choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<BlockSize>,
    /// The role of this client in the allocation; none: it is the owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<DeviceRole>,
}

/// The role of a client in an allocation that it shows and does not own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceRole {
    /// It stands by: I/O waits until it is the owner.
    StandsBy,
    /// It was the owner: I/O waits until the hand-over is committed, which ends the device, or rolled back.
    HandedOver,
}

/// Pages of a file in the page cache of this machine's kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    /// All pages, in bytes.
    pub cached: ByteSize,
    /// Changed pages that are not being written back, in bytes.
    pub dirty: ByteSize,
    /// Pages that are being written back, in bytes.
    pub writeback: ByteSize,
}

/// Whether I/O passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// I/O passes.
    Live,
    /// An appliance is out of reach: I/O to it is held.
    Holding,
    /// Memory is lost: I/O to it fails.
    Lost,
}

/// The link to one appliance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// The appliance.
    pub appliance: ApplianceId,
    /// Its name.
    pub appliance_name: Name,
    /// The transport in use, or being tried.
    pub transport: TransportKind,
    /// Whether I/O passes.
    pub state: LinkState,
    /// Time in this state.
    pub since: Span,
    /// Number of reconnections.
    pub reconnects: u64,
    /// Why it is not up, or why no better transport is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Whether I/O passes to one appliance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// I/O passes.
    Up,
    /// Reconnecting; I/O is held.
    Connecting,
    /// The appliance no longer knows the grant: its memory is lost, or the ownership has passed on.
    Lost,
}

/// Status of the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// This client's id.
    pub client: ClientId,
    /// Process id of the daemon.
    pub pid: u32,
    /// Time since it started.
    pub uptime: Span,
    /// The allocator's URL.
    pub allocator: String,
    /// Number of devices.
    pub devices: u64,
    /// Whether swap on its devices is safe, item by item.
    pub safety: Vec<SafetyItem>,
    /// The process that takes over when this one dies; none of a daemon without a standby.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<Standby>,
    /// Allocations that were detached here while the allocator did not answer; they are given back once it answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub owed: Vec<Owed>,
}

/// An allocation that still has to be given back to the allocator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owed {
    /// Its name.
    pub allocation: Name,
    /// When it was detached, seconds since 1970.
    pub since: u64,
    /// Why it is not given back yet; empty before the first attempt.
    pub reason: String,
}

/// A process that takes over when the serving one dies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standby {
    /// Whether it is ready.
    pub state: StandbyState,
    /// Its process id, once it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Memory that it has locked.
    pub locked: ByteSize,
}

/// State of a standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StandbyState {
    /// No standby is configured.
    Off,
    /// A standby is being started.
    Starting,
    /// It can take over at once.
    Ready,
}

/// A condition of swap safety, as read back from the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SafetyItem {
    /// The condition: `mlockall`, `io-flusher`, `oom-score-adj`, `mount-namespace`, `cgroup-swap-max`,
    /// `memory-reserve`, `real-time`.
    pub item: String,
    /// Whether it is met.
    pub ok: bool,
    /// The value that was read back.
    pub found: String,
    /// Remedy if it is not met.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_parsed_and_printed() {
        for text in [
            "ublk",
            "nbd",
            "nbd-direct",
            "nbd-socket=/run/a.sock",
            "nbd-socket=127.0.0.1:10809",
            "vhost-user=/run/a.sock",
            "file=/run/xpm/fs/ram",
        ] {
            assert_eq!(text.parse::<Form>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "UBLK",
            "nbd-socket",
            "nbd-socket=",
            "nbd-socket=a.sock",
            "vhost",
            "vhost-user",
            "vhost-user=",
            "vhost-user=a.sock",
            "vhost-user=127.0.0.1:1",
            "file",
            "file=ram",
        ] {
            assert!(text.parse::<Form>().unwrap_err().to_string().contains("nbd-direct"), "{text}");
        }
        let json = serde_json::to_string(&Form::NbdDirect).unwrap();
        assert_eq!(json, "\"nbd-direct\"");
    }

    #[test]
    fn holds_are_parsed_and_printed() {
        assert_eq!("forever".parse::<Hold>().unwrap(), Hold::Forever);
        assert_eq!("5m".parse::<Hold>().unwrap().to_string(), "5m");
        assert!("soon".parse::<Hold>().is_err());
    }
}
