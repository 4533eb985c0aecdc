//! Which appliances get the regions of an allocation: pure functions over a snapshot.
//!
//! *Filter* drops the appliances that cannot serve at all, *score* says how much one is wanted,
//! and *spread* deals the regions out by score. The same snapshot and seed give the same
//! placement, so that every decision can be repeated and explained.

mod filter;
mod score;
pub mod size;
mod spread;

use std::fmt;

use xpm_protocol::{ApplianceId, ByteSize, Name};

pub use filter::{Rejection, filter};
pub use score::{Score, score};
pub use spread::spread;

/// An appliance at the moment of the decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The appliance.
    pub id: ApplianceId,
    /// Its name, for explanations.
    pub name: Name,
    /// Whether it is heard.
    pub up: bool,
    /// Whether it refused or did not answer this very request before.
    pub failed: bool,
    /// Memory that may still be asked for, promises deducted, in bytes.
    pub free: u64,
    /// Memory that it is clearing and that will be free soon, in bytes.
    pub clearing: u64,
}

/// What is asked for; checked before: `size` is whole pages and `columns` and `unit` fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Size of the allocation in bytes, at least one page.
    pub size: u64,
    /// Regions in a row of the layout.
    pub columns: u32,
    /// Least length of a region in bytes: the stripe unit, or 0.
    pub unit: u64,
    /// Length of a region in bytes where the request says it.
    pub region_len: Option<u64>,
    /// Decides between appliances of equal score.
    pub seed: u64,
}

/// Where the regions go: whole rows, in the order of the allocation's regions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Length of each region in bytes.
    pub region_len: u64,
    /// The appliance of each region.
    pub regions: Vec<ApplianceId>,
}

/// Why there is no placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoPlace {
    /// It would take more regions than an allocation may have.
    TooManyRegions,
    /// The appliances do not have the memory.
    NoSpace {
        /// Size of the allocation in bytes.
        size: u64,
        /// Memory of the appliances that can serve, in bytes.
        free: u64,
        /// How many of them there are.
        usable: usize,
        /// Why the others cannot.
        rejections: Vec<Rejection>,
    },
}

/// Finds a place for every region. Where the request leaves the length of regions open, smaller
/// ones are tried down to the smallest: they fit into what is left here and there.
pub fn place(snapshot: &[Candidate], demand: &Demand) -> Result<Placement, NoPlace> {
    let lengths = size::lengths(demand).ok_or(NoPlace::TooManyRegions)?;
    for &region_len in &lengths {
        let usable = filter(snapshot, region_len).0;
        let rows = size::rows(demand.size, demand.columns, region_len);
        if let Some(regions) = spread(&usable, rows, demand.columns, region_len, demand.seed) {
            return Ok(Placement { region_len, regions });
        }
    }
    let smallest = lengths.last().copied().unwrap_or_default();
    let (usable, rejections) = filter(snapshot, smallest);
    let free = usable.iter().map(|candidate| candidate.free / smallest.max(1) * smallest).sum();
    Err(NoPlace::NoSpace { size: demand.size, free, usable: usable.len(), rejections })
}

impl fmt::Display for NoPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoPlace::TooManyRegions => write!(
                f,
                "it would take more than {} regions, the most that an allocation may have; ask for longer regions, or for \
                 less",
                size::REGIONS_MAX
            ),
            NoPlace::NoSpace { size, free, usable, rejections } => {
                let size = ByteSize(*size);
                let free = ByteSize(*free);
                match usable {
                    0 => write!(f, "{size} do not fit: no appliance can serve")?,
                    1 => write!(f, "{size} do not fit: 1 appliance can serve and has {free} free")?,
                    many => write!(f, "{size} do not fit: {many} appliances can serve and have {free} free")?,
                }
                for rejection in rejections.iter().take(REJECTIONS_SHOWN) {
                    write!(f, "; {rejection}")?;
                }
                if let more @ 1.. = rejections.len().saturating_sub(REJECTIONS_SHOWN) {
                    write!(f, "; and {more} more cannot serve")?;
                }
                f.write_str("; ask for less, delete an allocation, or start another appliance")
            }
        }
    }
}

/// How many rejected appliances an error names.
const REJECTIONS_SHOWN: usize = 8;

#[cfg(test)]
mod tests;
