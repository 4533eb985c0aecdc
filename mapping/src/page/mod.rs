//! Single pages: the page word, the userfaultfd that fills and moves pages, and the window in which the program
//! accesses them.

pub(crate) mod anchor;
pub(crate) mod uffd;
pub(crate) mod window;
pub(crate) mod word;
