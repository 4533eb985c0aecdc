//! Makes a link to the grant's appliance by each transport.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use xpm_protocol::api::appliance::Endpoints;
use xpm_protocol::api::blk::TransportKind;
use xpm_protocol::nbd::{ExportName, SessionTag};
use xpm_transport::link::Link;
use xpm_transport::nbd::client::{ConnectError, NbdLink, Target, connect_as, describe, describe_first};
use xpm_transport::rdma::client::{self as rdma, RdmaLink};
use xpm_transport::shm::client::ShmLink;

use super::Work;

/// How long to wait for an appliance that is still registering the memory; after that the next transport is
/// used.
const REGISTERING_MAX: Duration = Duration::from_secs(2);
/// How long to wait for names when addresses are known that did not work.
const NAMES_PATIENCE: Duration = Duration::from_secs(1);
/// Time limit of a connection attempt by RDMA; it is short because NBD is available, too.
const RDMA_LIMIT: Duration = Duration::from_secs(2);
/// Pause before the appliance is asked again whether the memory is registered.
const REGISTERING_PAUSE: Duration = Duration::from_millis(20);

impl Work {
    /// Makes a link by this transport.
    pub(super) fn by(&mut self, transport: TransportKind, queue: u16) -> Result<Box<dyn Link>, ConnectError> {
        match transport {
            TransportKind::Shm => self.shm(),
            TransportKind::Rdma => self.rdma(queue),
            TransportKind::NbdUnix => self.unix(queue),
            TransportKind::NbdTcp => Ok(Box::new(self.tcp(queue)?)),
        }
    }

    fn shm(&mut self) -> Result<Box<dyn Link>, ConnectError> {
        let grant = match self.shm.upgrade().filter(|grant| !grant.is_revoked()) {
            Some(grant) => grant,
            None => {
                let path = needed(self.connector.endpoints().shm, "shared memory")?;
                let options = &self.connector.options;
                let key = self.connector.key();
                xpm_transport::shm::client::connect_as(&path, &key, options.visitor.as_ref(), options.limit)?
            }
        };
        self.shm = Arc::downgrade(&grant);
        Ok(Box::new(ShmLink::new(grant, self.connector.options.depth)))
    }

    fn rdma(&mut self, queue: u16) -> Result<Box<dyn Link>, ConnectError> {
        rdma::check_support().map_err(ConnectError::Unavailable)?;
        let mut failure = ConnectError::Unreachable(io::Error::other("the appliance offers no RDMA"));
        let addresses = self.connector.endpoints().rdma;
        let limit = if addresses.len() > 1 { RDMA_LIMIT / 2 } else { RDMA_LIMIT };
        for address in addresses {
            match self.rdma_at(address, queue, limit) {
                Ok(link) => return Ok(Box::new(link)),
                Err(ConnectError::UnknownExport) => return Err(ConnectError::UnknownExport),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    fn rdma_at(
        &mut self,
        address: SocketAddr,
        queue: u16,
        limit: Duration,
    ) -> Result<RdmaLink, ConnectError> {
        let start = Instant::now();
        loop {
            // The NBD connection is made first, because it shuts out late requests of the queue's earlier
            // connections.
            let beside = self.tcp(queue)?;
            let options = &self.connector.options;
            let (key, epoch) = (self.connector.key(), self.connector.epoch());
            let target = rdma::Target {
                address,
                key: &key,
                epoch,
                session: self.session(queue),
                limit: options.limit.min(limit),
                depth: options.depth,
            };
            match rdma::connect(&target, beside) {
                Err(ConnectError::Unreachable(error))
                    if error.kind() == io::ErrorKind::WouldBlock && start.elapsed() < REGISTERING_MAX =>
                {
                    std::thread::sleep(REGISTERING_PAUSE);
                }
                result => return result,
            }
        }
    }

    fn unix(&mut self, queue: u16) -> Result<Box<dyn Link>, ConnectError> {
        let path = needed(self.connector.endpoints().nbd_unix, "a unix socket")?;
        Ok(Box::new(self.nbd(&Target::Unix(path), queue)?))
    }

    fn tcp(&mut self, queue: u16) -> Result<NbdLink, ConnectError> {
        let addresses = self.addresses();
        let connector = self.connector.clone();
        let options = &connector.options;
        let name = || {
            self.generation = self.generation.wrapping_add(1);
            ExportName { key: connector.key(), session: Some(self.session(queue)) }
        };
        let connected = xpm_transport::nbd::client::connect_first(
            &addresses,
            name,
            options.visitor.as_ref(),
            options.limit,
        )?;
        NbdLink::new(connected, options.depth).map_err(ConnectError::Unreachable)
    }

    /// The TCP addresses of the appliance, those of its names included. Names are waited for only when no
    /// other address is known, or the known addresses did not work the last time.
    fn addresses(&self) -> Vec<SocketAddr> {
        let Endpoints { mut nbd, names, .. } = self.connector.endpoints();
        let patience = match (nbd.is_empty(), self.connector.trouble().is_some()) {
            (true, _) => self.connector.options.limit,
            (false, true) => NAMES_PATIENCE,
            (false, false) => Duration::ZERO,
        };
        let named = self.names.resolve(&names, patience);
        nbd.extend(named);
        let mut seen = HashSet::new();
        nbd.retain(|address| seen.insert(*address));
        nbd
    }

    /// Checks whether the appliance answers and knows the grant, over the transport that its links use.
    /// Transports on which I/O works without an answer from the appliance always succeed. The request names
    /// no life of the client, so the life that the appliance admitted stays admitted.
    pub(super) fn ask(&self, limit: Duration) -> Result<(), ConnectError> {
        let name = ExportName { key: self.connector.key(), session: None };
        let first_choice = self.connector.first_choice();
        let transport = self.connector.lock().transport.unwrap_or(first_choice);
        match transport {
            TransportKind::NbdTcp => describe_first(&self.addresses(), &name, limit).map(drop),
            TransportKind::NbdUnix => {
                let path = needed(self.connector.endpoints().nbd_unix, "a unix socket")?;
                describe(&Target::Unix(path), &name, limit).map(drop)
            }
            TransportKind::Shm if self.shm.upgrade().is_none_or(|grant| grant.is_revoked()) => {
                let path = needed(self.connector.endpoints().nbd_unix, "a unix socket")?;
                describe(&Target::Unix(path), &name, limit).map(drop)
            }
            // The memory is mapped here, or the appliance's device answers.
            TransportKind::Shm | TransportKind::Rdma => Ok(()),
        }
    }

    fn nbd(&mut self, target: &Target, queue: u16) -> Result<NbdLink, ConnectError> {
        // Each connection has a higher generation than all before it, so the appliance closes the earlier
        // ones of this queue.
        self.generation = self.generation.wrapping_add(1);
        let options = &self.connector.options;
        let name = ExportName { key: self.connector.key(), session: Some(self.session(queue)) };
        let connected = connect_as(target, &name, options.visitor.as_ref(), options.limit)?;
        NbdLink::new(connected, options.depth).map_err(ConnectError::Unreachable)
    }

    /// The session of a queue, with the generation of its newest connection.
    fn session(&self, queue: u16) -> SessionTag {
        SessionTag { id: self.connector.options.session, queue, generation: self.generation }
    }
}

fn needed(path: Option<PathBuf>, what: &str) -> Result<PathBuf, ConnectError> {
    path.ok_or_else(|| ConnectError::Unreachable(io::Error::other(format!("the appliance offers no {what}"))))
}
