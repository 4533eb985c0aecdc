//! Kinds of events of the allocator.

use std::fmt;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)+) => {
        /// Kind of an event. On the wire a kind is its text, so that readers understand newer allocators;
        /// `docs/life.md` lists all kinds.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum EventKind {
            $($(#[$doc])* $name,)+
        }

        impl EventKind {
            /// All kinds.
            pub const ALL: &[EventKind] = &[$(EventKind::$name,)+];

            /// Its text on the wire.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(EventKind::$name => $text,)+
                }
            }
        }
    };
}

kinds! {
    /// An appliance is heard, for the first time or again.
    ApplianceUp = "appliance-up";
    /// An appliance is not heard any more.
    ApplianceSilent = "appliance-silent";
    /// An appliance has a warning for its operator: bad memory, a limit that was lowered, a damaged record.
    ApplianceWarning = "appliance-warning";
    /// An appliance has other addresses than before.
    ApplianceMoved = "appliance-moved";
    /// An appliance was refused because another one that is up has the same id or name.
    ApplianceRefused = "appliance-refused";
    /// An operator made the allocator forget an appliance.
    ApplianceForgotten = "appliance-forgotten";
    /// The operator gave an appliance up.
    ApplianceLost = "appliance-lost";
    /// An allocation lost memory on an appliance that was given up.
    LenderLost = "lender-lost";
    /// The emptying of an appliance began, was paused or ended.
    Drain = "drain";
    /// An allocation was made.
    Created = "created";
    /// An allocation is being given back.
    Deleted = "deleted";
    /// A client has become the owner of an allocation.
    Attached = "attached";
    /// An allocation was renamed.
    Renamed = "renamed";
    /// A copy of the owning client asked for its allocation, and was refused.
    CopyRefused = "copy-refused";
    /// An allocation has no owner any more.
    Detached = "detached";
    /// A request waits for its turn.
    Waiting = "waiting";
    /// A request that waited was served.
    Served = "served";
    /// A request that waited was refused.
    Refused = "refused";
    /// A request that waited was cancelled.
    Cancelled = "cancelled";
    /// A resize or a move is ready to be carried out.
    ChangeOpen = "change-open";
    /// A resize or a move is done.
    Changed = "changed";
    /// A resize or a move was given up.
    ChangeRefused = "change-refused";
    /// The owner of an allocation is asked to let go, because another client is to get it.
    HandOver = "hand-over";
    /// An allocation has gone to its new owner.
    HandedOver = "handed-over";
    /// A client stands by to take an allocation over.
    Standby = "standby";
    /// A client does not stand by any more.
    StandbyGone = "standby-gone";
    /// Allocations in use have another owner; the earlier owner waits for commit or rollback.
    HandoverOpen = "handover-open";
    /// A hand-over was not possible: the allocations stay with their owner, or return to it.
    HandoverFailed = "handover-failed";
    /// A hand-over was committed: the new owner keeps the allocations for good.
    HandoverCommitted = "handover-committed";
    /// A hand-over is rolled back: the old owner gets the allocation again.
    HandoverReturning = "handover-returning";
    /// The old owner has the allocation again.
    HandoverReturned = "handover-returned";
    /// An owner did not let go in time and was cut off.
    CutOff = "cut-off";
    /// A new owner got zeros in place of memory that could not be moved away from the old one.
    ContentLost = "content-lost";
    /// The end of a lease is near.
    LeaseWarning = "lease-warning";
    /// A lease has ended.
    LeaseEnded = "lease-ended";
    /// The end of an account's hours is near.
    HoursWarning = "hours-warning";
    /// The hours of an account have ended.
    HoursEnded = "hours-ended";
    /// The end of an allocation moved, because some time does not count against it.
    LeaseMoved = "lease-moved";
    /// The metadata are older than a state that appliances or owners reported: the allocator judges and changes
    /// nothing.
    MetadataBehind = "metadata-behind";
    /// The metadata cannot be written: the allocator answers, and changes nothing.
    MetadataReadOnly = "metadata-read-only";
    /// The metadata can be written again.
    MetadataWritable = "metadata-writable";
    /// The clock of the allocator's machine jumped: the allocator does not judge by it yet.
    ClockJumped = "clock-jumped";
    /// The clock is back at the expected time.
    ClockBack = "clock-back";
    /// The clock kept to its new time, which is taken.
    ClockSet = "clock-set";
    /// A lease was renewed.
    Renewed = "renewed";
    /// The memory of an allocation was freed because its time was over.
    Freed = "freed";
    /// An allocation gives way to a request of a higher priority.
    ReclaimNotice = "reclaim-notice";
    /// An allocation that was to give way stays.
    ReclaimWithdrawn = "reclaim-withdrawn";
    /// An appliance has a grant that no record knows.
    GarbageFound = "garbage-found";
    /// The memory of a grant without a record was freed.
    GarbageFreed = "garbage-freed";
    /// An appliance has lost the memory of an allocation.
    Lost = "lost";
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_there_once_and_documented() {
        let page = include_str!("../../../docs/life.md");
        for kind in EventKind::ALL {
            let text = kind.as_str();
            assert_eq!(EventKind::ALL.iter().filter(|one| one.as_str() == text).count(), 1, "{text}");
            assert!(page.contains(&format!("| `{text}` |")), "{text} is not in the table of docs/life.md");
        }
    }
}
