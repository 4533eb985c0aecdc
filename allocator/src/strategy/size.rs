//! How long the regions of an allocation are.
//!
//! An allocation takes whole rows of its layout, so the last row may hold more than was asked
//! for. Long regions mean few of them, which makes maps short; short ones waste less. The rule:
//!
//! 1. Regions are at most 256 MiB, or longer where the stripe unit is, or where there would be
//!    more than [`REGIONS_MAX`] of them.
//! 2. Of the powers of two from there down to 16 MiB, the longest is taken that wastes at most an
//!    eighth of the size.
//! 3. Where none does (a small allocation over many columns: 16 MiB is the smallest region), the
//!    longest of those that waste least.

use xpm_protocol::units::{REGION_LEN_DEFAULT, REGION_LEN_MAX, REGION_LEN_MIN};

use super::Demand;

/// Most regions of one allocation. A map of that many is a few hundred KiB; it is enough for
/// 4 TiB in regions of 256 MiB and for 1 PiB in the longest ones.
pub const REGIONS_MAX: u64 = 16 << 10;

/// Rows of `columns` regions of `len` bytes that hold `size` bytes.
pub fn rows(size: u64, columns: u32, len: u64) -> u64 {
    size.div_ceil(u64::from(columns) * len)
}

/// The lengths that may be tried, the preferred one first and then shorter ones; none where the
/// allocation would have too many regions at any length.
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

/// Rules 2 and 3; `lengths` descend.
fn preferred(demand: &Demand, lengths: impl Iterator<Item = u64> + Clone) -> Option<u64> {
    let thrifty = lengths.clone().find(|&len| waste(demand, len) <= demand.size / 8);
    // Of equal ones the first, which is the longest, is the minimum.
    thrifty.or_else(|| lengths.min_by_key(|&len| waste(demand, len)))
}

fn regions(demand: &Demand, len: u64) -> u64 {
    rows(demand.size, demand.columns, len).saturating_mul(u64::from(demand.columns))
}

/// What the allocation takes in regions of this length, in bytes.
pub fn taken(demand: &Demand, len: u64) -> u64 {
    regions(demand, len).saturating_mul(len)
}

fn waste(demand: &Demand, len: u64) -> u64 {
    taken(demand, len).saturating_sub(demand.size)
}
