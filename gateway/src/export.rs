//! A job's results as files that other programs read.

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{HeaderValue, header},
    response::{IntoResponse as _, Response},
};
use dnd_mesh::Fault;
use dnd_proto::v1::{GetJobRequest, GetUnitRequest, Job, ListUnitsRequest, UnitResult, UnitState, UnitSummary};
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use serde::Deserialize;
use serde_json::json;
use tonic::{Code, Status};

use crate::{
    Gateway,
    api::{Caller, Path, Query},
    problem::Problem,
    table,
};

/// Units that are read side by side.
const AT_A_TIME: usize = 16;
/// Units of a page.
const PAGE: u32 = 1000;

/// What can be exported. Only units that have ended are in any of them.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Format {
    /// A unit a row, as `results.csv` of `dnd dissect`.
    Csv,
    /// A unit a line with all its evidence, as `results.jsonl` of `dnd dissect`.
    Jsonl,
    /// Labels as CoSy's evaluation reads them.
    Cosy,
    /// A line a unit, with the names that Neuronpedia has for a feature.
    Neuronpedia,
}

impl Format {
    /// Its media type, the end of a file's name, and what comes before the units.
    fn of(self) -> (&'static str, &'static str, Option<Result<Bytes, Status>>) {
        match self {
            Self::Csv => ("text/csv; charset=utf-8", "csv", Some(record(&table::COLUMNS))),
            Self::Cosy => ("text/csv; charset=utf-8", "cosy.csv", Some(record(&["layer", "unit", "description"]))),
            Self::Jsonl => ("application/x-ndjson", "jsonl", None),
            Self::Neuronpedia => ("application/x-ndjson", "neuronpedia.jsonl", None),
        }
    }

    /// A unit in it; none if it has no place for this one.
    fn unit(self, job: &Job, unit: &UnitResult) -> Option<Result<Bytes, Status>> {
        match self {
            Self::Csv => Some(record(&table::row(unit))),
            Self::Cosy => (unit.state() == UnitState::Labelled).then(|| record(&[table::cell(&unit.layer), unit.unit.to_string(), table::cell(&unit.label)])),
            Self::Jsonl => Some(line(unit)),
            Self::Neuronpedia => Some(line(&neuronpedia(job, unit))),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Asked {
    format: Format,
}

pub(crate) async fn export(
    State(mut gateway): State<Gateway>,
    caller: Caller,
    Path(job_id): Path<String>,
    Query(Asked { format }): Query<Asked>,
) -> Result<Response, Problem> {
    let job = gateway.dissect.get_job(caller.asks(GetJobRequest { job_id })).await?.into_inner().job;
    let job = job.ok_or_else(|| Fault::new(Code::NotFound, "NO_SUCH_JOB", "there is no such job"))?;
    let (kind, ending, first) = format.of();
    let name = format!("attachment; filename=\"dnd-{}.{ending}\"", job.job_id);
    let stopping = gateway.stopping.clone();
    let units = results(gateway, caller, job.job_id.clone());
    let written = units.try_filter_map(move |unit| std::future::ready(format.unit(&job, &unit).transpose()));
    let body = Body::from_stream(stream::iter(first).chain(written).take_until(stopping.cancelled_owned()));
    let mut response = ([(header::CONTENT_TYPE, kind)], body).into_response();
    if let Ok(name) = HeaderValue::from_str(&name) {
        response.headers_mut().insert(header::CONTENT_DISPOSITION, name);
    }
    Ok(response)
}

/// The units of a job that have ended, in the order that was asked for.
fn results(gateway: Gateway, caller: Caller, job_id: String) -> impl Stream<Item = Result<UnitResult, Status>> {
    let (one, its, of) = (gateway.clone(), caller.clone(), job_id.clone());
    let pages = stream::try_unfold(Some(String::new()), move |token| {
        let (mut gateway, caller, job_id) = (gateway.clone(), caller.clone(), job_id.clone());
        async move {
            let Some(page_token) = token else { return Ok::<_, Status>(None) };
            let request = ListUnitsRequest { job_id, page_size: PAGE, page_token, ..Default::default() };
            let page = gateway.dissect.list_units(caller.asks(request)).await?.into_inner();
            let next = Some(page.next_page_token).filter(|token| !token.is_empty());
            Ok(Some((stream::iter(page.units).map(Ok), next)))
        }
    });
    let ended = pages.try_flatten().try_filter(|unit: &UnitSummary| std::future::ready(unit.state() != UnitState::Unspecified));
    let read = ended.map_ok(move |UnitSummary { layer, unit, .. }| {
        let (mut gateway, caller, job_id) = (one.clone(), its.clone(), of.clone());
        async move {
            let found = gateway.dissect.get_unit(caller.asks(GetUnitRequest { job_id, layer, unit })).await?.into_inner().unit;
            found.ok_or_else(|| Fault::internal("the orchestrator gave a unit without its result").into())
        }
    });
    read.try_buffered(AT_A_TIME)
}

fn record(cells: &[impl AsRef<[u8]>]) -> Result<Bytes, Status> {
    let mut table = csv::Writer::from_writer(Vec::new());
    let failed = |error: String| Status::from(Fault::internal(format!("a row can't be written: {error}")));
    table.write_record(cells).map_err(|error| failed(error.to_string()))?;
    table.into_inner().map(Bytes::from).map_err(|error| failed(error.to_string()))
}

fn line(value: &impl serde::Serialize) -> Result<Bytes, Status> {
    let mut line = serde_json::to_vec(value).map_err(|error| Fault::internal(format!("a result can't be written: {error}")))?;
    line.push(b'\n');
    Ok(line.into())
}

fn neuronpedia(job: &Job, unit: &UnitResult) -> serde_json::Value {
    let model = job.accepted.as_ref().and_then(|accepted| accepted.provenance.as_ref()?.summarizer.as_ref()).map(|model| &model.name);
    let explanations = unit.concepts.iter().map(|concept| {
        let scores = concept.score.map(|value| json!({ "explanationScoreTypeName": "describe-and-dissect", "value": value }));
        json!({
            "description": concept.concept,
            "typeName": "describe-and-dissect",
            "explanationModelName": model,
            "scores": scores.into_iter().collect::<Vec<_>>(),
        })
    });
    let activations = unit.probed.iter().map(|picture| json!({ "maxValue": picture.activation, "image": picture.digest, "path": picture.path }));
    json!({
        "modelId": job.target_name,
        "layer": unit.layer,
        "index": unit.unit.to_string(),
        "maxActApprox": unit.highest,
        "explanations": explanations.collect::<Vec<_>>(),
        "activations": activations.collect::<Vec<_>>(),
    })
}
