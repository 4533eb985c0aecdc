//! How the bytes of an allocation lie over its regions.

use serde::{Deserialize, Serialize};

/// Smallest stripe unit, in bytes.
pub const STRIPE_UNIT_MIN: u64 = 4096;
/// Default stripe unit, in bytes: a swap read-ahead of 32 KiB and most reads of a file system stay on one appliance,
/// and a write of 1 MiB uses up to sixteen.
pub const STRIPE_UNIT_DEFAULT: u64 = 64 << 10;
/// Most columns of a striped layout.
pub const COLUMNS_MAX: u32 = 1024;

/// How the bytes of an allocation lie over its ordered regions.
///
/// The regions form *rows*, each of as many regions as the layout has columns. A row holds a contiguous run of the
/// allocation, so that an allocation grows by adding rows and shrinks by dropping them. Linear means one column.
/// Within a row of a striped layout, stripe units alternate between the columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Layout {
    /// The regions follow one another.
    Linear,
    /// Stripe units alternate between `columns` regions.
    Striped {
        /// Regions in a row; 2 to [`COLUMNS_MAX`].
        columns: u32,
        /// Length of a run on one region in bytes; a power of two, at least [`STRIPE_UNIT_MIN`] and at most the
        /// region size.
        unit: u64,
    },
}

/// Why a layout is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The number of columns is out of range.
    #[error("a striped layout has 2 to {COLUMNS_MAX} columns, not {0}")]
    Columns(u32),
    /// The stripe unit is not a power of two in the range.
    #[error("a stripe unit is a power of two from {STRIPE_UNIT_MIN} bytes to the region size, not {0}")]
    Unit(u64),
}

impl Layout {
    /// Number of regions in a row.
    pub const fn columns(&self) -> u32 {
        match self {
            Layout::Linear => 1,
            Layout::Striped { columns, .. } => *columns,
        }
    }

    /// Length in bytes of a contiguous run on one region of `region_len` bytes.
    pub const fn unit(&self, region_len: u64) -> u64 {
        match self {
            Layout::Linear => region_len,
            Layout::Striped { unit, .. } => *unit,
        }
    }

    /// Number of bytes among the allocation's first `position` that lie in this region; `region` is its index in the
    /// allocation.
    pub const fn bytes_before(&self, region_len: u64, region: u32, position: u64) -> u64 {
        let (columns, unit) = (self.columns() as u64, self.unit(region_len));
        let (row, column) = (region as u64 / columns, region as u64 % columns);
        let row_len = columns * region_len;
        let in_row = position.saturating_sub(row * row_len);
        let in_row = if in_row < row_len { in_row } else { row_len };
        let turn_len = columns * unit;
        let rest = (in_row % turn_len).saturating_sub(column * unit);
        in_row / turn_len * unit + if rest < unit { rest } else { unit }
    }

    /// Checks the ranges stated at the fields.
    pub fn check(&self, region_len: u64) -> Result<(), LayoutError> {
        match *self {
            Layout::Linear => Ok(()),
            Layout::Striped { columns, .. } if !(2..=COLUMNS_MAX).contains(&columns) => {
                Err(LayoutError::Columns(columns))
            }
            Layout::Striped { unit, .. }
                if !unit.is_power_of_two() || unit < STRIPE_UNIT_MIN || unit > region_len =>
            {
                Err(LayoutError::Unit(unit))
            }
            Layout::Striped { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_out_of_range_are_refused() {
        let striped = |columns, unit| Layout::Striped { columns, unit };
        assert_eq!(striped(2, 4096).check(1 << 24), Ok(()));
        assert_eq!(striped(1, 4096).check(1 << 24), Err(LayoutError::Columns(1)));
        assert_eq!(striped(2, 5000).check(1 << 24), Err(LayoutError::Unit(5000)));
        assert_eq!(striped(2, 1 << 25).check(1 << 24), Err(LayoutError::Unit(1 << 25)));
        assert_eq!(Layout::Linear.check(0), Ok(()));
    }

    #[test]
    fn bytes_before_a_position_are_counted_per_region() {
        const LEN: u64 = 1 << 24;
        let linear = |region, position| Layout::Linear.bytes_before(LEN, region, position);
        assert_eq!((linear(0, LEN + 5), linear(1, LEN + 5), linear(2, LEN + 5)), (LEN, 5, 0));
        let striped = Layout::Striped { columns: 2, unit: 4096 };
        let before = |position| [0, 1, 2, 3].map(|region| striped.bytes_before(LEN, region, position));
        assert_eq!(before(3 * 4096 + 7), [8192, 4096 + 7, 0, 0]);
        assert_eq!(before(2 * LEN + 5000), [LEN, LEN, 4096, 904]);
        assert_eq!(before(4 * LEN), [LEN; 4]);
    }
}
