//! Tests of the real allocator with real appliances, as processes.

mod cluster;

use std::time::Duration;

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{
    Allocation, AllocationState, Appliance, ApplianceState, Attach, Create, Map, Status,
};
use xpm_protocol::api::appliance::{Grant, Region, RegionState};
use xpm_protocol::{ByteSize, ClientId, Epoch, HostId};

use cluster::{Cluster, allocator_command, eventually, refusal};

const MIB: u64 = 1 << 20;

fn create(name: &str, mib: u64, stripe: Option<u32>) -> Create {
    let region_len = Some(ByteSize(16 * MIB));
    Create { stripe, region_len, ..Create::new(name.parse().unwrap(), ByteSize(mib * MIB)) }
}

fn attach(client: u128, force: bool) -> Attach {
    let (host_name, purpose) = (format!("host{client}"), "ublk".to_owned());
    Attach {
        client: ClientId::from_u128(client),
        host: HostId::from_u128(1),
        host_name,
        purpose,
        force,
        lose: false,
        blocks: None,
    }
}

#[tokio::test]
async fn a_killed_allocator_forgets_nothing() {
    let mut cluster = Cluster::start(3, 64 * MIB).await;
    let client = cluster.client();
    let made: Allocation = client.post("/v1/allocations", &create("a", 96, Some(3))).await.unwrap();
    assert_eq!((made.state, made.regions.len()), (AllocationState::Ready, 6));
    let map: Map = client.put("/v1/allocations/a/owner", &attach(1, false)).await.unwrap();
    assert_eq!((map.grants.len(), map.epoch), (3, Epoch::FIRST));
    let listed: Vec<Allocation> = client.get("/v1/allocations").await.unwrap();

    cluster.kill_allocator();
    cluster.start_allocator(&[]).await;
    assert_eq!(client.get::<Vec<Allocation>>("/v1/allocations").await.unwrap(), listed);
    assert_eq!(
        client.get::<Vec<Appliance>>("/v1/appliances").await.unwrap().len(),
        3,
        "known before they are heard"
    );
    assert_eq!(client.put::<_, Map>("/v1/allocations/a/owner", &attach(1, false)).await.unwrap(), map);
    cluster.all_up().await;
    client.delete("/v1/allocations/a?force=true").await.unwrap();
    cluster.nothing_used().await;
}

#[tokio::test]
async fn regions_are_spread_over_appliances() {
    let cluster = Cluster::start(3, 64 * MIB).await;
    let client = cluster.client();
    let linear: Allocation = client.post("/v1/allocations", &create("linear", 32, None)).await.unwrap();
    assert_eq!(linear.regions.len(), 2);
    assert_eq!(linear.regions[0].appliance, linear.regions[1].appliance, "one appliance holds all of it");
    let striped: Allocation = client.post("/v1/allocations", &create("striped", 96, Some(3))).await.unwrap();
    for row in striped.regions.chunks(3) {
        let distinct: std::collections::BTreeSet<_> = row.iter().map(|region| region.appliance).collect();
        assert_eq!(distinct.len(), 3);
    }
    let appliances = client.get::<Vec<Appliance>>("/v1/appliances").await.unwrap();
    assert!(appliances.iter().all(|appliance| appliance.state == ApplianceState::Up));
    let mut regions: Vec<u64> = appliances.iter().map(|appliance| appliance.regions).collect();
    regions.sort_unstable();
    assert_eq!(regions, [2, 2, 4]);
}

#[tokio::test]
async fn impossible_requests_are_refused() {
    let cluster = Cluster::start(2, 64 * MIB).await;
    let client = cluster.client();
    client.post::<_, Allocation>("/v1/allocations", &create("a", 16, None)).await.unwrap();
    let post = async |body: &Create| refusal(client.post::<_, Allocation>("/v1/allocations", body).await);
    assert_eq!(post(&create("a", 16, None)).await.0, ErrorKind::Conflict);
    assert_eq!(post(&create("b", 0, None)).await.0, ErrorKind::Invalid);
    let (kind, line) = post(&create("b", 128, None)).await;
    assert!(kind == ErrorKind::NoSpace && line.contains("112MiB free"), "{line}");
    let misspelt = serde_json::json!({ "name": "b", "size": "16MiB", "strip": 2 });
    let (kind, line) = refusal(client.post::<_, Allocation>("/v1/allocations", &misspelt).await);
    assert!(kind == ErrorKind::Invalid && line.contains("strip"), "{line}");
    client.put::<_, Map>("/v1/allocations/a/owner", &attach(1, false)).await.unwrap();
    let (kind, line) = refusal(client.delete("/v1/allocations/a").await);
    assert!(kind == ErrorKind::InUse && line.contains("host1") && line.contains("force"), "{line}");
    let (kind, _) = refusal(client.put::<_, Map>("/v1/allocations/a/owner", &attach(2, false)).await);
    assert_eq!(kind, ErrorKind::InUse);
    assert_eq!(refusal(client.delete("/v1/allocations/b").await).0, ErrorKind::NotFound);
    let status: Status = client.get("/v1/status").await.unwrap();
    assert_eq!((status.allocations, status.capacity), (1, ByteSize(128 * MIB)));
}

#[tokio::test]
async fn memory_comes_back_at_once() {
    let cluster = Cluster::start(2, 64 * MIB).await;
    let client = cluster.client();
    for _ in 0..3 {
        client.post::<_, Allocation>("/v1/allocations", &create("a", 128, Some(2))).await.unwrap();
        client.delete("/v1/allocations/a").await.unwrap();
    }
    cluster.nothing_used().await;
}

#[tokio::test]
async fn a_new_owner_has_a_new_epoch_everywhere() {
    let cluster = Cluster::start(2, 64 * MIB).await;
    let client = cluster.client();
    client.post::<_, Allocation>("/v1/allocations", &create("a", 32, Some(2))).await.unwrap();
    let first: Map = client.put("/v1/allocations/a/owner", &attach(1, false)).await.unwrap();
    let second: Map = client.put("/v1/allocations/a/owner", &attach(2, true)).await.unwrap();
    assert!(first.grants.iter().zip(&second.grants).all(|(old, new)| old.id == new.id && old.key != new.key));
    for appliance in cluster.appliance_clients().await {
        let grants: Vec<Grant> = appliance.get("/v1/grants").await.unwrap();
        assert_eq!(grants.iter().map(|grant| grant.epoch).collect::<Vec<_>>(), [Epoch(2)]);
    }
    let owner = format!("/v1/allocations/a/owner/{}", ClientId::from_u128(2));
    client.delete(&owner).await.unwrap();
    client.delete(&owner).await.unwrap();
    client.delete("/v1/allocations/a").await.unwrap();
}

#[tokio::test]
async fn a_half_made_allocation_is_undone() {
    let cluster = Cluster::start(2, 64 * MIB).await;
    let client = cluster.client().with_limit(Duration::from_secs(30));
    cluster.stop_appliance(1);
    let (kind, line) =
        refusal(client.post::<_, Allocation>("/v1/allocations", &create("a", 128, Some(2))).await);
    assert!(matches!(kind, ErrorKind::Unavailable | ErrorKind::NoSpace), "{line}");
    let other = cluster.appliance_clients().await.remove(0);
    let used = |regions: Vec<Region>| {
        regions.iter().any(|region| matches!(region.state, RegionState::Reserved | RegionState::Granted))
    };
    assert!(!used(other.get("/v1/regions").await.unwrap()), "what the other one had reserved is given back");
    cluster.continue_appliance(1);
    eventually("the record goes", async || {
        client.get::<Vec<Allocation>>("/v1/allocations").await.unwrap().is_empty()
    })
    .await;
    cluster.nothing_used().await;
    // Memory that was given back counts as free once the appliances have cleared it and reported that.
    eventually("the allocator knows that all is free", async || {
        let appliances = client.get::<Vec<Appliance>>("/v1/appliances").await.unwrap();
        appliances.iter().map(|appliance| appliance.status.free.0).sum::<u64>() == 128 * MIB
    })
    .await;
    client.post::<_, Allocation>("/v1/allocations", &create("a", 128, Some(2))).await.unwrap();
}

#[tokio::test]
async fn a_silent_appliance_serves_nobody_and_can_be_forgotten() {
    let mut cluster = Cluster::start(2, 64 * MIB).await;
    let client = cluster.client();
    client.post::<_, Allocation>("/v1/allocations", &create("a", 32, Some(2))).await.unwrap();
    let lost = cluster.kill_appliance(1).await;
    eventually("it is silent", async || {
        client.get::<Status>("/v1/status").await.unwrap().appliances_silent == 1
    })
    .await;
    let made: Allocation = client.post("/v1/allocations", &create("b", 32, None)).await.unwrap();
    assert!(made.regions.iter().all(|region| region.appliance != lost));
    let path = format!("/v1/appliances/{lost}");
    let (kind, line) = refusal(client.delete(&path).await);
    assert!(kind == ErrorKind::InUse && line.contains("`a`"), "{line}");
    client.delete("/v1/allocations/a").await.unwrap();
    client.delete(&path).await.unwrap();
    eventually("a is gone", async || {
        client.get::<Vec<Allocation>>("/v1/allocations").await.unwrap().len() == 1
    })
    .await;
}

#[test]
fn an_unusable_configuration_keeps_it_from_starting() {
    let directory = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let place = taken.local_addr().unwrap().to_string();
    let data = directory.path().join("data");
    let config = directory.path().join("allocator.toml");
    std::fs::write(&config, "listen = \"127.0.0.1:0\"\nhartbeat = \"5s\"\n").unwrap();
    let [data, config] = [&data, &config].map(|path| path.to_str().unwrap());
    for (arguments, parts) in [
        (vec!["--listen", &place, "--data", data], vec![place.as_str(), "in use"]),
        (vec!["--listen", "127.0.0.1:0", "--data", "/proc/nowhere"], vec!["/proc/nowhere", "--data"]),
        (vec!["--listen", "0.0.0.0:0", "--data", data], vec!["--token-file", "--insecure"]),
        (vec!["--token-file", "/nonexistent", "--data", data], vec!["/nonexistent", "openssl"]),
        (vec!["--config", config], vec!["allocator.toml:2:1", "hartbeat"]),
        (vec!["--heartbeat", "0s", "--data", data], vec!["heartbeat", "100ms"]),
    ] {
        let output = allocator_command().args(&arguments).output().unwrap();
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && parts.iter().all(|part| line.contains(part)),
            "{arguments:?}: {line}"
        );
        assert_eq!(line.lines().count(), 1, "{line}");
    }
}

#[tokio::test]
async fn one_data_directory_has_one_allocator() {
    let cluster = Cluster::start(0, 0).await;
    let data = cluster.data();
    let output = allocator_command().args(["--listen", "127.0.0.1:0", "--data", &data]).output().unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && line.contains("another allocator uses"), "{line}");
}
