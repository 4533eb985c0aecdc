//! External memory for programs that know nothing of it: what they ask for in large pieces, by malloc(3) or mmap(2), is
//! in external memory, and the rest is where it would be anyway. `xpm run` starts a program with this library in
//! LD_PRELOAD and hands it an allocation by a file descriptor, which the library takes before `main`.
//!
//! Nothing of this library's own may be in external memory, or in memory of an allocator that keeps its tables there: a
//! thread that brings pages would wait for itself. So its Rust code allocates by glibc's own names
//! (`heap::Local`), which no program replaces, and what the C library allocates for its threads comes from there, too
//! ([`threads`]).
//!
//! fork(2): a child has nothing at the addresses of external memory (touching them is a SIGSEGV), and what it asks for is
//! local. Programs that are started by exec(3) get no external memory.

#![allow(unsafe_code)]

mod external;
pub mod heap;
pub mod maps;
mod start;
pub mod threads;

#[global_allocator]
static LOCAL: heap::Local = heap::Local;
