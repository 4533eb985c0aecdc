//! Tests of client and server with each other, and of each with a peer that breaks the protocol, over real sockets.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use xpm_control::client::{Client, ClientError};
use xpm_control::listen::Place;
use xpm_control::server::routing::{get, post};
use xpm_control::server::{ApiError, Force, Json, Limits, Path, Router, Server};
use xpm_control::token::Token;
use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;

#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Note {
    text: String,
}

fn routes() -> Router {
    Router::new()
        .route(
            "/v1/echo",
            post(|Json(note): Json<Note>| async { Json(note) }).put(|Json(_): Json<Note>| async {}),
        )
        .route("/v1/name/{name}", get(|Path(name): Path<Name>| async move { Json(name) }))
        .route("/v1/busy", get(|| async { ApiError(ErrorKind::InUse, "in use by b".into()) }))
        .route("/v1/forced", get(|Force(force): Force| async move { Json(force) }))
        .route("/v1/never", get(|| async { std::future::pending::<()>().await }))
}

/// A server that ends when this value is dropped.
struct Running {
    address: SocketAddr,
    _stop: oneshot::Sender<()>,
}

impl Running {
    fn start(token: Option<&str>, limits: Limits) -> Running {
        Running::start_with(token.and_then(Token::new), limits)
    }

    fn start_with(token: Option<Token>, limits: Limits) -> Running {
        let listener = "127.0.0.1:0".parse::<Place>().unwrap().bind().unwrap();
        let address = listener.address().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = Server::new(routes(), token, limits);
        tokio::spawn(server.serve(listener, async { drop(stopped.await) }));
        Running { address, _stop: stop }
    }

    fn client(&self, token: Option<&str>) -> Client {
        Client::new(&format!("http://{}", self.address), token.and_then(Token::new)).unwrap()
    }

    /// Sends raw bytes, and reads until the server closes.
    async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (ErrorKind, String) {
    match result.unwrap_err() {
        ClientError::Refused(body) => (body.kind, body.error),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_body_comes_back() {
    let server = Running::start(None, Limits::default());
    let note = Note { text: "x".repeat(500_000) };
    assert_eq!(server.client(None).post::<_, Note>("/v1/echo", &note).await.unwrap(), note);
    server.client(None).put::<_, ()>("/v1/echo", &note).await.unwrap();
}

#[tokio::test]
async fn unix_sockets_work_too() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let listener = Place::Unix(path.clone()).bind().unwrap();
    tokio::spawn(Server::new(routes(), None, Limits::default()).serve(listener, std::future::pending()));
    let client = Client::new(&format!("unix:{}", path.display()), None).unwrap();
    assert_eq!(client.get::<Name>("/v1/name/a").await.unwrap().as_str(), "a");
}

#[tokio::test]
async fn a_token_is_required() {
    let server = Running::start(Some("0123456789abcdef"), Limits::default());
    for token in [None, Some("0123456789abcdeX"), Some("0123456789abcdef0")] {
        for path in ["/v1/name/a", "/v1/unknown"] {
            let (kind, line) = refusal(server.client(token).get::<Name>(path).await);
            assert_eq!(kind, ErrorKind::Unauthorized, "{line}");
        }
    }
    assert!(server.client(Some("0123456789abcdef")).get::<Name>("/v1/name/a").await.is_ok());
}

#[tokio::test]
async fn refusals_have_one_form() {
    let server = Running::start(None, Limits::default());
    let client = server.client(None);
    let (kind, line) = refusal(client.get::<Name>("/v1/nothing").await);
    assert!(kind == ErrorKind::NotFound && line.contains("/v1/nothing"), "{line}");
    let (kind, line) = refusal(client.delete("/v1/echo").await);
    assert!(kind == ErrorKind::Invalid && line.contains("DELETE"), "{line}");
    let (kind, line) = refusal(client.get::<Name>("/v1/name/-bad").await);
    assert!(kind == ErrorKind::Invalid && line.contains("not a name"), "{line}");
    let (kind, line) = refusal(client.get::<Name>("/v1/busy").await);
    assert!(kind == ErrorKind::InUse && line == "in use by b", "{line}");
    let unknown = serde_json::json!({ "text": "a", "colour": 1 });
    let (kind, line) = refusal(client.post::<_, Note>("/v1/echo", &unknown).await);
    assert!(kind == ErrorKind::Invalid && line.contains("colour"), "{line}");
}

#[tokio::test]
async fn unknown_queries_are_refused() {
    let server = Running::start(None, Limits::default());
    let client = server.client(None);
    assert!(client.get::<bool>("/v1/forced?force=true").await.unwrap());
    assert!(!client.get::<bool>("/v1/forced").await.unwrap());
    let (kind, line) = refusal(client.get::<bool>("/v1/forced?farce=true").await);
    assert!(kind == ErrorKind::Invalid && line.contains("farce"), "{line}");
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused() {
    let server = Running::start(None, Limits { body_len_max: 1000, ..Limits::default() });
    let (kind, line) =
        refusal(server.client(None).post::<_, Note>("/v1/echo", &Note { text: "x".repeat(2000) }).await);
    assert!(kind == ErrorKind::Invalid && line.contains("1000"), "{line}");
}

#[tokio::test]
async fn malformed_json_is_refused() {
    let server = Running::start(None, Limits::default());
    for body in ["{", "[]", "{\"text\":1}", "{\"text\":\"a\"}x"] {
        let head =
            "POST /v1/echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n";
        let answer = server.raw(&format!("{head}Content-Length: {}\r\n\r\n{body}", body.len())).await;
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("\"kind\":\"invalid\""), "{answer}");
    }
    let plain = "POST /v1/echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: 12\r\n\r\n{\"text\":\"a\"}";
    assert!(server.raw(plain).await.contains("\"kind\":\"invalid\""));
    assert!(server.raw("nonsense\r\n\r\n").await.starts_with("HTTP/1.1 400 "));
}

#[tokio::test]
async fn slow_clients_are_cut_off_and_others_served() {
    let short = Duration::from_millis(100);
    let server = Running::start(None, Limits { head: short, body: short, ..Limits::default() });
    assert_eq!(server.raw("").await, "", "a connection that says nothing is closed");
    assert_eq!(server.raw("GET /v1/name/a HTT").await, "", "and one that never ends its head");
    let half = "POST /v1/echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{";
    assert!(server.raw(half).await.contains("too slowly"));
    assert!(server.client(None).get::<Name>("/v1/name/a").await.is_ok());
}

#[tokio::test]
async fn requests_end_in_time_on_both_sides() {
    let server = Running::start(None, Limits { request: Duration::from_millis(100), ..Limits::default() });
    let (kind, _) = refusal(server.client(None).get::<()>("/v1/never").await);
    assert_eq!(kind, ErrorKind::Unavailable);
    let deaf = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client::new(&format!("http://{}", deaf.local_addr().unwrap()), None).unwrap();
    let result = client.with_limit(Duration::from_millis(100)).get::<()>("/").await;
    assert!(matches!(result, Err(ClientError::TimedOut)));
}

#[tokio::test]
async fn connections_are_limited_and_the_next_one_waits() {
    let limits = Limits { connections_max: 1, head: Duration::from_millis(200), ..Limits::default() };
    let server = Running::start(None, limits);
    let mut idle = TcpStream::connect(server.address).await.unwrap();
    idle.write_all(b"GET /v1/name/b HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    assert!(
        idle.read(&mut [0; 64]).await.unwrap() > 0,
        "it has the one place until its time for a head is over"
    );
    assert!(server.client(None).get::<Name>("/v1/name/a").await.is_ok());
    drop(idle);
}

/// On a machine that swaps, seconds may pass between the connection of a command and its request.
#[tokio::test]
async fn a_slow_client_is_answered_while_places_are_free() {
    let limits = Limits { strangers_max: 8, first: Duration::from_millis(20), ..Limits::default() };
    let server = Running::start(None, limits);
    let ask = async |mut slow: TcpStream| {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let mut answer = String::new();
        let asked = slow.write_all(b"GET /v1/name/b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
        let _ = slow.read_to_string(&mut answer).await;
        asked.is_ok() && answer.starts_with("HTTP/1.1 200")
    };
    let connect = || TcpStream::connect(server.address);
    assert!(ask(connect().await.unwrap()).await);
    // The share of one address is a quarter of the places.
    let slow = connect().await.unwrap();
    let _other = connect().await.unwrap();
    assert!(!ask(slow).await);
}

#[tokio::test]
async fn silent_connections_keep_no_client_out() {
    let limits = Limits { strangers_max: 8, connections_max: 8, ..Limits::default() };
    let server = Running::start(Some("0123456789abcdef"), limits);
    let mut idle = Vec::new();
    for _ in 0..40 {
        idle.push(TcpStream::connect(server.address).await.unwrap());
    }
    assert!(server.client(Some("0123456789abcdef")).get::<Name>("/v1/name/a").await.is_ok());
    // Connections that show a wrong token and stay do not keep others out either.
    for stream in &mut idle[38..] {
        let _ =
            stream.write_all(b"GET /v1/name/b HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer x\r\n\r\n").await;
    }
    assert!(server.client(Some("0123456789abcdef")).get::<Name>("/v1/name/a").await.is_ok());
    for mut stream in idle {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        assert!(
            rest.is_empty() || rest.starts_with(b"HTTP/1.1 401"),
            "all of them are closed within seconds: {:?}",
            String::from_utf8_lossy(&rest)
        );
    }
}

#[tokio::test]
async fn an_unreachable_server_is_an_error() {
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let url = format!("http://{address}");
    let error = Client::new(&url, None).unwrap().get::<()>("/v1/status").await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }));
    let line = xpm_control::error_line(&error);
    assert!(
        line.contains(&url) && line.contains("check that the daemon runs") && line.contains("refused"),
        "{line}"
    );
}

#[tokio::test]
async fn a_peer_of_another_protocol_is_an_error() {
    for answer in [
        "SSH-2.0-OpenSSH\r\n",
        "HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nhi",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
        });
        let error = Client::new(&url, None).unwrap().get::<Note>("/v1/status").await.unwrap_err();
        assert!(matches!(&error, ClientError::NotXpm(line) if line.contains(&url)), "{error:?}");
    }
}

#[tokio::test]
async fn a_broken_connection_is_an_error() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = [0; 1024];
        assert!(stream.read(&mut request).await.unwrap() > 0);
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{").await.unwrap();
    });
    let error = Client::new(&url, None).unwrap().get::<Note>("/v1/status").await.unwrap_err();
    assert!(matches!(error, ClientError::Lost { .. }), "{error:?}");
}

#[tokio::test]
async fn running_requests_are_answered_at_the_end() {
    let listener = "127.0.0.1:0".parse::<Place>().unwrap().bind().unwrap();
    let url = format!("http://{}", listener.address().unwrap());
    let (entered, inside) = oneshot::channel::<()>();
    let (release, released) = oneshot::channel::<()>();
    let gate = std::sync::Arc::new(std::sync::Mutex::new(Some((entered, released))));
    let routes = Router::new().route(
        "/v1/wait",
        get(move || {
            let taken = gate.lock().unwrap().take();
            async move {
                let (entered, released) = taken.unwrap();
                entered.send(()).unwrap();
                released.await.unwrap();
                Json(7)
            }
        }),
    );
    let (stop, stopped) = oneshot::channel::<()>();
    let server = tokio::spawn(
        Server::new(routes, None, Limits::default()).serve(listener, async { drop(stopped.await) }),
    );
    let client = Client::new(&url, None).unwrap();
    let request = tokio::spawn(async move { client.get::<u32>("/v1/wait").await });
    inside.await.unwrap();
    stop.send(()).unwrap();
    release.send(()).unwrap();
    assert_eq!(request.await.unwrap().unwrap(), 7);
    server.await.unwrap();
}

/// A program that nobody can send a signal to reads its token file again when it is refused.
#[tokio::test]
async fn a_client_with_an_old_token_reads_its_file_again() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    let write = |text: &str| {
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    };
    write("old-old-old-old-old\n");
    let (of_server, of_client) = (Token::load(&file).unwrap(), Token::load(&file).unwrap());
    let running = Running::start_with(Some(of_server.clone()), Limits::default());
    let client = Client::new(&format!("http://{}", running.address), Some(of_client)).unwrap();
    let name: Name = client.get("/v1/name/a").await.unwrap();
    assert_eq!(name.to_string(), "a");
    write("new-new-new-new-new\n");
    assert!(of_server.reload().unwrap());
    client.get::<Name>("/v1/name/a").await.unwrap();
    let stale = running.client(Some("old-old-old-old-old"));
    let refused = stale.get::<Name>("/v1/name/a").await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unauthorized);
}
