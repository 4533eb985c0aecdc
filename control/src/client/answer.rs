//! An exchange over a connection: one request, its answer, and the errors of both.

use std::error::Error as _;
use std::io;
use std::pin::pin;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::LOCATION;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use xpm_protocol::api::{ErrorBody, ErrorKind};

use super::place::Place;
use super::{ANSWER_LEN_MAX, ClientError};

/// The answer to a request.
pub(super) struct Answer {
    status: StatusCode,
    pub(super) location: Option<String>,
    body: Bytes,
}

impl Answer {
    /// The refusal of a daemon that is not the leader.
    pub(super) fn not_leader(&self) -> Option<ErrorBody> {
        if self.status.is_success() {
            return None;
        }
        serde_json::from_slice(&self.body).ok().filter(|body: &ErrorBody| body.kind == ErrorKind::NotLeader)
    }
}

pub(super) async fn converse<S>(
    place: &Place,
    stream: S,
    request: Request<Full<Bytes>>,
) -> Result<Answer, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| broken(place, error))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|error| broken(place, error))?;
        collect(place, response).await
    };
    let mut answer = pin!(answer);
    // The connection task moves the bytes. If it ends first, the bytes that have arrived may still be a whole answer;
    // otherwise the connection's error is more precise than the request's.
    tokio::select! {
        result = &mut answer => result,
        ended = connection => match (answer.await, ended) {
            (Err(_), Err(cause)) => Err(broken(place, cause)),
            (result, _) => result,
        },
    }
}

async fn collect(place: &Place, response: Response<Incoming>) -> Result<Answer, ClientError> {
    let status = response.status();
    let location = response.headers().get(LOCATION).and_then(|url| url.to_str().ok()).map(str::to_owned);
    match Limited::new(response.into_body(), ANSWER_LEN_MAX).collect().await {
        Ok(body) => Ok(Answer { status, location, body: body.to_bytes() }),
        Err(error) => Err(match error.downcast::<hyper::Error>() {
            Ok(error) => broken(place, *error),
            Err(_) => not_xpm(place, &format!("its answer is larger than {ANSWER_LEN_MAX} bytes")),
        }),
    }
}

pub(super) fn decode<T: DeserializeOwned>(place: &Place, answer: &Answer) -> Result<T, ClientError> {
    let Answer { status, body, .. } = answer;
    if !status.is_success() {
        return Err(match serde_json::from_slice(body) {
            Ok(body) => ClientError::Refused(body),
            Err(_) => not_xpm(place, &format!("it answers {status} and not as xpm does")),
        });
    }
    // An answer without content (204) is read as JSON's null, so that `()` can be taken.
    let body: &[u8] = if body.is_empty() { b"null" } else { body };
    serde_json::from_slice(body)
        .map_err(|error| not_xpm(place, &format!("its answer cannot be read: {error}")))
}

fn broken(place: &Place, error: hyper::Error) -> ClientError {
    match is_foreign(&error) {
        true => not_xpm(place, "it does not speak HTTP"),
        false => ClientError::Lost { url: place.base.clone(), source: error },
    }
}

pub(super) fn not_xpm(place: &Place, what: &str) -> ClientError {
    ClientError::NotXpm(format!("{}: {what}", place.base))
}

/// Whether the peer violated HTTP, as opposed to a broken connection. A peer that speaks first is detected before or
/// after the request was taken, and hyper reports the two cases differently.
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
