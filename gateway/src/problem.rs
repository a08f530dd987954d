//! Errors as HTTP has them: problem+json (RFC 9457) with the code, reason and field of the mesh's status.

use std::any::Any;

use axum::{
    Json,
    extract::rejection::{BytesRejection, PathRejection, QueryRejection},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use dnd_mesh::{Fault, fault};
use serde::Serialize;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// What went wrong, for a caller over HTTP.
#[derive(Debug, Serialize)]
pub(crate) struct Problem {
    /// The HTTP status.
    status: u16,
    /// The HTTP status in words.
    title: &'static str,
    /// What was wrong, in a sentence.
    detail: String,
    /// The gRPC code, such as "NOT_FOUND".
    code: &'static str,
    /// The stable reason, such as "INVALID_FIELD".
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// The field that was wrong, such as "layers[0].units".
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<String>,
}

impl Problem {
    /// A problem with another HTTP status than its code has.
    pub(crate) fn with_status(self, status: StatusCode) -> Self {
        Self { status: status.as_u16(), title: status.canonical_reason().unwrap_or_default(), ..self }
    }
}

impl From<Status> for Problem {
    fn from(status: Status) -> Self {
        let (http, code) = http(status.code());
        let field = status.get_details_bad_request().and_then(|bad| bad.field_violations.into_iter().next()).map(|violation| violation.field);
        Self {
            status: http.as_u16(),
            title: http.canonical_reason().unwrap_or_default(),
            detail: status.message().to_owned(),
            code,
            reason: fault::reason_of(&status),
            field,
        }
    }
}

impl From<Fault> for Problem {
    fn from(fault: Fault) -> Self {
        Status::from(fault).into()
    }
}

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        Fault::new(Code::InvalidArgument, "INVALID_PATH", rejection.body_text()).into()
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        Fault::new(Code::InvalidArgument, "INVALID_QUERY", rejection.body_text()).into()
    }
}

impl From<BytesRejection> for Problem {
    fn from(rejection: BytesRejection) -> Self {
        let status = rejection.status();
        Self::from(Fault::new(Code::InvalidArgument, "INVALID_BODY", rejection.body_text())).with_status(status)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self)).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::UNAUTHORIZED {
            // A browser asks its user for the token then, as a password.
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"Your token is the password\", charset=\"UTF-8\""));
        }
        response
    }
}

/// A gRPC code as HTTP's, as google.rpc.Code's documentation maps it, and its name.
fn http(code: Code) -> (StatusCode, &'static str) {
    match code {
        Code::Ok => (StatusCode::OK, "OK"),
        // 499, "client closed request", has no name in HTTP.
        Code::Cancelled => (StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST), "CANCELLED"),
        Code::Unknown => (StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN"),
        Code::InvalidArgument => (StatusCode::BAD_REQUEST, "INVALID_ARGUMENT"),
        Code::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, "DEADLINE_EXCEEDED"),
        Code::NotFound => (StatusCode::NOT_FOUND, "NOT_FOUND"),
        Code::AlreadyExists => (StatusCode::CONFLICT, "ALREADY_EXISTS"),
        Code::PermissionDenied => (StatusCode::FORBIDDEN, "PERMISSION_DENIED"),
        Code::ResourceExhausted => (StatusCode::TOO_MANY_REQUESTS, "RESOURCE_EXHAUSTED"),
        Code::FailedPrecondition => (StatusCode::BAD_REQUEST, "FAILED_PRECONDITION"),
        Code::Aborted => (StatusCode::CONFLICT, "ABORTED"),
        Code::OutOfRange => (StatusCode::BAD_REQUEST, "OUT_OF_RANGE"),
        Code::Unimplemented => (StatusCode::NOT_IMPLEMENTED, "UNIMPLEMENTED"),
        Code::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL"),
        Code::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE"),
        Code::DataLoss => (StatusCode::INTERNAL_SERVER_ERROR, "DATA_LOSS"),
        Code::Unauthenticated => (StatusCode::UNAUTHORIZED, "UNAUTHENTICATED"),
    }
}

pub(crate) async fn no_such_page() -> Problem {
    Fault::new(Code::NotFound, "NO_SUCH_PAGE", "nothing is here; /openapi.json lists what there is").into()
}

pub(crate) async fn no_such_method() -> Problem {
    let fault = Fault::new(Code::Unimplemented, "NO_SUCH_METHOD", "this address has no such method; /openapi.json lists what there is");
    Problem::from(fault).with_status(StatusCode::METHOD_NOT_ALLOWED)
}

pub(crate) fn panicked(_: Box<dyn Any + Send>) -> Response {
    Problem::from(Fault::internal("the gateway panicked on this request; its log has the details")).into_response()
}
