//! Describe-and-Dissect, a unit at a time (paper, section 3): its three steps in order, and what becomes of a unit that fails in one.

mod augment;
mod candidates;
mod select;

use std::time::Instant;

use dnd_proto::v1::{ProbedUnit, Stage, UnitResult, UnitState};

use crate::{calls::Calls, jobs::Job};

pub(crate) use augment::ActivatingImages;

/// Why a unit, or a part of it, failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// A stable word.
    pub(crate) reason: String,
    /// A sentence.
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.to_owned(), message: message.into() }
    }
}

/// A unit on its way through the steps.
pub(crate) struct Unit<'j> {
    pub(crate) calls: &'j Calls,
    pub(crate) job: &'j Job,
    pub(crate) result: UnitResult,
}

impl<'j> Unit<'j> {
    pub(crate) fn new(calls: &'j Calls, job: &'j Job, probed: &ProbedUnit) -> Self {
        let result = UnitResult {
            layer: probed.layer.clone(),
            unit: probed.unit,
            not_finite: probed.not_finite,
            lowest: probed.lowest,
            highest: probed.highest,
            ..Default::default()
        };
        Self { calls, job, result }
    }

    /// Runs a part of a stage, counting its time.
    pub(crate) async fn timed<T>(&self, stage: Stage, work: impl Future<Output = T>) -> T {
        let since = Instant::now();
        let done = work.await;
        self.job.progress.time(stage, since);
        done
    }

    pub(crate) fn warn(&mut self, warning: String) {
        self.result.warnings.push(warning);
    }

    fn failed(mut self, failure: Failure) -> UnitResult {
        self.result.state = UnitState::Failed.into();
        self.result.reason = failure.reason;
        self.result.message = failure.message;
        self.result
    }
}

/// Labels a unit that the probing pass has found the top pictures of.
pub(crate) async fn dissect(calls: &Calls, job: &Job, probed: ProbedUnit) -> UnitResult {
    let mut unit = Unit::new(calls, job, &probed);
    let outcome = three_steps(&mut unit, probed).await;
    match outcome {
        Ok(()) => unit.result,
        Err(failure) => unit.failed(failure),
    }
}

async fn three_steps(unit: &mut Unit<'_>, probed: ProbedUnit) -> Result<(), Failure> {
    // Step 1 (3.1): the probing set, augmented with attention crops; of both the highest activating images.
    unit.keep_probed(&probed).await?;
    if probed.dead {
        unit.result.state = UnitState::Dead.into();
        return Ok(());
    }
    let images = unit.augment(&probed).await?;
    unit.job.step(Stage::Crop);

    // Step 2 (3.2): captions of the images, and what they share.
    let captions = unit.caption(&images).await?;
    unit.job.step(Stage::Caption);
    let candidates = unit.summarize(captions).await?;
    unit.job.step(Stage::Summarize);

    // Step 3 (3.3): pictures drawn of each candidate decide.
    unit.select(&candidates, &images).await
}

/// Step 3 alone (3.3): the caller's candidates on a unit's highest activating images.
pub(crate) async fn select(calls: &Calls, job: &Job, unit: Unit<'_>, candidates: &[String], images: Result<ActivatingImages, Failure>) -> UnitResult {
    let mut unit = Unit { calls, job, ..unit };
    let outcome = match images {
        Ok(images) => unit.select(candidates, &images).await,
        Err(failure) => Err(failure),
    };
    match outcome {
        Ok(()) => unit.result,
        Err(failure) => unit.failed(failure),
    }
}
