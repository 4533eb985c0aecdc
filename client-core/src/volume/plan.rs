//! The geometry of an allocation: maps an operation on the volume to operations on grants.
//!
//! Pure, and without memory allocation. A read or write becomes one leg for each stripe unit that it touches.
//! A trim or zero becomes one leg for each region, however many units lie in the region: the part of a
//! contiguous range of the volume that lies in one region is contiguous in that region.

use std::collections::HashSet;

use xpm_protocol::api::allocator::{Map, RegionSlot};
use xpm_protocol::layout::LayoutError;
use xpm_protocol::units::is_region_len;
use xpm_transport::io::Kind;

/// A defect of a map.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The region size is not a power of two in the allowed range.
    #[error("its region size, {0} bytes, is not a power of two from 16 MiB to 64 GiB")]
    RegionLen(u64),
    /// The layout is invalid.
    #[error("{0}")]
    Layout(#[from] LayoutError),
    /// The size is zero, or more than the regions hold.
    #[error("its size of {size} bytes does not fit its {regions} regions")]
    Size {
        /// The size in bytes.
        size: u64,
        /// Number of regions.
        regions: usize,
    },
    /// The number of regions is no multiple of the row length.
    #[error("its {regions} regions do not make whole rows of {columns}")]
    Rows {
        /// Number of regions.
        regions: usize,
        /// Number of regions in a row.
        columns: u32,
    },
    /// A region is not in any grant.
    #[error("its region {0} is in no grant")]
    Slot(usize),
    /// A region occurs twice.
    #[error("its region {0} is there twice")]
    Twice(usize),
}

/// The part of an operation that goes to one grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leg {
    /// The region, by its place in the allocation.
    pub region: u32,
    /// The number of the grant.
    pub grant: u32,
    /// First byte in the grant's export.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// First byte in the operation's buffer; meaningless for trims and zeros.
    pub start: u64,
}

/// The geometry of one allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    size: u64,
    columns: u64,
    unit: u64,
    region_len: u64,
    slots: Box<[RegionSlot]>,
}

impl Plan {
    /// The geometry that a map describes. Maps come from the network: this function checks the map
    /// completely, and later code checks no part of it again.
    ///
    /// # Errors
    /// The [`MapError`] names the defect.
    pub fn new(map: &Map) -> Result<Plan, MapError> {
        let region_len = map.region_len.0;
        if !is_region_len(region_len) {
            return Err(MapError::RegionLen(region_len));
        }
        map.layout.check(region_len)?;
        let (columns, regions) = (map.layout.columns(), map.regions.len());
        if !regions.is_multiple_of(columns as usize) {
            return Err(MapError::Rows { regions, columns });
        }
        let fits = (regions as u64).checked_mul(region_len).is_some_and(|held| map.size.0 <= held);
        if map.size.0 == 0 || !fits {
            return Err(MapError::Size { size: map.size.0, regions });
        }
        check_slots(map)?;
        Ok(Plan {
            size: map.size.0,
            columns: u64::from(columns),
            unit: map.layout.unit(region_len),
            region_len,
            slots: map.regions.clone().into_boxed_slice(),
        })
    }

    /// Size of the volume in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Whether `len` bytes at `offset` are within the volume.
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size)
    }

    /// The first leg of a read or write of `len` bytes, at least one, at `offset`.
    pub fn first_leg(&self, offset: u64, len: u64) -> Leg {
        let row_len = self.columns * self.region_len;
        let (row, in_row) = (offset / row_len, offset % row_len);
        let (stripe, in_unit) = (in_row / self.unit, in_row % self.unit);
        let (turn, column) = (stripe / self.columns, stripe % self.columns);
        self.leg(row * self.columns + column, turn * self.unit + in_unit, len.min(self.unit - in_unit))
    }

    /// The leg of a trim or zero of `len` bytes at `offset` on the region of this index; none if no byte of
    /// the range lies in the region.
    fn region_leg(&self, region: u64, offset: u64, len: u64) -> Option<Leg> {
        let row_start = region / self.columns * self.columns * self.region_len;
        let row_len = self.columns * self.region_len;
        let within = |position: u64| position.saturating_sub(row_start).min(row_len);
        let first = self.bytes_before(region % self.columns, within(offset));
        let end = self.bytes_before(region % self.columns, within(offset + len));
        (end > first).then(|| self.leg(region, first, end - first))
    }

    /// The number of bytes in this column among the first `position` bytes of a row.
    fn bytes_before(&self, column: u64, position: u64) -> u64 {
        let turn_len = self.columns * self.unit;
        let rest = position % turn_len;
        position / turn_len * self.unit + rest.saturating_sub(column * self.unit).min(self.unit)
    }

    fn leg(&self, region: u64, in_region: u64, len: u64) -> Leg {
        let RegionSlot { grant, slot } = self.slots[region as usize];
        let offset = u64::from(slot) * self.region_len + in_region;
        Leg { region: region as u32, grant, offset, len, start: 0 }
    }

    /// The same geometry with other grant numbers: `numbers` has one for each grant of the map.
    pub(super) fn renumbered(mut self, numbers: &[u32]) -> Plan {
        for slot in &mut self.slots {
            slot.grant = numbers[slot.grant as usize];
        }
        self
    }

    /// Whether bytes are distributed over regions in the same way.
    pub(super) fn has_layout_of(&self, other: &Plan) -> bool {
        (self.columns, self.unit, self.region_len) == (other.columns, other.unit, other.region_len)
    }

    /// Length of each region in bytes.
    pub(super) const fn region_len(&self) -> u64 {
        self.region_len
    }

    /// The place of each region, in the allocation's order.
    pub(super) fn slots(&self) -> &[RegionSlot] {
        &self.slots
    }

    /// A cursor over the legs of an operation; the caller has checked that the operation lies within the
    /// volume.
    pub fn legs(&self, kind: Kind, offset: u64, len: u64) -> Legs {
        let next = match kind {
            Kind::Read | Kind::Write => 0,
            Kind::Trim | Kind::Zero => offset / (self.columns * self.region_len) * self.columns,
            Kind::Flush => u64::MAX,
        };
        Legs { kind, offset, len, next }
    }
}

/// A cursor over the legs of one operation. It is a value, so that an operation can pause between two legs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Legs {
    kind: Kind,
    offset: u64,
    len: u64,
    /// Bytes done (read, write) or the next region (trim, zero).
    next: u64,
}

impl Legs {
    /// The next leg; none when there are no more.
    pub fn next(&mut self, plan: &Plan) -> Option<Leg> {
        match self.kind {
            Kind::Read | Kind::Write => {
                if self.next == self.len {
                    return None;
                }
                let leg = plan.first_leg(self.offset + self.next, self.len - self.next);
                self.next += leg.len;
                Some(Leg { start: self.next - leg.len, ..leg })
            }
            Kind::Trim | Kind::Zero => {
                let end = (self.offset + self.len).div_ceil(plan.columns * plan.region_len) * plan.columns;
                while self.next < end {
                    self.next += 1;
                    if let Some(leg) = plan.region_leg(self.next - 1, self.offset, self.len) {
                        return Some(leg);
                    }
                }
                None
            }
            Kind::Flush => None,
        }
    }
}

fn check_slots(map: &Map) -> Result<(), MapError> {
    let mut seen = HashSet::with_capacity(map.regions.len());
    for (index, slot) in map.regions.iter().enumerate() {
        if map.grants.get(slot.grant as usize).is_none_or(|grant| slot.slot >= grant.regions) {
            return Err(MapError::Slot(index));
        }
        if !seen.insert((slot.grant, slot.slot)) {
            return Err(MapError::Twice(index));
        }
    }
    Ok(())
}
