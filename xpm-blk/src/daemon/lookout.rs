//! Regular exchanges with the allocator. The daemon asks whether an allocation is going to end, and reports
//! how this host is linked to the appliances. Both are off the data path, and an allocator that does not
//! answer changes nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use xpm_client_core::owner::Heard;
use xpm_control::facts;
use xpm_protocol::Name;
use xpm_protocol::api::allocator::{Allocation, Appliance, Client, Ending};

use super::Daemon;

/// Interval of asking about the allocations.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// Interval of reporting facts about this host.
const TELL_EVERY: Duration = Duration::from_secs(300);

/// Asks and reports until it is dropped.
pub(crate) async fn run(daemon: Arc<Daemon>) {
    let mut told: Option<Instant> = None;
    loop {
        daemon.give_all_back().await;
        daemon.look_for_ends().await;
        daemon.look_for_orders();
        if told.is_none_or(|told| told.elapsed() >= TELL_EVERY) && daemon.tell_facts().await {
            told = Some(Instant::now());
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// Listens to events, until it is dropped, so that orders are noticed without delay.
pub(crate) async fn follow(daemon: Arc<Daemon>) {
    let mut listener = daemon.owner.listen();
    loop {
        for heard in listener.hear().await {
            daemon.sound_alarms(&heard);
            match heard {
                Heard::Allocation(name) => {
                    daemon.look_for_losses(&name);
                    daemon.obey(&name);
                }
                Heard::Missed => daemon.look_for_orders(),
                Heard::Appliance(_) => {}
            }
        }
    }
}

impl Daemon {
    /// Asks for the orders of every device.
    fn look_for_orders(self: &Arc<Daemon>) {
        let names: Vec<Name> = self.slots().keys().cloned().collect();
        for name in &names {
            self.look_for_losses(name);
            self.obey(name);
        }
    }

    async fn look_for_ends(&self) {
        let names: Vec<Name> = self.slots().keys().cloned().collect();
        for name in names {
            let asked: Result<Allocation, _> =
                self.owner.allocator.get(&format!("/v1/allocations/{name}")).await;
            if let Ok(allocation) = asked {
                self.hear_end(name, allocation.ending);
            }
        }
    }

    /// Logs an announced end, once, and stores it for the status.
    fn hear_end(&self, name: Name, ending: Option<Ending>) {
        let mut endings = self.endings();
        let known = endings.get(&name).map(|ending| (ending.reason, ending.frees));
        match ending {
            Some(ending) => {
                if known != Some((ending.reason, ending.frees)) {
                    tracing::warn!("{}", ending.text);
                }
                endings.insert(name, ending);
            }
            None => {
                if known.is_some() {
                    tracing::info!("allocation {name} does not end after all");
                }
                endings.remove(&name);
            }
        }
    }

    /// Reports the facts; returns whether the allocator accepted them. A host whose name is not valid for a
    /// client reports none.
    async fn tell_facts(&self) -> bool {
        let Ok(name) = facts::client_name() else { return true };
        let appliances: Result<Vec<Appliance>, _> = self.owner.allocator.get("/v1/appliances").await;
        let Ok(appliances) = appliances else { return false };
        let Ok(mut facts) = facts::find(self.owner.allocator.base(), &appliances).await else { return false };
        facts.client = Some(self.owner.client);
        let taken: Result<Client, _> = self.owner.allocator.put(&format!("/v1/clients/{name}"), &facts).await;
        taken.is_ok()
    }
}
