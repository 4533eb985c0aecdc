//! Grants as exports of the NBD server.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;

use xpm_protocol::nbd::{BlockSizes, ExportInfo, ExportName, TransmissionFlags};
use xpm_protocol::{GrantId, Visitor};
use xpm_transport::nbd::server::{Exports, Opened};
use xpm_transport::rdma::server::RdmaServer;
use xpm_transport::store::{Extent, Posted};
use xpm_transport::{Completion, IoBuf, IoError, Kind, Operation, Store};

use crate::lease::Lease;
use crate::regions::Table;
use crate::sweeper::{Done, INLINE_LEN_MAX, Job, Sweeper, sweep};

/// The capabilities of every export. All connections see the same memory, so a client may use several.
const FLAGS: TransmissionFlags = TransmissionFlags::HAS_FLAGS
    .with(TransmissionFlags::SEND_FLUSH)
    .with(TransmissionFlags::SEND_FUA)
    .with(TransmissionFlags::SEND_TRIM)
    .with(TransmissionFlags::SEND_WRITE_ZEROES)
    .with(TransmissionFlags::SEND_FAST_ZERO)
    .with(TransmissionFlags::SEND_CACHE)
    .with(TransmissionFlags::CAN_MULTI_CONN);

/// The grants of a table as exports. Their names contain keys, so they are not listed.
pub struct GrantExports {
    table: Table,
    sweeper: Sweeper,
    rdma: Option<Arc<RdmaServer>>,
}

impl GrantExports {
    /// The grants of this table; `rdma` is given if they are also served by RDMA.
    ///
    /// # Errors
    /// When the kernel provides no thread for long operations.
    pub fn new(table: Table, rdma: Option<Arc<RdmaServer>>) -> io::Result<GrantExports> {
        Ok(GrantExports { table, sweeper: Sweeper::start()?, rdma })
    }
}

impl Exports for GrantExports {
    /// An invalid name, an unknown key and a closing grant get the same answer: no export.
    fn open(&self, name: &str) -> Option<Opened> {
        let name: ExportName = name.parse().ok()?;
        let lease = self.table.open(&name.key)?;
        let info =
            ExportInfo { size: lease.len(), flags: FLAGS, block: BlockSizes::DEFAULT, description: None };
        let done = Done::new().map_err(|error| tracing::warn!("cannot open an export: {error}")).ok()?;
        Some(Opened {
            info,
            group: lease.grant().as_u128(),
            session: name.session,
            store: Box::new(GrantStore {
                lease,
                done: Arc::new(done),
                pending: 0,
                sweeper: self.sweeper.clone(),
                table: self.table.clone(),
            }),
        })
    }

    fn admit(&self, opened: &Opened, visitor: Option<&Visitor>) -> Result<(), String> {
        if let Some(visitor) = visitor {
            self.table.admit(GrantId::from_u128(opened.group), visitor)?;
        }
        if let (Some(rdma), Some(session)) = (&self.rdma, opened.session) {
            // RDMA requests that the queue posted before must not land after this.
            rdma.shut_out(opened.group, session);
        }
        Ok(())
    }

    fn is_admitted(&self, opened: &Opened, visitor: Option<&Visitor>) -> bool {
        visitor.is_none_or(|visitor| self.table.is_admitted(GrantId::from_u128(opened.group), visitor))
    }
}

/// A grant's memory, as the store of one connection.
struct GrantStore {
    lease: Arc<Lease>,
    done: Arc<Done>,
    /// Number of operations at the sweeper.
    pending: usize,
    sweeper: Sweeper,
    table: Table,
}

impl GrantStore {
    fn sweep(&mut self, operation: Operation) -> Posted {
        let Operation { kind, offset, len, token, .. } = operation;
        let job = Job { lease: self.lease.clone(), kind, offset, len, token, done: self.done.clone() };
        if len <= INLINE_LEN_MAX {
            return Posted::Done(sweep(&job));
        }
        match self.sweeper.post(job) {
            Ok(()) => {
                self.pending += 1;
                Posted::Pending
            }
            Err(job) => Posted::Done(sweep(&job)),
        }
    }
}

impl Drop for GrantStore {
    fn drop(&mut self) {
        self.done.cancel();
    }
}

impl Store for GrantStore {
    fn is_direct(&self) -> bool {
        true
    }

    fn direct(&mut self, offset: u64, len: usize) -> Option<IoBuf> {
        self.lease.at(offset, len)
    }

    fn is_sound(&mut self, kind: Kind, offset: u64, len: u64) -> bool {
        self.lease.is_sound(kind == Kind::Write, offset, len)
    }

    fn found_bad(&mut self, offset: u64, len: u64) {
        self.table.found_bad(&self.lease, offset, len);
    }

    fn post(&mut self, operation: Operation) -> Posted {
        match operation.kind {
            Kind::Trim | Kind::Zero => self.sweep(operation),
            // Written data have reached their destination: memory.
            Kind::Flush => Posted::Done(Ok(())),
            // The server reads and writes the memory itself.
            Kind::Read | Kind::Write => Posted::Done(Err(IoError::Unsupported)),
        }
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) {
        // Skipped while no operation is pending, because it costs a system call.
        if self.pending > 0 {
            let before = completions.len();
            self.done.take(completions);
            self.pending -= completions.len() - before;
        }
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.done.event().as_fd())
    }

    fn extent(&mut self, offset: u64, len: u64) -> Extent {
        self.lease.extent(offset, len)
    }

    fn alive(&self) -> bool {
        self.lease.is_alive()
    }
}
