//! Making room: which pages leave (`s3fifo`), how they do (`evictor`), and how much local memory there may be
//! (`budget`).

pub(crate) mod budget;
pub(crate) mod evictor;
pub(crate) mod s3fifo;
