//! How regions are dealt out among the appliances that can serve.

use std::cmp::Reverse;

use xpm_protocol::ApplianceId;

use super::Candidate;
use super::score::score;

/// Deals `rows * columns` regions of `region_len` bytes out, or none where they do not fit.
///
/// Each region goes to the appliance that, in this order, has the fewest regions of the same row,
/// has the fewest regions of the allocation, scores highest, and wins the draw by `seed`. So no
/// appliance is used twice before all that have room are used once, and the columns of a row,
/// which work at the same time, lie on as many appliances as there are.
pub fn spread(
    usable: &[&Candidate],
    rows: u64,
    columns: u32,
    region_len: u64,
    seed: u64,
) -> Option<Vec<ApplianceId>> {
    let room: u64 = usable.iter().map(|candidate| candidate.free / region_len).sum();
    let wanted = rows.checked_mul(u64::from(columns))?;
    if wanted > room {
        return None;
    }
    let mut seats: Vec<Seat<'_>> = usable.iter().map(|candidate| Seat::new(candidate, seed)).collect();
    let mut regions = Vec::new();
    for _ in 0..rows {
        seats.iter_mut().for_each(|seat| seat.in_row = 0);
        for _ in 0..columns {
            let next = seats.iter_mut().filter(|seat| seat.has_room(region_len));
            let seat = next.min_by_key(|seat| seat.rank(region_len))?;
            seat.in_row += 1;
            seat.regions += 1;
            regions.push(seat.candidate.id);
        }
    }
    Some(regions)
}

struct Seat<'a> {
    candidate: &'a Candidate,
    regions: u64,
    in_row: u32,
    draw: u64,
}

impl<'a> Seat<'a> {
    fn new(candidate: &'a Candidate, seed: u64) -> Seat<'a> {
        Seat { candidate, regions: 0, in_row: 0, draw: draw(candidate.id, seed) }
    }

    fn has_room(&self, region_len: u64) -> bool {
        self.candidate.free / region_len > self.regions
    }

    /// The smallest is next. The id settles equal draws, so that no order of the snapshot matters.
    fn rank(&self, region_len: u64) -> impl Ord + use<> {
        let wanted = score(self.candidate, self.regions * region_len);
        (self.in_row, self.regions, Reverse(wanted), self.draw, self.candidate.id)
    }
}

/// A number that looks random and is the same for the same id and seed (the finalizer of
/// splitmix64 over both halves of the id).
fn draw(id: ApplianceId, seed: u64) -> u64 {
    let number = id.as_u128();
    mix(mix(seed ^ number as u64) ^ (number >> 64) as u64)
}

fn mix(number: u64) -> u64 {
    let a = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let b = (a ^ a >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    b ^ b >> 31
}
