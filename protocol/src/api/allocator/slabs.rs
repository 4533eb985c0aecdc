//! Named slabs of an allocation.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Name;
use crate::units::ByteSize;

/// Most named slabs in one allocation.
pub const NAMED_SLABS_MAX: usize = 256;
/// A named slab starts at a multiple of this many bytes, and is at least as long.
pub const NAMED_SLAB_LEN_MIN: u64 = 2 << 20;

/// The named slabs of an allocation. Their content stays when the program that carved them ends. The allocator keeps
/// only their places.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlabMap {
    /// Number of changes of the map. A change must have the number after the known one.
    pub number: u64,
    /// Their places, by name: at most [`NAMED_SLABS_MAX`].
    pub slabs: BTreeMap<Name, SlabPlace>,
}

/// Place of a named slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlabPlace {
    /// First byte within the allocation; a multiple of [`NAMED_SLAB_LEN_MIN`].
    pub offset: ByteSize,
    /// Length in bytes; a power of two, at least [`NAMED_SLAB_LEN_MIN`].
    pub len: ByteSize,
}

impl SlabMap {
    /// Whether there never was a named slab.
    pub fn is_empty(&self) -> bool {
        self.number == 0 && self.slabs.is_empty()
    }

    /// First byte after all named slabs.
    pub fn end(&self) -> u64 {
        self.slabs.values().map(|place| place.offset.0.saturating_add(place.len.0)).max().unwrap_or(0)
    }

    /// Whether the map is valid in an allocation of `size` bytes.
    ///
    /// # Errors
    /// The first fault of the map, in one line.
    pub fn check(&self, size: u64) -> Result<(), String> {
        if self.slabs.len() > NAMED_SLABS_MAX {
            return Err(format!("an allocation has at most {NAMED_SLABS_MAX} slabs with names"));
        }
        let mut places: Vec<(&Name, &SlabPlace)> = self.slabs.iter().collect();
        places.sort_unstable_by_key(|(_, place)| place.offset);
        let mut behind = 0;
        for (name, place) in places {
            let (offset, len) = (place.offset.0, place.len.0);
            let fits = len.is_power_of_two()
                && len >= NAMED_SLAB_LEN_MIN
                && offset.is_multiple_of(NAMED_SLAB_LEN_MIN)
                && offset.checked_add(len).is_some_and(|end| end <= size);
            if !fits {
                return Err(format!(
                    "slab `{name}` of {len} bytes at {offset} cannot be: a slab with a name is a power of two of at least \
                     {NAMED_SLAB_LEN_MIN} bytes, at a multiple of {NAMED_SLAB_LEN_MIN}, within the {size} bytes of the allocation"
                ));
            }
            if offset < behind {
                return Err(format!("slab `{name}` at {offset} overlaps another one"));
            }
            behind = offset + len;
        }
        Ok(())
    }
}
