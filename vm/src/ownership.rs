//! Who may use a machine's RAM while the machine moves.

use xpm_protocol::ClientId;

use crate::Error;

/// Moves the right to read and write a machine's RAM from this host to the destination. What is done with it:
///
/// ```text
///          switch()              commit()
/// source ───────────▶ window ───────────────▶ destination
///    ▲                  │
///    └── roll_back() ───┘
/// ```
///
/// In the window the destination reads and writes, and accesses of the source wait: they are neither served nor refused, so
/// that a source that gets its RAM back goes on as if nothing had been.
#[expect(
    async_fn_in_trait,
    reason = "one task drives a migration; its futures need not be sent to other threads"
)]
pub trait Ownership {
    /// Prepares the switch while the machine runs, and refuses a destination that cannot have the RAM. `heir` is the client that
    /// stands by there; none where the RAM is an ordinary file there.
    ///
    /// # Errors
    /// When the RAM cannot be given to it.
    async fn prepare(&mut self, heir: Option<ClientId>) -> Result<(), Error>;

    /// Gives the RAM to the destination. The source has stopped, and nothing of the RAM is only in its cache. When this fails,
    /// the source still owns it.
    ///
    /// # Errors
    /// When it could not be given.
    async fn switch(&mut self) -> Result<(), Error>;

    /// Drops what this host has cached of the RAM. Called in the window; may take long, and runs while the machine's state is sent.
    ///
    /// # Errors
    /// When something is left in the cache.
    async fn discard(&mut self) -> Result<(), Error>;

    /// Closes the window: the source never has the RAM again, and its accesses fail from now on. The machine runs at the
    /// destination.
    ///
    /// # Errors
    /// When it could not be closed. The destination owns the RAM anyway.
    async fn commit(&mut self) -> Result<(), Error>;

    /// Gives the RAM back to the source. The machine never ran at the destination, and will not.
    ///
    /// # Errors
    /// When it could not be given back; the source must stay stopped.
    async fn roll_back(&mut self) -> Result<(), Error>;
}

/// The RAM is a file that both machines have through one page cache, so nothing has an owner and nothing has to be dropped.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plain;

impl Ownership for Plain {
    async fn prepare(&mut self, heir: Option<ClientId>) -> Result<(), Error> {
        match heir {
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
