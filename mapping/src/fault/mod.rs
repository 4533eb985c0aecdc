//! Bringing pages into local memory: in the thread that touched a page (`sigbus`), in threads of the library
//! (`handler`), and for calls of the program (`calls`). The first two share `fetch`; `tend` polls unused channels.

pub(crate) mod calls;
pub(crate) mod fetch;
pub(crate) mod handler;
pub(crate) mod sigbus;
pub(crate) mod tend;
