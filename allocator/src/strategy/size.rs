//! The length of an allocation's regions.
//!
//! An allocation takes whole rows of its layout, so the last row may hold more than was requested. Long regions mean
//! fewer regions and so shorter maps; short regions waste less. The rules:
//!
//! 1. Regions are at most 256 MiB, or longer if the stripe unit is, or if there would be more than [`REGIONS_MAX`] of
//!    them.
//! 2. Of the powers of two from there down to 16 MiB, the longest is taken that wastes at most an eighth of the size.
//! 3. If there is none (a small allocation over many columns: 16 MiB is the shortest region), the longest of those
//!    that waste least.

use xpm_protocol::units::{REGION_LEN_DEFAULT, REGION_LEN_MAX, REGION_LEN_MIN};

use super::Demand;

/// Most regions of one allocation. A map of that many is a few hundred KiB; they suffice for 4 TiB in regions of 256
/// MiB and for 1 PiB in the longest ones.
pub const REGIONS_MAX: u64 = 16 << 10;

/// Rows of `columns` regions of `len` bytes that hold `size` bytes.
pub fn rows(size: u64, columns: u32, len: u64) -> u64 {
    size.div_ceil(u64::from(columns) * len)
}

/// The lengths to try, the preferred one first and then shorter ones. None if every length gives too many regions.
pub fn lengths(demand: &Demand) -> Option<Vec<u64>> {
    let fits = |len: &u64| regions(demand, *len) <= REGIONS_MAX;
    if let Some(len) = demand.region_len {
        return fits(&len).then(|| vec![len]);
    }
    let least = demand.unit.max(REGION_LEN_MIN);
    let mut all: Vec<u64> = (0..u64::BITS)
        .map(|shift| 1 << shift)
        .filter(|len| (least..=REGION_LEN_MAX).contains(len))
        .filter(fits)
        .collect();
    all.reverse();
    let longest = REGION_LEN_DEFAULT.max(*all.last()?);
    let preferred = preferred(demand, all.iter().copied().filter(|&len| len <= longest))?;
    all.retain(|&len| len <= preferred);
    Some(all)
}

/// Rules 2 and 3; `lengths` must descend.
fn preferred(demand: &Demand, lengths: impl Iterator<Item = u64> + Clone) -> Option<u64> {
    let thrifty = lengths.clone().find(|&len| waste(demand, len) <= demand.size / 8);
    // `min_by_key` takes the first of equal ones, which is the longest.
    thrifty.or_else(|| lengths.min_by_key(|&len| waste(demand, len)))
}

fn regions(demand: &Demand, len: u64) -> u64 {
    rows(demand.size, demand.columns, len).saturating_mul(u64::from(demand.columns))
}

/// Bytes that the allocation takes in regions of this length.
pub fn taken(demand: &Demand, len: u64) -> u64 {
    regions(demand, len).saturating_mul(len)
}

fn waste(demand: &Demand, len: u64) -> u64 {
    taken(demand, len).saturating_sub(demand.size)
}
