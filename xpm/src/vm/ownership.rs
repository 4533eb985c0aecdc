//! The hand-over of a machine's allocations by the allocator, as a migration needs it.

use std::time::{Duration, Instant};

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Allocation, HandOverAll, Handover};
use xpm_protocol::api::blk::Cache;
use xpm_protocol::{ClientId, Name};
use xpm_vm::Error;
use xpm_vm::ownership::{Heirs, Ownership};
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
    /// xpm-blk of this host, where the machine has disks that move with it.
    blk: Option<Daemon>,
    /// The allocations of the RAM.
    names: Vec<Name>,
    /// Those of the disks.
    disks: Vec<Name>,
    /// To whom they go, as the allocator understands it; known after `prepare`.
    to: String,
}

impl Ownership for HandOver {
    async fn prepare(&mut self, heirs: Heirs) -> Result<(), Error> {
        let Some(heir) = heirs.ram else {
            return Err(Error::Peer(
                "the destination was started with --file, and here the RAM is an allocation: leave --file out there".to_owned(),
            ));
        };
        self.to = heir.to_string();
        let until = Instant::now() + NOTED_LIMIT;
        for name in &self.names {
            self.wait_until_noted(name, heir, until).await?;
        }
        for name in &self.disks {
            let Some(heir) = heirs.disks else {
                return Err(Error::Peer(format!("the destination does not stand by for the disk `{name}`")));
            };
            // RAM and disks go to two clients, xpm-fs and xpm-blk, of one host.
            self.to = self.wait_until_noted(name, heir, until).await?;
        }
        Ok(())
    }

    async fn switch(&mut self) -> Result<(), Error> {
        let order = HandOverAll { names: self.all(), to: self.to.clone(), force: false };
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
        let Some(machine) = place.load()?.filter(|machine| !machine.allocations.is_empty()) else {
            return Ok(None);
        };
        let disks: Vec<Name> = machine.disks.into_iter().map(|disk| disk.name).collect();
        let blk = if disks.is_empty() { None } else { Some(daemons.blk()?) };
        let (allocator, fs) = (daemons.allocator()?, daemons.fs()?);
        Ok(Some(HandOver { allocator, fs, blk, names: machine.allocations, disks, to: String::new() }))
    }

    /// RAM and disks.
    fn all(&self) -> Vec<Name> {
        self.names.iter().chain(&self.disks).cloned().collect()
    }

    /// Fails unless this host owns all of the RAM and of the disks.
    async fn check_owned(&self) -> Result<(), Error> {
        self.check_owned_by(&self.fs, &self.names).await?;
        match &self.blk {
            Some(blk) => self.check_owned_by(blk, &self.disks).await,
            None => Ok(()),
        }
    }

    async fn check_owned_by(&self, daemon: &Daemon, names: &[Name]) -> Result<(), Error> {
        let own = daemon.blk_status().await.map_err(of_allocator)?.client;
        for name in names {
            let allocation: Allocation =
                self.allocator.get(&format!("/v1/allocations/{name}")).await.map_err(of_allocator)?;
            if allocation.owner.is_none_or(|owner| owner.client != own) {
                return Err(Error::Machine(format!("`{name}` does not belong to this host")));
            }
        }
        Ok(())
    }

    /// Waits until the owner of an allocation has noted that this client stands by for it; the client's host.
    async fn wait_until_noted(&self, name: &Name, heir: ClientId, until: Instant) -> Result<String, Error> {
        loop {
            let allocation: Allocation =
                self.allocator.get(&format!("/v1/allocations/{name}")).await.map_err(of_allocator)?;
            match allocation.standby {
                Some(standby) if standby.client.client == heir && standby.noted => {
                    return Ok(standby.client.host_name);
                }
                Some(standby) if standby.client.client == heir => {}
                _ => return Err(Error::Peer(format!("the destination does not stand by for `{name}`"))),
            }
            if Instant::now() >= until {
                return Err(Error::Machine(format!(
                    "the daemon of this host that shows `{name}` has not noted within {NOTED_LIMIT:?} that the destination stands by \
                     for it: is it running?"
                )));
            }
            tokio::time::sleep(LOOK_EVERY).await;
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
