//! Kinds of events of the allocator.

use std::fmt;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)+) => {
        /// What happened. On the wire a kind is its text, so that readers understand newer allocators;
        /// `docs/life.md` lists all of them.
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
    /// An appliance has something to say to its operator: bad memory, a limit that was lowered, a damaged record.
    ApplianceWarning = "appliance-warning";
    /// An appliance is reached at other addresses than before.
    ApplianceMoved = "appliance-moved";
    /// An appliance was refused that has the id or the name of another one that is up.
    ApplianceRefused = "appliance-refused";
    /// An operator had an appliance forgotten.
    ApplianceForgotten = "appliance-forgotten";
    /// The operator gave an appliance up.
    ApplianceLost = "appliance-lost";
    /// An allocation had memory on an appliance that was given up.
    LenderLost = "lender-lost";
    /// The emptying of an appliance began, was held up or ended.
    Drain = "drain";
    /// An allocation was made.
    Created = "created";
    /// An allocation is being given back.
    Deleted = "deleted";
    /// A client uses an allocation.
    Attached = "attached";
    /// An allocation has another name.
    Renamed = "renamed";
    /// A copy of the client that uses an allocation asked for it.
    CopyRefused = "copy-refused";
    /// No client uses an allocation any more.
    Detached = "detached";
    /// A request waits for its turn.
    Waiting = "waiting";
    /// A request that waited was served.
    Served = "served";
    /// A request that waited was refused.
    Refused = "refused";
    /// A request that waited was taken back.
    Cancelled = "cancelled";
    /// A resize or a move can be carried out.
    ChangeOpen = "change-open";
    /// A resize or a move holds.
    Changed = "changed";
    /// A resize or a move was given up.
    ChangeRefused = "change-refused";
    /// An allocation is to go to another client.
    HandOver = "hand-over";
    /// An allocation has gone to another client.
    HandedOver = "handed-over";
    /// A client stands by to take an allocation over.
    Standby = "standby";
    /// A client does not stand by any more.
    StandbyGone = "standby-gone";
    /// An allocation in use has another owner, and the one before it waits whether it stays so.
    HandoverOpen = "handover-open";
    /// A hand-over was not possible: all is as before, or will be.
    HandoverFailed = "handover-failed";
    /// A hand-over is for good.
    HandoverCommitted = "handover-committed";
    /// A hand-over is rolled back: the old owner gets the allocation again.
    HandoverReturning = "handover-returning";
    /// The old owner has the allocation again.
    HandoverReturned = "handover-returned";
    /// An owner did not let go in time and was cut off.
    CutOff = "cut-off";
    /// A new owner got zeros in place of memory that could not be moved away from the old one.
    ContentLost = "content-lost";
    /// The end of a lease comes near.
    LeaseWarning = "lease-warning";
    /// A lease has ended.
    LeaseEnded = "lease-ended";
    /// The end of an account's hours comes near.
    HoursWarning = "hours-warning";
    /// The hours of an account have ended.
    HoursEnded = "hours-ended";
    /// The end of an allocation moved, by time that does not count.
    LeaseMoved = "lease-moved";
    /// The metadata are older than what appliances or owners heard of: nothing is judged or changed.
    MetadataBehind = "metadata-behind";
    /// The metadata cannot be written: the allocator answers, and changes nothing.
    MetadataReadOnly = "metadata-read-only";
    /// The metadata can be written again.
    MetadataWritable = "metadata-writable";
    /// The clock of the allocator's machine jumped: nothing is judged by it yet.
    ClockJumped = "clock-jumped";
    /// The clock is right again.
    ClockBack = "clock-back";
    /// The clock stays as it jumped: its time holds.
    ClockSet = "clock-set";
    /// A lease was renewed.
    Renewed = "renewed";
    /// The memory of an allocation was freed because its time was over.
    Freed = "freed";
    /// An allocation gives way to a request of a higher priority.
    ReclaimNotice = "reclaim-notice";
    /// An allocation that was to give way stays.
    ReclaimWithdrawn = "reclaim-withdrawn";
    /// An appliance has memory that no record knows.
    GarbageFound = "garbage-found";
    /// Memory that no record knows was freed.
    GarbageFreed = "garbage-freed";
    /// An appliance does not have any more what an allocation had there.
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
