//! Facts that a client finds out about itself: the speed of its link, and round-trip times to appliances.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;
use xpm_protocol::api::allocator::{Appliance, ApplianceState, ClientFacts};
use xpm_protocol::{ApplianceId, Name};

use crate::{host, link};

/// Number of measurements of each round trip. The shortest counts, because longer ones include waiting.
const TRIES: usize = 3;
/// Time limit of a measurement; a longer round trip is useless anyway.
const TRY_LIMIT: Duration = Duration::from_millis(500);
/// Most appliances that are measured: in a larger pool, labels describe nearness.
const TARGETS_MAX: usize = 512;
/// Most appliances that are measured at the same time.
const AT_ONCE: usize = 32;

/// The name of this host as a client: its host name. Fails if the host name is not a valid name.
pub fn client_name() -> io::Result<Name> {
    host::host_name()?.parse().map_err(io::Error::other)
}

/// Finds out facts about this host: the speed of the link towards the allocator, and the round-trip times of TCP
/// connections to the appliances that are up. Takes up to some seconds.
pub async fn find(allocator: &str, appliances: &[Appliance]) -> io::Result<ClientFacts> {
    let up = appliances.iter().filter(|one| one.state == ApplianceState::Up);
    let mut targets =
        up.take(TARGETS_MAX).filter_map(|one| Some((one.info.id, *one.info.endpoints.nbd.first()?)));
    let mut running: JoinSet<Option<(ApplianceId, u64)>> = JoinSet::new();
    let mut facts = ClientFacts {
        host: host::host_id()?,
        client: None,
        link_speed: None,
        round_trips: Default::default(),
    };
    loop {
        while running.len() < AT_ONCE
            && let Some((id, address)) = targets.next()
        {
            running.spawn(async move { round_trip(address).await.map(|time| (id, time)) });
        }
        match running.join_next().await {
            Some(measured) => facts.round_trips.extend(measured.ok().flatten()),
            None => break,
        }
    }
    let own = own_address(allocator, appliances).await;
    facts.link_speed = own.and_then(link::speed_of);
    Ok(facts)
}

/// The shortest time of several connection attempts, in nanoseconds: a connection takes one round trip.
async fn round_trip(address: SocketAddr) -> Option<u64> {
    let mut shortest = None;
    for _ in 0..TRIES {
        let began = Instant::now();
        let connected = tokio::time::timeout(TRY_LIMIT, TcpStream::connect(address)).await;
        if let Ok(Ok(_connection)) = connected {
            let time = began.elapsed().as_nanos() as u64;
            shortest = Some(shortest.map_or(time, |before: u64| before.min(time)));
        }
    }
    shortest
}

/// The address of this host towards appliances, or else towards the allocator. Sends nothing: connecting a UDP socket
/// only looks its route up.
async fn own_address(allocator: &str, appliances: &[Appliance]) -> Option<IpAddr> {
    let first = appliances.iter().find_map(|one| one.info.endpoints.nbd.first().copied());
    let target = match first {
        Some(address) => address,
        None => {
            let authority = allocator.strip_prefix("http://")?.split('/').next()?;
            tokio::net::lookup_host(authority).await.ok()?.next()?
        }
    };
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::bind((any, 0)).await.ok()?;
    socket.connect(target).await.ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_round_trip_is_measured_or_not() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let time = round_trip(address).await.unwrap();
        assert!(time > 0 && time < TRY_LIMIT.as_nanos() as u64);
        drop(listener);
        assert_eq!(round_trip(address).await, None, "nobody listens");
    }

    #[tokio::test]
    async fn facts_are_found_without_appliances() {
        let facts = find("http://127.0.0.1:1", &[]).await.unwrap();
        assert_eq!(facts.host, host::host_id().unwrap());
        assert!(facts.round_trips.is_empty());
        assert_eq!(facts.link_speed, None, "loopback has no speed");
    }
}
