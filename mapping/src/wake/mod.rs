//! Waking the threads of the library.

mod bell;
mod signal;

pub(crate) use self::bell::Bell;
