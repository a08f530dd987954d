use std::{
    error::Error as StdError,
    time::{Duration, SystemTime},
};

use backon::{ExponentialBuilder, Retryable as _};
use dnd_mesh::Fault;
use reqwest::{Client, RequestBuilder, Response, StatusCode, header, redirect};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Serialize, de::DeserializeOwned};
use tonic::Code;

use super::{
    args::BaseUrl,
    wire::{Models, Problem},
};

/// How often a call is tried again that may yet go well, and how long after the first time; twice as long after each further one, up to a bound, and up to as
/// long again by chance, so that calls that failed together don't come back together.
const RETRIES: usize = 5;
const RETRY_AFTER: Duration = Duration::from_millis(500);
const RETRY_AT_LAST_AFTER: Duration = Duration::from_secs(30);
/// The longest time that an endpoint may ask to be left alone.
const PATIENCE: Duration = Duration::from_secs(300);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an answer that are read at most.
const LARGEST_ANSWER: usize = 1 << 20;
/// Characters that are shown of what an endpoint said.
const SHOWN: usize = 300;

/// An endpoint, and how it is talked to.
pub(super) struct Endpoint {
    client: Client,
    base: BaseUrl,
    key: Option<SecretString>,
    timeout: Duration,
}

/// Why a try failed.
enum Failed {
    /// Another try may go well; the endpoint may have said after how long.
    ForNow { why: String, after: Option<Duration> },
    /// Another try would fail alike.
    ForGood(Fault),
}

impl Endpoint {
    pub(super) fn new(base: BaseUrl, key: Option<SecretString>, timeout: Duration) -> Result<Self, Fault> {
        // The first provider that a process installs stays.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // A request goes where it was told to go and nowhere else, its key with it.
        let client = Client::builder().redirect(redirect::Policy::none()).timeout(timeout).connect_timeout(CONNECT_TIMEOUT);
        // Without TLS nothing of it is needed, such as certificates.
        let client = if base.is_plain() { client.tls_certs_only([]) } else { client };
        let client = client.build().map_err(|e| Fault::new(Code::Internal, "LLM_CLIENT", format!("no HTTPS can be spoken here: {}", innermost(&e))))?;
        if key.is_some() && base.is_open() {
            tracing::warn!("{base} is plain HTTP: the key can be read on the way");
        }
        Ok(Self { client, base, key, timeout })
    }

    /// Whether somebody is there who takes the key. An endpoint that lists its models and not this one is warned of: it may know it all the same.
    pub(super) async fn check(&self, model: &str) -> Result<(), Fault> {
        let failed = |failed: Failed| match failed {
            Failed::ForNow { why, .. } => Fault::new(Code::Unavailable, "LLM_UNAVAILABLE", format!("{}: {why}", self.base)),
            Failed::ForGood(fault) => fault,
        };
        let response = self.send(self.client.get(self.base.at(&["models"]))).await.map_err(failed)?;
        if matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return Err(failed(self.refused(response).await));
        }
        let listed = self.body(response).await.ok().and_then(|body| serde_json::from_slice::<Models>(&body).ok());
        if let Some(Models { data }) = listed
            && !data.iter().any(|listed| listed.id == model)
        {
            let names: Vec<&str> = data.iter().map(|listed| listed.id.as_str()).take(20).collect();
            tracing::warn!("{} does not list a model {model:?}; it lists {}", self.base, names.join(", "));
        }
        Ok(())
    }

    /// Sends a message to a path, as often as it takes, and reads the answer.
    pub(super) async fn post<A: DeserializeOwned>(&self, path: &[&str], message: &impl Serialize) -> Result<A, Fault> {
        let backoff = ExponentialBuilder::new().with_min_delay(RETRY_AFTER).with_max_delay(RETRY_AT_LAST_AFTER).with_max_times(RETRIES).with_jitter();
        let tried = (|| self.try_once(path, message))
            .retry(backoff)
            .when(|failed| matches!(failed, Failed::ForNow { after, .. } if after.is_none_or(|after| after <= PATIENCE)))
            .adjust(|failed, wait| match failed {
                Failed::ForNow { after: Some(after), .. } => wait.map(|_| *after),
                _ => wait,
            })
            .notify(|failed, wait| {
                if let Failed::ForNow { why, .. } = failed {
                    tracing::warn!("{}: {why}; trying again in {wait:?}", self.base);
                }
            });
        tried.await.map_err(|failed| match failed {
            Failed::ForGood(fault) => fault,
            Failed::ForNow { why, after: Some(after) } if after > PATIENCE => {
                let message = format!("{}: {why}, and asks to be left alone for {} s; at most {} s are waited", self.base, after.as_secs(), PATIENCE.as_secs());
                Fault::new(Code::Unavailable, "LLM_UNAVAILABLE", message)
            }
            Failed::ForNow { why, .. } => Fault::new(Code::Unavailable, "LLM_UNAVAILABLE", format!("{}: {why}; tried {} times", self.base, RETRIES + 1)),
        })
    }

    async fn try_once<A: DeserializeOwned>(&self, path: &[&str], message: &impl Serialize) -> Result<A, Failed> {
        let response = self.send(self.client.post(self.base.at(path)).json(message)).await?;
        if !response.status().is_success() {
            return Err(self.refused(response).await);
        }
        let body = self.body(response).await?;
        serde_json::from_slice(&body).map_err(|error| {
            let message = format!("{}: the answer is not what was asked for ({error}): {}", self.base, self.said(&body));
            Failed::ForGood(Fault::new(Code::Internal, "LLM_ANSWER", message))
        })
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, Failed> {
        let request = match &self.key {
            Some(key) => request.bearer_auth(key.expose_secret()),
            None => request,
        };
        request.send().await.map_err(|error| self.broken(&error))
    }

    fn broken(&self, error: &reqwest::Error) -> Failed {
        let why = if error.is_timeout() {
            format!("no answer within {} s", self.timeout.as_secs())
        } else if error.is_connect() {
            format!("no connection: {}", innermost(error))
        } else {
            format!("the connection broke: {}", innermost(error))
        };
        Failed::ForNow { why, after: None }
    }

    /// The body of a response, of which there may be too much.
    async fn body(&self, mut response: Response) -> Result<Vec<u8>, Failed> {
        let mut body = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|error| self.broken(&error))? {
            if body.len() + piece.len() > LARGEST_ANSWER {
                let message = format!("{}: the answer is longer than {LARGEST_ANSWER} bytes", self.base);
                return Err(Failed::ForGood(Fault::new(Code::Internal, "LLM_ANSWER", message)));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }

    /// What an answer other than 2xx means.
    async fn refused(&self, response: Response) -> Failed {
        let status = response.status();
        let after = retry_after(response.headers());
        let body = self.body(response).await.unwrap_or_default();
        let why = format!("it answered {status}: {}", self.said(&body));
        let for_good = |code, reason, hint: &str| Failed::ForGood(Fault::new(code, reason, format!("{}: {why}{hint}", self.base)));
        match status {
            StatusCode::UNAUTHORIZED if self.key.is_none() => {
                for_good(Code::Unauthenticated, "LLM_KEY", "; set DND_LLM_KEY, or name a file with --llm-key-file")
            }
            StatusCode::UNAUTHORIZED => for_good(Code::Unauthenticated, "LLM_KEY", "; the key is not the right one"),
            StatusCode::FORBIDDEN => for_good(Code::PermissionDenied, "LLM_FORBIDDEN", ""),
            StatusCode::NOT_FOUND => for_good(Code::NotFound, "LLM_NOT_FOUND", "; the base URL, or the model's name, is not the right one"),
            StatusCode::PAYMENT_REQUIRED => for_good(Code::ResourceExhausted, "LLM_QUOTA", ""),
            StatusCode::TOO_MANY_REQUESTS if problem(&body).error.is_some_and(|error| error.code == "insufficient_quota") => {
                for_good(Code::ResourceExhausted, "LLM_QUOTA", "")
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => Failed::ForNow { why, after },
            status if status.is_server_error() => Failed::ForNow { why, after },
            status if status.is_redirection() => for_good(Code::NotFound, "LLM_NOT_FOUND", "; it points elsewhere, where requests are not sent"),
            _ => for_good(Code::InvalidArgument, "LLM_REQUEST", ""),
        }
    }

    /// A body in a sentence for people.
    fn said(&self, body: &[u8]) -> String {
        let Problem { error, message } = problem(body);
        let text = error.and_then(|error| error.message).or(message).unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
        let text = self.without_key(&text);
        let shown: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(SHOWN).collect();
        if shown.trim().is_empty() { "(nothing)".to_owned() } else { shown.trim().to_owned() }
    }

    /// A text of the endpoint's, which may have sent the key back.
    pub(super) fn without_key(&self, text: &str) -> String {
        match &self.key {
            Some(key) => text.replace(key.expose_secret(), "[key]"),
            None => text.to_owned(),
        }
    }
}

fn problem(body: &[u8]) -> Problem {
    serde_json::from_slice(body).unwrap_or_default()
}

/// When the endpoint wants to be asked again: seconds, or a date.
fn retry_after(headers: &header::HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        Err(_) => Some(httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).unwrap_or_default()),
    }
}

/// What is at the bottom of an error: never the URL, in which there may be credentials.
fn innermost(error: &reqwest::Error) -> String {
    let Some(mut source) = error.source() else { return "the request can't be sent".to_owned() };
    while let Some(deeper) = source.source() {
        source = deeper;
    }
    source.to_string()
}
