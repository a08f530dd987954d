//! A job's results as files that other programs read.

use std::collections::HashMap;

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse as _, Response},
};
use dnd_mesh::Fault;
use dnd_proto::v1::{
    GetJobRequest, GetPicturesRequest, GetUnitRequest, Job, LayerUnits, ListUnitsRequest, UnitResult, UnitState, UnitSummary,
    get_pictures_response::Result as Got,
};
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use serde::Deserialize;
use serde_json::json;
use tonic::{Code, Status};

use crate::{
    Gateway,
    api::{Caller, Path, Query},
    columns,
    problem::Problem,
    report::{About, Report, digests},
    table,
};

/// Units that are read side by side.
const AT_A_TIME: usize = 16;
/// Units of a page.
const PAGE: u32 = 1000;
/// Units of a report at most: it is made whole before it is sent, and a browser has to hold it.
const REPORTED: usize = 1000;

/// What can be exported. Only units that have ended are in any of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Format {
    /// A unit a row, as `results.csv` of `dnd dissect`.
    Csv,
    /// A unit a row, with all its evidence as JSON.
    Parquet,
    /// A unit a line with all its evidence, as `results.jsonl` of `dnd dissect`.
    Jsonl,
    /// Labels as CoSy's evaluation reads them.
    Cosy,
    /// A line a unit, with the names that Neuronpedia has for a feature.
    Neuronpedia,
    /// `report.html` of `dnd dissect`.
    Html,
}

impl Format {
    /// Its media type, and the end of a file's name.
    fn of(self) -> (&'static str, &'static str) {
        match self {
            Self::Csv => ("text/csv; charset=utf-8", "csv"),
            Self::Parquet => ("application/vnd.apache.parquet", "parquet"),
            Self::Cosy => ("text/csv; charset=utf-8", "cosy.csv"),
            Self::Jsonl => ("application/x-ndjson", "jsonl"),
            Self::Neuronpedia => ("application/x-ndjson", "neuronpedia.jsonl"),
            Self::Html => ("text/html; charset=utf-8", "html"),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Asked {
    format: Format,
    #[serde(default)]
    layer: String,
}

pub(crate) async fn export(
    State(mut gateway): State<Gateway>,
    caller: Caller,
    Path(job_id): Path<String>,
    Query(Asked { format, layer }): Query<Asked>,
) -> Result<Response, Problem> {
    let job = gateway.dissect.get_job(caller.asks(GetJobRequest { job_id })).await?.into_inner().job;
    let job = job.ok_or_else(|| Fault::new(Code::NotFound, "NO_SUCH_JOB", "there is no such job"))?;
    let (kind, ending) = format.of();
    let name = format!("dnd-{}.{ending}", job.job_id);
    let stopping = gateway.stopping.clone();
    let units = results(gateway.clone(), caller.clone(), job.job_id.clone(), layer.clone());
    let written = match format {
        Format::Csv => rows(&table::COLUMNS, units, |unit| Some(record(&table::row(unit)))).boxed(),
        Format::Cosy => rows(&["layer", "unit", "description"], units, cosy).boxed(),
        Format::Jsonl => units.and_then(|unit| std::future::ready(line(&unit))).boxed(),
        Format::Neuronpedia => units.and_then(move |unit| std::future::ready(line(&neuronpedia(&job, &unit)))).boxed(),
        Format::Parquet => columns::file(units).boxed(),
        Format::Html => {
            let page = report(gateway, &caller, &job, &layer, units).await?;
            stream::iter([Ok(Bytes::from(page))]).boxed()
        }
    };
    let body = Body::from_stream(written.take_until(stopping.cancelled_owned()));
    Ok(([(header::CONTENT_TYPE, kind)], attachment(&name), body).into_response())
}

/// A file to be saved, by its name.
pub(crate) fn attachment(name: &str) -> HeaderMap {
    let value = HeaderValue::from_str(&format!("attachment; filename=\"{name}\""));
    value.into_iter().map(|value| (header::CONTENT_DISPOSITION, value)).collect()
}

/// A table: its head, and a row for each unit that has one.
fn rows(
    columns: &'static [&'static str],
    units: impl Stream<Item = Result<UnitResult, Status>> + Send + 'static,
    row: fn(&UnitResult) -> Option<Result<Bytes, Status>>,
) -> impl Stream<Item = Result<Bytes, Status>> + Send + 'static {
    stream::iter([record(columns)]).chain(units.try_filter_map(move |unit| std::future::ready(row(&unit).transpose())))
}

fn cosy(unit: &UnitResult) -> Option<Result<Bytes, Status>> {
    (unit.state() == UnitState::Labelled).then(|| record(&[table::cell(&unit.layer), unit.unit.to_string(), table::cell(&unit.label)]))
}

/// The report of a job's units.
async fn report(
    mut gateway: Gateway,
    caller: &Caller,
    job: &Job,
    layer: &str,
    units: impl Stream<Item = Result<UnitResult, Status>>,
) -> Result<String, Problem> {
    let accepted = job.accepted.clone().unwrap_or_default();
    let asked = accepted.layers.iter().filter(|of| layer.is_empty() || of.layer == layer);
    let count: usize = asked.map(|LayerUnits { units, .. }| units.len()).sum();
    if count > REPORTED {
        let message = format!("{count} units; a report holds {REPORTED} at most: name a `layer`, or let `dnd jobs export` write one of any size");
        return Err(Fault::field("format", message).into());
    }
    let mut units = std::pin::pin!(units);
    let mut report = Report::default();
    while let Some(unit) = units.try_next().await? {
        let digests: Vec<String> = digests(&unit).map(str::to_owned).collect();
        let mut pictures = HashMap::new();
        if !digests.is_empty() {
            let mut got = gateway.pictures.get_pictures(caller.asks(GetPicturesRequest { digests })).await?.into_inner();
            while let Some(picture) = got.message().await? {
                if let Some(Got::Picture(bytes)) = picture.result {
                    pictures.insert(picture.digest, bytes);
                }
            }
        }
        let added = tokio::task::spawn_blocking(move || {
            report.add(&unit, &|digest| pictures.get(digest).cloned());
            report
        });
        report = added.await.map_err(|_| Fault::internal("the report panicked on a unit"))?;
    }
    let done = job.done.clone().unwrap_or_default();
    let warnings: Vec<String> = accepted.warnings.iter().chain(&done.warnings).cloned().collect();
    let about = About { provenance: accepted.provenance.as_ref(), warnings: &warnings, skipped: 0, usage: done.usage.as_ref() };
    Ok(report.render(&about).map_err(Fault::internal)?)
}

/// The units of a job, or of a layer of it, that have ended, in the order that was asked for.
fn results(gateway: Gateway, caller: Caller, job_id: String, layer: String) -> impl Stream<Item = Result<UnitResult, Status>> {
    let (one, its, of) = (gateway.clone(), caller.clone(), job_id.clone());
    let pages = stream::try_unfold(Some(String::new()), move |token| {
        let (mut gateway, caller, job_id, layer) = (gateway.clone(), caller.clone(), job_id.clone(), layer.clone());
        async move {
            let Some(page_token) = token else { return Ok::<_, Status>(None) };
            let request = ListUnitsRequest { job_id, page_size: PAGE, page_token, layer, ..Default::default() };
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

/// A row of a table.
pub(crate) fn record(cells: &[impl AsRef<[u8]>]) -> Result<Bytes, Status> {
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
