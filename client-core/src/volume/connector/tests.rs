//! A connector against servers that refuse, vanish and come back.

use std::net::{SocketAddr, TcpListener};

use xpm_protocol::api::appliance::Endpoints;
use xpm_protocol::nbd::{BlockSizes, ExportInfo, ExportName, SessionTag, TransmissionFlags};
use xpm_protocol::{ApplianceId, GrantId, GrantKey};
use xpm_transport::io::{IoBuf, Operation};
use xpm_transport::nbd::server::{Exports, Listener, Opened, Server, ServerOptions};
use xpm_transport::store::{Posted, Store};

use super::super::port::Bell;
use super::*;

const LIMIT: Duration = Duration::from_secs(10);

/// An appliance with one export, which has no memory, or with no export.
struct Appliance(bool);

struct Nothing;

impl Store for Nothing {
    fn is_direct(&self) -> bool {
        false
    }

    fn direct(&mut self, _: u64, _: usize) -> Option<IoBuf> {
        None
    }

    fn post(&mut self, _: Operation) -> Posted {
        Posted::Done(Ok(()))
    }
}

impl Exports for Appliance {
    fn open(&self, name: &str) -> Option<Opened> {
        let name: ExportName = name.parse().ok().filter(|_| self.0)?;
        let flags = TransmissionFlags::HAS_FLAGS;
        let info = ExportInfo { size: 1 << 24, flags, block: BlockSizes::DEFAULT, description: None };
        Some(Opened { info, group: 1, session: name.session, store: Box::new(Nothing) })
    }
}

struct Bed {
    connector: Arc<Connector>,
    ports: Vec<Arc<Port>>,
    _appliance: (Server, Listener, tokio::runtime::Runtime),
}

impl Bed {
    /// Queues that request a link to an appliance, which also advertises RDMA.
    fn new(knows_grant: bool, transport: Option<TransportKind>, forbidden: Vec<TransportKind>) -> Bed {
        Bed::with(knows_grant, transport, forbidden, Duration::from_millis(400))
    }

    fn with(
        knows_grant: bool,
        transport: Option<TransportKind>,
        forbidden: Vec<TransportKind>,
        refusal_limit: Duration,
    ) -> Bed {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let handshakes = runtime.enter();
        let server = Server::start(ServerOptions { loops: 1, ..ServerOptions::default() }).unwrap();
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let listener = server.listen_tcp(socket, Arc::new(Appliance(knows_grant))).unwrap();
        drop(handshakes);
        let options = LinkOptions { refusal_limit, ..options(None, transport, forbidden) };
        let connector = Connector::start(grant(vec![address]), options).unwrap();
        let bell = Arc::new(Bell::new().unwrap());
        let ports: Vec<_> = (0..3).map(|queue| Arc::new(Port::new(queue, bell.clone()))).collect();
        ports.iter().for_each(|port| connector.add(port.clone()));
        Bed { connector, ports, _appliance: (server, listener, runtime) }
    }

    fn delivered(&self) -> Vec<Delivery> {
        let start = Instant::now();
        let one = |port: &Arc<Port>| loop {
            if let Some(delivery) = port.take() {
                return delivery;
            }
            assert!(start.elapsed() < LIMIT, "nothing came for queue {}", port.queue);
            std::thread::sleep(Duration::from_millis(1));
        };
        self.ports.iter().map(one).collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.connector.stop();
    }
}

fn grant(nbd: Vec<SocketAddr>) -> Grant {
    Grant {
        id: GrantId::from_u128(1),
        appliance: ApplianceId::from_u128(1),
        appliance_name: "a1".parse().unwrap(),
        endpoints: Endpoints {
            host: HostId::from_u128(1),
            nbd,
            names: Vec::new(),
            rdma: vec!["192.0.2.1:10810".parse().unwrap()],
            nbd_unix: None,
            shm: None,
        },
        key: GrantKey::from_bytes([1; 32]),
        regions: 1,
    }
}

fn options(
    host: Option<HostId>,
    transport: Option<TransportKind>,
    forbidden: Vec<TransportKind>,
) -> LinkOptions {
    let limit = Duration::from_secs(2);
    LinkOptions {
        host,
        epoch: Epoch(1),
        transport,
        forbidden,
        limit,
        depth: 4,
        session: 1,
        generation: 0,
        refusal_limit: Duration::from_millis(400),
        hold: None,
        alarm: Arc::default(),
        visitor: None,
        held: None,
        contested: false,
    }
}

#[test]
fn the_best_working_transport_is_used() {
    use TransportKind::{NbdTcp, NbdUnix, Rdma, Shm};
    let choices = |host: u128, only, forbidden: &[TransportKind]| {
        let options = options(Some(HostId::from_u128(host)), only, forbidden.to_vec());
        Connector::idle(grant(Vec::new()), options).choices()
    };
    assert_eq!(choices(1, None, &[]), [Shm, Rdma, NbdUnix, NbdTcp]);
    assert_eq!(choices(2, None, &[]), [Rdma, NbdTcp]);
    assert_eq!(choices(2, None, &[Rdma]), [NbdTcp]);
    assert_eq!(choices(1, None, &[Shm, NbdUnix]), [Rdma, NbdTcp]);
    assert_eq!(choices(1, Some(NbdTcp), &[NbdTcp]), [NbdTcp], "what a device asks for wins");
    let mut without = grant(Vec::new());
    without.endpoints.rdma.clear();
    assert_eq!(Connector::idle(without, options(None, None, Vec::new())).choices(), [NbdTcp]);
}

#[test]
fn every_queue_is_notified_when_the_grant_is_proven_lost() {
    let bed = Bed::new(false, None, vec![TransportKind::Rdma]);
    let begin = Instant::now();
    assert!(bed.delivered().iter().all(|delivery| matches!(delivery, Delivery::Lost)));
    assert!(begin.elapsed() >= Duration::from_millis(400), "one refusal proves nothing");
    assert_eq!(bed.connector.status().state, LinkState::Lost);
}

fn refused() -> Bed {
    let bed = Bed::with(false, None, vec![TransportKind::Rdma], LIMIT * 100);
    let start = Instant::now();
    while bed.connector.trouble().is_none_or(|trouble| !trouble.refused) {
        assert!(start.elapsed() < LIMIT, "it is refused");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(bed.ports.iter().all(|port| port.take().is_none()), "I/O waits for the allocator's word");
    assert_eq!(bed.connector.status().state, LinkState::Connecting);
    bed
}

#[test]
fn the_allocators_answer_ends_io_at_once() {
    let words = [
        Word::Holds { lost: vec![GrantId::from_u128(1)], endpoints: Default::default() },
        Word::Ended { why: "it was deleted".to_owned(), recorded: false },
    ];
    for word in words {
        let bed = refused();
        bed.connector.hear(&word);
        assert!(bed.delivered().iter().all(|delivery| matches!(delivery, Delivery::Lost)), "{word:?}");
        assert!(bed.connector.status().reason.is_some_and(|reason| reason.contains("allocator says")));
    }
}

#[test]
fn an_allocator_without_records_ends_no_io_unless_an_appliance_refuses() {
    // A port that no server listens on.
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    drop(socket);
    let connector =
        Connector::start(grant(vec![address]), options(None, Some(TransportKind::NbdTcp), Vec::new()))
            .unwrap();
    let port = Arc::new(Port::new(0, Arc::new(Bell::new().unwrap())));
    connector.add(port.clone());
    let start = Instant::now();
    while connector.trouble().is_none() {
        assert!(start.elapsed() < LIMIT, "it cannot be reached");
        std::thread::sleep(Duration::from_millis(1));
    }
    let ended = |recorded| Word::Ended { why: "it was deleted".to_owned(), recorded };
    connector.hear(&ended(false));
    assert_eq!(port.state(), LinkState::Connecting);
    connector.hear(&ended(true));
    assert_eq!(port.state(), LinkState::Lost, "a record says so");
    connector.stop();
}

#[test]
fn an_appliance_is_found_at_its_new_address() {
    let bed = Bed::new(true, Some(TransportKind::NbdTcp), Vec::new());
    let there = bed.connector.endpoints();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut before = grant(vec![socket.local_addr().unwrap()]);
    drop(socket);
    before.endpoints.rdma.clear();
    let connector = Connector::start(before, options(None, None, Vec::new())).unwrap();
    let port = Arc::new(Port::new(7, Arc::new(Bell::new().unwrap())));
    connector.add(port.clone());
    let start = Instant::now();
    while port.state() != LinkState::Up {
        assert!(start.elapsed() < LIMIT);
        let endpoints = [(GrantId::from_u128(1), there.clone())].into();
        connector.hear(&Word::Holds { lost: Vec::new(), endpoints });
        std::thread::sleep(Duration::from_millis(1));
    }
    connector.stop();
}

#[test]
fn a_worse_transport_is_reported_with_its_reason() {
    let bed = Bed::new(true, None, Vec::new());
    assert!(bed.delivered().iter().all(|delivery| matches!(delivery, Delivery::Link(_))));
    let status = bed.connector.status();
    assert_eq!((status.state, status.transport), (LinkState::Up, TransportKind::NbdTcp));
    assert!(status.reason.is_some_and(|reason| reason.contains("rdma")));
}

#[test]
fn a_forced_transport_is_kept() {
    let bed = Bed::new(true, Some(TransportKind::Rdma), Vec::new());
    let start = Instant::now();
    while bed.connector.status().reason.is_none() {
        assert!(start.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(1));
    }
    let status = bed.connector.status();
    assert_eq!((status.state, status.transport), (LinkState::Connecting, TransportKind::Rdma));
    assert!(bed.ports.iter().all(|port| port.take().is_none()));
}

/// An appliance that records the sessions that connect.
#[derive(Default)]
struct Recorder(Mutex<Vec<SessionTag>>);

impl Exports for Recorder {
    fn open(&self, name: &str) -> Option<Opened> {
        let session = name.parse::<ExportName>().ok()?.session;
        self.0.lock().unwrap().extend(session);
        Appliance(true).open(name)
    }
}

#[test]
fn a_numbered_queue_shuts_out_its_connections_of_earlier_lives() {
    use super::super::{Volume, VolumeOptions};
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let _handshakes = runtime.enter();
    let server = Server::start(ServerOptions { loops: 1, ..ServerOptions::default() }).unwrap();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut map = super::super::tests::map(xpm_protocol::Layout::Linear, 1, 1, 1 << 24);
    map.grants[0].endpoints.nbd = vec![socket.local_addr().unwrap()];
    let seen = Arc::new(Recorder::default());
    let _listener = server.listen_tcp(socket, seen.clone()).unwrap();
    let open = |generation| {
        let options = VolumeOptions {
            visitor: None,
            held: None,
            contested: false,
            hold: xpm_protocol::api::blk::Hold::Forever,
            transport: Some(TransportKind::NbdTcp),
            forbidden: Vec::new(),
            connect_limit: LIMIT,
            depth: 4,
            session: 7,
            generation,
            host: None,
            refusal_limit: LIMIT,
        };
        Volume::open(&map, options).unwrap()
    };
    let generation = |count: usize| {
        let start = Instant::now();
        loop {
            let seen = seen.0.lock().unwrap();
            let numbered: Vec<_> = seen.iter().filter(|tag| (tag.id, tag.queue) == (7, 0x8003)).collect();
            if numbered.len() >= count {
                return numbered[count - 1].generation;
            }
            assert!(start.elapsed() < LIMIT, "{seen:?}");
            drop(seen);
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let (first, second) = (open(100), open(200));
    let channel = first.channel_of(3).unwrap();
    let _other = first.channel().unwrap();
    let before = generation(1);
    assert!(before > 100);
    let _next = second.channel_of(3).unwrap();
    assert!(generation(2) > 200, "the next life's is newer");
    drop(channel);
    let _again = first.channel_of(3).unwrap();
    assert!(generation(3) > before, "within a life the later one is newer");
}
