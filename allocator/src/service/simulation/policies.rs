//! Documents at work: limits, leases, hours, rules and waiting; one test for each story.

use std::time::Duration;

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{
    Allocation, AllocationState, ClientFacts, Create, EndReason, Event as Told, Renew,
};
use xpm_protocol::api::decision::{Decision, DecisionOutcome};
use xpm_protocol::api::policy::{Applied, Apply, PolicyFile, PolicyFormat};
use xpm_protocol::policy::{DocumentName, Kind};
use xpm_protocol::{ApplianceId, ByteSize, HostId, Name, Span};

use super::super::{Event, EventQuery, Outcome, Request};
use super::world::World;
use super::{MIB, attach, delete, detach};

/// A world with the documents of `text`.
pub(super) fn world(capacities: &[u64], text: &str) -> World {
    let mut world = World::new(capacities);
    let applied = apply(&mut world, text);
    assert_eq!(applied.problems, []);
    world
}

fn apply(world: &mut World, text: &str) -> Applied {
    let files = vec![PolicyFile { name: "pool".into(), format: PolicyFormat::Toml, text: text.into() }];
    match world.answer(Request::Apply(Apply { files, dry_run: false })).unwrap() {
        Outcome::Applied(applied) => applied,
        other => panic!("{other:?}"),
    }
}

pub(super) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub(super) fn asked(of: &str, mib: u64, account: &str) -> Create {
    let account = (!account.is_empty()).then(|| name(account));
    Create { account, region_len: Some(ByteSize(16 * MIB)), ..Create::new(name(of), ByteSize(mib * MIB)) }
}

pub(super) fn make(world: &mut World, create: Create) -> Result<Allocation, (ErrorKind, String)> {
    match world.answer(Request::Create(create)) {
        Ok(Outcome::Allocation(allocation)) => Ok(*allocation),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err((error.0, error.1)),
    }
}

pub(super) fn waiting(of: &str, mib: u64, account: &str) -> Create {
    Create { wait: Some(Span(Duration::from_secs(600))), ..asked(of, mib, account) }
}

pub(super) fn show(world: &mut World, of: &str) -> Option<Allocation> {
    match world.answer(Request::Allocation(name(of))) {
        Ok(Outcome::Allocation(allocation)) => Some(*allocation),
        _ => None,
    }
}

pub(super) fn state(world: &mut World, of: &str) -> Option<AllocationState> {
    show(world, of).map(|one| one.state)
}

fn dry_run(world: &mut World, create: Create) -> Decision {
    match world.answer(Request::Decide { create, all: true }).unwrap() {
        Outcome::Decision(decision) => *decision,
        other => panic!("{other:?}"),
    }
}

pub(super) fn kinds(world: &mut World) -> Vec<String> {
    match world.answer(Request::Events(EventQuery { after: Some(0), ..EventQuery::default() })).unwrap() {
        Outcome::Events(events) => {
            events.into_iter().map(|Told { kind, subject, .. }| format!("{kind} {subject}")).collect()
        }
        other => panic!("{other:?}"),
    }
}

/// Lets time pass in steps of a second, as ticks do.
pub(super) fn pass(world: &mut World, seconds: u64) {
    for _ in 0..seconds {
        world.now += Duration::from_secs(1);
        world.event(Event::Tick);
        world.finish();
        if world.now.as_secs().is_multiple_of(5) {
            world.pass(Duration::ZERO);
            world.finish();
        }
    }
}

pub(super) const TWO: &str = "
[[account]]
name = 'low'
priority = 10
reclaimable = true
hard-limit = '128MiB'
soft-limit = '64MiB'
[[account]]
name = 'high'
priority = 500
";

#[test]
fn limits_are_exact_when_many_ask_at_once() {
    let mut world = world(&[1024 * MIB; 2], TWO);
    let replies: Vec<_> =
        (0..20).map(|n| world.ask(Request::Create(asked(&format!("a{n}"), 16, "low")))).collect();
    world.finish();
    let made = replies.iter().filter(|reply| world.answers[reply].is_ok()).count();
    assert_eq!(made, 8);
    world.crash(true);
    world.finish();
    world.mend();
    assert_eq!(
        make(&mut world, asked("b", 16, "low")).unwrap_err().0,
        ErrorKind::Denied,
        "nor after a crash"
    );
    world.answer(delete("a0", false)).unwrap();
    let made = make(&mut world, asked("b", 16, "low")).unwrap();
    assert!(made.reclaimable && made.warnings[0].contains("soft limit"), "{made:?}");
    world.check();
}

#[test]
fn a_limit_says_how_much_is_left() {
    let mut world = world(&[1024 * MIB], TWO);
    make(&mut world, asked("a", 96, "low")).unwrap();
    let (kind, line) = make(&mut world, asked("b", 64, "low")).unwrap_err();
    assert!(kind == ErrorKind::Denied && line.contains("account low has 96MiB of at most 128MiB"), "{line}");
    assert!(
        line.contains("ask for at most 32MiB") && line.contains("raise its hard limit to 160MiB"),
        "{line}"
    );
    make(&mut world, asked("b", 32, "low")).unwrap();
}

#[test]
fn waiting_requests_are_served_by_priority() {
    let mut world = world(&[128 * MIB], TWO);
    make(&mut world, asked("full", 128, "")).unwrap();
    assert_eq!(make(&mut world, waiting("one", 64, "")).unwrap().state, AllocationState::Waiting);
    make(&mut world, waiting("two", 64, "")).unwrap();
    make(&mut world, waiting("first", 64, "high")).unwrap();
    let before = |world: &mut World, of: &str| show(world, of).unwrap().waiting.unwrap().before;
    assert_eq!(["first", "one", "two"].map(|of| before(&mut world, of)), [Some(0), Some(1), Some(2)]);
    assert_eq!(make(&mut world, asked("one", 16, "")).unwrap_err().0, ErrorKind::Conflict);
    world.answer(delete("full", false)).unwrap();
    pass(&mut world, 5);
    assert_eq!(state(&mut world, "first"), Some(AllocationState::Ready));
    assert_eq!(state(&mut world, "one"), Some(AllocationState::Ready));
    assert_eq!(state(&mut world, "two"), Some(AllocationState::Waiting));
    assert_eq!(before(&mut world, "two"), Some(0));
    world.answer(delete("two", false)).unwrap();
    assert_eq!(state(&mut world, "two"), None, "it was taken back");
    world.check();
}

#[test]
fn a_later_request_does_not_overtake() {
    let mut world = world(&[128 * MIB], TWO);
    make(&mut world, asked("a", 64, "")).unwrap();
    make(&mut world, waiting("large", 128, "high")).unwrap();
    let (kind, line) = make(&mut world, asked("small", 16, "")).unwrap_err();
    assert!(kind == ErrorKind::NoSpace && line.contains("held for a request that comes first"), "{line}");
    assert!(line.contains("wait for your turn"), "{line}");
    world.answer(delete("a", false)).unwrap();
    pass(&mut world, 5);
    assert_eq!(state(&mut world, "large"), Some(AllocationState::Ready));
    world.check();
}

#[test]
fn a_wait_ends() {
    let mut world = world(&[128 * MIB], TWO);
    make(&mut world, asked("a", 128, "")).unwrap();
    make(&mut world, waiting("b", 64, "")).unwrap();
    pass(&mut world, 605);
    let refused = show(&mut world, "b").unwrap();
    assert_eq!(refused.state, AllocationState::Refused);
    let why = refused.waiting.unwrap().why;
    assert!(why.contains("the time to wait is over") && why.contains("do not fit"), "{why}");
    assert_eq!(
        make(&mut world, asked("b", 64, "")).unwrap_err().0,
        ErrorKind::NoSpace,
        "the name is free again"
    );
    let (kind, _) = make(&mut world, waiting("never", 1024, "")).unwrap_err();
    assert_eq!(kind, ErrorKind::NoSpace, "what never fits does not wait");
    world.check();
}

#[test]
fn the_unimportant_give_way_with_notice() {
    let mut world = world(&[128 * MIB], TWO);
    make(&mut world, asked("used", 64, "low")).unwrap();
    world.answer(attach("used", 1, false)).unwrap();
    make(&mut world, Create { reclaimable: true, ..asked("idle", 32, "low") }).unwrap();
    make(&mut world, asked("kept", 32, "")).unwrap();
    make(&mut world, waiting("small", 32, "high")).unwrap();
    pass(&mut world, 2);
    let ending = show(&mut world, "idle").unwrap().ending.unwrap();
    assert_eq!(ending.reason, EndReason::Reclaim);
    assert!(ending.text.contains("`small`"), "{}", ending.text);
    assert_eq!(show(&mut world, "used").unwrap().ending, None, "what nobody uses goes first");
    assert_eq!(world.answer(attach("idle", 2, false)).unwrap_err().0, ErrorKind::Denied);
    pass(&mut world, 100);
    assert_eq!(state(&mut world, "idle"), Some(AllocationState::Ready), "not before its grace is over");
    pass(&mut world, 30);
    assert_eq!(state(&mut world, "small"), Some(AllocationState::Ready));
    assert_eq!(state(&mut world, "idle"), None);

    make(&mut world, waiting("more", 64, "high")).unwrap();
    pass(&mut world, 2);
    assert!(show(&mut world, "used").unwrap().ending.is_some(), "then what is used, of a lower priority");
    pass(&mut world, 130);
    assert_eq!(state(&mut world, "more"), Some(AllocationState::Ready));
    assert_eq!(
        state(&mut world, "kept"),
        Some(AllocationState::Ready),
        "nobody said that it may be reclaimed"
    );
    let kinds = kinds(&mut world);
    for kind in ["reclaim-notice idle", "freed idle", "reclaim-notice used", "freed used", "served more"] {
        assert!(kinds.contains(&kind.to_owned()), "{kind}: {kinds:?}");
    }
    world.check();
}

#[test]
fn a_victim_that_is_not_needed_stays() {
    let mut world = world(&[128 * MIB], TWO);
    make(&mut world, asked("victim", 64, "low")).unwrap();
    make(&mut world, asked("other", 64, "")).unwrap();
    make(&mut world, waiting("wish", 64, "high")).unwrap();
    pass(&mut world, 2);
    assert!(show(&mut world, "victim").unwrap().ending.is_some());
    world.answer(delete("other", false)).unwrap();
    pass(&mut world, 5);
    assert_eq!(state(&mut world, "wish"), Some(AllocationState::Ready));
    assert_eq!(show(&mut world, "victim").unwrap().ending, None);

    make(&mut world, waiting("wish2", 64, "high")).unwrap();
    pass(&mut world, 2);
    assert!(show(&mut world, "victim").unwrap().ending.is_some());
    world.crash(false);
    world.finish();
    // Up to ten seconds before the crash count as absence. In steps of a minute, each step would be late and move the
    // end.
    pass(&mut world, 140);
    world.mend();
    assert_eq!(
        state(&mut world, "victim"),
        Some(AllocationState::Ready),
        "nobody asked again after the restart"
    );
    assert_eq!(show(&mut world, "victim").unwrap().ending, None);
    world.check();
}

#[test]
fn a_lease_ends_in_steps() {
    let text = "[[account]]\nname = 'a'\nlease = { duration = '100s', warning = '20s', grace = '30s', total-max = '300s' }\n";
    let mut world = world(&[128 * MIB], text);
    make(&mut world, asked("x", 16, "a")).unwrap();
    world.answer(attach("x", 1, false)).unwrap();
    pass(&mut world, 79);
    assert_eq!(show(&mut world, "x").unwrap().ending, None);
    pass(&mut world, 2);
    let ending = show(&mut world, "x").unwrap().ending.unwrap();
    assert!(ending.reason == EndReason::Lease && ending.text.contains("xpm alloc renew x"), "{ending:?}");
    let renew = |world: &mut World, secs: Option<u64>| {
        let renew = Renew { duration: secs.map(|secs| Span(Duration::from_secs(secs))) };
        world.answer(Request::Renew { name: name("x"), renew })
    };
    renew(&mut world, None).unwrap();
    assert_eq!(show(&mut world, "x").unwrap().ending, None);
    let crash_and_pass = |world: &mut World, seconds| {
        world.crash(false);
        world.finish();
        world.pass(Duration::ZERO);
        pass(world, seconds);
    };
    crash_and_pass(&mut world, 99);
    // Up to ten seconds before the crash count as absence.
    pass(&mut world, 11);
    assert_eq!(world.answer(attach("x", 2, true)).unwrap_err().0, ErrorKind::Denied, "nobody new");
    assert!(world.answer(attach("x", 1, false)).is_ok(), "the owner may, to bring things to an end");
    pass(&mut world, 15);
    assert_eq!(state(&mut world, "x"), Some(AllocationState::Ready), "within its grace");
    renew(&mut world, Some(1000)).unwrap();
    // Short of 300 s in all, however much of the time before the crash counts as absence.
    pass(&mut world, 85);
    renew(&mut world, None).unwrap();
    assert!(
        show(&mut world, "x").unwrap().lease.unwrap().ends <= world.now.as_secs() + 30,
        "not beyond 300 s in all"
    );
    pass(&mut world, 31);
    assert_eq!(renew(&mut world, None).unwrap_err().0, ErrorKind::Denied);
    pass(&mut world, 35);
    assert_eq!(state(&mut world, "x"), None, "freed, although it was in use");
    let kinds = kinds(&mut world);
    for kind in ["lease-ended x", "renewed x", "lease-warning x", "freed x"] {
        assert!(kinds.contains(&kind.to_owned()), "{kind}: {kinds:?}");
    }
    world.check();
}

#[test]
fn hours_open_and_close() {
    // The simulation begins at 00:00 UTC on a Thursday.
    let text = "
[[account]]
name = 'night'
hours = [{ from = '00:00', to = '00:10' }]
at-close = 'end'
lease = { duration = '2h', warning = '60s', grace = '60s' }
[[account]]
name = 'day'
hours = [{ from = '00:05', to = '01:00' }]
";
    let mut world = world(&[128 * MIB], text);
    let (kind, line) = make(&mut world, asked("d", 16, "day")).unwrap_err();
    assert!(
        kind == ErrorKind::Denied && line.contains("ask again from Thu 1970-01-01 00:05 (UTC)"),
        "{line}"
    );
    make(&mut world, waiting("d", 16, "day")).unwrap();
    let made = make(&mut world, asked("n", 16, "night")).unwrap();
    assert_eq!(made.lease.unwrap().ends, 600, "with the hours, before the lease");
    pass(&mut world, 300);
    assert_eq!(state(&mut world, "d"), Some(AllocationState::Ready), "its hours came");
    pass(&mut world, 245);
    assert_eq!(show(&mut world, "n").unwrap().ending.unwrap().reason, EndReason::Hours);
    pass(&mut world, 60);
    assert_eq!(world.answer(attach("n", 1, false)).unwrap_err().0, ErrorKind::Denied);
    pass(&mut world, 60);
    assert_eq!(state(&mut world, "n"), None);
    assert_eq!(state(&mut world, "d"), Some(AllocationState::Ready));
    world.check();
}

#[test]
fn a_link_is_not_promised_twice() {
    let text = "
[[appliance]]
name = 'a1'
link-speed = '10Gbps'
[[appliance]]
name = 'a2'
link-speed = '1Gbps'
[[client]]
name = 'c'
own-link-speed = '6Gbps'
[[strategy]]
name = 'default'
[[strategy.rule]]
name = 'as-fast-as-the-client'
link-speed = 'client'
";
    let mut world = world(&[256 * MIB; 2], text);
    let (kind, line) = make(&mut world, asked("x", 16, "")).unwrap_err();
    assert!(kind == ErrorKind::Denied && line.contains("--client"), "{line}");
    let of = |of: &str| Create { client: Some(name("c")), ..asked(of, 16, "") };
    let made = make(&mut world, of("x")).unwrap();
    assert_eq!(made.regions[0].appliance, ApplianceId::from_u128(1));
    assert_eq!(made.link_speed.unwrap().to_string(), "6Gbps");
    let (kind, line) = make(&mut world, of("y")).unwrap_err();
    assert!(
        kind == ErrorKind::NoSpace && line.contains("a1 has 4Gbps of its link left, and 6Gbps is asked"),
        "{line}"
    );
    assert!(
        line.contains("a2 has a link of 1Gbps")
            && line.contains("set link-speed = \"4Gbps\" (now 6Gbps) in rule `as-fast-as-the-client`"),
        "{line}"
    );
    world.crash(false);
    world.mend();
    assert!(make(&mut world, of("y")).is_err(), "nor after a restart");
    world.answer(delete("x", false)).unwrap();
    make(&mut world, of("y")).unwrap();
    world.check();
}

#[test]
fn locality_is_by_labels_or_round_trips() {
    let text = "
[[appliance]]
name = 'a1'
labels = { site = 's', rack = 'r1' }
[[appliance]]
name = 'a2'
labels = { site = 's', rack = 'r2' }
[[client]]
name = 'c'
labels = { site = 's', rack = 'r2' }
[[strategy]]
name = 'rack'
[[strategy.rule]]
name = 'near'
locality = { within = 'rack' }
[[strategy]]
name = 'quick'
[[strategy.rule]]
name = 'near'
locality = { round-trip-max = '100us' }
";
    let mut world = world(&[256 * MIB; 2], text);
    let of = |of: &str, strategy: &str| Create {
        client: Some(name("c")),
        strategy: Some(name(strategy)),
        ..asked(of, 64, "")
    };
    let made = make(&mut world, of("x", "rack")).unwrap();
    assert!(made.regions.iter().all(|one| one.appliance == ApplianceId::from_u128(2)));
    assert!(make(&mut world, of("y", "quick")).unwrap_err().1.contains("no measured round trip"));
    let times = [(ApplianceId::from_u128(1), 90_000), (ApplianceId::from_u128(2), 200_000)];
    let facts =
        ClientFacts { host: HostId::from_u128(1), client: None, link_speed: None, round_trips: times.into() };
    world.answer(Request::HearClient { name: name("c"), facts }).unwrap();
    let made = make(&mut world, of("y", "quick")).unwrap();
    assert!(made.regions.iter().all(|one| one.appliance == ApplianceId::from_u128(1)));
}

#[test]
fn head_room_drain_and_shares_limit_placement() {
    let text = "
[[appliance]]
name = 'a1'
head-room = '50%'
[[appliance]]
name = 'a2'
drain = true
[[account]]
name = 'a'
[[strategy]]
name = 'default'
[[strategy.rule]]
name = 'fair'
when = { account = ['a'] }
limit = { appliance-share = '50%', size-max = '64MiB' }
";
    let mut world = world(&[128 * MIB; 3], text);
    make(&mut world, asked("x", 192, "")).unwrap();
    let (_, line) = make(&mut world, asked("y", 16, "")).unwrap_err();
    assert!(line.contains("a1 has 0B free") && line.contains("a2 is drained"), "{line}");
    world.answer(delete("x", false)).unwrap();
    let (kind, line) = make(&mut world, asked("z", 65, "a")).unwrap_err();
    assert!(kind == ErrorKind::Denied && line.contains("at most 64MiB at once"), "{line}");
    make(&mut world, asked("z", 64, "a")).unwrap();
    make(&mut world, asked("z2", 32, "a")).unwrap();
    let (_, line) = make(&mut world, asked("z3", 16, "a")).unwrap_err();
    assert!(line.contains("has given the account 64MiB of the 64MiB"), "{line}");
    make(&mut world, asked("free", 64, "")).unwrap();
    world.check();
}

#[test]
fn rules_lead_and_refuse() {
    let text = "
[[account]]
name = 'a'
strategy = 'first'
[[strategy]]
name = 'first'
[[strategy.rule]]
name = 'big'
when = { size-min = '100MiB' }
refuse = 'ask Anna'
[[strategy.rule]]
name = 'striped'
when = { labels = { kind = 'fast' } }
layout = { stripe = 2, stripe-unit = '128KiB' }
[[strategy.rule]]
name = 'rest'
use = 'second'
[[strategy]]
name = 'second'
[[strategy.rule]]
name = 'forbid'
forbid = [{ appliances = ['a1'] }]
";
    let mut world = world(&[256 * MIB; 3], text);
    let (kind, line) = make(&mut world, asked("x", 100, "a")).unwrap_err();
    assert!(kind == ErrorKind::Denied && line.contains("rule first/big refuses it: ask Anna"), "{line}");
    let fast = Create { labels: [(name("kind"), name("fast"))].into(), ..asked("x", 64, "a") };
    let made = make(&mut world, fast).unwrap();
    assert_eq!(made.layout.columns(), 2);
    assert!(made.regions.iter().all(|one| one.appliance != ApplianceId::from_u128(1)));
    let decision = dry_run(&mut world, asked("y", 16, "a"));
    let applied: Vec<&str> =
        decision.rules.iter().filter(|one| one.applies).map(|one| one.rule.as_str()).collect();
    assert_eq!(applied, ["rest", "forbid"]);
    assert_eq!(decision.documents.len(), 3);
    assert!(make(&mut world, asked("y", 16, "none")).unwrap_err().1.contains("there is no account `none`"));
    let strategy = Create { strategy: Some(name("none")), ..asked("y", 16, "") };
    assert!(make(&mut world, strategy).unwrap_err().1.contains("there is no strategy `none`"));
}

#[test]
fn a_dry_run_does_nothing_and_tells_the_same() {
    let mut world = world(&[128 * MIB; 2], TWO);
    let decision = dry_run(&mut world, asked("x", 64, "low"));
    assert!(matches!(decision.outcome, DecisionOutcome::Placed { regions: 4, appliances: 1, .. }));
    assert_eq!(state(&mut world, "x"), None);
    let refused = dry_run(&mut world, asked("x", 1024, ""));
    let DecisionOutcome::Refused { kind, remedies, .. } = refused.outcome else { panic!() };
    assert!(kind == ErrorKind::NoSpace && remedies[0] == "ask for at most 256MiB", "{remedies:?}");
    make(&mut world, asked("x", 64, "low")).unwrap();
    world.check();
}

#[test]
fn decisions_are_kept() {
    use crate::store::MetadataStore as _;
    let mut world = world(&[128 * MIB], TWO);
    make(&mut world, asked("x", 64, "low")).unwrap();
    make(&mut world, asked("x", 1024, "")).unwrap_err();
    world.answer(delete("x", false)).unwrap();
    make(&mut world, asked("y", 1024, "")).unwrap_err();
    let kept = world.durable.decisions().about(&name("x"), 10).unwrap();
    assert_eq!(kept.len(), 1, "the name was taken: nothing was decided the second time");
    assert!(kept[0].allocation.is_some() && kept[0].documents[0].version == 1);
    assert!(matches!(
        world.durable.decisions().about(&name("y"), 10).unwrap()[0].outcome,
        DecisionOutcome::Refused { .. }
    ));
    pass(&mut world, 3600);
    world.now += Duration::from_secs(7 * 86_400);
    pass(&mut world, 2);
    assert_eq!(world.durable.decisions().about(&name("x"), 10).unwrap(), [], "after their time");
}

#[test]
fn documents_in_use_stay() {
    let mut world = world(&[128 * MIB], TWO);
    make(&mut world, asked("x", 64, "low")).unwrap();
    let remove = |world: &mut World, of: &str| {
        let name = DocumentName { kind: Kind::Account, name: name(of) };
        world.answer(Request::RemoveDocument { name, version: None }).map_err(|error| error.0)
    };
    assert_eq!(remove(&mut world, "low").unwrap_err(), ErrorKind::InUse);
    let below = apply(&mut world, "[[account]]\nname = 'low'\nhard-limit = '32MiB'\n");
    assert!(below.problems[0].text.contains("has 64MiB already"), "{below:?}");
    world.answer(delete("x", false)).unwrap();
    remove(&mut world, "low").unwrap();
    world.crash(false);
    world.mend();
    assert_eq!(remove(&mut world, "low").unwrap_err(), ErrorKind::NotFound, "durable");
    remove(&mut world, "high").unwrap();
    world.check();
}

#[test]
fn an_allocation_without_owner_is_idle() {
    let mut world = world(&[128 * MIB], TWO);
    make(&mut world, asked("a", 64, "low")).unwrap();
    make(&mut world, asked("b", 64, "low")).unwrap();
    world.answer(attach("a", 1, false)).unwrap();
    pass(&mut world, 10);
    world.answer(detach("a", 1)).unwrap();
    make(&mut world, waiting("wish", 64, "high")).unwrap();
    pass(&mut world, 2);
    assert!(show(&mut world, "b").unwrap().ending.is_some(), "it is idle for longer");
    assert!(show(&mut world, "a").unwrap().ending.is_none());
}

#[test]
fn a_request_that_waits_for_a_limit_keeps_no_memory() {
    let mut world = world(&[1024 * MIB], TWO);
    make(&mut world, asked("a", 128, "low")).unwrap();
    make(&mut world, waiting("over", 64, "low")).unwrap();
    pass(&mut world, 3);
    assert_eq!(state(&mut world, "over"), Some(AllocationState::Waiting));
    make(&mut world, Create { account: None, ..asked("other", 512, "") }).unwrap();
    world.answer(delete("a", false)).unwrap();
    pass(&mut world, 5);
    assert_eq!(state(&mut world, "over"), Some(AllocationState::Ready));
    world.check();
}

#[test]
fn a_long_queue_is_served_in_turn() {
    let mut world = world(&[128 * MIB; 2], TWO);
    make(&mut world, asked("full", 256, "")).unwrap();
    for number in 0..60 {
        make(&mut world, waiting(&format!("w{number}"), 16, "")).unwrap();
    }
    world.answer(delete("full", false)).unwrap();
    pass(&mut world, 30);
    let ready =
        (0..60).filter(|number| state(&mut world, &format!("w{number}")) == Some(AllocationState::Ready));
    assert_eq!(ready.collect::<Vec<_>>(), (0..16).collect::<Vec<_>>(), "those that came first");
    world.check();
}
