//! Errors as callers see them: a gRPC status with google.rpc details and a stable reason.

use std::{borrow::Cow, fmt, time::Duration};

use prost::Message as _;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{MAX_TEXT_BYTES, tls};

/// The domain of the reasons in google.rpc.ErrorInfo.
pub const DOMAIN: &str = "dnd.v1";

/// What went wrong, for the caller: becomes a [`tonic::Status`] for a whole call, or a [`tonic_types::Status`] for one item of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    code: Code,
    reason: Cow<'static, str>,
    message: String,
    field: Option<String>,
    retry_after: Option<Duration>,
}

impl Fault {
    /// A fault with a stable, upper-case `reason` and a message that says what was wrong, where, and what would be right.
    pub fn new(code: Code, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason: Cow::Borrowed(reason), message: message.into(), field: None, retry_after: None }
    }

    /// A fault as another service of the mesh gave it, with its code, reason, message and field.
    pub fn relayed(status: &Status) -> Self {
        if let Some(fault) = std::error::Error::source(status).and_then(tls::client_fault) {
            return fault;
        }
        let field = status.get_details_bad_request().and_then(|bad| bad.field_violations.into_iter().next()).map(|violation| violation.field);
        let reason = reason_of(status).map_or(Cow::Borrowed("UNKNOWN"), Cow::Owned);
        Self { code: status.code(), reason, message: status.message().to_owned(), field, retry_after: retry_after(status) }
    }

    /// A field of the request that can't be right; `field` is its path, such as `layers[0].units`.
    pub fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        let fault = Self::new(Code::InvalidArgument, "INVALID_FIELD", message);
        Self { field: Some(field.into()), ..fault }
    }

    /// Something that is a defect of the service, not of the request.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, "INTERNAL", message)
    }

    /// The fault with when it is worth asking again, as google.rpc.RetryInfo.
    #[must_use]
    pub fn retry_after(self, delay: Duration) -> Self {
        Self { retry_after: Some(delay), ..self }
    }

    /// The gRPC code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// The stable reason.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// The fault as the status of one item.
    pub fn into_item(self) -> tonic_types::Status {
        let status = Status::from(self);
        tonic_types::Status::decode(status.details()).unwrap_or_else(|_| tonic_types::Status {
            code: status.code() as i32,
            message: status.message().to_owned(),
            details: Vec::new(),
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

/// Bytes of a message at most. It is sent in headers, twice, and a list of headers that is too long ends its connection, with all calls on it.
const MOST_MESSAGE: usize = 1500;

impl From<Fault> for Status {
    fn from(mut fault: Fault) -> Self {
        for text in [&mut fault.message].into_iter().chain(&mut fault.field).filter(|text| text.len() > MOST_MESSAGE) {
            text.truncate(text.floor_char_boundary(MOST_MESSAGE));
            text.push_str(" ...");
        }
        let mut details = ErrorDetails::with_error_info(fault.reason, DOMAIN, []);
        if let Some(field) = fault.field {
            details.add_bad_request_violation(field, &fault.message);
        }
        if let Some(delay) = fault.retry_after {
            details.set_retry_info(Some(delay));
        }
        Status::with_error_details(fault.code, fault.message, details)
    }
}

/// Refuses a text of a request that has no words, or too many.
pub fn check_text(field: impl Into<String>, text: &str) -> Result<(), Fault> {
    if text.trim().is_empty() {
        return Err(Fault::field(field, "empty; it has words"));
    }
    if text.len() > MAX_TEXT_BYTES {
        return Err(Fault::field(field, format!("{} bytes; at most {MAX_TEXT_BYTES} are read", text.len())));
    }
    Ok(())
}

/// The stable reason of a status, if a service of the mesh made it.
pub fn reason_of(status: &Status) -> Option<String> {
    status.get_details_error_info().map(|info| info.reason)
}

/// When a status says that it is worth asking again.
pub fn retry_after(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay
}

/// The status of one item of a stream as an ordinary status.
pub fn item_status(item: &tonic_types::Status) -> Status {
    Status::with_details(Code::from_i32(item.code), item.message.clone(), item.encode_to_vec().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_fault_names_the_field_and_the_reason_in_both_forms() {
        let fault = Fault::field("layers[0].units", "unit 12 is out of range 0..12");
        let item = item_status(&fault.clone().into_item());
        for status in [Status::from(fault), item] {
            assert_eq!(status.code(), Code::InvalidArgument);
            assert_eq!(status.message(), "unit 12 is out of range 0..12");
            assert_eq!(reason_of(&status).as_deref(), Some("INVALID_FIELD"));
            let violations = status.get_details_bad_request().unwrap().field_violations;
            assert_eq!(violations[0].field, "layers[0].units");
        }
    }

    #[test]
    fn a_message_that_repeats_what_was_sent_fits_into_headers() {
        for text in ["x", "\u{1F600}", "\0"] {
            let status = Status::from(Fault::field(text.repeat(1 << 20), format!("{:?} is no job", text.repeat(1 << 20))));
            let mut headers = http::HeaderMap::new();
            status.add_header(&mut headers).unwrap();
            let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
            assert!(bytes < 16 << 10, "{bytes}");
            assert!(status.message().ends_with(" ...") && reason_of(&status).as_deref() == Some("INVALID_FIELD"));
        }
    }

    #[test]
    fn a_status_from_elsewhere_has_no_reason() {
        assert_eq!(reason_of(&Status::unavailable("tcp connect error")), None);
    }
}
