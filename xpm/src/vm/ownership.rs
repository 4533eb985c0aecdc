//! The hand-over of a machine's allocations by the allocator, as a migration needs it.

use std::time::{Duration, Instant};

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Allocation, HandOverAll, Handover};
use xpm_protocol::api::blk::Cache;
use xpm_protocol::{ClientId, Name};
use xpm_vm::Error;
use xpm_vm::ownership::Ownership;
use xpm_vm::place::Place;

use crate::connect::{Daemon, Daemons, Failure};

/// How long the daemon of the present owner may take to write down that another client stands by.
const NOTED_LIMIT: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long a hand-over that appliances did not confirm is asked for again.
const RETURN_LIMIT: Duration = Duration::from_secs(60);

/// All allocations of a machine change their owner at once, or none does. While the hand-over is open, this host's xpm-fs holds every
/// access to the files.
pub(super) struct HandOver {
    allocator: Daemon,
    fs: Daemon,
    names: Vec<Name>,
    /// Who stands by; known after `prepare`.
    heir: Option<ClientId>,
}

impl Ownership for HandOver {
    async fn prepare(&mut self, heir: Option<ClientId>) -> Result<(), Error> {
        let Some(heir) = heir else {
            return Err(Error::Peer(
                "the destination was started with --file, and here the RAM is an allocation: leave --file out there".to_owned(),
            ));
        };
        self.heir = Some(heir);
        let until = Instant::now() + NOTED_LIMIT;
        for name in &self.names {
            while !self.is_noted(name, heir).await? {
                if Instant::now() >= until {
                    return Err(Error::Machine(format!(
                        "xpm-fs of this host has not noted within {NOTED_LIMIT:?} that the destination stands by for `{name}`: is it \
                         running?"
                    )));
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
        Ok(())
    }

    async fn switch(&mut self) -> Result<(), Error> {
        let to = self.heir.map(|heir| heir.to_string()).unwrap_or_default();
        let order = HandOverAll { names: self.names.clone(), to, force: false };
        self.allocator.post::<_, Handover>("/v1/handovers", &order).await.map(drop).map_err(of_allocator)
    }

    async fn discard(&mut self) -> Result<(), Error> {
        for name in &self.names {
            let left: Cache =
                self.fs.put(&format!("/v1/devices/{name}/cache"), &()).await.map_err(|failure| {
                    Error::Machine(format!(
                        "what this host has cached of `{name}` was not dropped: {failure}"
                    ))
                })?;
            if left.cached.0 != 0 {
                return Err(Error::Machine(format!(
                    "{} of `{name}` are still cached by this host",
                    left.cached
                )));
            }
        }
        Ok(())
    }

    async fn commit(&mut self) -> Result<(), Error> {
        self.end("commit").await
    }

    async fn roll_back(&mut self) -> Result<(), Error> {
        self.end("rollback").await?;
        // One that was committed is not there either.
        self.check_owned().await
    }
}

impl HandOver {
    /// Of the machine at this place; none where its RAM is not allocations.
    pub(super) fn of(place: &Place, daemons: &Daemons) -> anyhow::Result<Option<HandOver>> {
        let names = place.load()?.map(|machine| machine.allocations).unwrap_or_default();
        if names.is_empty() {
            return Ok(None);
        }
        Ok(Some(HandOver { allocator: daemons.allocator()?, fs: daemons.fs()?, names, heir: None }))
    }

    /// Fails unless this host's xpm-fs owns all of the RAM.
    async fn check_owned(&self) -> Result<(), Error> {
        let own = self.fs.blk_status().await.map_err(of_allocator)?.client;
        for name in &self.names {
            let allocation: Allocation =
                self.allocator.get(&format!("/v1/allocations/{name}")).await.map_err(of_allocator)?;
            if allocation.owner.is_none_or(|owner| owner.client != own) {
                return Err(Error::Machine(format!("`{name}` does not belong to this host")));
            }
        }
        Ok(())
    }

    async fn is_noted(&self, name: &Name, heir: ClientId) -> Result<bool, Error> {
        let allocation: Allocation =
            self.allocator.get(&format!("/v1/allocations/{name}")).await.map_err(of_allocator)?;
        match allocation.standby {
            Some(standby) if standby.client.client == heir => Ok(standby.noted),
            _ => Err(Error::Peer(format!("the destination does not stand by for `{name}`"))),
        }
    }

    /// Ends the hand-over of the machine's allocations. One that was never opened, or has ended so already, is no error.
    async fn end(&self, how: &str) -> Result<(), Error> {
        let Some(name) = self.names.first() else { return Ok(()) };
        let until = Instant::now() + RETURN_LIMIT;
        loop {
            match self.allocator.post::<_, Handover>(&format!("/v1/handovers/{name}/{how}"), &()).await {
                Ok(_) => return Ok(()),
                Err(failure) if failure.is(ErrorKind::NotFound) => return Ok(()),
                // An appliance, or the allocator, does not answer.
                Err(failure) if failure.may_pass() && Instant::now() < until => {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                Err(failure) => return Err(of_allocator(failure)),
            }
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn of_allocator(failure: Failure) -> Error {
    Error::Machine(failure.to_string())
}
