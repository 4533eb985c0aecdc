//! The client of a daemon's control interface: JSON over HTTP/1.1, over TCP or a unix socket.
//!
//! Each request has a connection of its own: orders are few, and none ever fails because an idle
//! connection had been closed meanwhile. Cancelling a request (dropping its future) closes the
//! connection; whether the daemon carried it out is then unknown, as after a time-out.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use xpm_protocol::api::ErrorBody;

use crate::token::Token;

/// Time limit of a request where nobody sets another one.
pub const LIMIT_DEFAULT: Duration = Duration::from_secs(10);
/// Largest answer that is read, in bytes.
pub const ANSWER_LEN_MAX: usize = 64 << 20;

/// Speaks to one daemon. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    place: Arc<Place>,
    token: Option<Token>,
    limit: Duration,
}

#[derive(Debug)]
struct Place {
    base: String,
    way: Way,
}

#[derive(Debug)]
enum Way {
    Tcp { host: String, port: u16, authority: String },
    Unix(PathBuf),
}

/// A text that is no base URL of a control interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{base}` is no address of a control interface ({reason}): write http://HOST:PORT or unix:/ABSOLUTE/PATH"
)]
pub struct BaseUrlError {
    base: String,
    reason: &'static str,
}

/// Why a request brought no answer that can be used. Only after [`ClientError::Refused`] and
/// [`ClientError::Unreachable`] is it certain that the daemon did not carry it out.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The daemon refused it; the message is the daemon's own.
    #[error("{}", .0.error)]
    Refused(ErrorBody),
    /// No connection could be made.
    #[error("cannot reach {url}; check that the daemon runs there and that the address is right")]
    Unreachable {
        /// Base URL of the daemon.
        url: String,
        /// Why.
        source: io::Error,
    },
    /// The connection broke after the request was begun.
    #[error("the connection to {url} broke before the answer came")]
    Lost {
        /// Base URL of the daemon.
        url: String,
        /// Why.
        source: hyper::Error,
    },
    /// The time limit was over.
    #[error("no answer came within the time limit")]
    TimedOut,
    /// What answers there does not speak as xpm does.
    #[error("{0}")]
    NotXpm(String),
}

impl Client {
    /// A client of the daemon at `base`: `http://host:port`, or `unix:/path`. Sends nothing yet.
    pub fn new(base: &str, token: Option<Token>) -> Result<Client, BaseUrlError> {
        let way = parse_base(base)
            .map_err(|reason| BaseUrlError { base: base.chars().take(200).collect(), reason })?;
        let place = Place { base: base.trim_end_matches('/').to_owned(), way };
        Ok(Client { place: Arc::new(place), token, limit: LIMIT_DEFAULT })
    }

    /// The same with another time limit for each request, from connecting to the whole answer.
    #[must_use]
    pub fn with_limit(mut self, limit: Duration) -> Client {
        self.limit = limit;
        self
    }

    /// Base URL of the daemon, without a slash at the end.
    pub fn base(&self) -> &str {
        &self.place.base
    }

    /// `GET path`; the path begins with a slash.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.exchange(Method::GET, path, None).await
    }

    /// `POST path` with a body. Take `()` for an answer without content.
    pub async fn post<B: Serialize + ?Sized, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        let body = self.encode(body)?;
        self.exchange(Method::POST, path, Some(body)).await
    }

    /// `PUT path` with a body. Take `()` for an answer without content.
    pub async fn put<B: Serialize + ?Sized, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        let body = self.encode(body)?;
        self.exchange(Method::PUT, path, Some(body)).await
    }

    /// `DELETE path`; the answer's content is ignored.
    pub async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.exchange::<serde::de::IgnoredAny>(Method::DELETE, path, None).await.map(|_| ())
    }

    fn encode<B: Serialize + ?Sized>(&self, body: &B) -> Result<Vec<u8>, ClientError> {
        serde_json::to_vec(body)
            .map_err(|error| self.not_xpm(&format!("the request has no form in JSON: {error}")))
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<T, ClientError> {
        let request = self.request(method, path, body)?;
        let answer = tokio::time::timeout(self.limit, self.send(request)).await;
        let (status, bytes) = answer.map_err(|_| ClientError::TimedOut)??;
        self.decode(status, &bytes)
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Request<Full<Bytes>>, ClientError> {
        let host = match &self.place.way {
            Way::Tcp { authority, .. } => authority.as_str(),
            Way::Unix(_) => "localhost",
        };
        let mut request =
            Request::builder().method(method).uri(path).header(HOST, host).header(ACCEPT, "application/json");
        if let Some(token) = &self.token {
            let value = HeaderValue::try_from(format!("Bearer {}", token.reveal())).map(|mut value| {
                value.set_sensitive(true);
                value
            });
            request =
                request.header(AUTHORIZATION, value.map_err(|_| self.not_xpm("the token fits no header"))?);
        }
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        request
            .body(Full::new(body.unwrap_or_default().into()))
            .map_err(|error| self.not_xpm(&format!("`{path}` is no path of a URL: {error}")))
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), ClientError> {
        let unreachable = |source| ClientError::Unreachable { url: self.place.base.clone(), source };
        match &self.place.way {
            Way::Tcp { host, port, .. } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(unreachable)?;
                stream.set_nodelay(true).map_err(unreachable)?;
                self.converse(stream, request).await
            }
            Way::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(unreachable)?;
                self.converse(stream, request).await
            }
        }
    }

    async fn converse<S>(
        &self,
        stream: S,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Bytes), ClientError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| self.broken(error))?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(|error| self.broken(error))?;
            self.collect(response).await
        };
        let mut answer = pin!(answer);
        // The connection moves the bytes. Where it ends first, what has arrived by then still
        // makes the answer; if it does not, the connection knows better than the request why.
        tokio::select! {
            result = &mut answer => result,
            ended = connection => match (answer.await, ended) {
                (Err(_), Err(cause)) => Err(self.broken(cause)),
                (result, _) => result,
            },
        }
    }

    async fn collect(&self, response: Response<Incoming>) -> Result<(StatusCode, Bytes), ClientError> {
        let status = response.status();
        match Limited::new(response.into_body(), ANSWER_LEN_MAX).collect().await {
            Ok(body) => Ok((status, body.to_bytes())),
            Err(error) => Err(match error.downcast::<hyper::Error>() {
                Ok(error) => self.broken(*error),
                Err(_) => self.not_xpm(&format!("its answer is larger than {ANSWER_LEN_MAX} bytes")),
            }),
        }
    }

    fn decode<T: DeserializeOwned>(&self, status: StatusCode, bytes: &[u8]) -> Result<T, ClientError> {
        if !status.is_success() {
            return Err(match serde_json::from_slice(bytes) {
                Ok(body) => ClientError::Refused(body),
                Err(_) => self.not_xpm(&format!("it answers {status} and not as xpm does")),
            });
        }
        // An answer without content (204) stands for JSON's null, so that `()` can be taken.
        let bytes = if bytes.is_empty() { b"null" } else { bytes };
        serde_json::from_slice(bytes)
            .map_err(|error| self.not_xpm(&format!("its answer cannot be read: {error}")))
    }

    fn broken(&self, error: hyper::Error) -> ClientError {
        match is_foreign(&error) {
            true => self.not_xpm("it does not speak HTTP"),
            false => ClientError::Lost { url: self.place.base.clone(), source: error },
        }
    }

    fn not_xpm(&self, what: &str) -> ClientError {
        ClientError::NotXpm(format!("{}: {what}", self.place.base))
    }
}

/// Whether the peer broke the rules of HTTP, rather than the connection. A peer that speaks first
/// is found out before or after the request was taken, and hyper tells that in different ways.
fn is_foreign(error: &hyper::Error) -> bool {
    let source = error.source();
    if let Some(cause) = source.and_then(|source| source.downcast_ref::<hyper::Error>()) {
        return is_foreign(cause);
    }
    let by_connection = source.and_then(|source| source.downcast_ref::<io::Error>()).is_some()
        || error.is_closed()
        || error.is_incomplete_message()
        || error.is_canceled()
        || error.is_body_write_aborted()
        || error.is_timeout();
    error.is_parse() || !by_connection
}

fn parse_base(base: &str) -> Result<Way, &'static str> {
    if let Some(path) = base.strip_prefix("unix:") {
        return if path.starts_with('/') {
            Ok(Way::Unix(path.into()))
        } else {
            Err("the path is not absolute")
        };
    }
    let uri: Uri = base.parse().map_err(|_| "it is no URL")?;
    if uri.scheme_str() != Some("http") {
        return Err("it does not start with http:// or unix:");
    }
    if uri.path() != "/" || uri.query().is_some() {
        return Err("a path follows the port");
    }
    let authority = uri
        .authority()
        .filter(|authority| !authority.as_str().contains('@') && !authority.host().is_empty())
        .ok_or("it has no plain host")?;
    let port = authority.port_u16().ok_or("it has no port")?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    Ok(Way::Tcp { host, port, authority: authority.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_urls() {
        for good in ["http://127.0.0.1:7700", "http://[::1]:7700/", "http://host.example:80", "unix:/run/x"] {
            assert!(Client::new(good, None).is_ok(), "{good}");
        }
        for bad in [
            "",
            "127.0.0.1:7700",
            "https://a:1",
            "http://a",
            "http://a:1/v1",
            "http://u@a:1",
            "unix:x",
            "http://:1",
        ] {
            let line = Client::new(bad, None).unwrap_err().to_string();
            assert!(line.contains("http://HOST:PORT"), "{line}");
        }
    }
}
