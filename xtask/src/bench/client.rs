//! The client that loads the servers.

use std::path::Path;

use anyhow::Result;

use super::load::{Load, Metric};
use super::{fio, nbdload};

/// A client, used alike on every server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Client {
    /// fio's nbd engine (libnbd): what people measure with.
    Fio,
    /// A client that costs little itself, for loads where fio is busier than the servers.
    Nbdload,
}

/// The report of one run of a client.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// Of the load's metric.
    pub(crate) value: f64,
    pub(crate) cost: Cost,
}

/// Processor time that the client itself used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    /// Microseconds for one operation.
    pub(crate) micros: f64,
    /// Share of one core.
    pub(crate) percent: f64,
}

impl Client {
    /// The clients of a load: where IOPS count, both, because there the client can be the limit.
    pub(crate) fn of(load: Load) -> &'static [Client] {
        if load.metric == Metric::Iops && load.block == nbdload::BLOCK {
            &[Client::Fio, Client::Nbdload]
        } else {
            &[Client::Fio]
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Client::Fio => "fio",
            Client::Nbdload => "nbdload",
        }
    }

    /// Runs the load on a server of `size` for `seconds`; `bin` is where xpm's programs are.
    pub(crate) fn run(self, bin: &Path, uri: &str, load: Load, size: &str, seconds: u32) -> Result<Sample> {
        match self {
            Client::Fio => fio::run(uri, load, size, seconds),
            Client::Nbdload => nbdload::run(bin, uri, load, seconds),
        }
    }
}
