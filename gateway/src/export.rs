//! A job's results as files to be saved.

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse as _, Response},
};
use dnd_mesh::Fault;
use dnd_proto::v1::{GetJobRequest, Job, LayerUnits};
use dnd_results::{Format, Mesh};
use futures::StreamExt as _;
use serde::Deserialize;
use tonic::Code;

use crate::{
    Gateway,
    api::{Caller, Path, Query},
    problem::Problem,
};

/// Units of a report at most: a browser has to hold it.
const REPORTED: usize = 1000;

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
    if format == Format::Html {
        is_held(&job, &layer)?;
    }
    let name = format!("dnd-{}.{}", job.job_id, format.ending());
    let Gateway { dissect, pictures, stopping, .. } = gateway;
    let file = dnd_results::export(Mesh { dissect, pictures, metadata: caller.asks(()).into_parts().0 }, job, format, layer)?;
    let body = Body::from_stream(file.take_until(stopping.cancelled_owned()));
    Ok(([(header::CONTENT_TYPE, format.media_type())], attachment(&name), body).into_response())
}

/// A file to be saved, by its name.
pub(crate) fn attachment(name: &str) -> HeaderMap {
    let value = HeaderValue::from_str(&format!("attachment; filename=\"{name}\""));
    value.into_iter().map(|value| (header::CONTENT_DISPOSITION, value)).collect()
}

/// Holds that a report is not larger than a browser can hold.
fn is_held(job: &Job, layer: &str) -> Result<(), Fault> {
    let layers = job.accepted.iter().flat_map(|accepted| &accepted.layers).filter(|of| layer.is_empty() || of.layer == layer);
    let count: usize = layers.map(|LayerUnits { units, .. }| units.len()).sum();
    if count > REPORTED {
        let message = format!("{count} units; a report holds {REPORTED} at most: name a `layer`, or let `dnd jobs export` write one of any size");
        return Err(Fault::field("format", message));
    }
    Ok(())
}
