//! Making room: the choice of the pages that leave (`s3fifo`), the thread that removes them (`evictor`), and the size
//! of local memory (`budget`).

pub(crate) mod budget;
pub(crate) mod evictor;
pub(crate) mod s3fifo;
