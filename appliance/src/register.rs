//! Registers this appliance with the allocator, and sends heartbeats with its status.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::UdpSocket;
use xpm_control::client::{Client, ClientError};
use xpm_control::discover;
use xpm_control::link;
use xpm_control::listen::Place;
use xpm_control::token::Token;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Heartbeat, HeartbeatAnswer};
use xpm_protocol::api::appliance::{Endpoints, Info, Medium, Status};
use xpm_protocol::policy::Labels;
use xpm_protocol::text::short_line;
use xpm_protocol::units::ByteSize;
use xpm_protocol::{ApplianceId, HostId, Life, LinkSpeed, Name};

use crate::control::Appliance;

/// Time between heartbeats unless the allocator sets another one.
const INTERVAL_DEFAULT: Duration = Duration::from_secs(5);
/// Shortest and longest time between heartbeats that the allocator can set.
const INTERVAL_RANGE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(300));
/// Longest pause before an allocator that does not answer is tried again.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// The same with several allocators: another one will lead soon.
const BACKOFF_MAX_OF_SEVERAL: Duration = Duration::from_millis(500);
/// The same when the allocator refuses this appliance: it accepts it after the other one has been silent for
/// a while.
const BACKOFF_MAX_OF_REFUSED: Duration = Duration::from_secs(5);
/// Time limit of a heartbeat when another allocator may lead by now.
const LIMIT_OF_SEVERAL: Duration = Duration::from_secs(3);
/// First pause between tries; it grows from there.
const BACKOFF_MIN: Duration = Duration::from_millis(250);
/// How long a search for allocators waits for answers, and the pause after it.
const DISCOVER_LIMIT: Duration = Duration::from_secs(10);
const DISCOVER_AGAIN: Duration = Duration::from_secs(1);
/// Longest text of an error that is logged, in bytes.
const ERROR_LEN_MAX: usize = 500;
/// Changes within this time are reported together.
const GATHER: Duration = Duration::from_millis(20);

/// The properties that do not change while the daemon runs.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The appliance's id.
    pub id: ApplianceId,
    /// The life of the appliance that this process is.
    pub life: Life,
    /// Its name.
    pub name: Name,
    /// The running kernel.
    pub host: HostId,
    /// The kind of storage of its memory.
    pub medium: Medium,
    /// Size of the regions that it keeps ready, in bytes.
    pub region_len: u64,
    /// The address of the control interface.
    pub control: Place,
    /// The addresses of NBD; at least one.
    pub nbd: Vec<SocketAddr>,
    /// The addresses of RDMA, if it is served.
    pub rdma: Vec<SocketAddr>,
    /// Unix socket of NBD.
    pub nbd_unix: PathBuf,
    /// Socket that passes memory, if there is one.
    pub shm: Option<PathBuf>,
    /// Names and addresses of this host for others, the best first.
    pub advertise: Vec<String>,
    /// Its labels, as set by the operator.
    pub labels: Labels,
    /// Speed of its link, if the operator set it.
    pub link_speed: Option<LinkSpeed>,
}

/// Sends heartbeats until cancelled (the future is dropped).
pub async fn run(client: Client, identity: Identity, appliance: Arc<Appliance>) {
    let client = if client.has_several() { client.with_limit(LIMIT_OF_SEVERAL) } else { client };
    let mut link = LinkState::default();
    let mut meter = Meter::default();
    loop {
        let beat = beat(&client, &identity, &appliance, &mut meter).await;
        let pause = link.after(&client, beat);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = appliance.table().news(), if link.failures == 0 => tokio::time::sleep(GATHER).await,
        }
    }
}

/// Looks for allocators on the network until it finds some, and registers with them; until cancelled.
pub async fn look_for(group: Name, token: Option<Token>, identity: Identity, appliance: Arc<Appliance>) {
    let mut said = false;
    loop {
        let line = match discover::find(&group, DISCOVER_LIMIT).await {
            Ok(Some(urls)) => match Client::one_of(&urls, token.clone()) {
                Ok(client) => {
                    tracing::info!("found the allocator at {urls}");
                    return run(client, identity, appliance).await;
                }
                Err(error) => error.to_string(),
            },
            Ok(None) => format!("no allocator of group `{group}` answers on this network"),
            Err(error) => error.to_string(),
        };
        if !std::mem::replace(&mut said, true) {
            tracing::warn!("{line}; looking on");
        }
        tokio::time::sleep(DISCOVER_AGAIN).await;
    }
}

async fn beat(
    client: &Client,
    identity: &Identity,
    appliance: &Arc<Appliance>,
    meter: &mut Meter,
) -> Result<Duration, Unheard> {
    let info = identity.info(client).await.map_err(Unheard::Away)?;
    let asked = appliance.clone();
    let status = tokio::task::spawn_blocking(move || asked.status()).await;
    let status = status.map_err(|error| Unheard::Away(error.to_string()))?;
    let first = info.endpoints.nbd.first().map(SocketAddr::ip);
    let status = Status { traffic: first.and_then(|address| meter.traffic(address)), ..status };
    let path = format!("/v1/appliances/{}", info.id);
    let answer: Result<HeartbeatAnswer, ClientError> = client.put(&path, &Heartbeat { info, status }).await;
    if let Ok(answer) = &answer {
        appliance.known().hear(answer.metadata);
    }
    match answer {
        Ok(HeartbeatAnswer { interval, .. }) if interval.0.is_zero() => Ok(INTERVAL_DEFAULT),
        Ok(HeartbeatAnswer { interval, .. }) => Ok(interval.0.clamp(INTERVAL_RANGE.0, INTERVAL_RANGE.1)),
        Err(error) => {
            // The text comes from the network, so it is shortened.
            let line = short_line(&xpm_control::error_line(&error), ERROR_LEN_MAX);
            Err(if error.kind() == ErrorKind::Conflict {
                Unheard::Refused(line)
            } else {
                Unheard::Away(line)
            })
        }
    }
}

/// Why the allocator did not accept a heartbeat.
#[derive(Debug)]
enum Unheard {
    /// The allocator cannot be reached, or cannot accept a heartbeat now.
    Away(String),
    /// The allocator accepts no heartbeat of this appliance: another one has its id or its name.
    Refused(String),
}

/// Measures the traffic of a link between heartbeats.
#[derive(Debug, Default)]
struct Meter {
    last: Option<(String, Instant, (u64, u64))>,
}

impl Meter {
    /// The traffic since the last call, of the busier direction; none at first, or when the link has no
    /// counters.
    fn traffic(&mut self, address: IpAddr) -> Option<LinkSpeed> {
        let name = link::link_of(address)?;
        let (now, bytes) = (Instant::now(), link::bytes(&name)?);
        let before = self.last.replace((name.clone(), now, bytes));
        let (_, then, (received, sent)) = before.filter(|(link, ..)| *link == name)?;
        let busier = bytes.0.saturating_sub(received).max(bytes.1.saturating_sub(sent));
        let seconds = now.saturating_duration_since(then).as_secs_f64().max(0.001);
        Some(LinkSpeed((busier as f64 * 8.0 / seconds) as u64))
    }
}

/// Whether the allocator accepts heartbeats; logs changes of that.
#[derive(Debug, Default)]
struct LinkState {
    /// Number of consecutive failures.
    failures: u32,
    registered: bool,
    /// Whether it was logged that the allocator refuses this appliance.
    refused: bool,
}

impl LinkState {
    /// How long to wait after a heartbeat with this result.
    fn after(&mut self, client: &Client, beat: Result<Duration, Unheard>) -> Duration {
        match beat {
            Ok(interval) => {
                match (self.registered, self.failures) {
                    (false, _) => tracing::info!("registered with the allocator at {}", client.base()),
                    (true, 0) => {}
                    (true, _) => tracing::info!("the allocator at {} is back", client.base()),
                }
                *self = LinkState { failures: 0, registered: true, refused: false };
                interval
            }
            Err(Unheard::Refused(line)) => {
                if !std::mem::replace(&mut self.refused, true) {
                    tracing::error!(
                        "the allocator refuses this appliance, which lends nothing until it is accepted: \
                         {line}"
                    );
                }
                self.failures = self.failures.saturating_add(1);
                backoff(self.failures, BACKOFF_MAX_OF_REFUSED, random_share())
            }
            Err(Unheard::Away(error)) => {
                if self.failures == 0 {
                    tracing::warn!(
                        "the allocator does not hear this appliance ({error}); trying on, serving on"
                    );
                }
                self.failures = self.failures.saturating_add(1);
                let most = if client.has_several() { BACKOFF_MAX_OF_SEVERAL } else { BACKOFF_MAX };
                backoff(self.failures, most, random_share())
            }
        }
    }
}

/// How long to wait after this many consecutive failures: a random time below a limit that doubles up to
/// `most`, so that many appliances do not reconnect to an allocator all at once. `share` is from 0 to 1.
fn backoff(failures: u32, most: Duration, share: f64) -> Duration {
    let limit = BACKOFF_MIN.saturating_mul(1 << failures.min(16)).min(most);
    // Not quite zero, so that no loop runs without a pause.
    limit.mul_f64(share.clamp(0.0, 1.0)).max(BACKOFF_MIN / 10)
}

fn random_share() -> f64 {
    // Without random numbers the wait has its maximum.
    xpm_control::random::bytes::<4>()
        .map_or(1.0, |bytes| f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX))
}

impl Identity {
    /// Whether the allocator at this URL is on another machine, which cannot reach the local addresses that
    /// it would be given. A host name counts as another machine.
    pub fn is_local_only(&self, allocator: &str) -> bool {
        let Some(authority) = allocator.strip_prefix("http://") else { return false };
        let local = authority.starts_with("127.")
            || authority.starts_with("localhost")
            || authority.starts_with("[::1]");
        !local
            && self.advertise.is_empty()
            && self.nbd.iter().all(|one| one.ip().to_canonical().is_loopback())
    }

    /// The information for other machines. Determined anew each time, because addresses change.
    async fn info(&self, client: &Client) -> Result<Info, String> {
        let addresses = self.addresses(client).await?;
        let first = addresses.first().ok_or("this host has no address to be reached by")?.ip();
        let control = match &self.control {
            Place::Tcp(address) => {
                // A control interface on the loopback address is not reachable by any other name.
                let host = self.advertise.first().map(|one| host_of(one).to_owned());
                let host = host.filter(|_| !address.ip().to_canonical().is_loopback());
                let ip = if address.ip().is_unspecified() { first } else { address.ip() };
                format!("http://{}", host_port(host, ip, address.port()))
            }
            Place::Unix(path) => format!("unix:{}", path.display()),
        };
        Ok(Info {
            id: self.id,
            name: self.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            control,
            endpoints: Endpoints {
                host: self.host,
                nbd: addresses,
                names: self.names(),
                rdma: self.rdma.clone(),
                nbd_unix: Some(self.nbd_unix.clone()),
                shm: self.shm.clone(),
            },
            medium: self.medium,
            region_len: ByteSize(self.region_len),
            labels: self.labels.clone(),
            link_speed: self.link_speed.or_else(|| link::speed_of(first)),
            life: Some(self.life),
        })
    }

    /// Port of NBD where `--advertise` names none.
    fn port(&self) -> u16 {
        self.nbd.first().map_or(0, SocketAddr::port)
    }

    /// The names in `--advertise`, with ports.
    fn names(&self) -> Vec<String> {
        let named = self.advertise.iter().filter(|one| host_of(one).parse::<IpAddr>().is_err());
        named.map(|one| format!("{}:{}", host_of(one), port_of(one).unwrap_or(self.port()))).collect()
    }

    /// The addresses of the NBD ports, in order of preference. A name that cannot be resolved now is skipped,
    /// as long as there is another address.
    async fn addresses(&self, client: &Client) -> Result<Vec<SocketAddr>, String> {
        if self.advertise.is_empty() {
            return self.own_addresses(client).await;
        }
        let (mut all, mut failure) = (Vec::new(), String::new());
        for one in &self.advertise {
            let place = (host_of(one), port_of(one).unwrap_or(self.port()));
            match tokio::net::lookup_host(place).await {
                Ok(found) => all.extend(found),
                Err(error) => {
                    failure = format!("cannot find the address of --advertise {one}: {error}");
                    tracing::debug!("{failure}");
                }
            }
        }
        if all.is_empty() { Err(failure) } else { Ok(without_repeats(all)) }
    }

    /// The addresses that it listens at; an unspecified address is replaced by the one from which this host
    /// reaches the allocator.
    async fn own_addresses(&self, client: &Client) -> Result<Vec<SocketAddr>, String> {
        let mut all = Vec::new();
        for address in &self.nbd {
            let ip = match address.ip() {
                ip if ip.is_unspecified() => towards(client.base()).await?,
                ip => ip,
            };
            all.push(SocketAddr::new(ip, address.port()));
        }
        Ok(without_repeats(all))
    }
}

fn without_repeats(all: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let mut once: Vec<SocketAddr> = Vec::with_capacity(all.len());
    all.into_iter().for_each(|address| {
        if !once.contains(&address) {
            once.push(address);
        }
    });
    once
}

/// The host of `HOST`, `IP`, `HOST:PORT` or `[IP]:PORT`.
fn host_of(advertised: &str) -> &str {
    let host = match port_of(advertised) {
        Some(_) => advertised.rsplit_once(':').map_or(advertised, |(host, _)| host),
        None => advertised,
    };
    host.trim_start_matches('[').trim_end_matches(']')
}

/// The port; none if the text has none, as an IPv6 address without brackets.
fn port_of(advertised: &str) -> Option<u16> {
    let (host, port) = advertised.rsplit_once(':')?;
    let is_port = !host.contains(':') || host.ends_with(']');
    port.parse().ok().filter(|_| is_port)
}

fn host_port(host: Option<String>, ip: IpAddr, port: u16) -> String {
    match host {
        // An IPv6 address is written in brackets.
        Some(host) => match host.parse::<IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, port).to_string(),
            Err(_) => format!("{host}:{port}"),
        },
        None => SocketAddr::new(ip, port).to_string(),
    }
}

/// The address from which this host reaches another. Sends no packet: connecting a UDP socket only looks up
/// its route.
async fn towards(base: &str) -> Result<IpAddr, String> {
    let Some(authority) = base.strip_prefix("http://") else { return Ok(Ipv4Addr::LOCALHOST.into()) };
    let authority = authority.split('/').next().unwrap_or_default();
    let has_port = authority.rsplit(':').next().is_some_and(|port| port.parse::<u16>().is_ok());
    let target = if has_port { authority.to_owned() } else { format!("{authority}:80") };
    let failed = |error: std::io::Error| {
        format!(
            "cannot determine the address from which this host reaches \
             {base}: {error}"
        )
    };
    let peers: Vec<SocketAddr> = tokio::net::lookup_host(target).await.map_err(failed)?.collect();
    let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
    for peer in peers {
        let any: IpAddr =
            if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        match route(any, peer).await {
            Ok(ip) => return Ok(ip),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

async fn route(any: IpAddr, peer: SocketAddr) -> std::io::Result<IpAddr> {
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(peer).await?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_grows_to_its_limit_and_spreads() {
        let one = |failures, share| backoff(failures, BACKOFF_MAX, share);
        assert_eq!(one(1, 1.0), Duration::from_millis(500));
        assert_eq!(one(3, 1.0), Duration::from_secs(2));
        assert_eq!(one(50, 1.0), BACKOFF_MAX);
        assert_eq!(one(50, 0.5), BACKOFF_MAX / 2);
        assert!(one(50, 0.0) > Duration::ZERO);
        assert_eq!(backoff(50, BACKOFF_MAX_OF_SEVERAL, 1.0), BACKOFF_MAX_OF_SEVERAL);
        assert!((0.0..=1.0).contains(&random_share()));
    }

    #[tokio::test]
    async fn the_address_towards_loopback_is_loopback() {
        for base in ["http://127.0.0.1:7700", "http://127.0.0.1", "unix:/run/a.sock"] {
            assert!(towards(base).await.unwrap().is_loopback(), "{base}");
        }
    }

    #[test]
    fn an_advertised_place_has_a_host_and_an_optional_port() {
        let parts = |text| (host_of(text), port_of(text));
        assert_eq!(parts("box"), ("box", None));
        assert_eq!(parts("box.lan:7"), ("box.lan", Some(7)));
        assert_eq!(parts("10.0.0.1"), ("10.0.0.1", None));
        assert_eq!(parts("10.0.0.1:7"), ("10.0.0.1", Some(7)));
        assert_eq!(parts("fe80::1"), ("fe80::1", None));
        assert_eq!(parts("[fe80::1]:7"), ("fe80::1", Some(7)));
        assert_eq!(parts("[fe80::1]"), ("fe80::1", None));
    }

    #[test]
    fn addresses_in_urls() {
        let ip = IpAddr::from([10, 0, 0, 1]);
        assert_eq!(host_port(None, ip, 1), "10.0.0.1:1");
        assert_eq!(host_port(Some("fe80::1".into()), ip, 1), "[fe80::1]:1");
        assert_eq!(host_port(Some("box".into()), ip, 1), "box:1");
    }
}
