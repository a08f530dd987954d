//! Jobs: what happens in one is kept, for whoever watches it, from the beginning.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use dnd_mesh::Fault;
use dnd_proto::v1::{DissectResponse, Stage, StageProgress, UnitResult, UnitState, dissect_response::Event};
use futures::{Stream, stream};
use tokio::sync::{OnceCell, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::progress::Progress;

/// Between two messages about how far a job is.
const PROGRESS: Duration = Duration::from_millis(100);
/// Finished jobs that are kept to be found again; the oldest go first.
const KEPT: usize = 16;

/// A job.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) progress: Arc<Progress>,
    pub(crate) cancelled: CancellationToken,
    log: Mutex<Log>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Log {
    events: Vec<Event>,
    /// The counts of each stage so far; only the latest matter.
    stages: BTreeMap<i32, StageProgress>,
    ended: Option<Result<(), Fault>>,
    labelled: u32,
    dead: u32,
    failed: u32,
}

impl Job {
    pub(crate) fn new() -> Self {
        Self {
            id: uuid::Uuid::new_v4().to_string(),
            progress: Arc::default(),
            cancelled: CancellationToken::new(),
            log: Mutex::default(),
            changed: watch::channel(()).0,
        }
    }

    /// The log is changed in single steps under the lock, so it is whole even after a panic.
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Log)) {
        change(&mut self.lock());
        let _ = self.changed.send(());
    }

    /// Tells of an event.
    pub(crate) fn say(&self, event: Event) {
        self.change(|log| log.events.push(event));
    }

    /// Tells how far a stage is.
    pub(crate) fn stage(&self, progress: StageProgress) {
        self.change(|log| {
            log.stages.insert(progress.stage, progress);
        });
    }

    /// One more unit is through a stage.
    pub(crate) fn step(&self, stage: Stage) {
        self.stage(self.progress.step(stage));
    }

    /// Sets what there is to do in the stages that units go through.
    pub(crate) fn units_to_do(&self, stages: &[Stage], units: u64) {
        for stage in stages {
            self.stage(self.progress.set(*stage, 0, units));
        }
    }

    /// Tells of a finished unit.
    pub(crate) fn finish_unit(&self, unit: UnitResult) {
        self.change(|log| {
            match unit.state() {
                UnitState::Labelled => log.labelled += 1,
                UnitState::Dead => log.dead += 1,
                UnitState::Failed | UnitState::Unspecified => log.failed += 1,
            }
            log.events.push(Event::Unit(unit));
        });
    }

    /// Units that are labelled, dead, failed.
    pub(crate) fn counts(&self) -> (u32, u32, u32) {
        let log = self.lock();
        (log.labelled, log.dead, log.failed)
    }

    /// Ends the job.
    pub(crate) fn end(&self, how: Result<(), Fault>) {
        self.change(|log| {
            log.ended.get_or_insert(how);
        });
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.lock().ended.is_some()
    }

    /// Everything that happens in the job, from its beginning, until it ends; of the progress only what is new, a few times a second.
    pub(crate) fn watch(self: Arc<Self>) -> impl Stream<Item = Result<DissectResponse, Status>> + Send + 'static {
        let changed = self.changed.subscribe();
        let watcher = Watcher { job: self, changed, seen: 0, stages: BTreeMap::new(), waiting: Vec::new(), ended: false };
        stream::unfold(watcher, |mut watcher| async move {
            let next = watcher.next().await?;
            Some((next, watcher))
        })
    }
}

struct Watcher {
    job: Arc<Job>,
    changed: watch::Receiver<()>,
    /// Events that were told.
    seen: usize,
    /// Progress that was told.
    stages: BTreeMap<i32, StageProgress>,
    /// Events to tell, the next one last.
    waiting: Vec<Event>,
    ended: bool,
}

impl Watcher {
    async fn next(&mut self) -> Option<Result<DissectResponse, Status>> {
        loop {
            if let Some(event) = self.waiting.pop() {
                return Some(Ok(DissectResponse { event: Some(event) }));
            }
            if self.ended {
                return None;
            }
            self.changed.mark_unchanged();
            if let Some(how) = self.look() {
                self.ended = true;
                if let Err(fault) = how {
                    return Some(Err(fault.into()));
                }
                continue;
            }
            if self.waiting.is_empty() {
                // Many small changes are told together.
                let _ = self.changed.changed().await;
                tokio::time::sleep(PROGRESS).await;
            }
        }
    }

    /// Takes what is new; once all was told of a job that has ended, how it ended.
    fn look(&mut self) -> Option<Result<(), Fault>> {
        let log = self.job.lock();
        let events = log.events.get(self.seen..).unwrap_or_default();
        self.waiting.extend(events.iter().rev().cloned());
        self.seen = log.events.len();
        let mut news: Vec<Event> = Vec::new();
        for (stage, progress) in &log.stages {
            if self.stages.get(stage) != Some(progress) {
                self.stages.insert(*stage, *progress);
                news.push(Event::Progress(*progress));
            }
        }
        // Told before the events, of which the last may be the job's end, but never before its acceptance.
        let accepted = matches!(self.waiting.last(), Some(Event::Accepted(_))).then(|| self.waiting.pop()).flatten();
        self.waiting.extend(news.into_iter().rev());
        self.waiting.extend(accepted);
        if self.waiting.is_empty() { log.ended.clone() } else { None }
    }
}

/// The jobs of this process that can be found again, by their requests.
#[derive(Debug, Default)]
pub(crate) struct Jobs(Mutex<VecDeque<Known>>);

/// A request's id, and its job once that is made.
type Known = (String, Arc<OnceCell<Arc<Job>>>);

impl Jobs {
    /// The job of a request, made by `start` if the request is not known (an empty id never is). Only one is made, however many ask at once.
    pub(crate) async fn find_or_start<F>(&self, request_id: &str, start: impl FnOnce() -> F) -> Result<Arc<Job>, Fault>
    where
        F: Future<Output = Result<Arc<Job>, Fault>>,
    {
        if request_id.is_empty() {
            return start().await;
        }
        let cell = self.cell(request_id);
        let job = cell.get_or_try_init(start).await.cloned();
        if job.is_err() && !cell.initialized() {
            // What was refused is forgotten, unless another has begun to try.
            let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            known.retain(|(_, other)| !Arc::ptr_eq(other, &cell) || Arc::strong_count(other) > 2);
        }
        job
    }

    fn cell(&self, request_id: &str) -> Arc<OnceCell<Arc<Job>>> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, cell)) = known.iter().find(|(id, _)| id == request_id) {
            return Arc::clone(cell);
        }
        // A request whose caller left before its job was made.
        known.retain(|(_, cell)| cell.initialized() || Arc::strong_count(cell) > 1);
        let is_over = |(_, cell): &Known| cell.get().is_some_and(|job| job.has_ended());
        if known.iter().filter(|known| is_over(known)).count() >= KEPT
            && let Some(oldest) = known.iter().position(is_over)
        {
            known.remove(oldest);
        }
        let cell = Arc::default();
        known.push_back((request_id.to_owned(), Arc::clone(&cell)));
        cell
    }
}
