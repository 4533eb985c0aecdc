use std::collections::HashMap;

use proptest::prelude::*;
use xpm_protocol::units::{PAGE_LEN, REGION_LEN_DEFAULT, REGION_LEN_MIN, is_region_len};

use super::*;

const MIB: u64 = 1 << 20;

fn candidate(number: u128, free: u64) -> Candidate {
    let name = format!("a{number}").parse().unwrap();
    Candidate { id: ApplianceId::from_u128(number), name, up: true, failed: false, free, clearing: 0 }
}

fn demand(size: u64, columns: u32) -> Demand {
    Demand { size, columns, unit: 0, region_len: None, seed: 7 }
}

fn count(placement: &Placement) -> HashMap<ApplianceId, u64> {
    placement.regions.iter().fold(HashMap::new(), |mut counts, &id| {
        *counts.entry(id).or_default() += 1;
        counts
    })
}

#[test]
fn lengths_of_regions() {
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
fn most_free_memory_first() {
    let snapshot = [candidate(1, 512 * MIB), candidate(2, 2048 * MIB), candidate(3, 1024 * MIB)];
    let placement = place(&snapshot, &demand(256 * MIB, 1)).unwrap();
    assert_eq!(placement.regions, [ApplianceId::from_u128(2)]);
}

#[test]
fn shorter_regions_where_long_ones_do_not_fit() {
    let snapshot = [candidate(1, 130 * MIB), candidate(2, 130 * MIB)];
    let placement = place(&snapshot, &demand(256 * MIB, 1)).unwrap();
    assert_eq!(placement.region_len, 128 * MIB);
}

#[test]
fn the_reasons_are_said() {
    let mut snapshot =
        [candidate(1, 0), candidate(2, 1 << 40), candidate(3, 1 << 40), candidate(4, 64 * MIB)];
    snapshot[1].up = false;
    snapshot[2].failed = true;
    let line = place(&snapshot, &demand(256 * MIB, 1)).unwrap_err().to_string();
    for part in [
        "256MiB do not fit",
        "1 appliance can serve",
        "64MiB free",
        "a1 has 0B",
        "a2 is silent",
        "a3 refused",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
}

prop_compose! {
    fn snapshots()(frees in prop::collection::vec((0..4096_u64, any::<bool>()), 0..12)) -> Vec<Candidate> {
        frees.iter().enumerate().map(|(index, &(mib, odd))| {
            // Mostly up; equal sizes are frequent, so that draws matter.
            let mut candidate = candidate(index as u128 + 1, (mib / 64 * 64 + u64::from(odd)) * MIB);
            candidate.up = mib % 13 != 0;
            candidate
        }).collect()
    }
}

prop_compose! {
    fn demands()(pages in 1..1_000_000_u64, columns in 1..9_u32, asked in prop::option::of(24..30_u32), seed: u64) -> Demand {
        let region_len = asked.map(|shift| 1 << shift);
        Demand { size: pages * PAGE_LEN, columns, unit: 0, region_len, seed }
    }
}

proptest! {
    #[test]
    fn placements_are_whole_and_fit(snapshot in snapshots(), demand in demands()) {
        if let Ok(placement) = place(&snapshot, &demand) {
            let len = placement.region_len;
            prop_assert!(is_region_len(len));
            prop_assert!(demand.region_len.is_none_or(|asked| asked == len));
            prop_assert_eq!(placement.regions.len() % demand.columns as usize, 0, "whole rows");
            let row = u64::from(demand.columns) * len;
            let total = placement.regions.len() as u64 * len;
            prop_assert!(total >= demand.size && total - demand.size < row, "no row too few, none too many");
            for (id, regions) in count(&placement) {
                let appliance = snapshot.iter().find(|candidate| candidate.id == id).unwrap();
                prop_assert!(appliance.up && regions * len <= appliance.free);
            }
        }
    }

    #[test]
    fn nobody_twice_before_all_once(snapshot in snapshots(), demand in demands()) {
        if let Ok(placement) = place(&snapshot, &demand) {
            let counts = count(&placement);
            let most = counts.values().copied().max().unwrap();
            for candidate in snapshot.iter().filter(|candidate| candidate.up) {
                let regions = counts.get(&candidate.id).copied().unwrap_or(0);
                let more_fits = (regions + 1) * placement.region_len <= candidate.free;
                prop_assert!(!more_fits || regions + 1 >= most, "{candidate:?} has {regions} of at most {most}");
            }
        }
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
    fn the_same_snapshot_gives_the_same_placement(snapshot in snapshots(), demand in demands()) {
        let mut reversed = snapshot.clone();
        reversed.reverse();
        prop_assert_eq!(place(&snapshot, &demand).ok(), place(&reversed, &demand).ok());
    }

    #[test]
    fn what_fits_is_placed(snapshot in snapshots(), demand in demands()) {
        let Some(lengths) = size::lengths(&demand) else { return Ok(()) };
        let fits = lengths.iter().any(|&len| {
            let room: u64 = snapshot.iter().filter(|c| c.up).map(|c| c.free / len).sum();
            room >= size::rows(demand.size, demand.columns, len) * u64::from(demand.columns)
        });
        prop_assert_eq!(place(&snapshot, &demand).is_ok(), fits);
    }

    #[test]
    fn little_is_wasted(pages in 1..4_000_000_u64, columns in 1..17_u32) {
        let size = pages * PAGE_LEN;
        let len = size::lengths(&demand(size, columns)).unwrap()[0];
        let total = size::rows(size, columns, len) * u64::from(columns) * len;
        let least_row = u64::from(columns) * REGION_LEN_MIN;
        prop_assert!(len <= REGION_LEN_DEFAULT);
        prop_assert!(total - size <= (size / 8).max(least_row), "{size} over {columns} takes {total}");
    }
}
