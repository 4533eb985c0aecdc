//! Extractors for handlers; a refusal has the protocol's one form of errors.

use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use xpm_protocol::api::ErrorKind;

use super::{ApiError, Limits};

/// A JSON body of a request or an answer.
///
/// The content type `application/json` is required: a web page cannot make a browser send it to another site without
/// that site's permission, so no page can give orders to a daemon on its reader's machine.
#[derive(Debug, Clone, Copy)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Json<T>, ApiError> {
        let limits = request.extensions().get::<Limits>().copied().unwrap_or_default();
        match tokio::time::timeout(limits.body, axum::Json::from_request(request, state)).await {
            Ok(Ok(axum::Json(value))) => Ok(Json(value)),
            Ok(Err(rejection)) => Err(refused_body(&rejection, limits)),
            Err(_) => Err(ApiError(ErrorKind::Invalid, "the body of the request came too slowly".to_owned())),
        }
    }
}

fn refused_body(rejection: &JsonRejection, limits: Limits) -> ApiError {
    let line = match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => format!("the body is larger than {} bytes", limits.body_len_max),
        _ => rejection.body_text(),
    };
    ApiError(ErrorKind::Invalid, line)
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

/// Parts of the path, such as an id or a name.
#[derive(Debug, Clone, Copy)]
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Path<T>, ApiError> {
        match axum::extract::Path::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(value)) => Ok(Path(value)),
            Err(rejection) => Err(refused_path(&rejection)),
        }
    }
}

fn refused_path(rejection: &PathRejection) -> ApiError {
    ApiError(ErrorKind::Invalid, rejection.body_text())
}

/// The query, such as `?after=7`. A misspelt key is refused if the type denies unknown keys.
#[derive(Debug, Clone, Copy)]
pub struct Query<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Query<T>, ApiError> {
        match axum::extract::Query::from_request_parts(parts, state).await {
            Ok(axum::extract::Query(value)) => Ok(Query(value)),
            Err(rejection) => Err(ApiError(ErrorKind::Invalid, rejection.body_text())),
        }
    }
}

/// Whether the query is `force=true`. The queries `force=true`, `force=false` and none are accepted. Any other query is
/// refused, so that a misspelt one is never ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Force(pub bool);

impl<S: Send + Sync> FromRequestParts<S> for Force {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Force, ApiError> {
        match parts.uri.query().unwrap_or_default() {
            "" | "force=false" => Ok(Force(false)),
            "force=true" => Ok(Force(true)),
            other => Err(ApiError(
                ErrorKind::Invalid,
                format!("`?{other}` is no option here: use ?force=true or none"),
            )),
        }
    }
}
