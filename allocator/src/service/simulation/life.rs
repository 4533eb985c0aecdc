//! Random scripts around one allocation that is resized, moved and handed over while two clients use it. Owners carry
//! changes out as xpm-blk does, and regions have contents, so that the test can check that written data are still
//! there.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use xpm_protocol::api::allocator::{
    ChangeKind, Drain, Map, MapChange, Orders, Rebalance, RegionSlot, Report, Resize, Transfer,
};
use xpm_protocol::{ByteSize, ClientId, Name, RegionId, Span};

use super::super::{Event, Outcome, ReplyTo, Request};
use super::world::{Fate, World};
use super::{MIB, attach, create, detach};
use crate::store::AllocationRecord;
use crate::store::MetadataStore as _;
use crate::store::record::{Phase, Stage};

const REGION: u64 = 16 * MIB;

#[derive(Debug, Clone)]
enum Move {
    Resize(u64),
    Drain(u8, bool),
    Rebalance,
    Transfer(u8, bool),
    Attach(u8, bool),
    Detach(u8),
    /// A client asks for its orders and carries them out, one step at a time.
    Owner(u8),
    /// A client restarts and forgets what it was doing.
    Restart(u8),
    Write(u8, u8, bool),
    Steps(Vec<(usize, u8)>),
    /// All pending effects are carried out without a fault.
    Finish,
    Tick(u64),
    Pass(u64),
    Arrive(usize),
    Away(u8, bool),
    Crash(bool),
    /// The metadata are lost, and recovered from the appliances and clients.
    LoseDisk,
}

fn moves() -> impl Strategy<Value = Move> {
    prop_oneof![
        4 => (1..9_u64).prop_map(Move::Resize),
        2 => (0..3_u8, prop::bool::weighted(0.7)).prop_map(|(one, begins)| Move::Drain(one, begins)),
        1 => Just(Move::Rebalance),
        1 => (0..2_u8, any::<bool>()).prop_map(|(to, force)| Move::Transfer(to, force)),
        2 => (0..2_u8, any::<bool>()).prop_map(|(client, force)| Move::Attach(client, force)),
        1 => (1..2_u8).prop_map(Move::Detach),
        24 => prop::bool::weighted(0.25).prop_map(|client| Move::Owner(client.into())),
        1 => (0..2_u8).prop_map(Move::Restart),
        10 => (0..2_u8, 0..8_u8, prop::bool::weighted(0.4))
            .prop_map(|(client, region, zeros)| Move::Write(client, region, zeros)),
        8 => prop::collection::vec((any::<usize>(), any::<u8>()), 1..24).prop_map(Move::Steps),
        12 => Just(Move::Finish),
        2 => (0..40_u64).prop_map(Move::Tick),
        1 => (0..90_u64).prop_map(Move::Pass),
        1 => any::<usize>().prop_map(Move::Arrive),
        1 => (0..3_u8, prop::bool::weighted(0.3)).prop_map(|(one, away)| Move::Away(one, away)),
        1 => any::<bool>().prop_map(Move::Crash),
        1 => Just(Move::LoseDisk),
    ]
}

/// A client that owns the allocation, or believes so.
#[derive(Default)]
struct Owner {
    map: Option<Map>,
    change: Option<MapChange>,
    /// All regions are copied, and writes go to both places.
    mirrored: bool,
    /// An answer that it waits for.
    asked: Option<ReplyTo>,
}

struct Life {
    world: World,
    owners: [Owner; 2],
    /// Stamp of the last write to each region that was reported as done.
    written: BTreeMap<u32, u64>,
    stamp: u64,
    /// Changes that an owner carried out to the end.
    seen_through: u32,
    lost_disk: bool,
}

fn name() -> Name {
    "v".parse().unwrap()
}

impl Life {
    fn new() -> Life {
        let mut world = World::new(&[160 * MIB, 96 * MIB, 224 * MIB]);
        world.answer(create("v", 48, Some(1))).unwrap();
        let mut life = Life {
            world,
            owners: Default::default(),
            written: BTreeMap::new(),
            stamp: 0,
            seen_through: 0,
            lost_disk: false,
        };
        life.ask_of(0, attach("v", 0, false));
        life.world.finish();
        life.hear(0);
        life
    }

    fn ask_of(&mut self, client: usize, request: Request) {
        self.owners[client].asked = Some(self.world.ask(request));
    }

    fn act(&mut self, made: Move) {
        match made {
            Move::Resize(regions) => {
                let resize = Resize { size: ByteSize(regions * REGION) };
                self.world.ask(Request::Resize { name: name(), resize });
            }
            Move::Drain(one, begins) => {
                let Some(id) = self.world.appliances.keys().nth(one.into()).copied() else { return };
                self.world.ask(match begins {
                    true => Request::Drain { id, drain: Drain::default() },
                    false => Request::EndDrain(id),
                });
            }
            Move::Rebalance => drop(self.world.ask(Request::Rebalance(Rebalance::default()))),
            Move::Transfer(to, force) => {
                let to = ClientId::from_u128(to.into()).to_string();
                let deadline = Some(Span(Duration::from_secs(20)));
                self.world.ask(Request::Transfer {
                    name: name(),
                    transfer: Transfer { to, deadline, force, lose: false },
                });
            }
            Move::Attach(client, force) => self.ask_of(client.into(), attach("v", client.into(), force)),
            Move::Detach(client) => {
                self.owners[usize::from(client)] = Owner::default();
                self.world.ask(detach("v", client.into()));
            }
            Move::Owner(client) => self.owner(client.into()),
            Move::Restart(client) => {
                self.owners[usize::from(client)] = Owner::default();
                let owned = self.durable().is_some_and(|record| {
                    record.owner.is_some_and(|owner| owner.client == ClientId::from_u128(client.into()))
                });
                if owned {
                    self.ask_of(client.into(), attach("v", client.into(), false));
                }
            }
            Move::Write(client, region, zeros) => self.write(client.into(), region.into(), zeros),
            Move::Steps(steps) => {
                for (choice, fate) in steps {
                    let fate = match fate % 24 {
                        0 => Fate::NeverArrives,
                        1 => Fate::AnswerIsLost,
                        2 => Fate::Refused,
                        3 => Fate::ArrivesLate,
                        _ => Fate::Works,
                    };
                    self.world.step(choice, fate);
                }
            }
            Move::Finish => self.world.finish(),
            Move::Tick(seconds) => {
                self.world.now += Duration::from_secs(seconds);
                self.world.event(Event::Tick);
            }
            Move::Pass(seconds) => self.world.pass(Duration::from_secs(seconds)),
            Move::Arrive(choice) => self.world.arrive(choice),
            Move::Away(one, away) => {
                if let Some(one) = self.world.appliances.values_mut().nth(one.into()) {
                    one.away = away;
                }
            }
            Move::LoseDisk => self.lose_disk(),
            Move::Crash(arriving) => {
                self.world.crash(arriving);
                // Clients that waited for an answer ask again.
                self.owners.iter_mut().for_each(|owner| owner.asked = None);
            }
        }
    }

    /// Loses the disk. A record that is complete at the appliances must be recovered from them alone; the maps of
    /// clients are needed only for a step under way.
    fn lose_disk(&mut self) {
        let record = self.durable().expect("nothing deletes it");
        let knows = |client: usize| {
            let map = self.owners[client].map.as_ref()?;
            Some((ClientId::from_u128(client as u128), map.clone()))
        };
        let clients: Vec<(ClientId, Map)> = (0..2).filter_map(knows).collect();
        let owner = record.owner.as_ref().map(|owner| owner.client);
        let current = |map: &Map| {
            map.epoch == record.epoch && (map.version == record.version || record.change.is_some())
        };
        let has = |owner| clients.iter().any(|(id, map)| *id == owner && current(map));
        // A record that no appliance was told of, and whose map no client has, is lost with the disk.
        if !owner.is_some_and(has) && !self.world.is_told(&record) {
            return;
        }
        self.world.lose_disk(clients);
        self.owners.iter_mut().for_each(|owner| owner.asked = None);
        let recovered = self.durable().expect("it is found");
        let same = |one: &AllocationRecord| (one.id, one.layout, one.region_len, one.terms.clone());
        assert_eq!(same(&record), same(&recovered));
        assert!(recovered.epoch >= record.epoch, "no epoch is used a second time");
        let after = recovered.owner.map(|owner| owner.client);
        let raised = record.next.is_some();
        assert!(owner.is_none() || raised || after == owner, "{owner:?} uses it, and {after:?} is to");
        self.lost_disk = true;
    }

    fn durable(&mut self) -> Option<AllocationRecord> {
        let loaded = self.world.durable.load().unwrap();
        loaded.allocations.into_iter().find(|record| record.phase == Phase::Ready)
    }

    /// Handles an answer that has come, or takes the next step.
    fn owner(&mut self, client: usize) {
        if self.owners[client].asked.is_some() {
            self.hear(client);
        }
        if self.owners[client].asked.is_some() {
            return;
        }
        let id = ClientId::from_u128(client as u128);
        let said = |report| Request::Report { name: name(), client: id, report };
        let owner = &self.owners[client];
        let request = match &owner.change {
            Some(change) if change.switched => said(Report::Done { number: change.number, how: None }),
            Some(change) if owner.mirrored => said(Report::Ready { number: change.number }),
            Some(change) => {
                let change = change.clone();
                match self.copy(client, &change) {
                    Ok(()) => self.owners[client].mirrored = true,
                    Err(why) => {
                        self.owners[client].change = None;
                        self.ask_of(client, said(Report::Refused { number: change.number, why }));
                    }
                }
                return;
            }
            None => Request::Orders { name: name(), client: id, known: None },
        };
        self.ask_of(client, request);
    }

    fn hear(&mut self, client: usize) {
        let Some(asked) = self.owners[client].asked else { return };
        let Some(answer) = self.world.answers.remove(&asked) else { return };
        let owner = &mut self.owners[client];
        owner.asked = None;
        match answer {
            Ok(Outcome::Owned(owned)) => {
                *owner = Owner { map: Some(owned.map), ..Owner::default() };
            }
            Ok(Outcome::Orders(orders)) => self.obey(client, *orders),
            _ => {}
        }
    }

    fn obey(&mut self, client: usize, orders: Orders) {
        let owner = &mut self.owners[client];
        match orders.change {
            Some(change) if owner.map.is_some() => {
                if change.switched {
                    owner.map = Some(change.next.clone());
                }
                if owner.change.as_ref().is_some_and(|known| known.number != change.number) {
                    owner.mirrored = false;
                }
                owner.change = Some(change);
            }
            _ => {
                let done = owner.change.take().is_some_and(|change| change.switched);
                self.seen_through += u32::from(done);
                owner.mirrored = false;
                let old = owner.map.as_ref().is_some_and(|map| map.version != orders.version);
                if old && orders.hand_over.is_none() {
                    self.ask_of(client, attach("v", client as u128, false));
                }
            }
        }
        if orders.hand_over.is_some() {
            // It writes back, forgets its map, and reports that.
            self.owners[client] = Owner::default();
            let id = ClientId::from_u128(client as u128);
            self.ask_of(client, Request::Report { name: name(), client: id, report: Report::HandedOver });
        }
    }

    /// The region at a place of a map, if the appliance accepts the map's key now.
    fn place(&self, map: &Map, slot: RegionSlot) -> Option<(xpm_protocol::ApplianceId, RegionId)> {
        let grant = &map.grants[slot.grant as usize];
        let appliance = self.world.appliances.get(&grant.appliance).filter(|one| !one.away)?;
        let held = appliance.grants.get(&grant.id).filter(|held| held.key == grant.key)?;
        Some((grant.appliance, held.regions[slot.slot as usize]))
    }

    fn content(&self, (appliance, region): (xpm_protocol::ApplianceId, RegionId)) -> u64 {
        self.world.appliances[&appliance].regions[&region].content
    }

    fn set(&mut self, (appliance, region): (xpm_protocol::ApplianceId, RegionId), content: u64) {
        let held = self.world.appliances.get_mut(&appliance).unwrap().regions.get_mut(&region);
        held.unwrap().content = content;
    }

    /// Copies the regions that move, and checks that regions to be removed are unused.
    fn copy(&mut self, client: usize, change: &MapChange) -> Result<(), String> {
        let now = self.owners[client].map.clone().ok_or("no map")?;
        for &region in &change.moved {
            let region = region as usize;
            // A client that was cut off without hearing of it may have an outdated map.
            let from = *now.regions.get(region).ok_or("not in its map")?;
            let from = self.place(&now, from).ok_or("out of reach")?;
            let to = self.place(&change.next, change.next.regions[region]).ok_or("out of reach")?;
            let content = self.content(from);
            self.set(to, content);
        }
        if change.kind == ChangeKind::Shrink {
            for slot in now.regions.get(change.next.regions.len()..).ok_or("not in its map")? {
                let place = self.place(&now, *slot).ok_or("out of reach")?;
                if self.content(place) != 0 {
                    return Err("in use".into());
                }
            }
        }
        Ok(())
    }

    /// A write is reported as done only once it is at every place where it has to be.
    fn write(&mut self, client: usize, region: u32, zeros: bool) {
        let owner = &self.owners[client];
        let Some(map) = &owner.map else { return };
        let region = region % map.regions.len() as u32;
        let mut maps = vec![map];
        let mirrored = owner.change.as_ref().filter(|change| owner.mirrored && !change.switched);
        let shrinks = mirrored.is_some_and(|change| region as usize >= change.next.regions.len());
        maps.extend(mirrored.map(|change| &change.next));
        if shrinks {
            return;
        }
        let places: Option<Vec<_>> =
            maps.iter().map(|map| self.place(map, map.regions[region as usize])).collect();
        let Some(places) = places else { return };
        let epoch = map.epoch;
        self.stamp += 1;
        let content = if zeros { 0 } else { self.stamp };
        places.into_iter().for_each(|place| self.set(place, content));
        // A client that was cut off may still reach a region that was given up; the region's content then counts for
        // nothing.
        let counts =
            |record: AllocationRecord| record.epoch == epoch || (region as usize) < record.slots.len();
        if self.durable().is_some_and(counts) {
            self.written.insert(region, content);
        }
    }

    /// The last write of each region is where the record says.
    fn check(&mut self) {
        let record = self.durable().expect("nothing deletes it");
        for (region, slot) in (0..).zip(&record.slots) {
            let grant = &record.grants[slot.grant as usize];
            let place = (grant.appliance, grant.regions[slot.slot as usize]);
            let written = self.written.get(&region).copied().unwrap_or(0);
            assert_eq!(self.content(place), written, "region {region}");
        }
        for (region, written) in self.written.range(record.slots.len() as u32..) {
            assert_eq!(*written, 0, "region {region} is gone with what was in it");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_written_data_are_lost(script in prop::collection::vec(moves(), 20..160)) {
        let mut life = Life::new();
        for made in script {
            life.act(made);
            life.check();
        }
        life.world.mend();
        if life.lost_disk {
            // Memory that was given up and forgotten is garbage by now.
            (0..12).for_each(|_| life.world.mend());
        }
        life.check();
        life.world.check();
        let open = life.durable().and_then(|record| record.change).map(|change| change.stage);
        prop_assert_ne!(open, Some(Stage::Preparing), "it ends one way or the other");
    }
}
