//! The edge to the kernel: reading its state of memory and swap, and controlling it.
//!
//! * [`table`]: entries of the kernel's tables of swap and of memory.
//! * [`pressure`]: waiting for events of `/proc/pressure/memory`.
//! * [`header`]: the header of a swap area, and recognizing other content of a device.
//! * `area`: swapon(2).
//! * [`hand`]: the process that executes swapoff(2).

pub mod area;
pub mod hand;
pub mod header;
pub mod pressure;
pub mod table;
