//! Tests of the service against simulated appliances, with faults between any two steps.
//!
//! The world holds the durable metadata, a few appliances that keep books of regions, reservations and grants, and
//! the calls and answers that are on their way. A seeded script of requests, faults, crashes and passing time drives
//! it. At its end all faults are repaired and time passes. Then each appliance must have exactly the grants of the
//! records and no reservation, and each request must have exactly one answer.

mod appliance;
mod behind;
mod cases;
mod ends;
mod handovers;
mod life;
mod lives;
mod policies;
mod queue;
mod script;
mod twins;
mod world;

use std::time::Duration;

use xpm_protocol::api::allocator::{Attach, Create};
use xpm_protocol::{BlockWish, ByteSize, ClientId, HostId};

use super::{Request, Settings};

const MIB: u64 = 1 << 20;
const TTL: Duration = Duration::from_secs(60);
const INTERVAL: Duration = Duration::from_secs(5);

const SETTINGS: Settings = Settings {
    interval: INTERVAL,
    reserve_ttl: TTL,
    reclaim_grace: Duration::from_secs(120),
    keep_decisions: Duration::from_secs(86_400),
    reconcile: Duration::from_secs(30),
    garbage_grace: Duration::from_secs(600),
};

fn create(name: &str, mib: u64, stripe: Option<u32>) -> Request {
    let region_len = Some(ByteSize(16 * MIB));
    let asked = Create::new(name.parse().unwrap(), ByteSize(mib * MIB));
    Request::Create(Create { stripe, region_len, ..asked })
}

fn attach(name: &str, client: u128, force: bool) -> Request {
    let attach = Attach {
        client: ClientId::from_u128(client),
        host: HostId::from_u128(1),
        host_name: format!("host{client}"),
        purpose: "ublk".into(),
        force,
        lose: false,
        blocks: Some(BlockWish::Kept),
    };
    Request::Attach { name: name.parse().unwrap(), attach, has: None }
}

fn delete(name: &str, force: bool) -> Request {
    Request::Delete { name: name.parse().unwrap(), force }
}

fn detach(name: &str, client: u128) -> Request {
    Request::Detach { name: name.parse().unwrap(), client: ClientId::from_u128(client) }
}
