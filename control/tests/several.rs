//! Tests of a client that knows several daemons of which one leads.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::oneshot;
use xpm_control::client::{Client, ClientError};
use xpm_control::listen::Place;
use xpm_control::server::routing::{get, put};
use xpm_control::server::{Duty, Json, Limits, Office, Router, Server};
use xpm_control::token::Token;
use xpm_control::urls::Urls;
use xpm_protocol::api::ErrorKind;

const SECRET: &str = "a-secret-for-these-tests";

fn token_of(text: &str) -> Token {
    Token::new(text).unwrap()
}

/// A daemon with an office; it ends when this value is dropped.
struct Running {
    address: SocketAddr,
    office: Office,
    _stop: oneshot::Sender<()>,
}

impl Running {
    fn start(token: Option<&str>) -> Running {
        let listener = "127.0.0.1:0".parse::<Place>().unwrap().bind().unwrap();
        let address = listener.address().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let office = Office::new();
        let server = Server::with_office(&office, token.map(token_of), Limits::default());
        tokio::spawn(server.serve(listener, async { drop(stopped.await) }));
        Running { address, office, _stop: stop }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Makes it the leader; setting the flag to false ends that.
    fn lead(&self) -> Arc<AtomicBool> {
        let me = self.address.port();
        let routes = Router::new()
            .route("/v1/who", get(async move || Json(me)))
            .route("/v1/echo", put(async move |Json(text): Json<String>| Json(text)));
        let valid = Arc::new(AtomicBool::new(true));
        let asked = Arc::clone(&valid);
        self.office.set(Duty::Lead { routes, holds: Arc::new(move || asked.load(Ordering::SeqCst)) });
        valid
    }
}

fn client(urls: &[String]) -> Client {
    let urls: Urls = urls.join(",").parse().unwrap();
    Client::one_of(&urls, Some(token_of(SECRET))).unwrap()
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (ErrorKind, String) {
    match result.unwrap_err() {
        ClientError::Refused(body) => (body.kind, body.error),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_follower_redirects_to_the_leader_and_the_client_stays_there() {
    let (first, second, third) = (Running::start(None), Running::start(None), Running::start(None));
    third.lead();
    first.office.set(Duty::Follow(Some(third.url())));
    let client = client(&[first.url(), second.url(), third.url()]);
    assert_eq!(client.put::<_, String>("/v1/echo", "kept").await.unwrap(), "kept");
    assert_eq!(client.base(), third.url());
    drop((first, second));
    assert_eq!(client.get::<u16>("/v1/who").await.unwrap(), third.address.port());
}

#[tokio::test]
async fn the_next_daemon_is_asked_if_one_is_gone_or_knows_no_leader() {
    let (follower, leader) = (Running::start(None), Running::start(None));
    leader.lead();
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let client = client(&[format!("http://{gone}"), follower.url(), leader.url()]);
    assert_eq!(client.get::<u16>("/v1/who").await.unwrap(), leader.address.port());
}

#[tokio::test]
async fn without_a_leader_the_refusal_says_so() {
    let follower = Running::start(None);
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let client = client(&[format!("http://{gone}"), follower.url()]);
    let (kind, line) = refusal(client.get::<u16>("/v1/who").await);
    assert!(kind == ErrorKind::NotLeader && line.contains("none is known"), "{line}");
    assert!(matches!(
        Client::new(&format!("http://{gone}"), None).unwrap().get::<u16>("/v1/who").await,
        Err(ClientError::Unreachable { .. })
    ));
}

#[tokio::test]
async fn with_patience_a_request_waits_for_a_leader() {
    let (first, second) = (Running::start(None), Running::start(None));
    let client = client(&[first.url(), second.url()]).with_patience(Duration::from_secs(5));
    let lead = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        second.lead();
    };
    let (answer, ()) = tokio::join!(client.get::<u16>("/v1/who"), lead);
    assert_eq!(answer.unwrap(), second.address.port());
}

#[tokio::test]
async fn the_token_goes_to_known_daemons_only() {
    let stranger = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let follower = Running::start(Some(SECRET));
    follower.office.set(Duty::Follow(Some(format!("http://{}", stranger.local_addr().unwrap()))));
    let (kind, line) = refusal(client(&[follower.url()]).get::<u16>("/v1/who").await);
    assert!(
        kind == ErrorKind::NotLeader && line.contains(&stranger.local_addr().unwrap().to_string()),
        "{line}"
    );
    let visit = tokio::time::timeout(Duration::from_millis(200), stranger.accept()).await;
    assert!(visit.is_err(), "the stranger was called");
}

#[tokio::test]
async fn a_follower_requires_the_token_too() {
    let follower = Running::start(Some("another-secret-of-others"));
    follower.office.set(Duty::Follow(Some("http://127.0.0.1:1".to_owned())));
    let (kind, line) = refusal(client(&[follower.url()]).get::<u16>("/v1/who").await);
    assert_eq!(kind, ErrorKind::Unauthorized, "{line}");
}

#[tokio::test]
async fn a_former_leader_answers_no_request() {
    let daemon = Running::start(None);
    let valid = daemon.lead();
    let client = client(&[daemon.url()]);
    assert_eq!(client.get::<u16>("/v1/who").await.unwrap(), daemon.address.port());
    assert_eq!(refusal(client.get::<u16>("/v1/nothing").await).0, ErrorKind::NotFound);
    valid.store(false, Ordering::SeqCst);
    assert_eq!(refusal(client.get::<u16>("/v1/who").await).0, ErrorKind::NotLeader);
}

#[tokio::test]
async fn after_a_daemon_that_hangs_the_next_is_asked() {
    let deaf = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let leader = Running::start(None);
    leader.lead();
    let client = client(&[format!("http://{}", deaf.local_addr().unwrap()), leader.url()]);
    let client = client.with_limit(Duration::from_millis(300));
    assert!(matches!(client.get::<u16>("/v1/who").await, Err(ClientError::TimedOut)));
    assert_eq!(client.get::<u16>("/v1/who").await.unwrap(), leader.address.port());
}
