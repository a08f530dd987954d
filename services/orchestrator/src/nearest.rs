//! NearestUnits: whose labels say nearly what a text says.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use dnd_mesh::{Fault, fault::check_text};
use dnd_method::embedding::{Embedding, mean_cosine};
use dnd_proto::v1::{NearUnit, Provenance, UnitState, UnitSummary};
use tonic::Code;

use crate::{
    calls::{Calls, Work},
    engine::Engine,
    failure::Failure,
    store::UnitFilter,
    watch::no_such_job,
};

/// The units of a job whose labels are nearest to a text, nearest first. Labels are embedded once: what CLIP makes of them is kept, as with all pure calls.
pub(crate) async fn nearest(engine: &Engine, job: &str, text: &str, most: usize) -> Result<Vec<NearUnit>, Fault> {
    check_text("text", text)?;
    let Engine { store, models, blobs, results, .. } = engine;
    let (request, mut accepted) = store.work(job).await?.ok_or_else(|| no_such_job(job))?;
    // The job's own may have gone; text and labels have to be one model's.
    accepted.provenance = Some(Provenance { clip: models.clip_model().await?, ..accepted.provenance.unwrap_or_default() });
    let calls = Calls::new(models.clone(), Arc::clone(blobs), results, Work::of(request, accepted)?);

    let filter = UnitFilter { most: u32::MAX, state: UnitState::Labelled, ..Default::default() };
    let units: Vec<UnitSummary> = store.units(job, &filter).await?.into_iter().map(|(_, unit)| unit).collect();
    let labels: BTreeSet<&String> = units.iter().flat_map(|unit| &unit.labels).collect();
    let labels: Vec<String> = labels.into_iter().cloned().collect();
    let of_text = calls.text_embeddings(&[text.to_owned()]).await.pop();
    let of_text = of_text.ok_or_else(|| Fault::internal("no embedding came for a text"))?.map_err(failed)?;
    let mut similarity: HashMap<&str, f64> = HashMap::new();
    for (label, embedding) in labels.iter().zip(calls.text_embeddings(&labels).await) {
        match embedding {
            Ok(embedding) => {
                similarity.insert(label, cosine(&of_text, &embedding)?);
            }
            Err(failure) if failure.is_the_items => {}
            Err(failure) => return Err(failed(failure)),
        }
    }
    let near = |unit: UnitSummary| {
        let similarity = unit.labels.iter().filter_map(|label| similarity.get(label.as_str()).copied()).reduce(f64::max)?;
        Some(NearUnit { unit: Some(unit), similarity })
    };
    let mut near: Vec<NearUnit> = units.into_iter().filter_map(near).collect();
    near.sort_by(|a, b| b.similarity.total_cmp(&a.similarity));
    near.truncate(most);
    Ok(near)
}

fn cosine(one: &Embedding, other: &Embedding) -> Result<f64, Fault> {
    mean_cosine(&[one], &[other]).map_err(|error| Fault::internal(error.to_string()))
}

fn failed(failure: Failure) -> Fault {
    match failure.pauses {
        Some(pause) => pause.fault,
        None => Fault::new(Code::Internal, "SERVICE_FAILED", format!("the clip service ({}): {}", failure.reason, failure.message)),
    }
}
