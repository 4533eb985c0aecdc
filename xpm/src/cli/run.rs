//! `xpm run`.

use std::ffi::OsString;

use clap::Args;
use xpm_protocol::api::blk::TransportKind;
use xpm_protocol::policy::Amount;
use xpm_protocol::{ByteSize, Name};

use crate::complete::accounts;

/// Options of `xpm run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// External memory for the program, such as 8GiB; each piece takes a power of two of it.
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: ByteSize,
    /// Local memory that what is external may use as cache, such as 1GiB, less than the size; or a share of the memory
    /// that is free, such as 25%, which becomes less when memory is short.
    #[arg(long, value_name = "SIZE|PERCENT")]
    pub(crate) local: Amount,
    /// Shorter pieces stay local.
    #[arg(long, value_name = "SIZE", default_value = "1MiB")]
    pub(crate) threshold: ByteSize,
    /// Threads that bring pages.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) threads: u16,
    /// Way to the appliances: shm, rdma, nbd-unix or nbd-tcp. [default: the best for each]
    #[arg(long, value_name = "KIND")]
    pub(crate) transport: Option<TransportKind>,
    /// The account that it is charged to.
    #[arg(long, value_name = "NAME", add = accounts())]
    pub(crate) account: Option<Name>,
    /// Says at the end how much was external.
    #[arg(long, short)]
    pub(crate) verbose: bool,
    /// The program, and its arguments.
    #[arg(value_name = "PROGRAM", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) program: Vec<OsString>,
}
