//! Jobs, units, selection and layers: each request a call of the orchestrator's DissectService.

use std::convert::Infallible;

use axum::{
    Json,
    body::{Body, Bytes},
    extract::{FromRequest, FromRequestParts, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    response::{
        IntoResponse as _, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dnd_mesh::Fault;
use dnd_proto::v1::{
    CancelJobRequest, CancelJobResponse, CreateJobRequest, CreateJobResponse, DeleteJobRequest, DescribeTargetResponse, DissectServiceDescribeTargetRequest,
    GetJobRequest, GetJobResponse, GetUnitRequest, GetUnitResponse, JobEvent, ListJobsRequest, ListJobsResponse, ListUnitsRequest, ListUnitsResponse,
    NearestUnitsRequest, NearestUnitsResponse, ResumeJobRequest, ResumeJobResponse, SelectConceptRequest, UnitState, WatchJobRequest, job_event,
};
use futures::{Stream, StreamExt as _, stream};
use serde::{Deserialize, de::DeserializeOwned};
use tonic::{
    Code, Streaming,
    metadata::{Ascii, MetadataMap, MetadataValue},
};

use crate::{Gateway, problem::Problem};

/// A path's parts.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Problem))]
pub(crate) struct Path<T>(pub(crate) T);

/// What stands behind an address's question mark.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Problem))]
pub(crate) struct Query<T>(pub(crate) T);

/// A message as protobuf's JSON.
pub(crate) struct Message<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Message<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        // A form of another site's page can't send this type, so that guard's rule does not stand alone.
        let is_json = request.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
        if !is_json {
            let fault = Fault::new(Code::InvalidArgument, "NOT_JSON", "the body has to be JSON, with content-type: application/json");
            return Err(Problem::from(fault).with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE));
        }
        let body = Bytes::from_request(request, state).await?;
        let message = serde_json::from_slice(&body).map_err(|e| Fault::new(Code::InvalidArgument, "INVALID_JSON", format!("the body: {e}")))?;
        Ok(Self(message))
    }
}

/// Who asks: their token goes on to the mesh.
#[derive(Clone)]
pub(crate) struct Caller(MetadataMap);

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let mut metadata = MetadataMap::new();
        if let Some(token) = parts.headers.get(header::AUTHORIZATION).and_then(bearer) {
            metadata.insert("authorization", token);
        }
        Ok(Self(metadata))
    }
}

/// The token that was shown, as the mesh takes it. A browser has asked for it as the password of any name, since it can't send it otherwise with pictures and
/// events.
fn bearer(shown: &HeaderValue) -> Option<MetadataValue<Ascii>> {
    let shown = shown.to_str().ok()?;
    let token = shown.strip_prefix("Basic ").map(|encoded| {
        let decoded = String::from_utf8(STANDARD.decode(encoded).ok()?).ok()?;
        decoded.split_once(':').map(|(_, password)| format!("Bearer {password}"))
    });
    token.map_or_else(|| shown.parse().ok(), |token| token?.parse().ok())
}

impl Caller {
    /// A call of the mesh.
    pub(crate) fn asks<T>(&self, message: T) -> tonic::Request<T> {
        tonic::Request::from_parts(self.0.clone(), tonic::Extensions::default(), message)
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
#[derive(Default)]
pub(crate) struct Page {
    pub(crate) page_size: u32,
    pub(crate) page_token: String,
}

pub(crate) async fn list_jobs(State(mut gateway): State<Gateway>, caller: Caller, Query(page): Query<Page>) -> Result<Json<ListJobsResponse>, Problem> {
    let Page { page_size, page_token } = page;
    Ok(Json(gateway.dissect.list_jobs(caller.asks(ListJobsRequest { page_size, page_token })).await?.into_inner()))
}

pub(crate) async fn create_job(
    State(mut gateway): State<Gateway>,
    caller: Caller,
    Message(request): Message<CreateJobRequest>,
) -> Result<(StatusCode, Json<CreateJobResponse>), Problem> {
    Ok((StatusCode::CREATED, Json(gateway.dissect.create_job(caller.asks(request)).await?.into_inner())))
}

pub(crate) async fn get_job(State(mut gateway): State<Gateway>, caller: Caller, Path(job_id): Path<String>) -> Result<Json<GetJobResponse>, Problem> {
    Ok(Json(gateway.dissect.get_job(caller.asks(GetJobRequest { job_id })).await?.into_inner()))
}

pub(crate) async fn delete_job(State(mut gateway): State<Gateway>, caller: Caller, Path(job_id): Path<String>) -> Result<StatusCode, Problem> {
    gateway.dissect.delete_job(caller.asks(DeleteJobRequest { job_id })).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn cancel_job(State(mut gateway): State<Gateway>, caller: Caller, Path(job_id): Path<String>) -> Result<Json<CancelJobResponse>, Problem> {
    Ok(Json(gateway.dissect.cancel_job(caller.asks(CancelJobRequest { job_id })).await?.into_inner()))
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
#[derive(Default)]
pub(crate) struct Resume {
    failed: bool,
}

pub(crate) async fn resume_job(
    State(mut gateway): State<Gateway>,
    caller: Caller,
    Path(job_id): Path<String>,
    Query(Resume { failed }): Query<Resume>,
) -> Result<Json<ResumeJobResponse>, Problem> {
    Ok(Json(gateway.dissect.resume_job(caller.asks(ResumeJobRequest { job_id, failed })).await?.into_inner()))
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
#[derive(Default)]
pub(crate) struct Units {
    page_size: u32,
    page_token: String,
    layer: String,
    state: String,
    text: String,
}

pub(crate) async fn list_units(
    State(mut gateway): State<Gateway>,
    caller: Caller,
    Path(job_id): Path<String>,
    Query(units): Query<Units>,
) -> Result<Json<ListUnitsResponse>, Problem> {
    let Units { page_size, page_token, layer, state, text } = units;
    let state = match state.as_str() {
        "" => UnitState::Unspecified,
        name => UnitState::from_str_name(name)
            .ok_or_else(|| Fault::field("state", format!("{name:?} is none; UNIT_STATE_LABELLED, UNIT_STATE_DEAD and UNIT_STATE_FAILED are")))?,
    };
    let request = ListUnitsRequest { job_id, page_size, page_token, layer, state: state.into(), text };
    Ok(Json(gateway.dissect.list_units(caller.asks(request)).await?.into_inner()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Near {
    text: String,
    #[serde(default)]
    most: u32,
}

pub(crate) async fn nearest_units(
    State(mut gateway): State<Gateway>,
    caller: Caller,
    Path(job_id): Path<String>,
    Query(Near { text, most }): Query<Near>,
) -> Result<Json<NearestUnitsResponse>, Problem> {
    Ok(Json(gateway.dissect.nearest_units(caller.asks(NearestUnitsRequest { job_id, text, most })).await?.into_inner()))
}

pub(crate) async fn get_unit(
    State(mut gateway): State<Gateway>,
    caller: Caller,
    Path((job_id, layer, unit)): Path<(String, String, u32)>,
) -> Result<Json<GetUnitResponse>, Problem> {
    Ok(Json(gateway.dissect.get_unit(caller.asks(GetUnitRequest { job_id, layer, unit })).await?.into_inner()))
}

pub(crate) async fn layers(
    State(mut gateway): State<Gateway>,
    caller: Caller,
    Message(request): Message<DissectServiceDescribeTargetRequest>,
) -> Result<Json<DescribeTargetResponse>, Problem> {
    let description = gateway.dissect.describe_target(caller.asks(request)).await?.into_inner().description;
    Ok(Json(description.unwrap_or_default()))
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Watch {
    after: u64,
    evidence: bool,
}

impl Default for Watch {
    fn default() -> Self {
        Self { after: 0, evidence: true }
    }
}

/// The events of a job as server-sent events, named by their kind, numbered as the job numbers them. A browser that comes back goes on after the last one that
/// it saw. After the last, `end` says that there will be no more; a `problem` ends a stream that broke.
pub(crate) async fn watch_job(
    State(mut gateway): State<Gateway>,
    caller: Caller,
    Path(job_id): Path<String>,
    Query(Watch { after, evidence }): Query<Watch>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let after = match headers.get("last-event-id") {
        Some(seen) => seen.to_str().ok().and_then(|seen| seen.parse().ok()).ok_or_else(|| Fault::field("last-event-id", "not the number of an event"))?,
        None => after,
    };
    let events = gateway.dissect.watch_job(caller.asks(WatchJobRequest { job_id, after })).await?.into_inner();
    let told = to_the_end(events).filter_map(move |told| async move {
        let event = match told {
            Told::Message(message) => event(message.event?, evidence),
            Told::Problem(problem) => Event::default().event("problem").json_data(problem),
            Told::End => Ok(Event::default().event("end").data("{}")),
        };
        Some(event)
    });
    let told = told.take_until(gateway.stopping.cancelled_owned());
    Ok(Sse::new(told).keep_alive(KeepAlive::default()).into_response())
}

fn event(mut message: JobEvent, evidence: bool) -> Result<Event, axum::Error> {
    let kind = match &mut message.event {
        Some(job_event::Event::Accepted(_)) => "accepted",
        Some(job_event::Event::Progress(_)) => "progress",
        Some(job_event::Event::Skipped(_)) => "skipped",
        Some(job_event::Event::Unit(unit)) => {
            if !evidence {
                unit.concepts.truncate(1);
                unit.concepts.iter_mut().for_each(|concept| concept.pictures.clear());
                unit.images.truncate(4);
                (unit.probed, unit.crops, unit.answers) = Default::default();
            }
            "unit"
        }
        Some(job_event::Event::Done(_)) => "done",
        Some(job_event::Event::Paused(_)) => "paused",
        Some(job_event::Event::Resumed(_)) => "resumed",
        None => "unknown",
    };
    let event = Event::default().event(kind);
    let event = if message.number > 0 { event.id(message.number.to_string()) } else { event };
    event.json_data(message)
}

/// What happens in a selection, a line of JSON each. A line with a `problem` ends one that failed.
pub(crate) async fn select(State(mut gateway): State<Gateway>, caller: Caller, Message(request): Message<SelectConceptRequest>) -> Result<Response, Problem> {
    let events = gateway.dissect.select_concept(caller.asks(request)).await?.into_inner();
    let lines = to_the_end(events).filter_map(|told| async {
        let line = match told {
            Told::Message(message) => serde_json::to_string(&message),
            Told::Problem(problem) => serde_json::to_string(&serde_json::json!({ "problem": problem })),
            Told::End => return None,
        };
        Some(line.map(|line| line + "\n"))
    });
    let lines = lines.take_until(gateway.stopping.cancelled_owned());
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

enum Told<T> {
    Message(T),
    Problem(Problem),
    End,
}

/// A stream's messages, then how it ended.
fn to_the_end<T>(messages: Streaming<T>) -> impl Stream<Item = Told<T>> {
    stream::unfold(Some(messages), |messages| async {
        let mut messages = messages?;
        match messages.message().await {
            Ok(Some(message)) => Some((Told::Message(message), Some(messages))),
            Ok(None) => Some((Told::End, None)),
            Err(status) => Some((Told::Problem(status.into()), None)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_passed_on_whether_shown_as_such_or_as_a_browsers_password() {
        let shown = |header: &'static str| bearer(&HeaderValue::from_static(header)).map(|token| token.to_str().unwrap().to_owned());
        assert_eq!(shown("Bearer dnd_1:2").as_deref(), Some("Bearer dnd_1:2"));
        assert_eq!(shown("Basic bWU6ZG5kXzE6Mg==").as_deref(), Some("Bearer dnd_1:2"));
        assert_eq!(shown("Basic bm8gY29sb24="), None);
        assert_eq!(shown("Basic ?"), None);
    }
}
