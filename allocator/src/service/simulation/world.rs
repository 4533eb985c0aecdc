//! The world around the service: clock, disk, appliances and network.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Behind, Heartbeat, Map, MetadataState};
use xpm_protocol::api::appliance::{Copy, Digest};
use xpm_protocol::{ApplianceId, ByteSize, ClientId, GrantId};

use super::super::describe::is_settled;
use super::super::{Answer, Call, CallError, Effect, Event, Moment, Outcome, ReplyTo, Request, Service};
use super::appliance::Appliance;
use super::{SETTINGS, TTL};
use crate::recover::Told;
use crate::store::Loaded;
use crate::store::MetadataStore as _;
use crate::store::memory::MemoryStore;
use crate::store::record::{AllocationRecord, GrantRecord, Phase};

/// Fate of a call.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fate {
    Works,
    NeverArrives,
    /// The caller gives it up, and it arrives afterwards.
    ArrivesLate,
    AnswerIsLost,
    Refused,
}

pub(super) struct World {
    service: Service,
    pub(super) durable: MemoryStore,
    pub(super) now: Duration,
    /// Seconds that the clock of the allocator's machine is ahead.
    pub(super) clock_ahead: i64,
    pub(super) appliances: BTreeMap<ApplianceId, Appliance>,
    /// Calls that the caller gave up and that are still on their way.
    late: Vec<(ApplianceId, Call)>,
    /// The newest state of the metadata that appliances heard of.
    heard: Option<MetadataState>,
    /// How often the disk was lost. After a loss, records may lack the keys of their epoch until the next epoch.
    losses: u8,
    /// Effects of the service that are not carried out yet.
    pub(super) pending: VecDeque<Effect>,
    asked: u64,
    pub(super) open: BTreeSet<ReplyTo>,
    pub(super) answers: BTreeMap<ReplyTo, Result<Outcome, ApiError>>,
}

impl World {
    pub(super) fn new(capacities: &[u64]) -> World {
        let mut world = World {
            service: new_service(0),
            durable: MemoryStore::default(),
            now: Duration::ZERO,
            clock_ahead: 0,
            appliances: BTreeMap::new(),
            late: Vec::new(),
            heard: None,
            losses: 0,
            pending: VecDeque::new(),
            asked: 0,
            open: BTreeSet::new(),
            answers: BTreeMap::new(),
        };
        for (index, capacity) in capacities.iter().enumerate() {
            let one = Appliance::new(index as u128 + 1, *capacity);
            world.appliances.insert(one.record.info.id, one);
        }
        // A pool without stored state is restored, too.
        let loaded = world.durable.load().unwrap();
        let effects = world.service.restore(world.moment(), loaded);
        world.pending.extend(effects);
        world.beat();
        world.finish();
        world
    }

    fn moment(&self) -> Moment {
        Moment { at: self.now, unix: self.now.as_secs().saturating_add_signed(self.clock_ahead) }
    }

    pub(super) fn event(&mut self, event: Event) {
        let now = self.moment();
        let effects = self.service.handle(now, event);
        self.pending.extend(effects);
    }

    pub(super) fn ask(&mut self, request: Request) -> ReplyTo {
        self.asked += 1;
        let reply = ReplyTo(self.asked);
        self.open.insert(reply);
        self.event(Event::Request(reply, request));
        reply
    }

    /// Every appliance that is not away sends its heartbeat.
    fn beat(&mut self) {
        let (now, heard) = (self.now, self.heard);
        let here = self.appliances.values_mut().filter(|one| !one.away);
        let beats: Vec<Heartbeat> = here
            .map(|one| {
                one.expire(now);
                let mut heartbeat = one.heartbeat();
                heartbeat.status.metadata = heard;
                heartbeat
            })
            .collect();
        for heartbeat in beats {
            self.ask(Request::Heartbeat(Box::new(heartbeat)));
        }
    }

    /// Carries out one pending effect: stores in order, calls in any order.
    pub(super) fn step(&mut self, choice: usize, fate: Fate) {
        let Some(effect) = self.take(choice) else { return };
        match effect {
            Effect::Reply(reply, result) => {
                assert!(self.open.remove(&reply), "{reply:?} was answered already");
                if let Ok(Outcome::Heartbeat(answer)) = &result {
                    let older = |ours: MetadataState| {
                        answer.metadata.is_some_and(|new| ours.is_behind(&new) || ours.pool != new.pool)
                    };
                    self.heard = if self.heard.is_none_or(older) { answer.metadata } else { self.heard };
                }
                self.answers.insert(reply, result);
            }
            Effect::Store(ticket, batch) => {
                self.durable.commit(&[batch]).unwrap();
                self.event(Event::Stored(ticket));
            }
            Effect::Call(ticket, target, call) => {
                let result = self.call(target.appliance, &call, fate);
                self.event(Event::Called(ticket, result));
            }
        }
    }

    /// A call that was given up arrives after all.
    pub(super) fn arrive(&mut self, choice: usize) {
        if !self.late.is_empty() {
            let (id, call) = self.late.swap_remove(choice % self.late.len());
            let _ = self.call(id, &call, Fate::Works);
        }
    }

    fn take(&mut self, choice: usize) -> Option<Effect> {
        let index = choice % self.pending.len().max(1);
        let index = match self.pending.get(index)? {
            Effect::Store(..) => {
                self.pending.iter().position(|effect| matches!(effect, Effect::Store(..)))?
            }
            _ => index,
        };
        self.pending.remove(index)
    }

    fn call(&mut self, id: ApplianceId, call: &Call, fate: Fate) -> Result<Answer, CallError> {
        let failed = || Err(CallError::Failed("no answer".into()));
        if let (Call::Copy(grant, copy), Fate::Works) = (call, fate) {
            return self.copy(id, *grant, copy);
        }
        if matches!(call, Call::Copy(..)) {
            return failed();
        }
        let appliance = self.appliances.get_mut(&id).unwrap();
        match fate {
            _ if appliance.away => failed(),
            Fate::NeverArrives => failed(),
            Fate::ArrivesLate => {
                self.late.push((id, call.clone()));
                failed()
            }
            Fate::Refused => Err(CallError::Refused(ErrorKind::NoSpace, "a whim".into())),
            Fate::AnswerIsLost => {
                let _ = appliance.carry_out(self.now, call);
                failed()
            }
            Fate::Works => match appliance.carry_out(self.now, call) {
                Ok(Answer::Status(mut status)) => {
                    status.metadata = self.heard;
                    Ok(Answer::Status(status))
                }
                other => other,
            },
        }
    }

    /// An appliance writes a run to another.
    fn copy(&mut self, from: ApplianceId, grant: GrantId, copy: &Copy) -> Result<Answer, CallError> {
        let refused = |line: &str| CallError::Refused(ErrorKind::Unavailable, line.into());
        let source = &self.appliances[&from];
        let region = source.region_at(grant, copy.range.offset).filter(|_| !source.away);
        let content = source.regions[&region.ok_or_else(|| refused("no such grant"))?].content;
        let has_key = |one: &&mut Appliance| one.grants.values().any(|grant| grant.key == copy.key);
        let target = self.appliances.values_mut().find(has_key).filter(|one| !one.away);
        let target = target.ok_or_else(|| refused("no such export"))?;
        let (id, _) = target.grants.iter().find(|(_, grant)| grant.key == copy.key).unwrap();
        let region = target.region_at(*id, copy.to).unwrap();
        target.regions.get_mut(&region).unwrap().content = content;
        let data = ByteSize(if content == 0 { 0 } else { 4096 });
        Ok(Answer::Digest(Digest { xxh3: content.to_string(), data, last: None }))
    }

    pub(super) fn finish(&mut self) {
        for _ in 0..100_000 {
            if self.pending.is_empty() {
                return;
            }
            self.step(0, Fate::Works);
        }
        panic!("it never comes to rest");
    }

    /// The allocator is killed: state that was not durable is lost, calls on their way may still arrive.
    pub(super) fn crash(&mut self, arriving: bool) {
        let late: Vec<Effect> = self.pending.drain(..).collect();
        self.open.clear();
        self.service = new_service(self.asked);
        self.now += Duration::from_secs(1);
        let now = self.moment();
        let loaded = self.durable.load().unwrap();
        let effects = self.service.restore(now, loaded);
        self.pending.extend(effects);
        for effect in late {
            if let Effect::Call(_, target, call) = effect
                && arriving
            {
                self.late.push((target.appliance, call));
            }
        }
    }

    /// The allocator and its disk are lost. A new allocator is recovered from the appliances, all of which answer,
    /// and from the maps of clients; that takes longer than any call is on its way.
    pub(super) fn lose_disk(&mut self, clients: Vec<(ClientId, Map)>) {
        self.appliances.values_mut().for_each(|one| one.away = false);
        self.late.clear();
        self.losses += 1;
        // The recovery numbers changes from its own time on (`CHANGES_SHIFT`). The clock has to move, or a number of an
        // earlier change could be used again.
        self.now += Duration::from_secs(1);
        let mut told = Told::default();
        for (id, one) in &self.appliances {
            one.list().into_iter().for_each(|grant| told.take(&id.to_string(), grant));
        }
        clients.into_iter().for_each(|(client, map)| told.take_map(Some(client), map));
        let (losses, mut count) = (self.losses, 0_u8);
        let mut dice = |bytes: &mut [u8]| {
            count += 1;
            bytes.fill(count);
            bytes[0] = losses;
            Ok(())
        };
        let (allocations, _) = told.put_together(self.now.as_secs(), &mut dice).unwrap();
        let state = self.heard.map(|heard| MetadataState { number: heard.number + 1, ..heard });
        self.durable = MemoryStore::of(Loaded { allocations, state, ..Loaded::default() });
        self.crash(false);
        self.beat();
        self.finish();
    }

    /// Whether the appliances of an allocation have the descriptor of its present record.
    pub(super) fn is_told(&self, record: &AllocationRecord) -> bool {
        let told = |grant: &GrantRecord| {
            let held = self.appliances[&grant.appliance].grants.get(&grant.id);
            held.is_some_and(|held| held.descriptor == record.descriptor())
        };
        is_settled(record) && record.grants.iter().all(told)
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.beat();
        self.event(Event::Tick);
    }

    /// Repairs all faults, and lets enough time pass for every undo.
    pub(super) fn mend(&mut self) {
        self.appliances.values_mut().for_each(|one| one.away = false);
        self.finish();
        while !self.late.is_empty() {
            self.arrive(0);
        }
        for _ in 0..4 {
            self.pass(TTL);
            self.finish();
        }
    }

    pub(super) fn check(&mut self) {
        assert!(self.open.is_empty(), "without an answer: {:?}", self.open);
        assert_eq!(self.behind(), None, "the metadata are the newest");
        let loaded = self.durable.load().unwrap();
        let mut granted = 0;
        for record in &loaded.allocations {
            assert_eq!(record.phase, Phase::Ready, "{}", record.name);
            for (index, grant) in record.known_grants().enumerate() {
                let held = &self.appliances[&grant.appliance].grants[&grant.id];
                assert_eq!(held.regions, grant.regions);
                let holds = record.grants.iter().any(|one| one.id == grant.id);
                let told = held.descriptor == record.descriptor();
                assert!(told || !holds || !is_settled(record), "what grant {} is part of", grant.id);
                let now = (record.epoch, &grant.key);
                let next = record.next.as_ref().and_then(|next| Some((next.epoch, next.keys.get(index)?)));
                let unknown = self.losses > 0 && next.is_some() && held.epoch <= record.epoch;
                assert!(
                    unknown || now == (held.epoch, &held.key) || next == Some((held.epoch, &held.key)),
                    "{}",
                    record.name
                );
                granted += 1;
            }
        }
        let grants: usize = self.appliances.values().map(|one| one.grants.len()).sum();
        assert_eq!(grants, granted, "a grant that no record has");
        for one in self.appliances.values() {
            assert!(one.regions.values().all(|region| region.grant.is_some()), "a reservation stayed");
        }
    }

    /// Whether the service reports that its metadata are outdated.
    pub(super) fn behind(&mut self) -> Option<Behind> {
        match self.answer(Request::Status).unwrap() {
            Outcome::Status(status) => status.behind,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn answer(&mut self, request: Request) -> Result<Outcome, ApiError> {
        let reply = self.ask(request);
        self.finish();
        self.answers.remove(&reply).unwrap()
    }
}

/// Random numbers that differ from those of the service before a crash.
fn new_service(life: u64) -> Service {
    let mut count = 0_u64;
    let dice = move |bytes: &mut [u8]| {
        for part in bytes.chunks_mut(16) {
            count += 1;
            let number = u128::from(count) << 64 | u128::from(life + 1);
            part.copy_from_slice(&number.to_le_bytes()[..part.len()]);
        }
        Ok(())
    };
    Service::new(SETTINGS, Box::new(dice))
}
