//! Distributes regions among the appliances that can serve.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use xpm_protocol::ApplianceId;

use super::filter::Rooms;
use super::score::Scorer;
use super::{Demand, Room, Seen, Snapshot, size};

/// Gives all regions to the appliance with the best score of those that hold all of them.
pub(super) fn on_one(
    snapshot: &Snapshot<'_>,
    demand: &Demand,
    seen: &mut [Seen],
    rooms: &Rooms,
    region_len: u64,
) -> Option<Vec<ApplianceId>> {
    let wanted = size::rows(demand.size, 1, region_len);
    super::score::fill(snapshot, demand, seen, rooms);
    let holding = rooms.list.iter().filter(|room| u64::from(room.regions) >= wanted);
    let seats = holding.map(|room| seat(snapshot, demand, room, seen[room.at as usize].score));
    let seat = seats.max_by_key(|seat| (demand.home.contains(&seat.id.0), *seat))?;
    Some(vec![seat.id.0; usize::try_from(wanted).ok()?])
}

/// Gives the regions to as few appliances as possible: again and again all that still fit go to the appliance with
/// most room, and the rest to the appliance with the best score of those that hold all of the rest.
pub(super) fn on_few(
    snapshot: &Snapshot<'_>,
    demand: &Demand,
    seen: &mut [Seen],
    rooms: &Rooms,
    region_len: u64,
) -> Option<Vec<ApplianceId>> {
    let mut wanted = size::rows(demand.size, 1, region_len);
    if wanted > rooms.regions {
        return None;
    }
    super::score::fill(snapshot, demand, seen, rooms);
    let seat = |room: &Room| seat(snapshot, demand, room, seen[room.at as usize].score);
    let mut seats: Vec<Seat> = rooms.list.iter().map(seat).collect();
    let mut regions = Vec::with_capacity(usize::try_from(wanted).ok()?);
    seats.sort_unstable_by_key(|seat| (seat.room, *seat));
    while wanted > 0 {
        let holds = |seat: &&Seat| seat.room >= wanted;
        let last =
            seats.iter().filter(holds).max_by_key(|seat| (demand.home.contains(&seat.id.0), **seat)).copied();
        let seat = match last {
            Some(seat) => seat,
            None => seats.pop()?,
        };
        let taken = seat.room.min(wanted);
        regions.extend(std::iter::repeat_n(seat.id.0, usize::try_from(taken).ok()?));
        wanted -= taken;
    }
    Some(regions)
}

fn seat(snapshot: &Snapshot<'_>, demand: &Demand, room: &Room, score: u32) -> Seat {
    let id = snapshot.pool.ids[room.at as usize];
    let (at, room) = (room.at, u64::from(room.regions));
    Seat { regions: Reverse(0), score, draw: Reverse(draw(id, demand.seed)), id: Reverse(id), room, at }
}

/// Distributes the regions evenly; none if they do not fit.
///
/// Each region goes to the appliance that, in this order, has the fewest regions of the same row, has the fewest
/// regions of the allocation, scores highest, and wins the draw by the seed. So no appliance is used twice before all
/// that have room are used once, and the columns of a row, which work at the same time, lie on as many appliances as
/// possible.
pub(super) fn spread(
    snapshot: &Snapshot<'_>,
    demand: &Demand,
    seen: &mut [Seen],
    rooms: &Rooms,
    region_len: u64,
) -> Option<Vec<ApplianceId>> {
    let rows = size::rows(demand.size, demand.columns, region_len);
    let wanted = rows.checked_mul(u64::from(demand.columns))?;
    if wanted > rooms.regions {
        return None;
    }
    let scorer = Scorer::new(snapshot, demand, rooms.most_free);
    let heap = first(&scorer, snapshot, demand, seen, rooms, wanted);
    let mut table = Table { scorer, snapshot, demand, region_len, heap };
    let mut regions = Vec::with_capacity(wanted as usize);
    for _ in 0..rows {
        table.row(&mut regions)?;
    }
    Some(regions)
}

/// A candidate for the next region; the greatest candidate gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Seat {
    regions: Reverse<u64>,
    score: u32,
    draw: Reverse<u64>,
    id: Reverse<ApplianceId>,
    room: u64,
    at: u32,
}

/// All candidates, or only the best ones if each of them gets at most one region. Sets the scores.
fn first(
    scorer: &Scorer<'_>,
    snapshot: &Snapshot<'_>,
    demand: &Demand,
    seen: &mut [Seen],
    rooms: &Rooms,
    wanted: u64,
) -> BinaryHeap<Seat> {
    let mut scored = rooms.list.iter().map(|room| {
        let at = room.at as usize;
        seen[at].score = scorer.score(at, 0);
        (room, seen[at].score)
    });
    let seat = |room: &Room, score: u32| seat(snapshot, demand, room, score);
    let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
    // The worst of the best so far is at the head; a look at the score alone excludes most appliances.
    let mut best: BinaryHeap<Reverse<Seat>> =
        scored.by_ref().take(wanted).map(|(room, score)| Reverse(seat(room, score))).collect();
    for (room, score) in scored {
        let Some(mut least) = best.peek_mut() else { break };
        if score < least.0.score {
            continue;
        }
        let seat = seat(room, score);
        if seat > least.0 {
            least.0 = seat;
        }
    }
    best.into_iter().map(|Reverse(seat)| seat).collect()
}

struct Table<'a> {
    scorer: Scorer<'a>,
    snapshot: &'a Snapshot<'a>,
    demand: &'a Demand,
    region_len: u64,
    heap: BinaryHeap<Seat>,
}

impl Table<'_> {
    fn row(&mut self, regions: &mut Vec<ApplianceId>) -> Option<()> {
        let mut used = Vec::with_capacity(self.demand.columns as usize);
        for _ in 0..self.demand.columns {
            if self.heap.is_empty() {
                self.heap.extend(used.drain(..));
            }
            let mut seat = self.heap.pop()?;
            regions.push(self.snapshot.pool.ids[seat.at as usize]);
            seat.regions.0 += 1;
            if seat.regions.0 < seat.room {
                seat.score = self.scorer.score(seat.at as usize, seat.regions.0 * self.region_len);
                used.push(seat);
            }
        }
        self.heap.extend(used);
        Some(())
    }
}

/// A pseudo-random number that depends only on id and seed (the finalizer of splitmix64 over both halves of the id).
pub(super) fn draw(id: ApplianceId, seed: u64) -> u64 {
    let number = id.as_u128();
    mix(mix(seed ^ number as u64) ^ (number >> 64) as u64)
}

fn mix(number: u64) -> u64 {
    let a = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let b = (a ^ a >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    b ^ b >> 31
}
