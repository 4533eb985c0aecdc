//! Asking the allocator about paths that do not work: whether the memory behind them is lost, and the present
//! addresses of the appliance. Off the path of every I/O. An allocator that does not answer changes nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use xpm_control::client::ClientError;
use xpm_control::error_line;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{self as api, Allocation, Map, Orders, Part};
use xpm_protocol::api::appliance::Endpoints;
use xpm_protocol::{AllocationId, ApplianceId, Epoch, GrantId, Name, Succession};

use super::Owner;

/// How long a path has to be down before the allocator is asked; a refusal leads to a question at once.
const DOWN_MIN: Duration = Duration::from_secs(2);
/// Pause between two questions while an appliance refuses, and while paths are only down.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(4));

/// An object with paths to appliances that may need the allocator's statement.
pub trait Guarded: Send + Sync {
    /// The paths that do not work. Takes locks that no I/O waits for.
    fn troubles(&self) -> Vec<Trouble>;

    /// Takes the allocator's statement.
    fn hear(&self, word: &Word);

    /// Notified when a path begins to fail, or to be refused.
    fn alarm(&self) -> Arc<Notify>;
}

/// A path that does not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// The grant that the path leads to.
    pub grant: GrantId,
    /// The appliance that has the grant.
    pub appliance: ApplianceId,
    /// Whether the appliance was reached and answered that it does not know the grant.
    pub refused: bool,
    /// The time when the path began to fail.
    pub since: Instant,
}

/// A statement of the allocator about an ownership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// The ownership is valid.
    Holds {
        /// Grants whose memory their appliances lost.
        lost: Vec<GrantId>,
        /// The present addresses of each grant.
        endpoints: BTreeMap<GrantId, Endpoints>,
    },
    /// Another client has the allocation now and may give it back, or will get it soon: I/O waits.
    Waits {
        /// This client's part in the transfer.
        part: Part,
    },
    /// The ownership has ended.
    Ended {
        /// Why, in one line.
        why: String,
        /// Whether a record of the allocation says so. Otherwise a record is missing; that counts only where
        /// the appliance refuses the grant, too, because an allocator that lost its metadata has no records.
        recorded: bool,
    },
}

/// An owner's knowledge of its allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// The allocation.
    pub id: AllocationId,
    /// The epoch of its ownership.
    pub epoch: Epoch,
    /// Version of its map.
    pub version: u64,
}

impl From<&Map> for Known {
    fn from(map: &Map) -> Known {
        Known { id: map.id, epoch: map.epoch, version: map.version }
    }
}

/// Asks the allocator on behalf of one owner about one allocation.
pub struct Guard {
    owner: Owner,
    name: Name,
}

impl Guard {
    /// A guard of this allocation.
    pub const fn new(owner: Owner, name: Name) -> Guard {
        Guard { owner, name }
    }

    /// Asks the allocator if a path needs its statement, and passes the answer to `subject`. Returns the
    /// answer, and the time until the next call; none: call again only after the alarm.
    pub async fn look(&self, known: Known, subject: &dyn Guarded) -> (Option<Word>, Option<Duration>) {
        let troubles = subject.troubles();
        let refused: Vec<GrantId> = troubles.iter().filter(|one| one.refused).map(|one| one.grant).collect();
        let Some(oldest) = troubles.iter().map(|one| one.since).min() else { return (None, None) };
        let left = DOWN_MIN.saturating_sub(oldest.elapsed());
        if refused.is_empty() && !left.is_zero() {
            return (None, Some(left));
        }
        let again = if refused.is_empty() { AGAIN.1 } else { AGAIN.0 };
        let word = self.ask(known, &refused).await;
        if let Some(word) = &word {
            subject.hear(word);
        }
        (word, Some(again))
    }

    /// The allocator's statement about the ownership, whatever the state of the paths; none as in
    /// [`Guard::look`].
    pub async fn word(&self, known: Known) -> Option<Word> {
        self.ask(known, &[]).await
    }

    /// The allocator's statement; none when the allocator cannot be reached, or its statement does not count.
    async fn ask(&self, known: Known, refused: &[GrantId]) -> Option<Word> {
        let orders = match refused {
            [] => self.owner.orders(&self.name).await,
            refused => self.owner.orders_about(&self.name, refused).await,
        };
        match orders {
            Ok(orders) => word_of(known, orders),
            Err(ClientError::Refused(body)) if body.kind == ErrorKind::NotFound => {
                Some(Word::Ended { why: format!("allocation `{}` was deleted", self.name), recorded: false })
            }
            Err(ClientError::Refused(body)) if body.kind == ErrorKind::Conflict => self.whose(known).await,
            Err(error) => {
                tracing::debug!("allocation {}: {}", self.name, error_line(&error));
                None
            }
        }
    }

    /// Handles the answer that this client does not own the allocation: asks for the owner.
    async fn whose(&self, known: Known) -> Option<Word> {
        let path = format!("/v1/allocations/{}", self.name);
        let found: Allocation = self.owner.allocator.get(&path).await.ok()?;
        let ended = |why: String, recorded| Some(Word::Ended { why, recorded });
        if found.id != known.id {
            return ended(
                format!("allocation `{}` was deleted, and another allocation has its name now", self.name),
                false,
            );
        }
        let by = match found.owner {
            Some(owner) if owner.client == self.owner.client && !is_another_life(&self.owner, &owner) => {
                return None;
            }
            Some(owner) => format!("belongs to {} now", one_line(&owner.shown())),
            None => "does not belong to this client any more".to_owned(),
        };
        match is_behind(known, found.epoch, None) {
            true => None,
            false => ended(format!("allocation `{}` {by}", self.name), found.epoch > known.epoch),
        }
    }
}

/// The statement in an answer about orders; none when the answer does not count.
fn word_of(known: Known, orders: Orders) -> Option<Word> {
    if let Some(part) = orders.part {
        return (!is_behind(known, orders.epoch?, None)).then_some(Word::Waits { part });
    }
    // An allocator of an older version sends no such fields, and so makes no statement about lost memory.
    let (epoch, lost) = (orders.epoch?, orders.lost?);
    match is_behind(known, epoch, Some(orders.version)) {
        true => None,
        false => Some(Word::Holds { lost, endpoints: orders.endpoints }),
    }
}

/// Whether an allocator's record is older than the owner's knowledge, because its metadata are of an earlier
/// time. Then its statements about lost, deleted or transferred allocations do not count. This is the only
/// function that decides that.
fn is_behind(known: Known, epoch: Epoch, version: Option<u64>) -> bool {
    epoch < known.epoch || version.is_some_and(|version| version < known.version)
}

/// Whether an allocation of this client belongs to another life of the client that does not succeed this one:
/// a copy of the client took the allocation by force.
fn is_another_life(of: &Owner, owner: &api::Owner) -> bool {
    of.life.zip(owner.life).is_some_and(|(of, owner)| owner.after(&of) != Succession::Same)
}

/// A text from another machine, cleaned for display: no control characters, at most 100 characters.
fn one_line(text: &str) -> String {
    text.chars().filter(|one| !one.is_control()).take(100).collect()
}

#[cfg(test)]
mod tests {
    use xpm_protocol::HandoverId;

    use super::*;

    const KNOWN: Known = Known { id: AllocationId::from_u128(1), epoch: Epoch(3), version: 7 };

    fn orders(epoch: Option<u64>, version: u64, lost: Option<Vec<GrantId>>) -> Orders {
        let endpoints = BTreeMap::new();
        let (epoch, given_up) = (epoch.map(Epoch), Vec::new());
        Orders {
            version,
            change: None,
            hand_over: None,
            epoch,
            lost,
            endpoints,
            given_up,
            metadata: None,
            part: None,
            contested: false,
            wants_keys: false,
        }
    }

    #[test]
    fn an_allocator_with_outdated_metadata_is_not_believed() {
        let lost = Some(vec![GrantId::from_u128(1)]);
        let word = |epoch, version| word_of(KNOWN, orders(Some(epoch), version, lost.clone()));
        assert!(matches!(word(3, 7), Some(Word::Holds { lost, .. }) if lost.len() == 1));
        assert!(word(3, 8).is_some(), "a change that this owner has not carried out");
        assert_eq!(word(2, 7), None);
        assert_eq!(word(3, 6), None);
    }

    #[test]
    fn a_client_that_may_get_the_allocation_back_waits() {
        let part = Part::Holds { handover: HandoverId::from_u128(1), to: "b".to_owned() };
        let handed = |epoch| Orders { part: Some(part.clone()), ..orders(Some(epoch), 7, None) };
        assert_eq!(word_of(KNOWN, handed(4)), Some(Word::Waits { part: part.clone() }));
        assert_eq!(word_of(KNOWN, handed(2)), None, "an allocator of yesterday");
    }

    #[test]
    fn an_answer_without_the_lost_grants_is_no_statement() {
        assert_eq!(word_of(KNOWN, orders(None, 7, None)), None);
        assert_eq!(word_of(KNOWN, orders(Some(3), 7, None)), None);
    }
}
