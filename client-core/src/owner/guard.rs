//! Asking the allocator about paths that do not work: whether what lies behind them is lost, and where the appliance
//! is now. Off the path of every I/O. An allocator that does not answer changes nothing.

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

/// How long a path has to be down before the allocator is asked; a refusal is asked about at once.
const DOWN_MIN: Duration = Duration::from_secs(2);
/// Pause between two questions while an appliance refuses, and while paths are only down.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(4));

/// Something with paths to appliances, which may need the allocator's word.
pub trait Guarded: Send + Sync {
    /// The paths that do not work. Takes locks that no I/O waits for.
    fn troubles(&self) -> Vec<Trouble>;

    /// What the allocator says.
    fn hear(&self, word: &Word);

    /// Notified when a path begins to fail, or to be refused.
    fn alarm(&self) -> Arc<Notify>;
}

/// A path that does not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// Where it leads.
    pub grant: GrantId,
    /// The appliance that has the grant.
    pub appliance: ApplianceId,
    /// The appliance was reached and says that it does not know the grant.
    pub refused: bool,
    /// Since when it does not work.
    pub since: Instant,
}

/// What the allocator says of an ownership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// It holds.
    Holds {
        /// Grants whose memory their appliances lost.
        lost: Vec<GrantId>,
        /// Where each grant is reached now.
        endpoints: BTreeMap<GrantId, Endpoints>,
    },
    /// Another client has it now and may give it back, or gets it soon: I/O waits.
    Waits {
        /// What this client has of it.
        part: Part,
    },
    /// It has ended.
    Ended {
        /// Why, in one line.
        why: String,
        /// A record of the allocation says so. Else a record is missing, which counts only where the appliance
        /// refuses the grant, too: an allocator that lost its metadata has no records.
        recorded: bool,
    },
}

/// What an owner knows of its allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// The allocation.
    pub id: AllocationId,
    /// Its ownership counter.
    pub epoch: Epoch,
    /// Version of its map.
    pub version: u64,
}

impl From<&Map> for Known {
    fn from(map: &Map) -> Known {
        Known { id: map.id, epoch: map.epoch, version: map.version }
    }
}

/// Asks for one owner about one allocation.
pub struct Guard {
    owner: Owner,
    name: Name,
}

impl Guard {
    /// A guard of this allocation.
    pub const fn new(owner: Owner, name: Name) -> Guard {
        Guard { owner, name }
    }

    /// Asks the allocator if a path needs it, and tells the answer to `subject`. What was answered, and when this is
    /// to be called again; none: not before the alarm.
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

    /// What the allocator says of the ownership, whatever the paths do; none as of [`Guard::look`].
    pub async fn word(&self, known: Known) -> Option<Word> {
        self.ask(known, &[]).await
    }

    /// What the allocator says; none where it cannot be reached, or is not to be believed.
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

    /// The allocator says that this client does not own the allocation: who does?
    async fn whose(&self, known: Known) -> Option<Word> {
        let path = format!("/v1/allocations/{}", self.name);
        let found: Allocation = self.owner.allocator.get(&path).await.ok()?;
        let ended = |why: String, recorded| Some(Word::Ended { why, recorded });
        if found.id != known.id {
            return ended(format!("allocation `{}` was deleted, and is another one now", self.name), false);
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

/// What orders say of the ownership; none where they do not count.
fn word_of(known: Known, orders: Orders) -> Option<Word> {
    if let Some(part) = orders.part {
        return (!is_behind(known, orders.epoch?, None)).then_some(Word::Waits { part });
    }
    // An allocator that does not know these fields does not say what is lost.
    let (epoch, lost) = (orders.epoch?, orders.lost?);
    match is_behind(known, epoch, Some(orders.version)) {
        true => None,
        false => Some(Word::Holds { lost, endpoints: orders.endpoints }),
    }
}

/// Whether an allocator's record is older than what this owner has seen: its metadata are of an earlier time. Its word
/// on what is lost, deleted or another's does not count then. The one place that decides this.
fn is_behind(known: Known, epoch: Epoch, version: Option<u64>) -> bool {
    epoch < known.epoch || version.is_some_and(|version| version < known.version)
}

/// Whether an allocation of this client belongs to another life of it, which is no successor of this one: a copy of the client
/// took it by force.
fn is_another_life(of: &Owner, owner: &api::Owner) -> bool {
    of.life.zip(owner.life).is_some_and(|(of, owner)| owner.after(&of) != Succession::Same)
}

/// Text of another machine, fit to be shown.
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
    fn the_word_of_an_allocator_that_is_behind_does_not_count() {
        let lost = Some(vec![GrantId::from_u128(1)]);
        let word = |epoch, version| word_of(KNOWN, orders(Some(epoch), version, lost.clone()));
        assert!(matches!(word(3, 7), Some(Word::Holds { lost, .. }) if lost.len() == 1));
        assert!(word(3, 8).is_some(), "a change that this owner has not carried out");
        assert_eq!(word(2, 7), None);
        assert_eq!(word(3, 6), None);
    }

    #[test]
    fn who_may_get_it_back_waits() {
        let part = Part::Holds { handover: HandoverId::from_u128(1), to: "b".to_owned() };
        let handed = |epoch| Orders { part: Some(part.clone()), ..orders(Some(epoch), 7, None) };
        assert_eq!(word_of(KNOWN, handed(4)), Some(Word::Waits { part: part.clone() }));
        assert_eq!(word_of(KNOWN, handed(2)), None, "an allocator of yesterday");
    }

    #[test]
    fn an_allocator_that_does_not_say_what_is_lost_says_nothing() {
        assert_eq!(word_of(KNOWN, orders(None, 7, None)), None);
        assert_eq!(word_of(KNOWN, orders(Some(3), 7, None)), None);
    }
}
