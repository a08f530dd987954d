//! Describe-and-Dissect, a unit at a time (paper, section 3): its three steps in order, and what becomes of a unit that fails in one.

mod augment;
mod candidates;
mod select;

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use dnd_mesh::{call, telemetry::Ids};
use dnd_method::parameters::Parameters;
use dnd_proto::v1::{ProbedUnit, Stage, StoredImages, UnitResult, UnitState, Usage};

use tracing::{Instrument as _, Span, info_span};

use crate::{calls::Calls, failure::Failure, progress};

use augment::ActivatingImages;

/// Pictures of the probing set that a unit is asked for: those to crop, and those that may be among the highest activating images.
pub(crate) fn looked_at(parameters: &Parameters) -> u32 {
    parameters.probe_images.max(parameters.top_images)
}

/// Whoever follows a unit on its way.
pub(crate) trait Course: Send + Sync {
    /// What the span of a stage has, if it is to be known by it.
    fn ids(&self, _: Stage) -> Option<Ids> {
        None
    }

    /// The unit is through a stage. It goes no further, if that can't be told.
    fn through(&self, stage: Stage) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// A unit on its way through the steps.
pub(crate) struct Unit<'c, C> {
    pub(crate) calls: &'c Calls,
    course: &'c C,
    pub(crate) result: UnitResult,
    /// The stage that it is in, with its span and when it began.
    stage: Mutex<Option<(Stage, Span, Instant)>>,
}

impl<'c, C: Course> Unit<'c, C> {
    /// A unit at its beginning.
    pub(crate) fn new(calls: &'c Calls, course: &'c C, probed: &ProbedUnit) -> Self {
        let result = UnitResult {
            layer: probed.layer.clone(),
            unit: probed.unit,
            not_finite: probed.not_finite,
            lowest: probed.lowest,
            highest: probed.highest,
            ..Default::default()
        };
        Self { calls, course, result, stage: Mutex::default() }
    }

    /// Runs a part of a stage, counting its time.
    pub(crate) async fn timed<T>(&self, stage: Stage, work: impl Future<Output = T>) -> T {
        let since = Instant::now();
        let done = work.instrument(self.span(stage)).await;
        self.calls.progress().time(stage, since);
        done
    }

    /// The span of a stage, which all its parts are in.
    fn span(&self, stage: Stage) -> Span {
        let mut current = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        match &*current {
            Some((of, span, _)) if *of == stage => span.clone(),
            _ => {
                call::doing(|| progress::name(stage));
                let span = info_span!("stage", otel.name = stage.as_str_name());
                if let Some(ids) = self.course.ids(stage) {
                    ids.give(&span);
                }
                *current = Some((stage, span.clone(), Instant::now()));
                span
            }
        }
    }

    pub(crate) fn warn(&mut self, warning: String) {
        self.result.warnings.push(warning);
    }

    /// Counts in what an endpoint was asked for this unit.
    pub(crate) fn used(&mut self, stage: Stage, usage: Option<Usage>) {
        let Some(usage) = usage else { return };
        self.result.usage.get_or_insert_with(Usage::default).add(&usage);
        self.calls.progress().used(stage, &usage);
    }

    /// The unit is through a stage.
    pub(crate) async fn through(&self, stage: Stage) -> Result<(), Failure> {
        let ended = self.stage.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((stage, _, since)) = ended {
            progress::through(stage, since);
        }
        self.course.through(stage).await
    }

    /// What came of the unit, and, if it failed, why.
    fn end(mut self, outcome: Result<(), Failure>) -> (UnitResult, Option<Failure>) {
        let failure = outcome.err();
        if let Some(Failure { reason, message, .. }) = &failure {
            self.result.state = UnitState::Failed.into();
            self.result.reason.clone_from(reason);
            self.result.message.clone_from(message);
        }
        (self.result, failure)
    }
}

/// The stages that a unit goes through after the probing pass.
pub(crate) const STAGES: [Stage; 5] = [Stage::Crop, Stage::Caption, Stage::Summarize, Stage::Generate, Stage::Score];

/// Labels a unit that the probing pass has found the top pictures of. Beside the result, why it failed, if it did.
pub(crate) async fn dissect(calls: &Calls, course: &impl Course, probed: &ProbedUnit) -> (UnitResult, Option<Failure>) {
    let mut unit = Unit::new(calls, course, probed);
    let outcome = three_steps(&mut unit, probed).await;
    unit.end(outcome)
}

async fn three_steps<C: Course>(unit: &mut Unit<'_, C>, probed: &ProbedUnit) -> Result<(), Failure> {
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
pub(crate) async fn select(calls: &Calls, course: &impl Course, probed: &ProbedUnit, candidates: &[String]) -> (UnitResult, Option<Failure>) {
    let mut unit = Unit::new(calls, course, probed);
    let outcome = async {
        unit.keep_probed(probed).await?;
        if probed.dead {
            return Err(Failure::new("dead", "all its finite activations over the probing set are equal: no concept fits it better than another"));
        }
        let images = unit.augment(probed).await?;
        unit.result.images = images.0.clone();
        unit.select(candidates, &images).await
    };
    let outcome = outcome.await;
    unit.end(outcome)
}

/// Step 3 alone (3.3), over the images of an earlier result.
pub(crate) async fn select_stored(
    calls: &Calls,
    course: &impl Course,
    unit: &ProbedUnit,
    candidates: &[String],
    images: StoredImages,
) -> (UnitResult, Option<Failure>) {
    let mut unit = Unit::new(calls, course, unit);
    let images = ActivatingImages(images.images);
    unit.result.images = images.0.clone();
    let outcome = unit.select(candidates, &images).await;
    unit.end(outcome)
}
