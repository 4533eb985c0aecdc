//! The edge to the kernel: what it says of memory and swap, and what it is told.
//!
//! * [`table`]: what the kernel's tables of swap and of memory say of one thing.
//! * [`pressure`]: `/proc/pressure/memory`, waited for.
//! * [`header`]: the header of a swap area, and what else may be on a device.
//! * `area`: swapon(2).
//! * [`hand`]: the process that does swapoff(2).

pub mod area;
pub mod hand;
pub mod header;
pub mod pressure;
pub mod table;
