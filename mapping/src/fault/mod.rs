//! Bringing pages: in the thread that touched one (`sigbus`), in threads of the library (`handler`), and for calls of
//! the program (`calls`). `fetch` is what the first two share.

pub(crate) mod calls;
pub(crate) mod fetch;
pub(crate) mod handler;
pub(crate) mod sigbus;
pub(crate) mod tend;
