//! The right to use a machine's RAM, while the machine moves.

use xpm_protocol::ClientId;

use crate::Error;

/// The clients of a destination that stand by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Heirs {
    /// For the RAM; none where that is an ordinary file there.
    pub ram: Option<ClientId>,
    /// For the disks that move with it; none where there is none.
    pub disks: Option<ClientId>,
}

/// Moves the right to read and write a machine's RAM, and the disks that move with it, from this host to the
/// destination. The order of calls:
///
/// ```text
///          switch()              commit()
/// source ───────────▶ window ───────────────▶ destination
///    ▲                  │
///    └── roll_back() ───┘
/// ```
///
/// In the window the destination reads and writes, and accesses of the source wait: they are neither served nor
/// refused, so that a source that gets its RAM back goes on as if nothing had happened.
#[expect(
    async_fn_in_trait,
    reason = "one task drives a migration; its futures need not be sent to other threads"
)]
pub trait Ownership {
    /// Prepares the switch while the machine runs, and refuses a destination that cannot get the RAM and the disks.
    ///
    /// # Errors
    /// When they cannot be given to the destination.
    async fn prepare(&mut self, heirs: Heirs) -> Result<(), Error>;

    /// Gives the RAM to the destination. The machine is stopped at the source, and no page of the RAM is only in the
    /// source's cache. A failed switch may have taken effect, if only its answer was lost: the caller has to call
    /// [`Ownership::roll_back`] before it lets the machine go on.
    ///
    /// # Errors
    /// When the RAM could not be given.
    async fn switch(&mut self) -> Result<(), Error>;

    /// Drops this host's cache of the RAM. Called in the window; may take long, and runs while the machine's state is
    /// sent.
    ///
    /// # Errors
    /// When pages are left in the cache.
    async fn discard(&mut self) -> Result<(), Error>;

    /// Closes the window: the source can never get the RAM back, and its accesses fail from now on. The machine runs
    /// at the destination.
    ///
    /// # Errors
    /// When the window could not be closed. The destination owns the RAM anyway.
    async fn commit(&mut self) -> Result<(), Error>;

    /// Gives the RAM back to the source. The machine never ran at the destination, and will not.
    ///
    /// # Errors
    /// When the RAM could not be given back; the source must stay stopped.
    async fn roll_back(&mut self) -> Result<(), Error>;
}

/// The RAM is a file that both machines access through one page cache, so there is no owner to change and no cache to
/// drop.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plain;

impl Ownership for Plain {
    async fn prepare(&mut self, heirs: Heirs) -> Result<(), Error> {
        match heirs.ram {
            None => Ok(()),
            Some(_) => Err(Error::Peer(
                "the destination was started without --file, and here the RAM is an ordinary file: give the same file there".to_owned(),
            )),
        }
    }

    async fn switch(&mut self) -> Result<(), Error> {
        Ok(())
    }

    async fn discard(&mut self) -> Result<(), Error> {
        Ok(())
    }

    async fn commit(&mut self) -> Result<(), Error> {
        Ok(())
    }

    async fn roll_back(&mut self) -> Result<(), Error> {
        Ok(())
    }
}
