//! Works on the jobs of the store: takes what there is to do, a few units at a time over all jobs, and writes what comes of it.

use std::{
    collections::{HashMap, HashSet},
    num::NonZeroUsize,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use dnd_mesh::{
    Fault,
    blobs::Blobs,
    metrics::{UNITS, UNITS_OPEN},
    telemetry::Ids,
};
use dnd_proto::v1::{Model, ProbedUnit, Provenance, Stage, UnitResult, UnitState};
use lru::LruCache;
use tokio::{
    sync::OnceCell,
    task::{AbortHandle, JoinSet},
};
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;
use tracing::{Instrument as _, info_span};

use crate::{
    calls::{Calls, Work},
    data::Data,
    failure::Failure,
    models::{Models, SERVICE_AWAY, SERVICES},
    probing::{self, Probed, ProbingArgs},
    progress,
    results::Results,
    server::OrchestratorArgs,
    steps::{self, Course},
    store::{Claim, Lease, Passed, Pause, Store, StoreError},
};

/// Times that a unit, or a probing pass, is tried before it has failed, and how long after the first time; twice as long after the second.
const ATTEMPTS: u64 = 3;
const AGAIN: Duration = Duration::from_millis(500);
/// Between two looks for work that other processes may have left.
const LOOK: Duration = Duration::from_millis(500);
/// Between two looks at paused jobs.
const MEND: Duration = Duration::from_secs(1);
/// How long a job's models are looked for before the job pauses for one that is not there, and how long after each time.
const AWAY: Duration = Duration::from_secs(5);
const WAIT: Duration = Duration::from_millis(500);
/// Units of a probing pass that are written together.
const PROBED: usize = 256;
/// Jobs whose results of late are kept in memory.
const OPEN: NonZeroUsize = NonZeroUsize::new(8).expect("8 is not 0");

/// What works on jobs.
pub(crate) struct Engine {
    pub(crate) store: Store,
    pub(crate) models: Models,
    pub(crate) blobs: Arc<Blobs>,
    pub(crate) results: Results,
    pub(crate) probing: ProbingArgs,
    in_flight: NonZeroUsize,
    lease: Duration,
    /// The jobs that it works on, if it does not on all.
    asked: Option<Mutex<HashSet<String>>>,
    /// The calls of the jobs that were worked on last.
    open: Mutex<LruCache<String, Arc<OnceCell<Arc<Calls>>>>>,
}

/// Which jobs of its store an orchestrator works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorksOn {
    /// All.
    AllJobs,
    /// Those that it is asked to create or resume: the others wait for their own.
    AskedJobs,
    /// None: they are only looked at.
    NoJobs,
}

impl Engine {
    pub(crate) fn new(models: Models, data: Data, args: &OrchestratorArgs, works_on: WorksOn) -> Self {
        let Data { blobs, database, results } = data;
        let lease = Duration::from_secs(args.lease.get());
        Self {
            store: Store::new(database, lease),
            models,
            blobs,
            results,
            probing: args.probing.clone(),
            in_flight: args.units_in_flight,
            lease,
            asked: (works_on == WorksOn::AskedJobs).then(Mutex::default),
            open: Mutex::new(LruCache::new(OPEN)),
        }
    }

    /// Works on this job, too.
    pub(crate) fn ask(&self, job: &str) {
        if let Some(asked) = &self.asked {
            asked.lock().unwrap_or_else(PoisonError::into_inner).insert(job.to_owned());
        }
    }

    fn wants(&self, job: &str) -> bool {
        self.asked.as_ref().is_none_or(|asked| asked.lock().unwrap_or_else(PoisonError::into_inner).contains(job))
    }

    /// Works for as long as it is polled.
    pub(crate) async fn run(self: Arc<Self>) {
        tokio::join!(Arc::clone(&self).work(), self.mend());
    }

    async fn work(self: Arc<Self>) {
        let (mut changes, mut stops) = (self.store.changes(), self.store.stops());
        let mut beat = tokio::time::interval(self.lease / 4);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut working = JoinSet::new();
        let mut leases: Vec<(Lease, AbortHandle)> = Vec::new();
        loop {
            changes.mark_unchanged();
            while working.len() < self.in_flight.get() {
                match self.store.claim(|job| self.wants(job)).await {
                    Ok(Some(claim)) => {
                        let lease = claim.lease().clone();
                        leases.push((lease, working.spawn(Arc::clone(&self).settle(claim))));
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::warn!(%error, "no work can be taken");
                        break;
                    }
                }
            }
            UNITS_OPEN.of([]).set(working.len() as f64);
            tokio::select! {
                _ = working.join_next(), if !working.is_empty() => leases.retain(|(_, task)| !task.is_finished()),
                _ = beat.tick() => self.renew(&leases).await,
                _ = stops.changed() => self.renew(&leases).await,
                () = idle(&mut changes), if working.len() < self.in_flight.get() => {}
            }
        }
    }

    /// Prolongs the leases of what is worked on, so that those of what nothing works on any more come to their end; what is not this process's any more is let
    /// go.
    async fn renew(&self, working: &[(Lease, AbortHandle)]) {
        for (lease, task) in working.iter().filter(|(_, task)| !task.is_finished()) {
            match self.store.renew(lease).await {
                Ok(()) => {}
                Err(StoreError::Lost) => task.abort(),
                Err(error) => tracing::warn!(%error, job = lease.job, place = lease.place, "a lease can't be prolonged"),
            }
        }
    }

    /// Lets jobs go on whose services are there again.
    async fn mend(&self) {
        loop {
            tokio::time::sleep(MEND).await;
            let due = self.store.due().await.unwrap_or_default();
            for job in due.into_iter().filter(|job| self.wants(job)) {
                let mended = match self.look_up(&job).await {
                    Ok(_) => self.store.go_on(&job).await,
                    Err(Shut::Pause(why)) => self.store.stay_paused(&job, &why).await,
                    Err(Shut::Store(error)) => Err(error),
                };
                if let Err(error) = mended {
                    tracing::warn!(%error, job, "a paused job can't be looked at");
                }
            }
        }
    }

    /// Does what was taken, and writes what came of it.
    async fn settle(self: Arc<Self>, claim: Claim) {
        let Lease { job, place, .. } = claim.lease().clone();
        let settled = match claim {
            Claim::Pass(lease) => self.pass(&lease).await,
            Claim::Unit(lease, probed) => self.unit(lease, *probed).await,
        };
        match settled {
            Ok(()) => {}
            Err(StoreError::Lost) => tracing::info!(job, place, "the lease is over: another process goes on with it, or nobody"),
            Err(error) => tracing::warn!(%error, job, place, "what came of a unit can't be written; it is taken again when its lease is over"),
        }
    }

    async fn pass(&self, lease: &Lease) -> Result<(), StoreError> {
        let calls = match self.calls(&lease.job).await {
            Ok(calls) => calls,
            Err(shut) => return self.shut(lease, shut).await,
        };
        let since = Instant::now();
        let fault = match self.probe(lease, &calls).await {
            Ok(passed) => {
                calls.progress().time(Stage::Probe, since);
                progress::through(Stage::Probe, since);
                return self.store.passed(lease, passed, calls.progress().take()).await;
            }
            Err(Unprobed::Store(error)) => return Err(error),
            Err(Unprobed::Pass(fault)) => fault,
        };
        let tallies = calls.progress().take();
        // What is wrong with the request is so the next time, too.
        let for_good = matches!(fault.code(), Code::InvalidArgument | Code::FailedPrecondition | Code::NotFound | Code::OutOfRange);
        match fault.reason() {
            SERVICE_AWAY | "STORAGE" => self.store.pause(lease, &Pause { fault, by_itself: true }, tallies).await,
            _ if !for_good && lease.attempts + 1 < ATTEMPTS => self.store.again(lease, after(lease), tallies).await,
            _ => self.store.fail(lease, &fault).await,
        }
    }

    /// Runs a job's probing pass, and keeps its units as they come.
    async fn probe(&self, lease: &Lease, calls: &Calls) -> Result<Passed, Unprobed> {
        let units = calls.layers().iter().flat_map(|of| of.units.iter().map(|unit| (of.layer.as_str(), *unit)));
        let places: HashMap<(&str, u32), i64> = units.zip(1..).collect();
        let listen = async |mut told: probing::Told| {
            let mut passed = Passed::default();
            let mut units: Vec<(i64, ProbedUnit)> = Vec::new();
            while let Some(event) = told.recv().await {
                match passed.hear(event, calls.parameters()) {
                    Some(Probed::Progress(progress)) => self.store.probing(lease, progress.done, progress.pictures).await?,
                    Some(Probed::Unit(unit)) => {
                        let place = places.get(&(unit.layer.as_str(), unit.unit)).copied();
                        units.extend(place.map(|place| (place, unit)));
                    }
                    None => {}
                }
                if units.len() >= PROBED {
                    self.store.probed(lease, &std::mem::take(&mut units)).await?;
                }
            }
            self.store.probed(lease, &units).await?;
            Ok(passed)
        };
        probing::probe(calls, &self.probing, listen).await
    }

    async fn unit(&self, lease: Lease, probed: ProbedUnit) -> Result<(), StoreError> {
        let calls = match self.calls(&lease.job).await {
            Ok(calls) => calls,
            Err(shut) => return self.shut(&lease, shut).await,
        };
        let course = Leased { store: self.store.clone(), lease: lease.clone(), calls: Arc::clone(&calls) };
        let named = UnitResult { layer: probed.layer.clone(), unit: probed.unit, ..Default::default() };
        // A task of its own, so that a panic in it fails the unit and nothing else.
        // Of a trace of its own: a unit is what one wants to see the way of.
        let span = info_span!(parent: None, "unit", layer = probed.layer, unit = probed.unit, job = lease.job);
        let (ids, before) = lease.spans();
        ids.give(&span);
        if let Some(before) = before {
            before.link(&span);
        }
        let work = tokio::spawn(async move { steps::dissect(&course.calls, &course, &probed).await }.instrument(span));
        let (result, failure) = AbortOnDropHandle::new(work).await.unwrap_or_else(|_| {
            let failure = Failure::new("internal", "the work on it panicked; the orchestrator's log has the details").worth_another_try();
            let Failure { reason, message, .. } = failure.clone();
            (UnitResult { state: UnitState::Failed.into(), reason, message, ..named }, Some(failure))
        });
        let tallies = calls.progress().take();
        match failure {
            Some(Failure { pauses: Some(why), .. }) => self.store.pause(&lease, &why, tallies).await,
            Some(failure) if failure.retry && lease.attempts + 1 < ATTEMPTS => {
                calls.ask_anew();
                self.store.again(&lease, after(&lease), tallies).await
            }
            _ => {
                self.store.finish(&lease, &result, tallies).await?;
                let state = result.state().as_str_name().trim_start_matches("UNIT_STATE_").to_lowercase();
                UNITS.of([&state]).inc();
                Ok(())
            }
        }
    }

    /// Gives back what is of a job that can't be worked on now.
    async fn shut(&self, lease: &Lease, shut: Shut) -> Result<(), StoreError> {
        match shut {
            Shut::Pause(why) => self.store.pause(lease, &why, Default::default()).await,
            Shut::Store(error) => Err(error),
        }
    }

    /// The calls of a job, shared by its units.
    async fn calls(&self, job: &str) -> Result<Arc<Calls>, Shut> {
        self.has_room().await?;
        let cell = {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(open.get_or_insert(job.to_owned(), Arc::default))
        };
        let open = async || {
            let since = Instant::now();
            let work = loop {
                match self.look_up(job).await {
                    // Started anew at once, as a rule.
                    Err(Shut::Pause(why)) if why.fault.reason() == SERVICE_AWAY && since.elapsed() < AWAY => {}
                    looked_up => break looked_up?,
                }
                tokio::time::sleep(WAIT).await;
            };
            Ok(Arc::new(Calls::new(self.models.clone(), Arc::clone(&self.blobs), &self.results, work)))
        };
        cell.get_or_try_init(open).await.cloned()
    }

    /// Whether more may be kept than is pinned.
    async fn has_room(&self) -> Result<(), Shut> {
        match self.results.room().full().await.map_err(StoreError::from)? {
            Some(full) => Err(Shut::Pause(Pause { fault: Fault::new(Code::ResourceExhausted, "NO_ROOM", full), by_itself: true })),
            None => Ok(()),
        }
    }

    /// What a job works on, if the mesh has its models: results of others would be taken for theirs.
    async fn look_up(&self, job: &str) -> Result<Work, Shut> {
        self.has_room().await?;
        let (request, accepted) = self.store.work(job).await?.ok_or(StoreError::Lost)?;
        let models = self.models.models(0).await.map_err(|fault| {
            let fault = Fault::new(Code::Unavailable, SERVICE_AWAY, fault.to_string());
            Shut::Pause(Pause { fault, by_itself: true })
        })?;
        let Provenance { activation, captioner, summarizer, diffusion, clip, .. } = accepted.provenance.clone().unwrap_or_default();
        for (service, (then, now)) in SERVICES.iter().zip([activation, captioner, summarizer, diffusion, clip].into_iter().zip(models)) {
            let told = |model: Option<Model>| model.map(|Model { name, digest, engine, .. }| (name, digest, engine)).unwrap_or_default();
            let (then, now) = (told(then), told(now));
            if then != now {
                let message = format!("the job was begun with the {service} model {then:?}, and the mesh has {now:?} now");
                return Err(Shut::Pause(Pause { fault: Fault::new(Code::FailedPrecondition, "MODEL_CHANGED", message), by_itself: true }));
            }
        }
        Work::of(request, accepted).map_err(|fault| Shut::Pause(Pause { fault, by_itself: false }))
    }
}

/// Waits for something that this process writes, or for a while.
async fn idle(changes: &mut tokio::sync::watch::Receiver<()>) {
    let _ = tokio::time::timeout(LOOK, changes.changed()).await;
}

/// How long after a failed attempt the next one is.
fn after(lease: &Lease) -> Duration {
    AGAIN * (lease.attempts as u32 + 1)
}

/// Why a job can't be worked on now.
enum Shut {
    Pause(Pause),
    Store(StoreError),
}

impl From<StoreError> for Shut {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// Why a probing pass came to no end.
enum Unprobed {
    Pass(Fault),
    Store(StoreError),
}

impl From<Fault> for Unprobed {
    fn from(fault: Fault) -> Self {
        Self::Pass(fault)
    }
}

impl From<StoreError> for Unprobed {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// A course that is written to the store, for as long as the unit is this process's.
struct Leased {
    store: Store,
    lease: Lease,
    calls: Arc<Calls>,
}

impl Course for Leased {
    fn ids(&self, stage: Stage) -> Option<Ids> {
        Some(self.lease.span(stage))
    }

    async fn through(&self, stage: Stage) -> Result<(), Failure> {
        // The last is written with the unit's end.
        if stage == Stage::Score {
            return Ok(());
        }
        Ok(self.store.through(&self.lease, stage, self.calls.progress().take()).await?)
    }
}
