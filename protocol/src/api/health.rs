//! Problems that daemons and the command report, each with a stable code.
//!
//! A code never changes its meaning and is never reused for another problem. `docs/health.md` explains each: its
//! meaning and the remedy.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Severity of a problem, ordered from harmless to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Worth knowing; everything works as requested.
    Info,
    /// Something will fail, or works less well than it should, unless somebody acts.
    Warning,
    /// Something fails or is lost now, or is about to be.
    Critical,
}

impl Severity {
    /// Its name in JSON and in text.
    pub const fn as_str(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Critical => "critical",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A problem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The code of a [`Check`]. A text, so that a command understands daemons that are newer.
    pub code: String,
    /// How bad the problem is.
    pub severity: Severity,
    /// The affected object, as `KIND/NAME`: `appliance/pool1`, `allocation/db`, `device//dev/ublkb0`.
    pub object: String,
    /// Description in one line.
    pub summary: String,
    /// Remedy in one line; empty if nothing has to be done.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Problem {
    /// A problem with the usual severity of its check. `object` is `KIND/NAME`.
    pub fn new(check: Check, object: impl Into<String>, summary: impl Into<String>) -> Problem {
        Problem {
            code: check.code().to_owned(),
            severity: check.severity(),
            object: object.into(),
            summary: summary.into(),
            remedy: String::new(),
        }
    }

    /// The same problem with a remedy.
    #[must_use]
    pub fn with_remedy(self, remedy: impl Into<String>) -> Problem {
        Problem { remedy: remedy.into(), ..self }
    }

    /// The same problem with another severity.
    #[must_use]
    pub fn with_severity(self, severity: Severity) -> Problem {
        Problem { severity, ..self }
    }

    /// Whether this check found the problem.
    pub fn is(&self, check: Check) -> bool {
        self.code == check.code()
    }
}

/// The worst severity of these problems; none if there is no problem.
pub fn worst<'a>(problems: impl IntoIterator<Item = &'a Problem>) -> Option<Severity> {
    problems.into_iter().map(|problem| problem.severity).max()
}

macro_rules! checks {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $severity:ident;)+) => {
        /// A check, named by the code of the problem that it finds.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Check {
            $($(#[$doc])* $name,)+
        }

        impl Check {
            /// All checks.
            pub const ALL: &[Check] = &[$(Check::$name,)+];

            /// The code of its problems.
            pub const fn code(self) -> &'static str {
                match self {
                    $(Check::$name => $code,)+
                }
            }

            /// The usual severity of its problems.
            pub const fn severity(self) -> Severity {
                match self {
                    $(Check::$name => Severity::$severity,)+
                }
            }
        }
    };
}

checks! {
    /// No allocator answers.
    AllocatorUnreachable = "ALLOCATOR_UNREACHABLE", Critical;
    /// None of several allocators is the leader.
    AllocatorNoLeader = "ALLOCATOR_NO_LEADER", Critical;
    /// Some of several allocators do not answer.
    AllocatorDown = "ALLOCATOR_DOWN", Warning;
    /// The allocator started a moment ago and has not heard every appliance yet.
    AllocatorStarting = "ALLOCATOR_STARTING", Info;
    /// The allocator cannot write its metadata: it answers, and changes nothing.
    MetadataReadOnly = "METADATA_READ_ONLY", Critical;
    /// Appliances or clients know of newer metadata than the allocator has.
    MetadataBehind = "METADATA_BEHIND", Critical;
    /// The allocator's clock jumped.
    ClockJumped = "CLOCK_JUMPED", Warning;
    /// An appliance is not heard. Critical while an allocation has memory on it.
    ApplianceSilent = "APPLIANCE_SILENT", Warning;
    /// An appliance asks to be accepted although another one that is up has the same id or name.
    ApplianceRefused = "APPLIANCE_REFUSED", Warning;
    /// An appliance is being emptied.
    ApplianceDraining = "APPLIANCE_DRAINING", Info;
    /// An appliance is being emptied, and there is no place for its remaining regions.
    ApplianceDrainStuck = "APPLIANCE_DRAIN_STUCK", Warning;
    /// The memory limit of an appliance is lower than the memory that it lends.
    ApplianceMemoryLimit = "APPLIANCE_MEMORY_LIMIT", Critical;
    /// An uncorrectable memory error hit lent memory.
    AppliancePoison = "APPLIANCE_POISON", Critical;
    /// An appliance has a grant that no record knows.
    GarbageFound = "GARBAGE_FOUND", Warning;
    /// An allocation has lost memory.
    AllocationLost = "ALLOCATION_LOST", Critical;
    /// The end of an allocation is announced. Critical once its time of grace runs and it is in use.
    AllocationEnding = "ALLOCATION_ENDING", Warning;
    /// An allocation is being made.
    AllocationCreating = "ALLOCATION_CREATING", Info;
    /// An allocation is being deleted, and an appliance has not confirmed that.
    AllocationDeleting = "ALLOCATION_DELETING", Info;
    /// The last change of an allocation was not carried out.
    ChangeRefused = "CHANGE_REFUSED", Warning;
    /// A hand-over has been open for long without commit or rollback, or cannot be rolled back.
    HandoverOpen = "HANDOVER_OPEN", Warning;
    /// A request waits for its turn.
    RequestWaiting = "REQUEST_WAITING", Info;
    /// A request was refused after it had waited.
    RequestRefused = "REQUEST_REFUSED", Info;
    /// xpm-blk does not answer.
    BlkUnreachable = "BLK_UNREACHABLE", Critical;
    /// I/O of a device waits for an appliance.
    DeviceHolding = "DEVICE_HOLDING", Warning;
    /// A device has lost memory: its I/O fails.
    DeviceLost = "DEVICE_LOST", Critical;
    /// A device reaches an appliance by a worse transport than it could use.
    DeviceSlowPath = "DEVICE_SLOW_PATH", Warning;
    /// Swap is on a device, and this host does not meet the conditions for that.
    SwapUnsafe = "SWAP_UNSAFE", Critical;
    /// xpm-blk serves devices that need a standby, and has no standby that is ready.
    StandbyMissing = "STANDBY_MISSING", Warning;
    /// Swap is on a device that looks like one of xpm-blk, and xpm-blk does not answer.
    SwapOrphan = "SWAP_ORPHAN", Warning;
    /// The kernel's settings of a device are not the recommended ones.
    DeviceSettings = "DEVICE_SETTINGS", Warning;
    /// A device accepts or receives no discards, so memory is never given back.
    DeviceNoDiscard = "DEVICE_NO_DISCARD", Warning;
    /// The kernel is too old for a form of device, or its version is not understood.
    HostKernel = "HOST_KERNEL", Warning;
    /// io_uring, which ublk needs, is forbidden or missing.
    HostIoUring = "HOST_IO_URING", Info;
    /// userfaultfd, which mapped memory needs, is missing.
    HostUserfaultfd = "HOST_USERFAULTFD", Warning;
    /// ublk devices are not available.
    HostUblk = "HOST_UBLK", Info;
    /// Devices of the kernel's nbd driver are not available.
    HostNbd = "HOST_NBD", Info;
    /// The shell lacks rights that xpm-blk needs.
    HostPrivileges = "HOST_PRIVILEGES", Warning;
    /// Too little memory may be locked.
    HostMemlock = "HOST_MEMLOCK", Warning;
    /// Control groups cannot keep xpm-blk out of swap.
    HostCgroup = "HOST_CGROUP", Warning;
    /// Swap is read ahead in runs of a length that is slow.
    HostPageCluster = "HOST_PAGE_CLUSTER", Warning;
    /// Pages are compressed twice before they are swapped out.
    HostCompressedSwap = "HOST_COMPRESSED_SWAP", Warning;
    /// The machine may hibernate, and would not resume if its swap is on ublk.
    HostHibernation = "HOST_HIBERNATION", Warning;
    /// The machine has no memory to lend.
    HostNothingToLend = "HOST_NOTHING_TO_LEND", Warning;
    /// Memory cannot be shared between processes of this machine.
    HostSharedMemory = "HOST_SHARED_MEMORY", Info;
    /// A part of RDMA is missing, or not as good as it could be.
    HostRdma = "HOST_RDMA", Info;
    /// Another property of this machine.
    HostOther = "HOST_OTHER", Info;
    /// xpm-swapd gets no more swap, or cannot set it up.
    SwapNotGrown = "SWAP_NOT_GROWN", Warning;
    /// Swap runs low, and its maximum is reached.
    SwapAtMaximum = "SWAP_AT_MAXIMUM", Warning;
    /// A swap area cannot be taken away.
    SwapNotDrained = "SWAP_NOT_DRAINED", Warning;
    /// The local fallback swap cannot be used.
    SwapNoFallback = "SWAP_NO_FALLBACK", Warning;
    /// xpm-swapd has another problem, which its summary describes.
    SwapTrouble = "SWAP_TROUBLE", Warning;
    /// Two allocations have the same region.
    RegionShared = "REGION_SHARED", Critical;
    /// An appliance has an allocation at another epoch than the record.
    EpochDiffers = "EPOCH_DIFFERS", Critical;
    /// `xpm fsck` could not ask an appliance.
    ApplianceUnchecked = "APPLIANCE_UNCHECKED", Warning;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_is_there_once_and_documented() {
        let page = include_str!("../../../docs/health.md");
        for check in Check::ALL {
            let code = check.code();
            assert!(code.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'), "{code}");
            assert_eq!(Check::ALL.iter().filter(|one| one.code() == code).count(), 1, "{code}");
            assert!(
                page.contains(&format!("| `{code}` | {} ", check.severity())),
                "{code} is not in docs/health.md"
            );
        }
    }

    #[test]
    fn problems_of_newer_daemons_are_understood() {
        let text = r#"{"code":"SOMETHING_NEW","severity":"info","object":"x/y","summary":"s","more":1}"#;
        let problem: Problem = serde_json::from_str(text).unwrap();
        let silent = Problem::new(Check::ApplianceSilent, "appliance/a", "it is silent").with_remedy("look");
        assert!(silent.is(Check::ApplianceSilent) && !problem.is(Check::ApplianceSilent));
        assert_eq!(worst([&problem, &silent]), Some(Severity::Warning));
        assert_eq!(worst([]), None);
        let back: Problem = serde_json::from_str(&serde_json::to_string(&silent).unwrap()).unwrap();
        assert_eq!(back, silent);
    }
}
