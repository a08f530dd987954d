//! How far a job is, a stage at a time, and what its stages took.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use dnd_proto::v1::{Stage, StageProgress, StageTime, Usage};

/// Counts of every stage.
#[derive(Debug, Default)]
pub(crate) struct Progress(Mutex<BTreeMap<Stage, Counts>>);

#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    done: u64,
    total: u64,
    time: Duration,
    calls: u64,
    reused: u64,
    usage: Option<Usage>,
}

impl Progress {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Stage, Counts>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, stage: Stage, change: impl FnOnce(&mut Counts)) -> StageProgress {
        let mut stages = self.lock();
        let counts = stages.entry(stage).or_default();
        change(counts);
        StageProgress { stage: stage.into(), done: counts.done, total: counts.total, usage: counts.usage }
    }

    /// Sets what is done of a stage, and what there is to do.
    pub(crate) fn set(&self, stage: Stage, done: u64, total: u64) -> StageProgress {
        self.change(stage, |counts| (counts.done, counts.total) = (done, total))
    }

    /// One more unit is through a stage.
    pub(crate) fn step(&self, stage: Stage) -> StageProgress {
        self.change(stage, |counts| counts.done += 1)
    }

    /// Adds calls to a stage's.
    pub(crate) fn calls(&self, stage: Stage, made: u64, reused: u64) {
        self.change(stage, |counts| {
            counts.calls += made;
            counts.reused += reused;
        });
    }

    /// Adds what an endpoint was asked in a stage to what it was before.
    pub(crate) fn used(&self, stage: Stage, usage: &Usage) -> StageProgress {
        self.change(stage, |counts| counts.usage.get_or_insert_with(Usage::default).add(usage))
    }

    /// What endpoints were asked in all stages.
    pub(crate) fn usage(&self) -> Option<Usage> {
        self.lock().values().filter_map(|counts| counts.usage).reduce(|mut all, more| {
            all.add(&more);
            all
        })
    }

    /// Adds the time since then to a stage's.
    pub(crate) fn time(&self, stage: Stage, since: Instant) {
        self.change(stage, |counts| counts.time += since.elapsed());
    }

    /// What the stages took.
    pub(crate) fn times(&self) -> Vec<StageTime> {
        let time = |(stage, counts): (&Stage, &Counts)| StageTime {
            stage: (*stage).into(),
            seconds: counts.time.as_secs_f64(),
            calls: counts.calls,
            reused: counts.reused,
        };
        self.lock().iter().map(time).collect()
    }
}
