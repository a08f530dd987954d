//! What a job's units become, a unit after the other: however many there are, few are held at once.

use std::collections::HashMap;

use bytes::Bytes;
use clap::ValueEnum;
use dnd_mesh::{Fault, balance::Balanced};
use dnd_proto::v1::{
    GetPicturesRequest, GetUnitRequest, Job, ListUnitsRequest, UnitResult, UnitState, UnitSummary, dissect_service_client::DissectServiceClient,
    get_pictures_response::Result as Got, picture_service_client::PictureServiceClient,
};
use futures::{
    Stream, StreamExt as _, TryStreamExt as _,
    stream::{self, BoxStream},
};
use serde::Deserialize;
use serde_json::json;
use tonic::{Request, Status, metadata::MetadataMap};

use crate::{
    columns,
    report::{About, Report, digests},
    table,
};

/// Units that are read side by side.
const AT_A_TIME: usize = 16;
/// Units of a page.
const PAGE: u32 = 1000;

/// What can be exported. Only units that have ended are in any of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// A unit a row, as in results.csv
    Csv,
    /// A unit a row, with all its evidence as JSON in the last column
    Parquet,
    /// A unit a line with all its evidence, as in results.jsonl
    Jsonl,
    /// Labels as CoSy's evaluation reads them, as CSV
    Cosy,
    /// A unit a line of JSON, with the names that Neuronpedia has for a feature
    Neuronpedia,
    /// One page that opens anywhere, as report.html
    Html,
}

impl Format {
    /// Its media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Csv | Self::Cosy => "text/csv; charset=utf-8",
            Self::Parquet => "application/vnd.apache.parquet",
            Self::Jsonl | Self::Neuronpedia => "application/x-ndjson",
            Self::Html => "text/html; charset=utf-8",
        }
    }

    /// The end of a file's name, without a dot before it.
    pub fn ending(self) -> &'static str {
        match self {
            Self::Csv => "csv",
            Self::Parquet => "parquet",
            Self::Jsonl => "jsonl",
            Self::Cosy => "cosy.csv",
            Self::Neuronpedia => "neuronpedia.jsonl",
            Self::Html => "html",
        }
    }
}

/// Where results are.
#[derive(Debug, Clone)]
pub struct Mesh {
    /// Where units are asked for.
    pub dissect: DissectServiceClient<Balanced>,
    /// Where their pictures are asked for.
    pub pictures: PictureServiceClient<Balanced>,
    /// What each call shows, such as a token.
    pub metadata: MetadataMap,
}

/// The units of a job that have ended, of all layers or of one, in the order that was asked for: the parts of the file, as they are made.
///
/// # Errors
///
/// `INVALID_FIELD` for a layer that the job does not have; in the stream what the mesh said, where it stopped.
pub fn export(mesh: Mesh, job: Job, format: Format, layer: String) -> Result<BoxStream<'static, Result<Bytes, Status>>, Fault> {
    has_layer(&job, &layer)?;
    let ended = mesh.clone().ended(job.job_id.clone(), layer);
    if format == Format::Html {
        return Ok(stream::once(report(mesh, job, ended)).try_flatten().boxed());
    }
    let units = mesh.results(job.job_id.clone(), ended);
    Ok(match format {
        Format::Csv => rows(&table::COLUMNS, units, |unit| Some(table::record(&table::row(unit)))).boxed(),
        Format::Cosy => rows(&["layer", "unit", "description"], units, cosy).boxed(),
        Format::Neuronpedia => units.and_then(move |unit| std::future::ready(line(&neuronpedia(&job, &unit)))).boxed(),
        Format::Parquet => columns::file(units).boxed(),
        Format::Jsonl | Format::Html => units.and_then(|unit| std::future::ready(line(&unit))).boxed(),
    })
}

/// Holds that a layer is one of a job's, or none is named.
fn has_layer(job: &Job, layer: &str) -> Result<(), Fault> {
    let layers = job.accepted.as_ref().map(|accepted| &accepted.layers);
    if layer.is_empty() || layers.is_none_or(|layers| layers.iter().any(|of| of.layer == layer)) {
        return Ok(());
    }
    let layers: Vec<&str> = layers.into_iter().flatten().map(|of| of.layer.as_str()).collect();
    Err(Fault::field("layer", format!("the job has no layer {layer:?}; it has {}", layers.join(", "))))
}

impl Mesh {
    fn asks<T>(&self, message: T) -> Request<T> {
        Request::from_parts(self.metadata.clone(), tonic::Extensions::default(), message)
    }

    /// The units that have ended, in short.
    fn ended(self, job_id: String, layer: String) -> impl Stream<Item = Result<UnitSummary, Status>> + Send {
        let pages = stream::try_unfold(Some(String::new()), move |token| {
            let (mut mesh, job_id, layer) = (self.clone(), job_id.clone(), layer.clone());
            async move {
                let Some(page_token) = token else { return Ok::<_, Status>(None) };
                let request = mesh.asks(ListUnitsRequest { job_id, page_size: PAGE, page_token, layer, ..Default::default() });
                let page = mesh.dissect.list_units(request).await?.into_inner();
                let next = Some(page.next_page_token).filter(|token| !token.is_empty());
                Ok(Some((stream::iter(page.units).map(Ok), next)))
            }
        });
        pages.try_flatten().try_filter(|unit: &UnitSummary| std::future::ready(unit.state() != UnitState::Unspecified))
    }

    /// All that there is of them.
    fn results(
        self,
        job_id: String,
        ended: impl Stream<Item = Result<UnitSummary, Status>> + Send + 'static,
    ) -> impl Stream<Item = Result<UnitResult, Status>> + Send + 'static {
        let read = ended.map_ok(move |UnitSummary { layer, unit, .. }| {
            let (mut mesh, job_id) = (self.clone(), job_id.clone());
            async move {
                let request = mesh.asks(GetUnitRequest { job_id, layer, unit });
                let found = mesh.dissect.get_unit(request).await?.into_inner().unit;
                found.ok_or_else(|| Fault::internal("the orchestrator gave a unit without its result").into())
            }
        });
        read.try_buffered(AT_A_TIME)
    }

    /// The pictures of a unit that are still kept, by digest.
    async fn pictures(&mut self, unit: &UnitResult) -> Result<HashMap<String, Bytes>, Status> {
        let digests: Vec<String> = digests(unit).map(str::to_owned).collect();
        let mut found = HashMap::new();
        if !digests.is_empty() {
            let request = self.asks(GetPicturesRequest { digests });
            let mut got = self.pictures.get_pictures(request).await?.into_inner();
            while let Some(picture) = got.message().await? {
                if let Some(Got::Picture(bytes)) = picture.result {
                    found.insert(picture.digest, bytes);
                }
            }
        }
        Ok(found)
    }
}

/// A table: its head, and a row for each unit that has one.
fn rows(
    columns: &'static [&'static str],
    units: impl Stream<Item = Result<UnitResult, Status>> + Send + 'static,
    row: fn(&UnitResult) -> Option<Result<Bytes, Fault>>,
) -> impl Stream<Item = Result<Bytes, Status>> + Send + 'static {
    let head = table::record(columns).map_err(Status::from);
    stream::iter([head]).chain(units.try_filter_map(move |unit| std::future::ready(row(&unit).transpose().map_err(Status::from))))
}

fn cosy(unit: &UnitResult) -> Option<Result<Bytes, Fault>> {
    (unit.state() == UnitState::Labelled).then(|| table::record(&[table::cell(&unit.layer), unit.unit.to_string(), table::cell(&unit.label)]))
}

/// The report: its head counts the units, so it is known first which there are.
async fn report(
    mesh: Mesh,
    job: Job,
    ended: impl Stream<Item = Result<UnitSummary, Status>> + Send,
) -> Result<impl Stream<Item = Result<Bytes, Status>> + Send, Status> {
    let ended: Vec<UnitSummary> = ended.try_collect().await?;
    let (accepted, done) = (job.accepted.unwrap_or_default(), job.done.unwrap_or_default());
    let warnings: Vec<String> = done.warnings.iter().chain(&accepted.warnings).cloned().collect();
    let about = About { provenance: accepted.provenance.as_ref(), warnings: &warnings, skipped: 0, usage: done.usage.as_ref() };
    let (report, head) = Report::begin(&about, ended.iter().map(|unit| (unit.layer.as_str(), unit.state()))).map_err(Fault::internal)?;
    let units = mesh.clone().results(job.job_id, stream::iter(ended).map(Ok)).boxed();
    let parts = stream::try_unfold((Some(report), mesh, units), |(report, mut mesh, mut units)| async move {
        let Some(mut report) = report else { return Ok::<_, Status>(None) };
        let Some(unit) = units.try_next().await? else { return Ok(Some((report.end(), (None, mesh, units)))) };
        let pictures = mesh.pictures(&unit).await?;
        let added = tokio::task::spawn_blocking(move || report.unit(&unit, &|digest| pictures.get(digest).cloned()).map(|part| (part, report)));
        let (part, report) = added.await.map_err(|_| Fault::internal("the report panicked on a unit"))?.map_err(Fault::internal)?;
        Ok(Some((part, (Some(report), mesh, units))))
    });
    Ok(stream::iter([Ok(head)]).chain(parts).map_ok(Bytes::from))
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
