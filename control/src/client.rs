//! The client of a daemon's control interface: JSON over HTTP/1.1, over TCP or a unix socket.
//!
//! A client may know several daemons of one kind, of which one leads. It first asks the daemon that answered last. On
//! a redirect it goes to the leader, if that is one of the daemons that it knows (others must not get the token);
//! otherwise it goes to the next daemon. It tries another daemon only if the request was certainly not carried out.
//!
//! Each request has a connection of its own: requests are few, and none fails because an idle connection was closed
//! meanwhile. Cancelling a request (dropping its future) closes the connection; then it is unknown whether the daemon
//! carried the request out, as after a time-out.

mod answer;
mod place;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::{TcpStream, UnixStream};
use xpm_protocol::api::{ErrorBody, ErrorKind};

use self::answer::{Answer, converse, decode, not_xpm};
pub use self::place::BaseUrlError;
use self::place::{Place, Places, Way};
use crate::token::Token;
use crate::urls::Urls;

/// Default time limit of a request.
pub const LIMIT_DEFAULT: Duration = Duration::from_secs(10);
/// Largest answer that is read, in bytes.
pub const ANSWER_LEN_MAX: usize = 64 << 20;

/// Pause before all daemons are asked again.
const PAUSE: Duration = Duration::from_millis(200);
/// Time limit of a connection attempt if another daemon can be asked instead.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// Client of one daemon, or of the leader of several. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    places: Arc<Places>,
    token: Option<Token>,
    limit: Duration,
    patience: Duration,
}

/// Why a request got no usable answer. Only after [`ClientError::Refused`] and [`ClientError::Unreachable`] is it
/// certain that the daemon did not carry the request out.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The daemon refused the request, with this message.
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
    /// The connection broke after the request was sent in part or whole.
    #[error("the connection to {url} broke before the answer came")]
    Lost {
        /// Base URL of the daemon.
        url: String,
        /// Why.
        source: hyper::Error,
    },
    /// The time limit expired.
    #[error("no answer came within the time limit")]
    TimedOut,
    /// The peer does not answer as xpm does.
    #[error("{0}")]
    NotXpm(String),
}

impl ClientError {
    /// For a daemon that asked another daemon and got this error: the kind of error that it reports to its own
    /// requester.
    pub const fn kind(&self) -> ErrorKind {
        match self {
            ClientError::Refused(body) if matches!(body.kind, ErrorKind::NotLeader) => ErrorKind::Unavailable,
            ClientError::Refused(body) => body.kind,
            ClientError::Unreachable { .. } | ClientError::Lost { .. } | ClientError::TimedOut => {
                ErrorKind::Unavailable
            }
            ClientError::NotXpm(_) => ErrorKind::Internal,
        }
    }
}

impl Client {
    /// A client of the daemon at `base`: `http://host:port`, or `unix:/path`. Sends nothing yet.
    pub fn new(base: &str, token: Option<Token>) -> Result<Client, BaseUrlError> {
        Ok(Client::of(vec![Place::parse(base)?], token))
    }

    /// A client of the leader among the daemons at these URLs. Sends nothing yet.
    pub fn one_of(urls: &Urls, token: Option<Token>) -> Result<Client, BaseUrlError> {
        let places: Result<Vec<Place>, _> = urls.iter().map(Place::parse).collect();
        Ok(Client::of(places?, token))
    }

    fn of(places: Vec<Place>, token: Option<Token>) -> Client {
        let places = Places::new(places).expect("there is at least one URL");
        Client { places: Arc::new(places), token, limit: LIMIT_DEFAULT, patience: Duration::ZERO }
    }

    /// The same client with another time limit per request, from connecting to the whole answer.
    #[must_use]
    pub fn with_limit(mut self, limit: Duration) -> Client {
        self.limit = limit;
        self
    }

    /// The same client, but if it knows several daemons and none of them leads, a request waits this long for a
    /// leader, within its time limit.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Client {
        self.patience = patience;
        self
    }

    /// Base URL of the daemon that answered last or is asked next, without a slash at the end.
    pub fn base(&self) -> &str {
        &self.places.all()[self.places.preferred()].base
    }

    /// Whether it knows more than one daemon.
    pub fn has_several(&self) -> bool {
        self.places.all().len() > 1
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
            .map_err(|error| ClientError::NotXpm(format!("the request has no form in JSON: {error}")))
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<T, ClientError> {
        let order = Order { method, path, body: body.map(Bytes::from) };
        match self.exchange_once(&order).await {
            // The pool's token may have changed without a signal to this process.
            Err(ClientError::Refused(body))
                if body.kind == ErrorKind::Unauthorized && self.has_newer_token() =>
            {
                self.exchange_once(&order).await
            }
            result => result,
        }
    }

    fn has_newer_token(&self) -> bool {
        self.token.as_ref().is_some_and(|token| token.reload().unwrap_or(false))
    }

    async fn exchange_once<T: DeserializeOwned>(&self, order: &Order<'_>) -> Result<T, ClientError> {
        let (place, answer) = tokio::time::timeout(self.limit, self.ask_patiently(order))
            .await
            .unwrap_or(Err(ClientError::TimedOut))
            .inspect_err(|error| {
                if matches!(error, ClientError::TimedOut | ClientError::Lost { .. }) {
                    // The next request goes to another daemon, if there is one.
                    self.places.prefer(self.places.preferred() + 1);
                }
            })?;
        decode(place, &answer)
    }

    async fn ask_patiently(&self, order: &Order<'_>) -> Result<(&Place, Answer), ClientError> {
        let begun = Instant::now();
        loop {
            let result = self.ask(order).await;
            let nobody_leads = match &result {
                Err(ClientError::Refused(_) | ClientError::Unreachable { .. }) => self.has_several(),
                _ => false,
            };
            if !nobody_leads || begun.elapsed() + PAUSE > self.patience {
                return result;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Asks the daemons one after the other until one of them takes the request.
    async fn ask(&self, order: &Order<'_>) -> Result<(&Place, Answer), ClientError> {
        let mut untried = self.places.in_order();
        let mut refused = None;
        let mut unreachable = None;
        while let Some(&number) = untried.first() {
            untried.remove(0);
            self.places.prefer(number);
            let place = &self.places.all()[number];
            match self.send(place, order).await {
                Err(error @ ClientError::Unreachable { .. }) => unreachable = unreachable.or(Some(error)),
                Err(error) => return Err(error),
                Ok(answer) => match answer.not_leader() {
                    None => return Ok((place, answer)),
                    Some(body) => {
                        refused = Some(ClientError::Refused(body));
                        let leader = answer.location.and_then(|url| self.places.find(&url));
                        untried.sort_by_key(|&number| Some(number) != leader);
                    }
                },
            }
        }
        // A refusal of a daemon that answers says more than "unreachable".
        Err(refused.or(unreachable).unwrap_or(ClientError::TimedOut))
    }

    fn request(&self, place: &Place, order: &Order<'_>) -> Result<Request<Full<Bytes>>, ClientError> {
        let mut request = Request::builder()
            .method(&order.method)
            .uri(order.path)
            .header(HOST, place.host())
            .header(ACCEPT, "application/json");
        if let Some(token) = &self.token {
            let value = HeaderValue::try_from(format!("Bearer {}", token.reveal())).map(|mut value| {
                value.set_sensitive(true);
                value
            });
            request =
                request.header(AUTHORIZATION, value.map_err(|_| not_xpm(place, "the token fits no header"))?);
        }
        if order.body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        request
            .body(Full::new(order.body.clone().unwrap_or_default()))
            .map_err(|error| not_xpm(place, &format!("`{}` is no path of a URL: {error}", order.path)))
    }

    async fn send(&self, place: &Place, order: &Order<'_>) -> Result<Answer, ClientError> {
        let request = self.request(place, order)?;
        let unreachable = |source| ClientError::Unreachable { url: place.base.clone(), source };
        match &place.way {
            Way::Tcp { host, port, .. } => {
                let stream = self.connect(host, *port).await.map_err(unreachable)?;
                stream.set_nodelay(true).map_err(unreachable)?;
                converse(place, stream, request).await
            }
            Way::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(unreachable)?;
                converse(place, stream, request).await
            }
        }
    }

    async fn connect(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        let connect = TcpStream::connect((host, port));
        match self.has_several() {
            true => tokio::time::timeout(CONNECT_LIMIT, connect).await?,
            false => connect.await,
        }
    }
}

/// A request to be sent.
struct Order<'a> {
    method: Method,
    path: &'a str,
    body: Option<Bytes>,
}
