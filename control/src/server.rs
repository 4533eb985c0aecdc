//! The scaffold of a daemon's control interface: the daemon's routes, surrounded by the token check, limits on size,
//! time and connections, and the protocol's one form of errors.
//!
//! A client that sends too slowly, too much or nothing at all uses one connection for a limited time and harms no
//! other client. When a client goes away, the future of its handler is dropped: a handler that must finish hands its
//! work to a task.

mod admission;
mod extract;
mod office;

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use xpm_protocol::api::{ErrorBody, ErrorKind};

pub use axum::Router;
pub use axum::response::NoContent;
pub use axum::routing;
pub use extract::{Force, Json, Path, Query};
pub use office::{Duty, Office};

use self::admission::{Admission, Standing};
use crate::listen::Listener;
use crate::token::Token;

/// Pause after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Whether the routes answer a request for this path with anything but a server error: this proves that the part that
/// carries requests out is alive. Give the inner routes, because a token check would answer first.
pub async fn answers(routes: Router, path: &'static str) -> bool {
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = Uri::from_static(path);
    let answered = TowerToHyperService::new(routes).call(request).await;
    !answered.unwrap_or_else(|never| match never {}).status().is_server_error()
}

/// Limits on clients.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Time until the head of a request is complete, also on an idle connection.
    pub head: Duration,
    /// Time until the body of a request is complete.
    pub body: Duration,
    /// Time until a request is answered, the body included.
    pub request: Duration,
    /// Largest body, in bytes.
    pub body_len_max: usize,
    /// Time until a connection has shown the token, or, without a token, has sent a request. While most places for
    /// such connections are free, `head` counts instead: on a machine that is short of memory, a command may take
    /// seconds between connecting and sending its request, and must not be cut off.
    pub first: Duration,
    /// Most connections at once that have not shown the token. For a further one, the oldest is closed; if its
    /// address has a quarter of the places already, the oldest of that address. The limit is lower if the process may
    /// open few descriptors.
    pub strangers_max: usize,
    /// Most connections at once that have shown the token; requests on further connections wait.
    pub connections_max: usize,
    /// Time for running requests to finish when the daemon ends.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            head: Duration::from_secs(15),
            body: Duration::from_secs(15),
            request: Duration::from_secs(60),
            body_len_max: 1 << 20,
            first: Duration::from_secs(2),
            strangers_max: 1024,
            connections_max: 512,
            drain: Duration::from_secs(5),
        }
    }
}

/// A control interface, ready to serve.
#[derive(Debug, Clone)]
pub struct Server {
    routes: Router,
    limits: Limits,
}

impl Server {
    /// Puts the scaffold around the daemon's routes. With a token, each request must show it.
    pub fn new(routes: Router, token: Option<Token>, limits: Limits) -> Server {
        Server::around(complete(routes), token, limits)
    }

    /// The same for a daemon that is the leader only at times: its office decides how requests are answered.
    pub fn with_office(office: &Office, token: Option<Token>, limits: Limits) -> Server {
        Server::around(office.routes(), token, limits)
    }

    fn around(routes: Router, token: Option<Token>, limits: Limits) -> Server {
        let routes = routes
            .layer(DefaultBodyLimit::max(limits.body_len_max))
            .layer(axum::Extension(limits))
            .layer(middleware::from_fn(admit))
            .layer(middleware::from_fn_with_state(limits, limit_time));
        let routes = match token {
            Some(token) => routes.layer(middleware::from_fn_with_state(Arc::new(token), authorize)),
            None => routes,
        };
        Server { routes, limits }
    }

    /// Serves until `shutdown` resolves, and then until running requests are answered or their time is over.
    /// Cancelling (dropping the future) closes all connections.
    pub async fn serve(self, listener: Listener, shutdown: impl Future<Output = ()>) {
        let (stop, stopping) = watch::channel(false);
        let mut connections = JoinSet::new();
        let admission = Admission::new(&self.limits);
        let mut shutdown = pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                (stream, peer) = accept(&listener) => admission.begin(peer, |standing| {
                    connections.spawn(self.clone().connection(stream, stopping.clone(), standing))
                }),
                Some(_) = connections.join_next() => {}
            }
        }
        drop(listener);
        // The send fails if no connection is open.
        let _ = stop.send(true);
        let drained = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(self.limits.drain, drained).await.is_err() {
            tracing::warn!("ended with control requests unanswered");
        }
    }

    async fn connection(self, stream: Stream, stopping: watch::Receiver<bool>, standing: Arc<Standing>) {
        let ended = match stream {
            Stream::Tcp(stream) => self.converse(stream, stopping, standing).await,
            Stream::Unix(stream) => self.converse(stream, stopping, standing).await,
        };
        if let Err(error) = ended {
            tracing::debug!("a control connection ended: {error}");
        }
    }

    async fn converse<S>(
        self,
        stream: S,
        mut stopping: watch::Receiver<bool>,
        standing: Arc<Standing>,
    ) -> hyper::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (routes, of) = (TowerToHyperService::new(self.routes), standing.clone());
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(of.clone());
            routes.call(request)
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.head)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        let stop = async { drop(stopping.wait_for(|stop| *stop).await) };
        let is_stranger = async {
            let begun = Instant::now();
            loop {
                tokio::time::sleep(self.limits.first).await;
                if standing.is_proved() {
                    std::future::pending::<()>().await;
                }
                if standing.is_in_the_way() || begun.elapsed() >= self.limits.head {
                    return;
                }
            }
        };
        tokio::select! {
            // Polled first: a request that arrived in time counts, even if this task runs late.
            biased;
            ended = connection.as_mut() => return ended,
            () = stop => {}
            () = is_stranger => return Ok(()),
        }
        connection.as_mut().graceful_shutdown();
        connection.await
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Accepts the next connection, with the address of its peer; none for a unix socket.
async fn accept(listener: &Listener) -> (Stream, Option<SocketAddr>) {
    loop {
        let accepted = match listener {
            Listener::Tcp(listener) => {
                listener.accept().await.map(|(stream, peer)| (Stream::Tcp(stream), Some(peer)))
            }
            Listener::Unix(listener) => {
                listener.accept().await.map(|(stream, _)| (Stream::Unix(stream), None))
            }
        };
        match accepted {
            Ok((stream, peer)) => {
                if let Stream::Tcp(stream) = &stream {
                    // Without TCP_NODELAY an answer is only late.
                    let _ = stream.set_nodelay(true);
                }
                return (stream, peer);
            }
            Err(error) => {
                // For example, no descriptors are left: other connections end, and then accepting works again.
                tracing::warn!("cannot accept a control connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Routes that answer every path and every method.
fn complete(routes: Router) -> Router {
    routes.fallback(unknown_path).method_not_allowed_fallback(wrong_method)
}

async fn unknown_path(request: Request) -> ApiError {
    ApiError(
        ErrorKind::NotFound,
        format!("{} is no path of this daemon; its paths begin with /v1", request.uri().path()),
    )
}

/// Answers 405 with kind `invalid`: the protocol has no separate kind for it.
async fn wrong_method(request: Request) -> Response {
    let line = format!("{} has no {}", request.uri().path(), request.method());
    let body = ErrorBody { kind: ErrorKind::Invalid, error: line };
    (StatusCode::METHOD_NOT_ALLOWED, axum::Json(body)).into_response()
}

async fn limit_time(
    State(limits): State<Limits>,
    request: Request,
    next: Next,
) -> Result<Response, Infallible> {
    Ok(match tokio::time::timeout(limits.request, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let line = "the request took too long and was given up; look whether it was carried out before trying again";
            ApiError(ErrorKind::Unavailable, line.to_owned()).into_response()
        }
    })
}

/// A request that gets here has shown the token, if one is required.
async fn admit(request: Request, next: Next) -> Response {
    if let Some(standing) = request.extensions().get::<Arc<Standing>>().cloned() {
        standing.prove().await;
    }
    next.run(request).await
}

async fn authorize(State(token): State<Arc<Token>>, request: Request, next: Next) -> Response {
    let shown = request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes);
    match shown.and_then(|value| value.strip_prefix(b"Bearer ")) {
        Some(shown) if token.matches(shown) => next.run(request).await,
        Some(_) => unauthorized("the token is wrong: use the token file of this daemon"),
        None => unauthorized("this daemon wants a token: use its token file"),
    }
}

fn unauthorized(line: &str) -> Response {
    let mut response = ApiError(ErrorKind::Unauthorized, line.to_owned()).into_response();
    response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

/// A refusal: its kind, and one line of what, where, and what to do instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError(pub ErrorKind, pub String);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let ApiError(kind, error) = self;
        if kind == ErrorKind::Internal {
            tracing::error!("{error}");
        }
        let status = StatusCode::from_u16(kind.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, axum::Json(ErrorBody { kind, error })).into_response()
    }
}
