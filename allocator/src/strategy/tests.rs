//! Tests of decisions: examples, and properties over random pools and demands.

use std::collections::HashMap;

use proptest::prelude::*;
use xpm_protocol::api::appliance::Medium;
use xpm_protocol::api::decision::{ApplianceTrace, Rejection, Verdict};
use xpm_protocol::policy::{Labels, Selector};
use xpm_protocol::units::{PAGE_LEN, REGION_LEN_DEFAULT, REGION_LEN_MIN, is_region_len};

use super::*;

const MIB: u64 = 1 << 20;
const NOW: Duration = Duration::from_secs(100);
const GBPS: u64 = 1_000_000_000;

fn candidate(number: u128, free: u64) -> Candidate {
    Candidate {
        id: ApplianceId::from_u128(number),
        name: format!("a{number}").parse().unwrap(),
        up_until: NOW,
        free,
        capacity: free.max(1 << 40),
        clearing: 0,
        drain: false,
        labels: Labels::new(),
        medium: Medium::Memory,
        rdma: false,
        link_speed: None,
        link_promised: LinkSpeed(0),
        idle: 1000,
        health: 1000,
        since: 0,
        ramp_up: 0,
    }
}

fn demand(size: u64, columns: u32) -> Demand {
    Demand { size, columns, unit: 0, region_len: None, seed: 7, home: Vec::new(), needs: Needs::default() }
}

/// Owner of all that a snapshot borrows.
#[derive(Default)]
struct Stage {
    pool: Pool,
    failed: Vec<ApplianceId>,
    held: HashSet<ApplianceId>,
    numbers: HashMap<ApplianceId, u64>,
    kept: HashMap<ApplianceId, u64>,
}

impl Stage {
    fn new(candidates: &[Candidate]) -> Stage {
        let mut stage = Stage::default();
        candidates.iter().cloned().for_each(|one| stage.pool.put(one));
        stage
    }

    fn snapshot(&self) -> Snapshot<'_> {
        Snapshot {
            pool: &self.pool,
            now: NOW,
            unix: 1_000_000,
            failed: &self.failed,
            held: &self.held,
            of_account: &self.numbers,
            round_trips: &self.numbers,
            with_clearing: false,
            given_back: &self.numbers,
            kept: &self.kept,
        }
    }
}

fn place(candidates: &[Candidate], demand: &Demand) -> Result<Placement, NoPlace> {
    decide(&Stage::new(candidates).snapshot(), demand).placement
}

fn count(placement: &Placement) -> HashMap<ApplianceId, u64> {
    placement.regions.iter().fold(HashMap::new(), |mut counts, &id| {
        *counts.entry(id).or_default() += 1;
        counts
    })
}

fn labels(text: &str) -> Labels {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=').unwrap();
        (key.parse().unwrap(), value.parse().unwrap())
    };
    text.split(' ').filter(|pair| !pair.is_empty()).map(pair).collect()
}

fn traces(stage: &Stage, demand: &Demand) -> Vec<ApplianceTrace> {
    let decided = decide(&stage.snapshot(), demand);
    trace::appliances(&stage.snapshot(), demand, &decided, true).0
}

/// The reason why each rejected appliance cannot serve, by name.
fn reasons(stage: &Stage, demand: &Demand) -> HashMap<String, String> {
    let said = |one: ApplianceTrace| match one.verdict {
        Verdict::Rejected(rejection) => Some((one.name.to_string(), rejection.to_string())),
        Verdict::Scored { .. } => None,
    };
    traces(stage, demand).into_iter().filter_map(said).collect()
}

#[test]
fn region_lengths_follow_the_rules() {
    for (size, columns, expected) in [
        (1024 * MIB, 1, 256 * MIB),
        (256 * MIB, 1, 256 * MIB),
        (64 * MIB, 1, 64 * MIB),
        (PAGE_LEN, 1, 16 * MIB),
        (1024 * MIB, 3, 128 * MIB),
        (100 * MIB, 1, 16 * MIB),
        (64 * MIB, 4, 16 * MIB),
    ] {
        let preferred = size::lengths(&demand(size, columns)).unwrap()[0];
        assert_eq!(preferred, expected, "{size} over {columns}");
    }
    let huge = size::lengths(&demand(16 << 40, 1)).unwrap();
    assert_eq!(huge[0], 1 << 30, "longer than the default where there would be too many");
    assert_eq!(size::lengths(&demand(u64::MAX / PAGE_LEN * PAGE_LEN, 1)), None);
    let asked = Demand { region_len: Some(16 * MIB), ..demand(1 << 40, 1) };
    assert_eq!(size::lengths(&asked), None, "too many of the length that was asked for");
}

#[test]
fn the_appliance_with_most_free_memory_is_first() {
    let snapshot = [candidate(1, 512 * MIB), candidate(2, 2048 * MIB), candidate(3, 1024 * MIB)];
    let placement = place(&snapshot, &demand(256 * MIB, 1)).unwrap();
    assert_eq!(placement.regions, [ApplianceId::from_u128(2)]);
}

#[test]
fn a_linear_allocation_lies_on_one_appliance_that_holds_it() {
    let two = [candidate(1, 1024 * MIB), candidate(2, 1000 * MIB), candidate(3, 512 * MIB)];
    let on = |demand: &Demand| count(&place(&two, demand).unwrap());
    assert_eq!(on(&demand(1024 * MIB, 1)), HashMap::from([(ApplianceId::from_u128(1), 4)]));
    let home = Demand { home: vec![ApplianceId::from_u128(3)], ..demand(512 * MIB, 1) };
    assert_eq!(
        on(&home).into_keys().collect::<Vec<_>>(),
        [ApplianceId::from_u128(3)],
        "where it lies already"
    );
    assert_eq!(on(&demand(1792 * MIB, 1)).len(), 2, "no more appliances than are needed");
    let mut spread = demand(1024 * MIB, 1);
    spread.needs.spread = true;
    assert!(on(&spread).len() > 1, "a rule says otherwise");
}

#[test]
fn regions_are_shorter_if_long_ones_do_not_fit() {
    let snapshot = [candidate(1, 130 * MIB), candidate(2, 130 * MIB)];
    let placement = place(&snapshot, &demand(256 * MIB, 1)).unwrap();
    assert_eq!(placement.region_len, 128 * MIB);
}

#[test]
fn regions_are_shorter_if_long_ones_exceed_a_limit() {
    let mut demand = demand(100 * MIB, 3);
    demand.needs.taken_max = Some(144 * MIB);
    assert_eq!(place(&[candidate(1, 1 << 40)], &demand).unwrap().regions.len(), 9, "of 16 MiB");
    demand.needs.taken_max = Some(128 * MIB);
    let refused = place(&[candidate(1, 1 << 40)], &demand).unwrap_err();
    assert_eq!(refused, NoPlace::Limit { takes: 144 * MIB, left: 128 * MIB });
}

#[test]
fn every_reason_is_reported() {
    let big = 1 << 40;
    let on = |number, text: &str| Candidate { labels: labels(text), ..candidate(number, big) };
    let candidates = [
        Candidate { up_until: Duration::ZERO, ..candidate(1, big) },
        Candidate { drain: true, ..candidate(2, big) },
        Candidate { link_speed: Some(LinkSpeed(10 * GBPS)), ..on(3, "site=s rack=r") },
        on(4, "disk=slow site=s"),
        on(5, "room=wet site=s"),
        on(6, "site=other"),
        Candidate { link_speed: Some(LinkSpeed(GBPS)), ..on(7, "site=s rack=r") },
        Candidate {
            link_speed: Some(LinkSpeed(10 * GBPS)),
            link_promised: LinkSpeed(7 * GBPS),
            ..on(8, "site=s rack=r")
        },
        Candidate { link_speed: Some(LinkSpeed(10 * GBPS)), free: 8 * MIB, ..on(9, "site=s rack=r") },
        Candidate { link_speed: Some(LinkSpeed(10 * GBPS)), ..on(10, "site=s rack=r") },
        Candidate { link_speed: Some(LinkSpeed(10 * GBPS)), ..on(11, "site=s rack=r") },
        on(12, "site=s rack=other"),
    ];
    let mut stage = Stage::new(&candidates);
    stage.failed.push(ApplianceId::from_u128(3));
    stage.held.insert(ApplianceId::from_u128(10));
    let mut demand = demand(256 * MIB, 1);
    let select = |text: &str| Selector { labels: labels(text), ..Selector::default() };
    demand.needs = Needs {
        require: vec![("s/site".into(), select("site=s"))],
        forbid: vec![("s/wet".into(), select("room=wet")), ("s/slow".into(), select("disk=slow"))],
        link_speed: Some(LinkSpeed(4 * GBPS)),
        within: Some(Level::Rack),
        position: stage.pool.position(&labels("site=s rack=r")),
        ..Needs::default()
    };
    let reasons = reasons(&stage, &demand);
    for (name, part) in [
        ("a1", "silent"),
        ("a2", "drained"),
        ("a3", "refused or did not answer"),
        ("a4", "forbidden by rule s/slow"),
        ("a5", "forbidden by rule s/wet"),
        ("a6", "not what rule s/site requires"),
        ("a7", "a link of 1Gbps, and 4Gbps is asked"),
        ("a8", "3Gbps of its link left, and 4Gbps is asked"),
        ("a9", "8MiB free, a region takes 256MiB"),
        ("a10", "held"),
        ("a12", "in the same site, and the same rack is asked"),
    ] {
        let said = reasons.get(name).map(String::as_str).unwrap_or("nothing");
        assert!(said.contains(part), "{name}: {said}");
    }
    assert_eq!(decide(&stage.snapshot(), &demand).placement.unwrap().regions, [ApplianceId::from_u128(11)]);
}

#[test]
fn a_link_is_shared_by_the_columns() {
    let ten = |number| Candidate { link_speed: Some(LinkSpeed(10 * GBPS)), ..candidate(number, 1 << 40) };
    let mut demand = demand(256 * MIB, 4);
    demand.needs.link_speed = Some(LinkSpeed(10 * GBPS));
    assert_eq!(demand.needs.link_share(4), Some(LinkSpeed(2_500_000_000)));
    let mut used = ten(1);
    used.link_promised = LinkSpeed(7_500_000_000);
    assert!(place(&[used.clone()], &demand).is_ok());
    used.link_promised = LinkSpeed(7_500_000_001);
    assert!(place(&[used], &demand).is_err());
}

#[test]
fn round_trips_and_shares_are_limited() {
    let mut stage = Stage::new(&[candidate(1, 1 << 40), candidate(2, 1 << 40), candidate(3, 1 << 40)]);
    stage.numbers =
        HashMap::from([(ApplianceId::from_u128(1), 300_000), (ApplianceId::from_u128(2), 90_000)]);
    let empty = HashMap::new();
    let snapshot = Snapshot { of_account: &empty, given_back: &empty, ..stage.snapshot() };
    let mut wanted = demand(256 * MIB, 1);
    wanted.needs.round_trip_max = Some(100_000);
    assert_eq!(decide(&snapshot, &wanted).placement.unwrap().regions, [ApplianceId::from_u128(2)]);
    wanted.needs.round_trip_max = Some(10_000);
    let remedies = remedy::remedies(&snapshot, &wanted);
    assert!(remedies.iter().any(|one| one.contains("set locality.round-trip-max = ")), "{remedies:?}");

    let used = HashMap::from([(ApplianceId::from_u128(1), 100 << 30)]);
    let snapshot =
        Snapshot { of_account: &used, round_trips: &empty, given_back: &empty, ..stage.snapshot() };
    let mut wanted = demand(30 << 30, 1);
    wanted.needs.share = "10%".parse().ok();
    let placed = count(&decide(&snapshot, &wanted).placement.unwrap());
    let most = (1 << 40) / 10;
    assert!(placed.iter().all(|(id, regions)| used.get(id).unwrap_or(&0) + regions * (256 << 20) <= most));
    assert!(!placed.contains_key(&ApplianceId::from_u128(1)) || placed[&ApplianceId::from_u128(1)] <= 9);
}

#[test]
fn newcomers_and_failing_appliances_score_less() {
    let old = candidate(1, 1 << 30);
    let newcomer = Candidate { since: 999_999, ramp_up: 600, ..candidate(2, 1 << 40) };
    let troubled = Candidate { health: 200, ..candidate(3, 1 << 30) };
    let stage = Stage::new(&[old, newcomer, troubled]);
    let traces = traces(&stage, &demand(256 * MIB, 1));
    let score = |name: &str| {
        let one = traces.iter().find(|one| one.name.as_str() == name).unwrap();
        match &one.verdict {
            Verdict::Scored { score, .. } => *score,
            Verdict::Rejected(rejection) => panic!("{rejection}"),
        }
    };
    assert!(score("a1") > score("a3"), "health counts");
    assert!(score("a1") > score("a2"), "an empty newcomer does not draw everything to itself");
    let preferred = Needs {
        prefer: vec![(
            "s/new".into(),
            Preference {
                select: Selector { appliances: vec!["a3".parse().unwrap()], ..Selector::default() },
                weight: 500,
            },
        )],
        ..Needs::default()
    };
    let demand = Demand { needs: preferred, ..demand(256 * MIB, 1) };
    assert_eq!(decide(&stage.snapshot(), &demand).placement.unwrap().regions, [ApplianceId::from_u128(3)]);
}

#[test]
fn nearness_raises_the_score() {
    let on = |number, text: &str| Candidate { labels: labels(text), ..candidate(number, 1 << 40) };
    let stage = Stage::new(&[
        on(1, "site=s row=q"),
        on(2, "site=s row=r rack=x"),
        on(3, "site=s row=r rack=t"),
        on(4, ""),
    ]);
    let mut demand = demand(1 << 30, 1);
    demand.needs.position = stage.pool.position(&labels("site=s row=r rack=t"));
    let whole = decide(&stage.snapshot(), &demand).placement.unwrap().regions;
    assert_eq!(whole, [3; 4].map(ApplianceId::from_u128), "the nearest holds all of it");
    demand.needs.spread = true;
    let order = decide(&stage.snapshot(), &demand).placement.unwrap().regions;
    assert_eq!(order, [3, 2, 1, 4].map(ApplianceId::from_u128), "four regions of 256 MiB, the nearest first");
}

#[test]
fn remedies_succeed() {
    let ten =
        |number, free: u64| Candidate { link_speed: Some(LinkSpeed(10 * GBPS)), ..candidate(number, free) };
    let stage = Stage::new(&[ten(1, 512 * MIB), Candidate { clearing: 256 * MIB, ..ten(2, 512 * MIB) }]);
    let remedies = |demand: &Demand| remedy::remedies(&stage.snapshot(), demand);
    let much = remedies(&demand(1088 * MIB, 1));
    assert!(much[0].contains("cleared") && much[1] == "ask for at most 1GiB", "{much:?}");
    assert_eq!(
        much.last().unwrap(),
        "bring 64MiB more memory: delete allocations, or start another appliance"
    );
    let mut fast = demand(256 * MIB, 1);
    fast.needs.link_speed = Some(LinkSpeed(25 * GBPS));
    fast.needs.sources.link = "account `a`".to_owned();
    assert_eq!(remedies(&fast)[0], "set link-speed = \"10Gbps\" (now 25Gbps) in account `a`");
    let mut far = demand(256 * MIB, 1);
    far.needs.within = Some(Level::Rack);
    far.needs.sources.locality = rule_source("s/near");
    assert_eq!(
        remedies(&far)[0],
        "take locality.within (now \"rack\") out of rule `near` of strategy `s` (`xpm edit strategy s`)"
    );
    let mut picky = demand(256 * MIB, 1);
    picky
        .needs
        .require
        .push(("s/gold".into(), Selector { labels: labels("tier=gold"), ..Selector::default() }));
    assert_eq!(
        remedies(&picky)[0],
        "take what is required out of rule `gold` of strategy `s` (`xpm edit strategy s`)"
    );
}

#[test]
fn records_of_large_pools_are_shortened() {
    let mut candidates: Vec<Candidate> = (1..=1000).map(|n| candidate(n, (n as u64) << 30)).collect();
    candidates[..400].iter_mut().for_each(|one| one.drain = true);
    let stage = Stage::new(&candidates);
    let mut demand = demand(1 << 30, 1);
    demand.needs.spread = true;
    let decided = decide(&stage.snapshot(), &demand);
    let (short, rejected) = trace::appliances(&stage.snapshot(), &demand, &decided, false);
    assert!(short.len() < 20, "{}", short.len());
    let serving =
        short.iter().filter(|one| matches!(one.verdict, Verdict::Scored { regions: 1.., .. })).count();
    assert_eq!(serving, 4);
    assert_eq!((rejected[0].reason.as_str(), rejected[0].appliances), ("drained", 400));
}

/// A slow spread, written directly from the description of `spread`, region by region.
fn slow_spread(candidates: &[Candidate], demand: &Demand, region_len: u64) -> Option<Vec<ApplianceId>> {
    let stage = Stage::new(candidates);
    let snapshot = stage.snapshot();
    let filter = Filter::new(&snapshot, demand);
    let (_, rooms) = filter.look(region_len);
    let scorer = score::Scorer::new(&snapshot, demand, rooms.most_free);
    let mut taken: HashMap<u32, u64> = HashMap::new();
    let mut regions = Vec::new();
    for _ in 0..size::rows(demand.size, demand.columns, region_len) {
        let mut in_row: HashMap<u32, u64> = HashMap::new();
        for _ in 0..demand.columns {
            let has = |map: &HashMap<u32, u64>, at: u32| map.get(&at).copied().unwrap_or(0);
            let free = rooms.list.iter().filter(|room| u64::from(room.regions) > has(&taken, room.at));
            let next = free.min_by_key(|room| {
                let id = stage.pool.cold[room.at as usize].candidate.id;
                let got = has(&taken, room.at);
                let score = scorer.score(room.at as usize, got * region_len);
                (has(&in_row, room.at), got, std::cmp::Reverse(score), spread::draw(id, demand.seed), id)
            })?;
            *in_row.entry(next.at).or_default() += 1;
            *taken.entry(next.at).or_default() += 1;
            regions.push(stage.pool.cold[next.at as usize].candidate.id);
        }
    }
    Some(regions)
}

prop_compose! {
    fn snapshots()(
        frees in prop::collection::vec((0..4096_u64, any::<bool>(), 0..4_u8, 0..3_u64), 0..12),
    ) -> Vec<Candidate> {
        frees.iter().enumerate().map(|(index, &(mib, odd, label, link))| {
            // Mostly up; equal sizes are frequent, so that the draw decides often.
            let mut candidate = candidate(index as u128 + 1, (mib / 64 * 64 + u64::from(odd)) * MIB);
            candidate.labels = labels(["", "rack=a", "rack=b", "rack=a tier=gold"][usize::from(label)]);
            candidate.link_speed = (link > 0).then_some(LinkSpeed(link * 10 * GBPS));
            candidate.drain = mib % 17 == 0;
            if mib % 13 == 0 {
                candidate.up_until = Duration::ZERO;
            }
            candidate
        }).collect()
    }
}

prop_compose! {
    fn demands()(pages in 1..1_000_000_u64, columns in 1..9_u32, asked in prop::option::of(24..30_u32), seed: u64) -> Demand {
        let region_len = asked.map(|shift| 1 << shift);
        let needs = Needs { spread: seed % 2 == 0, ..Needs::default() };
        Demand { size: pages * PAGE_LEN, columns, unit: 0, region_len, seed, home: Vec::new(), needs }
    }
}

prop_compose! {
    /// A demand with the needs that rules can set.
    fn picky()(
        demand in demands(),
        require in prop::option::of(0..2_usize),
        forbid in prop::option::of(0..2_usize),
        link in prop::option::of(1..30_u64),
        taken in prop::option::of(1..4096_u64),
    ) -> Demand {
        let select = |index: usize| Selector { labels: labels(["rack=a", "tier=gold"][index]), ..Selector::default() };
        let needs = Needs {
            require: require.map(|index| ("s/r".to_owned(), select(index))).into_iter().collect(),
            forbid: forbid.map(|index| ("s/f".to_owned(), select(index))).into_iter().collect(),
            link_speed: link.map(|link| LinkSpeed(link * GBPS)),
            taken_max: taken.map(|mib| mib * MIB),
            ..demand.needs
        };
        Demand { needs, ..demand }
    }
}

/// Whether an appliance may serve, written without the filter.
fn may_serve(one: &Candidate, demand: &Demand) -> bool {
    let fits =
        |selector: &Selector| selector.labels.iter().all(|(key, value)| one.labels.get(key) == Some(value));
    let needs = &demand.needs;
    !one.up_until.is_zero()
        && !one.drain
        && needs.require.iter().all(|(_, selector)| fits(selector))
        && !needs.forbid.iter().any(|(_, selector)| fits(selector))
        && needs.link_speed.is_none_or(|speed| one.link_speed.is_some_and(|has| has >= speed))
}

proptest! {
    #[test]
    fn placements_are_whole_and_fit(snapshot in snapshots(), demand in picky()) {
        if let Ok(placement) = place(&snapshot, &demand) {
            let len = placement.region_len;
            prop_assert!(is_region_len(len));
            prop_assert!(demand.region_len.is_none_or(|asked| asked == len));
            prop_assert_eq!(placement.regions.len() % demand.columns as usize, 0, "whole rows");
            let row = u64::from(demand.columns) * len;
            let total = placement.regions.len() as u64 * len;
            prop_assert!(total >= demand.size && total - demand.size < row, "no row too few, none too many");
            prop_assert!(demand.needs.taken_max.is_none_or(|most| total <= most), "no limit is exceeded");
            for (id, regions) in count(&placement) {
                let appliance = snapshot.iter().find(|candidate| candidate.id == id).unwrap();
                prop_assert!(may_serve(appliance, &demand) && regions * len <= appliance.free);
            }
        }
    }

    #[test]
    fn the_quick_spread_is_the_slow_one(snapshot in snapshots(), demand in picky()) {
        let demand = Demand { needs: Needs { spread: true, ..demand.needs }, ..demand };
        if let Ok(placement) = place(&snapshot, &demand) {
            let slow = slow_spread(&snapshot, &demand, placement.region_len);
            prop_assert_eq!(Some(placement.regions), slow);
        }
    }

    #[test]
    fn a_linear_allocation_lies_on_as_few_appliances_as_possible(snapshot in snapshots(), demand in picky()) {
        let demand = Demand { columns: 1, needs: Needs { spread: false, ..demand.needs }, ..demand };
        let Ok(placement) = place(&snapshot, &demand) else { return Ok(()) };
        let len = placement.region_len;
        let mut rooms: Vec<u64> =
            snapshot.iter().filter(|one| may_serve(one, &demand)).map(|one| one.free / len).collect();
        rooms.sort_unstable_by(|a, b| b.cmp(a));
        let wanted = placement.regions.len() as u64;
        let least = rooms.iter().scan(0, |sum, room| { *sum += room; Some(*sum) }).position(|sum| sum >= wanted);
        prop_assert_eq!(Some(count(&placement).len()), least.map(|last| last + 1));
    }

    #[test]
    fn rows_use_all_appliances(equal in 1..9_usize, demand in demands()) {
        let snapshot: Vec<_> = (1..=equal).map(|n| candidate(n as u128, 1 << 40)).collect();
        let placement = place(&snapshot, &demand).unwrap();
        for row in placement.regions.chunks(demand.columns as usize) {
            let distinct: std::collections::HashSet<_> = row.iter().collect();
            prop_assert_eq!(distinct.len(), equal.min(demand.columns as usize));
        }
    }

    #[test]
    fn the_same_snapshot_gives_the_same_placement(snapshot in snapshots(), demand in picky()) {
        let mut reversed = snapshot.clone();
        reversed.reverse();
        prop_assert_eq!(place(&snapshot, &demand).ok(), place(&reversed, &demand).ok());
    }

    #[test]
    fn a_demand_that_fits_is_placed(snapshot in snapshots(), demand in picky()) {
        let Some(lengths) = size::lengths(&demand) else { return Ok(()) };
        let most = demand.needs.taken_max.unwrap_or(u64::MAX);
        let fits = lengths.iter().filter(|&&len| size::taken(&demand, len) <= most).any(|&len| {
            let room: u64 = snapshot.iter().filter(|one| may_serve(one, &demand)).map(|c| c.free / len).sum();
            room >= size::rows(demand.size, demand.columns, len) * u64::from(demand.columns)
        });
        prop_assert_eq!(place(&snapshot, &demand).is_ok(), fits);
    }

    #[test]
    fn the_explanation_agrees_with_the_decision(snapshot in snapshots(), demand in picky()) {
        let stage = Stage::new(&snapshot);
        let decided = decide(&stage.snapshot(), &demand);
        let counts = decided.placement.as_ref().map(count).unwrap_or_default();
        let (traces, _) = trace::appliances(&stage.snapshot(), &demand, &decided, true);
        prop_assert_eq!(traces.len(), snapshot.len());
        for one in traces {
            let candidate = snapshot.iter().find(|candidate| candidate.id == one.id).unwrap();
            let got = counts.get(&one.id).copied().unwrap_or(0);
            match one.verdict {
                Verdict::Scored { regions, .. } => {
                    prop_assert_eq!(regions, got);
                    prop_assert!(may_serve(candidate, &demand));
                }
                Verdict::Rejected(Rejection::Full { .. }) => {
                    prop_assert!(got == 0 && may_serve(candidate, &demand) && candidate.free < decided.region_len);
                }
                Verdict::Rejected(_) => prop_assert!(got == 0 && !may_serve(candidate, &demand)),
            }
        }
    }

    #[test]
    fn every_remedy_that_names_a_size_works(snapshot in snapshots(), demand in picky()) {
        let stage = Stage::new(&snapshot);
        if !matches!(decide(&stage.snapshot(), &demand).placement, Err(NoPlace::NoSpace { .. })) {
            return Ok(());
        }
        for remedy in remedy::remedies(&stage.snapshot(), &demand) {
            if let Some(size) = remedy.strip_prefix("ask for at most ") {
                // A size is shown rounded, so a slightly smaller one must fit.
                let size = size.parse::<ByteSize>().map_or(0, |size| size.0 / 100 * 98).max(PAGE_LEN);
                let less = Demand { size: size / PAGE_LEN * PAGE_LEN, ..demand.clone() };
                prop_assert!(decide(&stage.snapshot(), &less).placement.is_ok(), "{remedy}");
            }
        }
    }

    #[test]
    fn whole_regions_waste_little(pages in 1..4_000_000_u64, columns in 1..17_u32) {
        let size = pages * PAGE_LEN;
        let len = size::lengths(&demand(size, columns)).unwrap()[0];
        let total = size::rows(size, columns, len) * u64::from(columns) * len;
        let least_row = u64::from(columns) * REGION_LEN_MIN;
        prop_assert!(len <= REGION_LEN_DEFAULT);
        prop_assert!(total - size <= (size / 8).max(least_row), "{size} over {columns} takes {total}");
    }
}
