//! Random scripts of all requests and faults; at the end each allocation is whole or undone.

use std::time::Duration;

use proptest::prelude::*;
use xpm_protocol::api::allocator::{Create, Drain, Rebalance, Renew, Report, Resize, Transfer};
use xpm_protocol::{ByteSize, ClientId, Span};

use super::super::{Event, Request};
use super::world::{Fate, World};
use super::{MIB, attach, create, delete, detach};

#[derive(Debug, Clone)]
enum Move {
    Create(u8, u64, u32, u8, bool),
    Renew(u8),
    Tick(u64),
    Attach(u8, u8, bool),
    Detach(u8, u8),
    Delete(u8, bool),
    Steps(Vec<(usize, u8)>),
    Pass(u64),
    Arrive(usize),
    Away(u8, bool),
    Crash(bool),
    Resize(u8, u64),
    Transfer(u8, u8, bool),
    /// A report of an owner; it may not fit the present state.
    Report(u8, u8, u64, u8),
    Drain(u8, bool),
    Rebalance,
}

fn moves() -> impl Strategy<Value = Move> {
    prop_oneof![
        4 => (0..4_u8, 1..200_u64, 1..4_u32, 0..4_u8, any::<bool>())
            .prop_map(|(name, mib, stripe, account, wait)| Move::Create(name, mib, stripe, account, wait)),
        1 => (0..4_u8).prop_map(Move::Renew),
        3 => (0..200_u64).prop_map(Move::Tick),
        3 => (0..4_u8, 0..3_u8, any::<bool>()).prop_map(|(name, client, force)| Move::Attach(name, client, force)),
        1 => (0..4_u8, 0..3_u8).prop_map(|(name, client)| Move::Detach(name, client)),
        2 => (0..4_u8, any::<bool>()).prop_map(|(name, force)| Move::Delete(name, force)),
        8 => prop::collection::vec((any::<usize>(), any::<u8>()), 1..20).prop_map(Move::Steps),
        2 => (0..90_u64).prop_map(Move::Pass),
        3 => any::<usize>().prop_map(Move::Arrive),
        1 => (0..3_u8, any::<bool>()).prop_map(|(one, away)| Move::Away(one, away)),
        1 => any::<bool>().prop_map(Move::Crash),
        3 => (0..4_u8, 1..200_u64).prop_map(|(name, mib)| Move::Resize(name, mib)),
        1 => (0..4_u8, 0..3_u8, any::<bool>()).prop_map(|(name, to, force)| Move::Transfer(name, to, force)),
        4 => (0..4_u8, 0..3_u8, 1..4_u64, 0..9_u8)
            .prop_map(|(name, client, number, what)| Move::Report(name, client, number, what)),
        1 => (0..3_u8, any::<bool>()).prop_map(|(one, begins)| Move::Drain(one, begins)),
        1 => Just(Move::Rebalance),
    ]
}

impl World {
    fn make(&mut self, made: Move) {
        let name = |name: u8| format!("v{name}");
        match made {
            Move::Create(of, mib, stripe, account, wait) => {
                let Request::Create(plain) = create(&name(of), mib, Some(stripe)) else { return };
                let account =
                    ["low", "high", "leased"].get(usize::from(account)).map(|name| name.parse().unwrap());
                let wait = wait.then_some(Span(Duration::from_secs(300)));
                self.ask(Request::Create(Create { account, wait, ..plain }));
            }
            Move::Renew(of) => {
                let name = name(of).parse().unwrap();
                self.ask(Request::Renew { name, renew: Renew::default() });
            }
            Move::Tick(seconds) => {
                self.now += Duration::from_secs(seconds);
                self.event(Event::Tick);
            }
            Move::Attach(of, client, force) => drop(self.ask(attach(&name(of), client.into(), force))),
            Move::Detach(of, client) => drop(self.ask(detach(&name(of), client.into()))),
            Move::Delete(of, force) => drop(self.ask(delete(&name(of), force))),
            Move::Steps(steps) => {
                steps.into_iter().for_each(|(choice, fate)| self.step(choice, fate_of(fate)));
            }
            Move::Resize(of, mib) => {
                let (name, size) = (name(of).parse().unwrap(), ByteSize(mib * MIB));
                self.ask(Request::Resize { name, resize: Resize { size } });
            }
            Move::Transfer(of, to, force) => {
                let to = ClientId::from_u128(to.into()).to_string();
                let deadline = Some(Span(Duration::from_secs(20)));
                let name = name(of).parse().unwrap();
                self.ask(Request::Transfer { name, transfer: Transfer { to, deadline, force, lose: false } });
            }
            Move::Report(of, client, number, what) => {
                let (name, client) = (name(of).parse().unwrap(), ClientId::from_u128(client.into()));
                self.ask(match report(number, what) {
                    Some(report) => Request::Report { name, client, report },
                    None => Request::Orders { name, client, known: None },
                });
            }
            Move::Drain(one, begins) => {
                let Some(id) = self.appliances.keys().nth(one.into()).copied() else { return };
                self.ask(match begins {
                    true => Request::Drain { id, drain: Drain::default() },
                    false => Request::EndDrain(id),
                });
            }
            Move::Rebalance => drop(self.ask(Request::Rebalance(Rebalance::default()))),
            Move::Pass(seconds) => self.pass(Duration::from_secs(seconds)),
            Move::Arrive(choice) => self.arrive(choice),
            Move::Crash(arriving) => self.crash(arriving),
            Move::Away(one, away) => {
                if let Some(one) = self.appliances.values_mut().nth(one.into()) {
                    one.away = away;
                }
            }
        }
    }
}

fn report(number: u64, what: u8) -> Option<Report> {
    let why = "it is in use".to_owned();
    Some(match what {
        0 => Report::Copied { number, bytes: number << 20 },
        1 | 2 => Report::Ready { number },
        3 | 4 => Report::Done { number, how: None },
        5 => Report::Refused { number, why },
        6 => Report::HandedOver,
        7 => Report::Kept { why },
        _ => return None,
    })
}

fn fate_of(number: u8) -> Fate {
    match number % 16 {
        0 => Fate::NeverArrives,
        1 => Fate::AnswerIsLost,
        2 => Fate::Refused,
        3 => Fate::ArrivesLate,
        _ => Fate::Works,
    }
}

const DOCUMENTS: &str = "
[[account]]
name = 'low'
priority = 10
reclaimable = true
hard-limit = '128MiB'
soft-limit = '64MiB'
link-speed = '1Gbps'
[[account]]
name = 'high'
priority = 500
hard-limit = '256MiB'
[[account]]
name = 'leased'
lease = { duration = '100s', warning = '20s', grace = '30s' }
[[appliance]]
name = 'a1'
link-speed = '3Gbps'
[[appliance]]
name = 'a2'
link-speed = '1Gbps'
[[appliance]]
name = 'a3'
head-room = '20%'
";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn each_allocation_is_whole_or_undone(script in prop::collection::vec(moves(), 1..60)) {
        let mut world = super::policies::world(&[160 * MIB, 96 * MIB, 224 * MIB], DOCUMENTS);
        script.into_iter().for_each(|made| world.make(made));
        world.mend();
        world.check();
    }
}
