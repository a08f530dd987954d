//! What the stages of a job took here since it was last written to the store.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use dnd_mesh::{
    metrics::{RESULTS, STAGE_SECONDS},
    telemetry::Trace,
};
use dnd_proto::v1::{Stage, StageProgress, Usage};

/// A tally of every stage, that calls add to.
#[derive(Debug, Default)]
pub(crate) struct Progress(Mutex<BTreeMap<Stage, Tally>>);

/// What a stage took.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    pub(crate) time: Duration,
    /// Calls of a model, and those that were not made since their results were there.
    pub(crate) calls: u64,
    pub(crate) reused: u64,
    /// What a language model behind an HTTP endpoint was asked.
    pub(crate) usage: Option<Usage>,
}

impl Progress {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Stage, Tally>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds calls to a stage's.
    pub(crate) fn calls(&self, stage: Stage, made: u64, reused: u64) {
        let mut stages = self.lock();
        let tally = stages.entry(stage).or_default();
        tally.calls += made;
        tally.reused += reused;
        for (origin, count) in [("made", made), ("reused", reused)] {
            RESULTS.of([&name(stage), origin]).inc_by(count);
        }
    }

    /// Adds what an endpoint was asked in a stage.
    pub(crate) fn used(&self, stage: Stage, usage: &Usage) {
        self.lock().entry(stage).or_default().usage.get_or_insert_with(Usage::default).add(usage);
    }

    /// Adds the time since then to a stage's.
    pub(crate) fn time(&self, stage: Stage, since: Instant) {
        self.lock().entry(stage).or_default().time += since.elapsed();
    }

    /// Takes what was added since it was last taken.
    pub(crate) fn take(&self) -> BTreeMap<Stage, Tally> {
        std::mem::take(&mut *self.lock())
    }
}

/// Measures how long a unit, or a pass, took through a stage.
pub(crate) fn through(stage: Stage, since: Instant) {
    STAGE_SECONDS.of([&name(stage)]).observe(since.elapsed().as_secs_f64(), Trace::current());
}

/// How far something is through a stage, such as `caption 3/8`.
pub(crate) fn told(progress: &StageProgress) -> String {
    format!("{} {}/{}", name(progress.stage()), progress.done, progress.total)
}

/// A stage as its users know it, such as `caption`.
pub(crate) fn name(stage: Stage) -> String {
    stage.as_str_name().trim_start_matches("STAGE_").to_lowercase()
}
