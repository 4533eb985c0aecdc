//! One page: its word, the userfaultfd that brings and takes pages, and the window in which the program sees them.

pub(crate) mod anchor;
pub(crate) mod uffd;
pub(crate) mod window;
pub(crate) mod word;
