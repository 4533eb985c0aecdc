//! The interface for programs: spaces, mappings, slabs, arrays.

pub(crate) mod array;
pub(crate) mod buffer;
pub(crate) mod carver;
pub(crate) mod error;
pub(crate) mod mapping;
pub(crate) mod named;
pub(crate) mod open;
pub(crate) mod options;
pub mod slab;
pub(crate) mod space;

/// 2 MiB, in bytes: parts of an allocation with different uses begin and end at multiples of this length.
pub const CHUNK_LEN: u64 = crate::pager::CHUNK as u64 * crate::page::window::PAGE as u64;
