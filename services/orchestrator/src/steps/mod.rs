//! Describe-and-Dissect, a unit at a time (paper, section 3): its three steps in order, and what becomes of a unit that fails in one.

mod augment;
mod candidates;
mod select;

use std::time::Instant;

use dnd_mesh::Fault;
use dnd_method::parameters::Parameters;
use dnd_proto::v1::{ProbedUnit, Stage, StoredImages, UnitResult, UnitState, Usage};

use tracing::{Instrument as _, info_span};

use crate::{calls::Calls, jobs::Job};

use augment::ActivatingImages;

/// Why a unit, or a part of it, failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// A stable word.
    pub(crate) reason: String,
    /// A sentence.
    pub(crate) message: String,
    /// Whether the item itself is at fault (a picture that can't be read, a text that is too long) and would be again. Such an item is left out and said;
    /// any other failure is the service's, and a result without the item would be another than the method's: it fails the unit.
    pub(crate) is_the_items: bool,
    /// The fault that ends the whole job, if this is one that every unit would meet: the unit has no result then.
    pub(crate) ends_the_job: Option<Box<Fault>>,
}

impl Failure {
    pub(crate) fn new(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.to_owned(), message: message.into(), is_the_items: false, ends_the_job: None }
    }
}

/// Pictures of the probing set that a unit is asked for: those to crop, and those that may be among the highest activating images.
pub(crate) fn looked_at(parameters: &Parameters) -> u32 {
    parameters.probe_images.max(parameters.top_images)
}

/// A unit on its way through the steps.
pub(crate) struct Unit<'j> {
    pub(crate) calls: &'j Calls,
    job: &'j Job,
    pub(crate) result: UnitResult,
    /// The stages that it has still to go through.
    stages: Vec<Stage>,
}

impl<'j> Unit<'j> {
    /// A unit at its beginning, with the stages that it will go through.
    pub(crate) fn new(calls: &'j Calls, job: &'j Job, probed: &ProbedUnit, stages: &[Stage]) -> Self {
        let result = UnitResult {
            layer: probed.layer.clone(),
            unit: probed.unit,
            not_finite: probed.not_finite,
            lowest: probed.lowest,
            highest: probed.highest,
            ..Default::default()
        };
        Self { calls, job, result, stages: stages.to_vec() }
    }

    /// Runs a part of a stage, counting its time.
    pub(crate) async fn timed<T>(&self, stage: Stage, work: impl Future<Output = T>) -> T {
        let since = Instant::now();
        let done = work.instrument(info_span!("stage", otel.name = stage.as_str_name())).await;
        self.job.progress.time(stage, since);
        done
    }

    pub(crate) fn warn(&mut self, warning: String) {
        self.result.warnings.push(warning);
    }

    /// Counts in what an endpoint was asked for this unit.
    pub(crate) fn used(&mut self, stage: Stage, usage: Option<Usage>) {
        let Some(usage) = usage else { return };
        self.result.usage.get_or_insert_with(Usage::default).add(&usage);
        self.job.stage(self.job.progress.used(stage, &usage));
    }

    /// The unit is through a stage.
    pub(crate) fn through(&mut self, stage: Stage) {
        self.stages.retain(|left| *left != stage);
        self.job.step(stage);
    }

    /// What came of the unit, unless the job ends with it. Stages that it did not get to are done for it.
    pub(crate) fn end(mut self, outcome: Result<(), Failure>) -> Result<UnitResult, Fault> {
        if let Err(Failure { ends_the_job: Some(fault), .. }) = outcome {
            return Err(*fault);
        }
        for stage in std::mem::take(&mut self.stages) {
            self.job.step(stage);
        }
        if let Err(failure) = outcome {
            self.result.state = UnitState::Failed.into();
            self.result.reason = failure.reason;
            self.result.message = failure.message;
        }
        Ok(self.result)
    }
}

/// The stages that a unit goes through after the probing pass, and those of a selection over a probing set, or over stored images.
pub(crate) const STAGES: [Stage; 5] = [Stage::Crop, Stage::Caption, Stage::Summarize, Stage::Generate, Stage::Score];
pub(crate) const STAGES_OF_SELECTION: [Stage; 3] = [Stage::Crop, Stage::Generate, Stage::Score];
pub(crate) const STAGES_OF_STORED_SELECTION: [Stage; 2] = [Stage::Generate, Stage::Score];

/// Labels a unit that the probing pass has found the top pictures of. A fault is one that ends the job.
pub(crate) async fn dissect(calls: &Calls, job: &Job, probed: ProbedUnit) -> Result<UnitResult, Fault> {
    let mut unit = Unit::new(calls, job, &probed, &STAGES);
    // A trace of its own: a unit is what one wants to see the way of.
    let span = info_span!(parent: None, "unit", layer = probed.layer, unit = probed.unit, job = job.id);
    let outcome = three_steps(&mut unit, &probed).instrument(span).await;
    unit.end(outcome)
}

async fn three_steps(unit: &mut Unit<'_>, probed: &ProbedUnit) -> Result<(), Failure> {
    // Step 1 (3.1): the probing set, augmented with attention crops; of both the highest activating images.
    unit.keep_probed(probed).await?;
    if probed.dead {
        unit.result.state = UnitState::Dead.into();
        return Ok(());
    }
    let images = unit.augment(probed).await?;

    // Step 2 (3.2): captions of the images, and what they share.
    let captions = unit.caption(&images).await?;
    let candidates = unit.summarize(captions).await?;

    // Step 3 (3.3): pictures drawn of each candidate decide.
    unit.select(&candidates, &images).await
}

/// Step 3 alone (3.3), over a probing set: the caller's candidates on the unit's highest activating images.
pub(crate) async fn select(calls: &Calls, job: &Job, probed: ProbedUnit, candidates: &[String]) -> Result<UnitResult, Fault> {
    let mut unit = Unit::new(calls, job, &probed, &STAGES_OF_SELECTION);
    let outcome = async {
        unit.keep_probed(&probed).await?;
        if probed.dead {
            return Err(Failure::new("dead", "all its finite activations over the probing set are equal: no concept fits it better than another"));
        }
        let images = unit.augment(&probed).await?;
        unit.result.images = images.0.clone();
        unit.select(candidates, &images).await
    };
    let outcome = outcome.await;
    unit.end(outcome)
}

/// Step 3 alone (3.3), over the images of an earlier result.
pub(crate) async fn select_stored(calls: &Calls, job: &Job, unit: &ProbedUnit, candidates: &[String], images: StoredImages) -> Result<UnitResult, Fault> {
    let mut unit = Unit::new(calls, job, unit, &STAGES_OF_STORED_SELECTION);
    let images = ActivatingImages(images.images);
    unit.result.images = images.0.clone();
    let outcome = unit.select(candidates, &images).await;
    unit.end(outcome)
}
