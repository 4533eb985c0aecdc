//! The ledger of grants: reservations, commits, epochs and expiry.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use proptest::prelude::*;
use proptest::sample::Index;
use xpm_protocol::api::appliance::Commit;
use xpm_protocol::{Epoch, GrantKey};

use super::*;

const UNIT: u64 = 16 << 20;
const CAPACITY: u64 = 16 * UNIT;
const STOCK: Stock = Stock { region_len: 2 * UNIT, target: 6 * UNIT };

/// A test double for memory, which records its length and whether a client wrote to it.
struct Token {
    len: u64,
    dirty: AtomicBool,
    live: Arc<AtomicU64>,
}

impl Drop for Token {
    fn drop(&mut self) {
        self.live.fetch_sub(self.len, SeqCst);
    }
}

fn key(number: u64) -> GrantKey {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    GrantKey::from_bytes(bytes)
}

fn commit_of(allocation: AllocationId, epoch: u64, key_number: u64, regions: Vec<RegionId>) -> Commit {
    Commit {
        allocation,
        name: "a".parse().unwrap(),
        epoch: Epoch(epoch),
        key: key(key_number),
        regions,
        from: None,
        descriptor: None,
    }
}

#[derive(Debug, Clone)]
enum Step {
    Plan { allocation: u8, count: usize, len: u32, ttl: u64 },
    FinishPlan { which: Index, well: bool },
    Commit { grant: u8, which: Index, take: usize },
    Renew { grant: u8, epoch: u64 },
    DeleteGrant { grant: u8 },
    DeleteRegion { which: Index },
    Clear { outcome: u8 },
    Surplus,
    StartStocking,
    FinishStocking { well: bool },
    Pass { seconds: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..3_u8, 1..5_usize, 0..3_u32, 1..20_u64)
            .prop_map(|(allocation, count, len, ttl)| Step::Plan { allocation, count, len, ttl }),
        3 => (any::<Index>(), prop::bool::weighted(0.8)).prop_map(|(which, well)| Step::FinishPlan { which, well }),
        4 => (0..4_u8, any::<Index>(), 1..4_usize).prop_map(|(grant, which, take)| Step::Commit { grant, which, take }),
        1 => (0..4_u8, 1..5_u64).prop_map(|(grant, epoch)| Step::Renew { grant, epoch }),
        2 => (0..4_u8).prop_map(|grant| Step::DeleteGrant { grant }),
        1 => any::<Index>().prop_map(|which| Step::DeleteRegion { which }),
        3 => (0..3_u8).prop_map(|outcome| Step::Clear { outcome }),
        1 => Just(Step::Surplus),
        2 => Just(Step::StartStocking),
        2 => prop::bool::weighted(0.8).prop_map(|well| Step::FinishStocking { well }),
        1 => (1..10_u64).prop_map(|seconds| Step::Pass { seconds }),
    ]
}

/// A ledger, its environment, and the checks of its invariants.
struct World {
    ledger: Ledger<Arc<Token>>,
    now: Instant,
    live: Arc<AtomicU64>,
    plans: Vec<(Plan<Arc<Token>>, u64)>,
    stocking: usize,
    keys: u64,
    /// Every id that was ever lent, with the allocation that reserved it.
    seen: BTreeMap<RegionId, AllocationId>,
}

impl World {
    fn new() -> World {
        World {
            ledger: Ledger::new(CAPACITY, STOCK, 7),
            now: Instant::now(),
            live: Arc::new(AtomicU64::new(0)),
            plans: Vec::new(),
            stocking: 0,
            keys: 0,
            seen: BTreeMap::new(),
        }
    }

    fn token(&self, len: u64) -> Arc<Token> {
        self.live.fetch_add(len, SeqCst);
        Arc::new(Token { len, dirty: AtomicBool::new(false), live: self.live.clone() })
    }

    fn act(&mut self, step: &Step) {
        match *step {
            Step::Plan { allocation, count, len, ttl } => {
                let (free, len) = (self.ledger.free(), UNIT << len);
                match self.ledger.plan(AllocationId::from_u128(allocation.into()), count, len) {
                    Ok(mut plan) => {
                        assert!(count as u64 * len <= free, "more than is free was given");
                        for (memory, len) in plan.leaving.drain(..) {
                            drop(memory);
                            self.ledger.left(len);
                        }
                        assert_eq!(self.ledger.leaving(), 0);
                        self.plans.push((plan, ttl));
                    }
                    Err(NoPlan::Wait) => assert!(self.stocking > 0, "waits for nothing"),
                    Err(NoPlan::Refused(_)) => assert!(count as u64 * len > free, "refused though free"),
                }
            }
            Step::FinishPlan { which, well } if !self.plans.is_empty() => {
                let index = which.index(self.plans.len());
                let (plan, ttl) = self.plans.swap_remove(index);
                self.finish(plan, ttl, well);
            }
            Step::Commit { grant, which, take } => self.commit(grant, which, take),
            Step::Renew { grant, epoch } => self.renew(grant, epoch),
            Step::DeleteGrant { grant } => self.ledger.delete_grant(GrantId::from_u128(grant.into())),
            Step::DeleteRegion { which } => {
                let ids: Vec<_> = self.ledger.regions().map(|(id, region)| (id, region.state)).collect();
                if !ids.is_empty() {
                    let (id, state) = ids[which.index(ids.len())];
                    // The id of a reservation that is still being made is known to no client.
                    if !self.plans.iter().any(|(plan, _)| plan.ready.contains(&id)) {
                        let refused = self.ledger.delete_region(id).is_err();
                        assert_eq!(refused, matches!(state, State::Granted { .. }));
                    }
                }
            }
            Step::Clear { outcome } => {
                if let Some((id, memory)) = self.ledger.take_clearing() {
                    match outcome {
                        0 => self.ledger.not_yet(id, memory),
                        1 => {
                            drop(memory);
                            self.ledger.dropped(id);
                        }
                        _ => {
                            memory.dirty.store(false, SeqCst);
                            self.ledger.cleared(id, memory);
                        }
                    }
                }
            }
            Step::Surplus => {
                if let Some((id, memory)) = self.ledger.take_surplus() {
                    drop(memory);
                    self.ledger.dropped(id);
                }
            }
            Step::StartStocking => self.stocking += usize::from(self.ledger.start_stocking().is_some()),
            Step::FinishStocking { well } if self.stocking > 0 => {
                self.stocking -= 1;
                let memory = well.then(|| self.token(STOCK.region_len));
                self.ledger.stocked(memory);
            }
            Step::Pass { seconds } => {
                self.now += Duration::from_secs(seconds);
                self.ledger.expire(self.now);
            }
            Step::FinishPlan { .. } | Step::FinishStocking { .. } => {}
        }
    }

    fn finish(&mut self, plan: Plan<Arc<Token>>, ttl: u64, well: bool) {
        if !well {
            return self.ledger.abandon(plan);
        }
        let (allocation, len) = (plan.allocation, plan.region_len);
        let made = (0..plan.make).map(|_| self.token(len)).collect();
        for id in self.ledger.reserved(plan, made, self.now + Duration::from_secs(ttl)) {
            let memory = self.ledger.region(id).unwrap().memory.clone().unwrap();
            assert!(!memory.dirty.load(SeqCst), "lent again before it was cleared");
            assert_eq!(self.seen.insert(id, allocation), None, "an id was used again");
        }
    }

    fn commit(&mut self, grant: u8, which: Index, take: usize) {
        let reserved: Vec<_> = self.seen.keys().copied().collect();
        if reserved.is_empty() {
            return;
        }
        let start = which.index(reserved.len());
        let regions: Vec<_> = reserved[start..].iter().copied().take(take).collect();
        let allocation = self.seen[&regions[0]];
        self.keys += 1;
        let order = commit_of(allocation, 1, self.keys, regions.clone());
        let id = GrantId::from_u128(grant.into());
        if let Ok(Change::Made) = self.ledger.commit(id, &order) {
            for region in regions {
                self.ledger.region(region).unwrap().memory.as_ref().unwrap().dirty.store(true, SeqCst);
            }
            assert_eq!(self.ledger.commit(id, &order), Ok(Change::Nothing), "not idempotent");
        }
    }

    fn renew(&mut self, grant: u8, epoch: u64) {
        let id = GrantId::from_u128(grant.into());
        let Some(old) = self.ledger.grant(id).cloned() else { return };
        self.keys += 1;
        let order = commit_of(old.allocation, epoch, self.keys, old.regions.clone());
        match self.ledger.commit(id, &order) {
            Ok(Change::Renew) => {
                assert!(order.epoch > old.epoch, "renewed for an epoch that is over");
                assert_eq!(self.ledger.find(&old.key), None, "let in while closing");
                self.ledger.renew(id, &order);
                assert_eq!(self.ledger.find(&old.key), None, "the old key still works");
                assert_eq!(self.ledger.find(&order.key), Some(id));
            }
            Ok(change) => panic!("{change:?} for another key"),
            Err(_) => assert!(order.epoch <= old.epoch, "a higher epoch was refused"),
        }
    }

    fn check(&self) {
        let mut totals = Totals::default();
        for (id, region) in self.ledger.regions() {
            match region.state {
                State::Ready => totals.ready += region.len,
                State::Reserved { .. } => totals.reserved += region.len,
                State::Clearing => totals.clearing += region.len,
                State::Granted { grant, .. } => {
                    totals.granted += region.len;
                    let owners: Vec<_> = self
                        .ledger
                        .grants()
                        .filter(|(_, grant)| grant.regions.contains(&id))
                        .map(|(id, _)| id)
                        .collect();
                    assert!(
                        owners.contains(&grant) && owners.len() <= 2,
                        "in one grant, or one that takes over"
                    );
                }
            }
        }
        for (id, grant) in self.ledger.grants() {
            for region in &grant.regions {
                let state = self.ledger.region(*region).expect("a grant's regions are there").state;
                let allocated =
                    matches!(state, State::Granted { allocation, .. } if allocation == grant.allocation);
                assert!(allocated, "region {region} of grant {id} is {state:?}");
            }
        }
        let exists = totals.used();
        totals.reserved += self.plans.iter().map(|(plan, _)| plan.make as u64 * plan.region_len).sum::<u64>();
        totals.stocking = self.stocking as u64 * STOCK.region_len;
        assert_eq!(self.ledger.totals(), totals);
        assert!(totals.used() <= CAPACITY, "more than the capacity is in use");
        assert_eq!(self.live.load(SeqCst), exists, "memory that no region has, or has twice");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_invariants_hold_after_any_steps(steps in prop::collection::vec(step(), 1..150)) {
        let mut world = World::new();
        for step in steps {
            world.act(&step);
            world.check();
        }
    }
}

/// A ledger with `count` regions of one unit reserved for allocation 1.
fn with_reserved(count: usize) -> (Ledger<()>, Vec<RegionId>, Instant) {
    let mut ledger = Ledger::new(CAPACITY, STOCK, 1);
    let (until, allocation) = (Instant::now() + Duration::from_secs(10), AllocationId::from_u128(1));
    let plan = ledger.plan(allocation, count, UNIT).unwrap();
    let ids = ledger.reserved(plan, vec![(); count], until);
    (ledger, ids, until)
}

#[test]
fn a_commit_that_contradicts_itself_is_refused() {
    let (mut ledger, ids, _) = with_reserved(2);
    let (own, other) = (AllocationId::from_u128(1), AllocationId::from_u128(2));
    let grant = GrantId::from_u128(9);
    let mut refused = |order: Commit| ledger.commit(grant, &order).unwrap_err();
    assert!(matches!(refused(commit_of(own, 1, 1, vec![])), Refusal::Invalid(_)));
    assert!(matches!(refused(commit_of(own, 1, 1, vec![ids[0], ids[0]])), Refusal::Invalid(_)));
    assert!(matches!(refused(commit_of(other, 1, 1, ids.clone())), Refusal::Conflict(_)));
    let unknown = RegionId::from_u128(3);
    assert_eq!(refused(commit_of(own, 1, 1, vec![ids[0], unknown])), Refusal::UnknownRegion(unknown));
    assert_eq!(ledger.totals().reserved, 2 * UNIT, "nothing was taken");
}

#[test]
fn a_reservation_that_is_over_cannot_be_committed() {
    let (mut ledger, ids, until) = with_reserved(1);
    assert_eq!(ledger.next_expiry(), Some(until));
    assert!(ledger.expire(until));
    assert_eq!(ledger.free(), CAPACITY);
    let order = commit_of(AllocationId::from_u128(1), 1, 1, ids.clone());
    assert_eq!(ledger.commit(GrantId::from_u128(9), &order), Err(Refusal::UnknownRegion(ids[0])));
}

#[test]
fn two_grants_never_have_one_key_or_one_region() {
    let (mut ledger, ids, _) = with_reserved(2);
    let own = AllocationId::from_u128(1);
    let (first, second) = (GrantId::from_u128(1), GrantId::from_u128(2));
    ledger.commit(first, &commit_of(own, 1, 1, vec![ids[0]])).unwrap();
    let same_key = ledger.commit(second, &commit_of(own, 1, 1, vec![ids[1]]));
    assert!(matches!(same_key, Err(Refusal::Conflict(_))));
    let same_region = ledger.commit(second, &commit_of(own, 1, 2, vec![ids[0]]));
    assert_eq!(same_region, Err(Refusal::InGrant { region: ids[0], grant: first }));
    ledger.commit(second, &commit_of(own, 1, 2, vec![ids[1]])).unwrap();
    assert_eq!(ledger.find(&key(1)), Some(first));
    assert_eq!(ledger.find(&key(2)), Some(second));
    assert_eq!(ledger.find(&key(3)), None);
    assert_eq!(ledger.delete_region(ids[0]), Err(Refusal::InGrant { region: ids[0], grant: first }));
}

#[test]
fn ready_regions_make_room_for_other_sizes() {
    let mut ledger = Ledger::new(4 * UNIT, Stock { region_len: UNIT, target: 4 * UNIT }, 1);
    while ledger.start_stocking().is_some() {
        ledger.stocked(Some(()));
    }
    assert_eq!(ledger.totals().ready, 4 * UNIT);
    let plan = ledger.plan(AllocationId::from_u128(1), 1, 2 * UNIT).unwrap();
    assert_eq!((plan.leaving.len(), ledger.leaving(), plan.make), (2, 2 * UNIT, 1));
    assert_eq!(ledger.totals().ready, 2 * UNIT);
    ledger.abandon(plan);
    assert_eq!((ledger.free(), ledger.totals().used()), (4 * UNIT, 2 * UNIT));
}

#[test]
fn a_region_that_cannot_be_cleared_yet_does_not_delay_others() {
    let (mut ledger, ids, _) = with_reserved(3);
    let grant = GrantId::from_u128(1);
    ledger.commit(grant, &commit_of(AllocationId::from_u128(1), 1, 1, ids.clone())).unwrap();
    ledger.delete_grant(grant);
    let mut given: Vec<_> = std::iter::from_fn(|| {
        let (id, memory) = ledger.take_clearing()?;
        ledger.not_yet(id, memory);
        Some(id)
    })
    .take(3)
    .collect();
    given.sort_unstable();
    let mut all = ids;
    all.sort_unstable();
    assert_eq!(given, all);
}
