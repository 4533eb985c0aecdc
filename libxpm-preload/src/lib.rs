//! External memory for programs that know nothing of it: what they ask for in large pieces, by malloc(3) or mmap(2), is
//! in external memory, and the rest is where it would be anyway. `xpm run` starts a program with this library in
//! LD_PRELOAD; the first process that wants a large piece asks it for the memory (`start`).
//!
//! All descriptors of this library are in a table of its own (`table`): what the program does with descriptors, by
//! whatever system calls, concerns the library not at all. A thread of the program has its work done by one of the
//! library (`service`).
//!
//! Nothing of this library's own may be in external memory, or in memory of an allocator that keeps its tables there: a
//! thread that brings pages would wait for itself. So its Rust code allocates by glibc's own names
//! (`heap::Local`), which no program replaces, and what the C library allocates for its threads comes from there, too
//! ([`threads`]).
//!
//! A child of fork(2) has a local copy of its parent's external memory if that is small (`adopted`), else nothing at
//! these addresses (touching them is a SIGSEGV), and may ask for memory of its own (`process`).

#![allow(unsafe_code)]

mod adopted;
mod external;
mod fallen;
pub mod heap;
mod lease;
pub mod locks;
pub mod maps;
mod process;
mod service;
mod start;
mod table;
pub mod threads;

#[global_allocator]
static LOCAL: heap::Local = heap::Local;
