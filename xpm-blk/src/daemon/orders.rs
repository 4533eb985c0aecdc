//! Executing the allocator's orders to an owner: to give an allocation up, and to follow a change of the
//! places of its regions. I/O continues meanwhile, and waits for no answer of the allocator.
//!
//! A firm change is recorded before the allocator learns that it is firm: from then on only the allocator
//! knows whether the old or the new map is valid, and after a restart writes go to both places until the
//! allocator has answered.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, MutexGuard, PoisonError};

use xpm_client_core::owner::{CONNECT_LIMIT, Mover, TailError};
use xpm_client_core::{Change, ChangeError};
use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{ChangeKind, HandOver, MapChange, Orders, Report};
use xpm_protocol::api::blk::AttachDevice;

use super::{Attached, Daemon, Slot, blocking};
use crate::error::{DeviceError, Step};
use crate::records::Role;

impl Daemon {
    /// Asks for the orders of a device and executes them, in a task of their own. If that task runs already,
    /// it repeats once more.
    pub(super) fn obey(self: &Arc<Daemon>, name: &Name) {
        if !matches!(self.slots().get(name), Some(Slot::Shown(_))) {
            return;
        }
        if let Some(again) = self.obeying().get_mut(name) {
            *again = true;
            return;
        }
        self.obeying().insert(name.clone(), false);
        let (daemon, name) = (Arc::clone(self), name.clone());
        tokio::spawn(async move {
            loop {
                let done = tokio::spawn(Arc::clone(&daemon).obey_now(name.clone())).await;
                if let Err(error) = done {
                    tracing::error!("the orders for allocation {name} were not carried out: {error}");
                }
                let mut obeying = daemon.obeying();
                match obeying.get_mut(&name) {
                    Some(again) if *again => *again = false,
                    _ => {
                        obeying.remove(&name);
                        return;
                    }
                }
            }
        });
    }

    fn obeying(&self) -> MutexGuard<'_, BTreeMap<Name, bool>> {
        self.obeying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn obey_now(self: Arc<Daemon>, name: Name) {
        let Some(Slot::Shown(attached)) = self.slots().get(&name).cloned() else { return };
        match attached.record().role {
            Role::StandsBy => return self.stand_by_or_begin(&attached).await,
            Role::HandedOver { .. } => return self.wait_or_go_on(&attached).await,
            Role::Owner | Role::Contested => {}
        }
        if !self.is_registered(&attached.record()).await {
            // The allocation may have been handed over.
            if let Ok(Orders { part: Some(part), .. }) = self.owner.orders(&name).await {
                self.take_part(&attached, part).await;
            }
            return;
        }
        if attached.change().is_some() {
            return self.finish_firm(&attached).await;
        }
        let Ok(orders) = self.owner.orders(&name).await else { return };
        if let Some(part) = orders.part {
            return self.take_part(&attached, part).await;
        }
        if orders.epoch > Some(attached.record().map.epoch) {
            return self.renew(&attached, orders.contested).await;
        }
        self.note_contested(&attached, orders.contested).await;
        let map = attached.record().map;
        let orders = self.owner.tell_keys(&name, map.epoch, &map.grants, orders).await;
        if let Some(hand_over) = &orders.hand_over {
            return self.hand_over(&attached, hand_over).await;
        }
        match orders.change {
            Some(change) => self.carry_out(&attached, change).await,
            // A newer map of this client wins over an allocator whose metadata are older.
            None if orders.version > attached.record().map.version => self.catch_up(&attached).await,
            None => {}
        }
    }

    /// Executes a change until it is firm, and then to its end.
    async fn carry_out(self: &Arc<Daemon>, attached: &Arc<Attached>, change: MapChange) {
        let name = attached.record().request.name;
        let number = change.number;
        if change.switched {
            // An earlier life executed the change and recorded that.
            return self.catch_up(attached).await;
        }
        tracing::info!("allocation {name} is changed: {:?} to {}", change.kind, change.next.size);
        let (daemon, attached_too) = (Arc::clone(self), Arc::clone(attached));
        let firm = blocking(move || {
            let mover = Mover::new(&daemon.owner, &change);
            make_firm(&daemon, &attached_too, &change, &mover)
        });
        match firm.await {
            Ok(()) => self.finish_firm(attached).await,
            Err(error) => {
                tracing::warn!("allocation {name} is not changed: {error}");
                let why = error.to_string();
                let _ = self.owner.say_until_heard(&name, &Report::Refused { number, why }).await;
            }
        }
    }

    /// Asks whether a firm change is valid, and ends it either way.
    async fn finish_firm(self: &Arc<Daemon>, attached: &Arc<Attached>) {
        let record = attached.record();
        let Some(change) = record.change.clone() else { return };
        let (name, number) = (record.request.name.clone(), change.number);
        let orders = self.owner.say_until_heard(&name, &Report::Ready { number }).await;
        let holds = orders.as_ref().is_some_and(|orders| orders.version == change.next.version);
        let attached_too = Arc::clone(attached);
        let daemon = Arc::clone(self);
        let ended = blocking(move || match holds {
            true => switch(&daemon, &attached_too, &change),
            false => give_up(&daemon, &attached_too, &change),
        });
        match ended.await {
            Ok(how) if holds => {
                let _ = self.owner.say_until_heard(&name, &Report::Done { number, how }).await;
                tracing::info!("allocation {name} is changed");
            }
            Ok(_) => tracing::warn!("allocation {name} is as it was: the allocator gave the change up"),
            Err(error) => tracing::error!("allocation {name}: {error}"),
        }
    }

    /// Follows the allocator's valid map when it is another one than ours and nothing has to be copied.
    async fn catch_up(self: &Arc<Daemon>, attached: &Arc<Attached>) {
        let record = attached.record();
        let name = record.request.name.clone();
        // The flag to take it by force applied to the attach only.
        let request = AttachDevice { force: false, lose: false, ..record.request.clone() };
        let Ok(map) = self.own(&request).await else { return };
        if map.version < record.map.version {
            return tracing::error!(
                "the allocator has an older map of allocation {name}: its metadata are outdated, so ours \
                 stays"
            );
        }
        let (daemon, attached_too) = (Arc::clone(self), Arc::clone(attached));
        let number = map.version;
        let turned = blocking(move || {
            let Some(volume) = attached_too.shown.volume() else { return Ok(None) };
            if map.version != record.map.version {
                let change = volume.change(&map, &[], CONNECT_LIMIT).map_err(refused)?;
                attached_too.keep_with(&daemon.records, |record| record.map = map)?;
                change.switch();
            }
            attached_too.shown.resize(volume.size())
        });
        match turned.await {
            Ok(how) => drop(self.owner.say(&name, &Report::Done { number, how }).await),
            Err(error) => tracing::error!("allocation {name} cannot turn to its new map: {error}"),
        }
    }

    /// Gives an allocation up to another client: writes back the kernel's changed data, removes the device,
    /// and reports that. Refused while the device is in use.
    async fn hand_over(self: &Arc<Daemon>, attached: &Arc<Attached>, hand_over: &HandOver) {
        let name = attached.record().request.name;
        tracing::info!("allocation {name} is to go to client {}", hand_over.to);
        if let Some(disk) = attached.shown.disk().map(|disk| format!("/dev/{disk}")) {
            // An error is ignored: if the device cannot be removed, detaching refuses.
            let _ =
                blocking(move || File::open(&disk).and_then(|disk| disk.sync_all()).at("write back")).await;
        }
        // When its owner detaches the allocation, it goes to the client that is to have it.
        if let Err(error) = self.detach(name.clone(), false).await {
            let why = error.to_string();
            tracing::warn!("allocation {name} is kept: {why}");
            let _ = self.owner.say(&name, &Report::Kept { why }).await;
        }
    }
}

/// Copies the regions that move, and records that the change is firm.
fn make_firm(
    daemon: &Daemon,
    attached: &Attached,
    change: &MapChange,
    mover: &Mover<'_>,
) -> Result<(), DeviceError> {
    let record = attached.record();
    let Some(volume) = attached.shown.volume() else {
        let form = &record.request.form;
        return Err(DeviceError::unsupported(
            format!("a device of form {form} leads to its appliance without xpm-blk and cannot follow"),
            "detach it, or attach it in another form",
        ));
    };
    if change.kind == ChangeKind::Shrink {
        check_shrink(attached)?;
        mover.check_tail(&record.map, change.next.size.0).map_err(in_the_way)?;
    }
    let under_way = volume.change(&change.next, &change.moved, CONNECT_LIMIT).map_err(refused)?;
    mover.copy(&under_way).map_err(refused)?;
    if change.kind == ChangeKind::Shrink {
        attached.shown.resize(change.next.size.0)?;
    }
    let firm = under_way.firm().map_err(refused).and_then(|()| match change.kind {
        ChangeKind::Shrink => mover.check_tail(&record.map, change.next.size.0).map_err(in_the_way),
        _ => Ok(()),
    });
    let firm = firm.and_then(|()| {
        attached.keep_with(&daemon.records, |record| record.change = Some(Box::new(change.clone())))
    });
    if let Err(error) = firm {
        if change.kind == ChangeKind::Shrink {
            attached.shown.resize(record.map.size.0)?;
        }
        return Err(error);
    }
    *attached.change() = Some(under_way);
    Ok(())
}

/// A device used as swap has its size in its header, and a ublk device keeps the size that it was made with.
fn check_shrink(attached: &Attached) -> Result<(), DeviceError> {
    let users = super::detach::users_of(attached, false);
    if users.iter().any(|user| user == "swap") {
        let path = attached.shown.path();
        let line =
            format!("{path} is in use as swap, whose size is in its header: run `swapoff {path}` first");
        return Err(DeviceError::new(ErrorKind::InUse, line));
    }
    match attached.shown.can_shrink() {
        true => Ok(()),
        false => Err(DeviceError::unsupported(
            "a device of this kind cannot become smaller on this kernel",
            "detach it first",
        )),
    }
}

/// The change is valid: switches to the new map. Returns a remark about the device, if there is one.
fn switch(daemon: &Daemon, attached: &Attached, change: &MapChange) -> Result<Option<String>, DeviceError> {
    attached
        .keep_with(&daemon.records, |record| (record.map, record.change) = (change.next.clone(), None))?;
    let under_way: Option<Change> = attached.change().take();
    if let Some(under_way) = under_way {
        under_way.switch();
    }
    match change.kind {
        ChangeKind::Grow => attached.shown.resize(change.next.size.0),
        ChangeKind::Shrink | ChangeKind::Move => Ok(None),
    }
}

/// The change is not valid: restores the state before it.
fn give_up(daemon: &Daemon, attached: &Attached, change: &MapChange) -> Result<Option<String>, DeviceError> {
    drop(attached.change().take());
    attached.keep_with(&daemon.records, |record| record.change = None)?;
    let size = attached.record().map.size.0;
    if change.kind == ChangeKind::Shrink {
        attached.shown.resize(size)?;
    }
    Ok(None)
}

#[expect(clippy::needless_pass_by_value, reason = "used where an error is mapped")]
pub(super) fn refused(error: ChangeError) -> DeviceError {
    DeviceError::new(ErrorKind::Unavailable, error.to_string())
}

#[expect(clippy::needless_pass_by_value, reason = "used where an error is mapped")]
fn in_the_way(error: TailError) -> DeviceError {
    let kind = match error {
        TailError::InTheWay { .. } => ErrorKind::InUse,
        TailError::Unseen(_) => ErrorKind::Unavailable,
    };
    DeviceError::new(kind, error.to_string())
}
