//! Watching a job: its events in order, from any on, whoever writes them; between them how far it is.

use std::{collections::BTreeMap, time::Duration};

use dnd_mesh::{Fault, call};
use dnd_proto::v1::{JobEvent, StageProgress, job_event::Event};
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::watch;
use tonic::{Code, Status};

use crate::{
    progress,
    store::{EVENTS, Store},
};

/// Between two looks at a job that other processes may write to.
const LOOK: Duration = Duration::from_millis(500);
/// Between two looks at one that this process writes to: many small changes are told together.
const CHANGES: Duration = Duration::from_millis(100);

/// What happens in a job after the event of this number, until it has ended.
pub(crate) fn watch(store: Store, job: String, after: u64) -> impl Stream<Item = Result<JobEvent, Status>> + Send + 'static {
    let changes = store.changes();
    let watcher = Watcher { store, job, seen: after, told: BTreeMap::new(), changes, first: true };
    let looks =
        stream::try_unfold(watcher, |mut watcher| async move { Ok::<_, Status>(watcher.look().await?.map(|events| (stream::iter(events).map(Ok), watcher))) });
    looks.try_flatten()
}

struct Watcher {
    store: Store,
    job: String,
    /// Number of the last event that was told.
    seen: u64,
    /// Progress that was told.
    told: BTreeMap<i32, StageProgress>,
    changes: watch::Receiver<()>,
    first: bool,
}

impl Watcher {
    /// Waits for what is new, and gives it; none once all was told of a job that has ended.
    async fn look(&mut self) -> Result<Option<Vec<JobEvent>>, Fault> {
        loop {
            self.changes.mark_unchanged();
            let standing = self.store.standing(&self.job).await?.ok_or_else(|| no_such_job(&self.job))?;
            if !self.first && self.seen >= standing.last_event && standing.has_ended() {
                return standing.fault.map_or(Ok(None), Err);
            }
            let mut events = self.store.events(&self.job, self.seen).await?;
            // Of a job that is read from its beginning only what it came to is told between.
            if events.len() < EVENTS as usize || self.first {
                // Before the events, of which the last may be the job's end, but never before its acceptance.
                let begins = matches!(events.first(), Some(JobEvent { event: Some(Event::Accepted(_)), .. }));
                let news = self.news().await?;
                call::doing(|| self.told.values().map(progress::told).collect::<Vec<_>>().join(", "));
                events.splice(usize::from(begins)..usize::from(begins), news);
            }
            self.first = false;
            self.seen = events.iter().map(|event| event.number).max().unwrap_or_default().max(self.seen);
            if !events.is_empty() {
                return Ok(Some(events));
            }
            if !standing.has_ended() {
                let _ = tokio::time::timeout(LOOK, self.changes.changed()).await;
                tokio::time::sleep(CHANGES).await;
            }
        }
    }

    /// The progress that was not told yet.
    async fn news(&mut self) -> Result<Vec<JobEvent>, Fault> {
        let progress = self.store.progress(&self.job).await?;
        let new = progress.into_iter().filter(|progress| self.told.insert(progress.stage, *progress).as_ref() != Some(progress));
        Ok(new.map(|progress| JobEvent { number: 0, event: Some(Event::Progress(progress)) }).collect())
    }
}

/// The fault for a job that is not there.
pub(crate) fn no_such_job(id: &str) -> Fault {
    Fault::new(Code::NotFound, "NO_SUCH_JOB", format!("no job {id:?} is kept here"))
}
