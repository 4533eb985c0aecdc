//! Tests of the store and the election with a real etcd.

use tokio::runtime::Runtime;
use xpm_tests::etcd::Etcd as Cluster;

use super::journal::{COMPLETE_KEY, PARTS};
use super::*;
use crate::etcd::{Election, Term};
use crate::store::suite;
use crate::testing::allocation;

/// A real etcd, and the runtime of its clients.
struct Scene {
    runtime: Runtime,
    cluster: Cluster,
}

impl Scene {
    fn new(members: usize) -> Scene {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Scene { runtime, cluster: Cluster::start(members) }
    }

    fn election(&self, url: &str) -> Election {
        let etcd = Etcd::new(self.cluster.store("test").parse().unwrap());
        Election::new(self.runtime.block_on(etcd).unwrap(), url.to_owned())
    }

    /// Waits until the candidate leads.
    fn win(&self, election: &Election) -> Term {
        let campaign = election.campaign(|_| {});
        let limited = async { tokio::time::timeout(xpm_tests::LIMIT, campaign).await };
        self.runtime.block_on(limited).expect("it leads in time")
    }

    fn open(&self, election: &Election, term: &Term) -> Result<EtcdStore, StoreError> {
        EtcdStore::open(election.etcd().clone(), term.revision(), self.runtime.handle())
    }

    fn resign(&self, election: &Election) {
        self.runtime.block_on(election.resign());
    }

    fn put(&self, etcd: &Etcd, key: &str, value: &str) {
        let put = etcd.ask(LIMIT, async |mut member: Client| member.put(etcd.key(key), value, None).await);
        self.runtime.block_on(put).unwrap();
    }
}

fn batch(number: u128, name: &str) -> Batch {
    vec![Change::Allocation(Box::new(allocation(number, name)))]
}

fn names(store: &mut EtcdStore) -> Vec<String> {
    store.load().unwrap().allocations.iter().map(|one| one.name.to_string()).collect()
}

#[test]
fn the_store_passes_the_common_suite() {
    let scene = Scene::new(1);
    let election = scene.election("http://a:1");
    let term = scene.win(&election);
    suite::committed_changes_are_there_after_reopening(|| scene.open(&election, &term).unwrap());
}

#[test]
fn a_deposed_leader_cannot_write_and_the_next_has_all() {
    let scene = Scene::new(1);
    let (old, new) = (scene.election("http://a:1"), scene.election("http://b:1"));
    let term = scene.win(&old);
    let mut deposed = scene.open(&old, &term).unwrap();
    deposed.commit(&[batch(1, "a")]).unwrap();
    scene.resign(&old);
    // There is no leader any more: even so the write is refused.
    assert!(matches!(deposed.commit(&[batch(2, "b")]), Err(StoreError::Deposed { .. })));
    let next = scene.win(&new);
    assert!(next.revision() > term.revision());
    let mut store = scene.open(&new, &next).unwrap();
    store.commit(&[batch(3, "c")]).unwrap();
    assert!(matches!(deposed.commit(&[batch(1, "x")]), Err(StoreError::Deposed { .. })));
    assert_eq!(names(&mut store), ["a", "c"]);
}

#[test]
fn a_write_that_arrives_late_or_twice_changes_nothing() {
    let scene = Scene::new(1);
    let election = scene.election("http://a:1");
    let term = scene.win(&election);
    let mut store = scene.open(&election, &term).unwrap();
    let entries = store.entries(&batch(1, "old")).unwrap();
    let next = format!("{}-{}", store.term, store.writes + 1);
    let late = store.transaction(entries.clone(), &next);
    let send = |transaction: &Txn| {
        let etcd = election.etcd();
        let sent = etcd.ask(LIMIT, async |mut member: Client| member.txn(transaction.clone()).await);
        scene.runtime.block_on(sent).unwrap().succeeded()
    };
    // The first attempt arrives, but not its answer; the second attempt finds that the write is done.
    assert!(send(&late));
    scene.runtime.block_on(store.write(entries)).unwrap();
    store.commit(&[batch(1, "new")]).unwrap();
    assert!(!send(&late));
    assert_eq!(names(&mut store), ["new"]);
}

#[test]
fn the_next_leader_finishes_a_complete_journal_and_drops_another() {
    let scene = Scene::new(1);
    let election = scene.election("http://a:1");
    let term = scene.win(&election);
    let mut store = scene.open(&election, &term).unwrap();
    store.commit(&[batch(1, "a")]).unwrap();
    let mut part = |number, name| {
        let entries = store.entries(&batch(number, name)).unwrap();
        serde_json::to_string(&entries.into_all()).unwrap()
    };
    let (first, second) = (part(1, "x"), part(2, "y"));
    scene.put(election.etcd(), &format!("{PARTS}00000000"), &first);
    assert_eq!(names(&mut scene.open(&election, &term).unwrap()), ["a"]);
    scene.put(election.etcd(), &format!("{PARTS}00000000"), &first);
    scene.put(election.etcd(), &format!("{PARTS}00000001"), &second);
    scene.put(election.etcd(), COMPLETE_KEY, "2");
    let mut store = scene.open(&election, &term).unwrap();
    assert_eq!(names(&mut store), ["x", "y"]);
    assert_eq!(scene.runtime.block_on(keys_below(election.etcd(), PARTS)).unwrap(), [""; 0]);
    scene.put(election.etcd(), COMPLETE_KEY, "2");
    assert!(matches!(scene.open(&election, &term), Err(StoreError::Damaged { .. })));
}

#[test]
fn a_newer_schema_is_refused_and_left_alone() {
    let scene = Scene::new(1);
    let election = scene.election("http://a:1");
    let term = scene.win(&election);
    scene.put(election.etcd(), SCHEMA_KEY, &(SCHEMA + 1).to_string());
    for _ in 0..2 {
        let error = scene.open(&election, &term).unwrap_err();
        assert!(matches!(error, StoreError::Newer { found, .. } if found == SCHEMA + 1), "{error}");
    }
}

#[test]
fn more_than_one_page_is_read() {
    let scene = Scene::new(1);
    let election = scene.election("http://a:1");
    let term = scene.win(&election);
    let mut store = scene.open(&election, &term).unwrap();
    let batches: Vec<Batch> = (0..600).map(|number| batch(number, &format!("n{number:03}"))).collect();
    store.commit(&batches).unwrap();
    let expected: Vec<String> = (0..600).map(|number| format!("n{number:03}")).collect();
    assert_eq!(names(&mut scene.open(&election, &term).unwrap()), expected);
}

#[test]
fn a_leader_without_answers_of_etcd_stops_before_its_lease_ends() {
    let mut scene = Scene::new(1);
    let election = scene.election("http://a:1");
    let begun = std::time::Instant::now();
    let term = scene.win(&election);
    assert!(term.holds());
    scene.cluster.kill(0);
    let keep = async { tokio::time::timeout(Duration::from_secs(5), election.keep(&term)).await };
    let stopped = std::thread::scope(|scope| {
        let stopped = scope.spawn(|| {
            xpm_tests::wait_until("it stops", || !term.holds());
            begun.elapsed()
        });
        // It keeps trying for a while: the lease may still exist when etcd is back.
        assert!(scene.runtime.block_on(keep).is_err());
        stopped.join().unwrap()
    });
    assert!(stopped < Duration::from_secs(4), "{stopped:?}");
}

#[test]
fn one_of_three_members_may_fail() {
    let mut scene = Scene::new(3);
    let election = scene.election("http://a:1");
    let term = scene.win(&election);
    let mut store = scene.open(&election, &term).unwrap();
    store.commit(&[batch(1, "a")]).unwrap();
    let leader = scene.cluster.leader();
    scene.cluster.kill(leader);
    let begun = std::time::Instant::now();
    store.commit(&[batch(2, "b")]).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(names(&mut store), ["a", "b"]);
}
