//! What a request asks for, looked up and checked, once, before there is a job.

use std::sync::Arc;

use dnd_mesh::{Fault, blobs::Blobs, parameters};
use dnd_method::parameters::Parameters;
use dnd_proto::v1::{DescribeTargetRequest, DescribeTargetResponse, JobAccepted, LayerUnits, ProbingSet, Provenance, Target};
use tonic::Response;

use crate::{
    calls::{TRIES_AT_FIRST, once_loaded},
    models::{Models, passed_on},
    uploads,
};

/// Looks up a target's layers and the mesh's models; gives what a job of them will do, without its id.
pub(crate) async fn accept(
    models: &Models,
    blobs: &Arc<Blobs>,
    target: Option<&Target>,
    layers: &[LayerUnits],
    set: Option<&ProbingSet>,
    parameters: &Parameters,
) -> Result<JobAccepted, Fault> {
    let target = target.ok_or_else(|| Fault::field("target", "not set; say which network to dissect"))?;
    if layers.is_empty() {
        return Err(Fault::field("layers", "empty; say which layers to dissect"));
    }
    uploads::pass_on(models, blobs, target, set).await?;
    let described = describe(models, target, layers).await?;
    let [activation, captioner, summarizer, diffusion, clip] = models.models(TRIES_AT_FIRST).await?;
    let provenance = Provenance {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        target_digest: described.digest,
        preprocessing: described.preprocessing,
        activation,
        captioner,
        summarizer,
        diffusion,
        clip,
        parameters: Some(parameters::to_message(parameters)),
        preprocessing_source: described.preprocessing_source,
        target_options: target.options.clone(),
    };
    Ok(JobAccepted { job_id: String::new(), provenance: Some(provenance), layers: described.found, warnings: described.warnings })
}

/// A target's layers, and those that are asked for, looked up.
pub(crate) async fn describe(models: &Models, target: &Target, layers: &[LayerUnits]) -> Result<DescribeTargetResponse, Fault> {
    let request = DescribeTargetRequest { target: Some(target.clone()), asked: layers.to_vec() };
    let described = once_loaded(TRIES_AT_FIRST, || {
        let (mut client, request) = (models.activation.clone(), request.clone());
        async move { client.describe_target(request).await }
    })
    .await;
    described.map(Response::into_inner).map_err(|status| passed_on("activation", &status))
}
