//! The life of a client that holds a grant. Each grant admits one life, and its successors: of two copies of
//! a client the first one is admitted, and the second one is refused with the name of the first. A new epoch
//! resets the holder.

use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use xpm_protocol::api::appliance::Holder;
use xpm_protocol::{GrantId, Life, Succession, Visitor};

use super::Table;
use super::shared::Shared;
use super::state::State;

/// How long the holding life has to be absent before another life may follow it whose order is not proven by
/// a lock: far longer than a client takes to reconnect after its process or this appliance was restarted.
const ABSENT_MIN: Duration = Duration::from_secs(10);

impl Table {
    /// Admits a life of the grant's owner, and records that for the next life of this appliance. If another
    /// life holds the grant whose end is not proven, its connections are checked for live hosts, which can
    /// take three seconds. If none is alive for ten seconds, the new life becomes the holder, and those
    /// connections are closed.
    ///
    /// # Errors
    /// The present holder, in one line.
    pub fn admit(&self, id: GrantId, visitor: &Visitor) -> Result<(), String> {
        let state = self.shared.lock();
        let Some(grant) = state.ledger.grant(id) else { return Ok(()) };
        let name = grant.name.clone();
        let Some(holder) = state.holders.get(&id).cloned() else {
            self.shared.hold(state, id, visitor);
            return Ok(());
        };
        let refused =
            |why: &str| Err(format!("`{name}` is held by {}; {} is {why}", holder.shown(), visitor.shown()));
        match visitor.life.after(&holder.life) {
            Succession::Same => {
                self.shared.hold(state, id, visitor);
                return Ok(());
            }
            Succession::Past => return refused("an earlier life of it"),
            Succession::Copy => return refused("a copy of it: attach the allocation on one of them only"),
            Succession::Stranger => {
                return refused("another machine with the same client id: attach it there");
            }
            Succession::IfEnded => drop(state),
        }
        let living = self.shared.living(id, &visitor.life);
        let mut state = self.shared.lock();
        if state.holders.get(&id) != Some(&holder) {
            return refused("overtaken by another life just now");
        }
        if !living.is_empty() {
            state.absent.remove(&id);
            return refused("a copy of it, for the first one lives and answers");
        }
        let absent = state.absent.entry(id).or_insert_with(Instant::now).elapsed();
        if absent < ABSENT_MIN {
            return refused("let in when the first one has been away for 10 s");
        }
        self.shared.hold(state, id, visitor);
        self.shared.close_others(id, &visitor.life);
        Ok(())
    }

    /// Whether an admitted life still holds the grant.
    pub fn is_admitted(&self, id: GrantId, visitor: &Visitor) -> bool {
        let state = self.shared.lock();
        let holds = |holder: &Visitor| matches!(visitor.life.after(&holder.life), Succession::Same);
        state.holders.get(&id).is_none_or(holds)
    }

    /// Other lives than `life` that have connections to a grant and whose hosts answer now. Blocks for up to
    /// three seconds.
    pub fn living(&self, id: GrantId, life: &Life) -> Vec<Holder> {
        let holder = |visitor: Visitor| Holder { life: visitor.life, host_name: visitor.host_name };
        self.shared.living(id, life).into_iter().map(holder).collect()
    }
}

impl Shared {
    fn hold(&self, mut state: MutexGuard<'_, State>, id: GrantId, visitor: &Visitor) {
        state.absent.remove(&id);
        if state.holders.insert(id, visitor.clone()).as_ref() != Some(visitor) {
            self.record(&state, id);
        }
    }

    fn living(&self, id: GrantId, life: &Life) -> Vec<Visitor> {
        self.fences().iter().flat_map(|fence| fence.living(id.as_u128(), life)).collect()
    }

    fn close_others(&self, id: GrantId, life: &Life) {
        self.fences().iter().for_each(|fence| fence.close_others(id.as_u128(), life));
    }
}
