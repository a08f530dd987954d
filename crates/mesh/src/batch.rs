//! Admission and dynamic batching: callers queue items, owner threads take what waits.
//!
//! A session runs on one thread at a time, so each [`Worker`] lives on a thread of its own. An idle worker takes an item and whatever compatible ones wait beside
//! it, up to the limit; it never waits for more.
//!
//! Each call has a line of its own, and the lines take turns: what a call sends first waits for at most one item of every other, however many they have. So it is
//! the first item of each line that counts for whether the queue is full. A call that finds it full is refused as a whole, before anything was done for it, with
//! when to come again. One that was taken in is never refused: it has only as many items in its line as are worked on for a call at a time, and gRPC's flow control
//! holds the rest back at its sender, which costs nothing; refusing them one by one would have all of them sent again.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::oneshot};
use tonic::Code;
use tracing::error;

use crate::{
    Fault,
    call::{self, Call, shutting_down},
    metrics::{
        BATCH_ITEMS, BATCH_SECONDS, BATCH_STOPPED, Counter, ENGINE_FAILURES, Gauge, Histogram, QUEUE_DROPPED, QUEUE_REFUSED, QUEUE_SECONDS, QUEUE_UNITS,
        SESSIONS, WORK,
    },
    telemetry::Trace,
};

/// Batches in a row of which a model answered nothing, before it has to show that it can answer at all.
const FAILURES: u32 = 3;
/// What a refused caller is asked to wait, at least and at most.
const SOONEST: Duration = Duration::from_millis(100);
const LATEST: Duration = Duration::from_secs(30);
/// The reason of a batch that was stopped because nobody waited for it.
const CALLER_GONE: &str = "CALLER_GONE";

/// Runs batches on a thread of its own.
pub trait Worker: Send + 'static {
    /// What is queued.
    type Item: Send + 'static;
    /// What an item becomes.
    type Output: Send + 'static;
    /// Items share a batch only if their keys are equal.
    type Key: PartialEq;

    /// The key of an item.
    fn key(item: &Self::Item) -> Self::Key;

    /// What an item is worth of the queue, in the unit of the model's work: pictures, texts, tokens, denoising steps.
    fn cost(_: &Self::Item) -> usize {
        1
    }

    /// Has the model answer something that it must be able to answer: before the first batch, and where several failed in a row. If it can't, its service can't
    /// serve.
    fn warm_up(&mut self) -> Result<(), Fault>;

    /// Runs a batch of items of equal keys: as many results as items, in their order. Long loops look at `stop` at each step.
    fn run(&mut self, batch: Vec<Self::Item>, stop: &Stop) -> Vec<Result<Self::Output, Fault>>;
}

/// Whether the results of a batch are still wanted: not when the service is shutting down, and not when all its callers have left.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    closing: Arc<AtomicBool>,
    callers: Vec<Caller>,
}

impl Stop {
    /// The fault to end with, if the results are wanted no more.
    pub fn check(&self) -> Result<(), Fault> {
        if self.closing.load(Ordering::Relaxed) {
            return Err(shutting_down());
        }
        if !self.callers.is_empty() && self.callers.iter().all(|caller| caller.has_left().is_some()) {
            return Err(Fault::new(Code::Cancelled, CALLER_GONE, "nobody waits for it any more"));
        }
        Ok(())
    }
}

/// Who waits for an item.
#[derive(Debug, Clone)]
struct Caller {
    here: Weak<()>,
    deadline: Option<Instant>,
}

impl Caller {
    /// Why it waits no more.
    fn has_left(&self) -> Option<Gone> {
        if self.here.strong_count() == 0 { Some(Gone::Left) } else { self.deadline.is_some_and(|at| at <= Instant::now()).then_some(Gone::Overdue) }
    }
}

/// Why a caller waits no more.
#[derive(Debug, Clone, Copy)]
enum Gone {
    Left,
    Overdue,
}

/// How much waits, and how much is run together.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// What may wait, by the cost of items.
    pub queue: usize,
    /// Items of a batch at most.
    pub batch: usize,
}

struct Waiting<W: Worker> {
    item: W::Item,
    answer: oneshot::Sender<Result<W::Output, Fault>>,
    caller: Caller,
    call: Option<Arc<Call>>,
    cost: usize,
    since: Instant,
}

impl<W: Worker> Waiting<W> {
    /// That of its call, if it is taken.
    fn trace(&self) -> Option<Trace> {
        self.call.as_ref()?.trace
    }
}

/// What waits of one call.
struct Line<W: Worker> {
    call: u64,
    items: VecDeque<Waiting<W>>,
}

struct State<W: Worker> {
    /// The one whose turn it is first; none is empty.
    lines: VecDeque<Line<W>>,
    closed: bool,
    /// Seconds that a unit of work has taken lately.
    pace: f64,
}

struct Shared<W: Worker> {
    name: String,
    limits: Limits,
    state: Mutex<State<W>>,
    changed: Condvar,
    closing: Arc<AtomicBool>,
    depth: Gauge,
    waited: Histogram,
    refused: Counter,
    left: Counter,
    overdue: Counter,
}

impl<W: Worker> Shared<W> {
    /// The queue is only changed in single steps under the lock, so it is whole even after a panic.
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts an item in its call's line, unless the call is new and there is no room for it.
    fn queue(&self, item: W::Item, here: &Arc<()>) -> Result<oneshot::Receiver<Result<W::Output, Fault>>, Fault> {
        let call = call::current();
        let id = call.as_ref().map_or(0, |call| call.id);
        let cost = W::cost(&item).max(1);
        let (answer, answered) = oneshot::channel();
        let mut state = self.lock();
        if state.closed {
            return Err(shutting_down());
        }
        if let Some(call) = &call
            && !call.admitted.load(Ordering::Relaxed)
        {
            // What has left makes room first.
            self.sweep(&mut state);
            let taken: usize = state.lines.iter().filter_map(|line| line.items.front()).map(|first| first.cost).sum();
            if taken > 0 && taken + cost > self.limits.queue {
                let delay = Duration::from_secs_f64((state.pace * taken as f64).clamp(SOONEST.as_secs_f64(), LATEST.as_secs_f64()));
                self.refused.inc();
                let message =
                    format!("the queue of the {} model is full: {taken} of {} units of work; come again in {delay:.1?}", self.name, self.limits.queue);
                let fault = Fault::new(Code::ResourceExhausted, "QUEUE_FULL", message).retry_after(delay);
                call.refuse(fault.clone());
                return Err(fault);
            }
            call.admitted.store(true, Ordering::Relaxed);
        }
        let deadline = call.as_ref().and_then(|call| call.deadline).map(tokio::time::Instant::into_std);
        let waiting = Waiting { item, answer, caller: Caller { here: Arc::downgrade(here), deadline }, call, cost, since: Instant::now() };
        self.depth.inc_by(cost as f64);
        match state.lines.iter_mut().find(|line| line.call == id) {
            Some(line) => line.items.push_back(waiting),
            None => state.lines.push_back(Line { call: id, items: VecDeque::from([waiting]) }),
        }
        drop(state);
        self.changed.notify_one();
        Ok(answered)
    }

    /// Drops what nobody waits for any more.
    fn sweep(&self, state: &mut State<W>) {
        for line in &mut state.lines {
            line.items.retain(|waiting| {
                let left = waiting.caller.has_left();
                if let Some(gone) = left {
                    self.depth.dec_by(waiting.cost as f64);
                    match gone {
                        Gone::Left => self.left.inc(),
                        Gone::Overdue => self.overdue.inc(),
                    };
                }
                left.is_none()
            });
        }
        state.lines.retain(|line| !line.items.is_empty());
    }

    /// The next item, and compatible ones, of each line in turn; the others keep their places. Empty when closed.
    fn take(&self) -> Vec<Waiting<W>> {
        let mut state = self.lock();
        loop {
            self.sweep(&mut state);
            if let Some(first) = state.lines.front().and_then(|line| line.items.front()) {
                let key = W::key(&first.item);
                let limit = self.limits.batch.max(1);
                let mut batch = Vec::new();
                let mut served = vec![false; state.lines.len()];
                while batch.len() < limit {
                    let before = batch.len();
                    for (line, served) in state.lines.iter_mut().zip(&mut served) {
                        if batch.len() == limit {
                            break;
                        }
                        let place = line.items.iter().position(|waiting| W::key(&waiting.item) == key);
                        if let Some(waiting) = place.and_then(|place| line.items.remove(place)) {
                            *served = true;
                            batch.push(waiting);
                        }
                    }
                    if batch.len() == before {
                        break;
                    }
                }
                // Who had a turn comes after all others.
                let (had, not): (Vec<_>, Vec<_>) = state.lines.drain(..).zip(served).partition(|(_, served)| *served);
                state.lines = not.into_iter().chain(had).map(|(line, _)| line).filter(|line| !line.items.is_empty()).collect();
                for waiting in &batch {
                    self.depth.dec_by(waiting.cost as f64);
                    self.waited.observe(waiting.since.elapsed().as_secs_f64(), waiting.trace());
                }
                return batch;
            }
            if state.closed {
                return Vec::new();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The queue of a model, and the threads that own its sessions.
pub struct Batcher<W: Worker> {
    shared: Arc<Shared<W>>,
    threads: Vec<JoinHandle<()>>,
}

impl<W: Worker> Batcher<W> {
    /// Warms up each worker and starts a thread for it; `name` is what metrics, refusals and a debugger show. Blocking.
    pub fn start(name: &str, mut workers: Vec<W>, limits: Limits) -> Result<Self, Fault> {
        workers.iter_mut().try_for_each(Worker::warm_up)?;
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            limits,
            state: Mutex::new(State { lines: VecDeque::new(), closed: false, pace: 0.0 }),
            changed: Condvar::new(),
            closing: Arc::default(),
            depth: QUEUE_UNITS.of([name]),
            waited: QUEUE_SECONDS.of([name]),
            refused: QUEUE_REFUSED.of([name]),
            left: QUEUE_DROPPED.of([name, "left"]),
            overdue: QUEUE_DROPPED.of([name, "deadline"]),
        });
        let count = workers.len().max(1);
        let threads = workers.into_iter().map(|worker| {
            let owner = Owner::new(worker, Arc::clone(&shared), count);
            std::thread::Builder::new().name(name.to_owned()).spawn(move || owner.run())
        });
        let threads = threads.collect::<Result<_, _>>().map_err(|e| Fault::internal(format!("no thread can be started: {e}")))?;
        Ok(Self { shared, threads })
    }

    /// Queues an item and waits for what becomes of it. Dropping the future takes the item back unless it is running. Where the queue is full, the call that this
    /// is a part of is refused.
    pub async fn submit(&self, item: W::Item) -> Result<W::Output, Fault> {
        let here = Arc::new(());
        let answered = self.shared.queue(item, &here)?;
        answered.await.map_err(|_| if self.shared.lock().closed { shutting_down() } else { Fault::new(Code::DeadlineExceeded, "DEADLINE", self.too_late()) })?
    }

    fn too_late(&self) -> String {
        format!("the caller's deadline passed in the queue of the {} model", self.shared.name)
    }
}

impl<W: Worker> Drop for Batcher<W> {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        let threads: Vec<_> = self.threads.drain(..).collect();
        let wait = move || threads.into_iter().for_each(|thread| drop(thread.join()));
        // They end with the batch that they are running, which a thread of the runtime must not wait for; the runtime's end does.
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(wait)),
            Err(_) => wait(),
        }
    }
}

/// A worker on its thread.
struct Owner<W: Worker> {
    worker: W,
    shared: Arc<Shared<W>>,
    /// Workers that share the queue.
    count: usize,
    /// Batches in a row of which nothing was answered.
    failures: u32,
    batch_items: Histogram,
    batch_seconds: Histogram,
    sessions: Gauge,
    work: Counter,
    stopped: Counter,
    failed: Counter,
}

impl<W: Worker> Owner<W> {
    fn new(worker: W, shared: Arc<Shared<W>>, count: usize) -> Self {
        let model = [shared.name.as_str()];
        let (batch_items, batch_seconds) = (BATCH_ITEMS.of(model), BATCH_SECONDS.of(model));
        let (sessions, work) = (SESSIONS.of(model), WORK.of(model));
        let (stopped, failed) = (BATCH_STOPPED.of(model), ENGINE_FAILURES.of(model));
        sessions.inc();
        Self { worker, shared, count, failures: 0, batch_items, batch_seconds, sessions, work, stopped, failed }
    }

    fn run(mut self) {
        loop {
            let batch = self.shared.take();
            if batch.is_empty() {
                return;
            }
            if batch.len() < self.shared.limits.batch {
                // More may wait than this worker could use: let another see to it.
                self.shared.changed.notify_one();
            }
            self.run_batch(batch);
        }
    }

    fn run_batch(&mut self, batch: Vec<Waiting<W>>) {
        let count = batch.len();
        let costs: Vec<usize> = batch.iter().map(|waiting| waiting.cost).collect();
        let units: usize = costs.iter().sum();
        let life = batch.iter().find_map(|waiting| waiting.call.as_ref()).map(|call| Arc::clone(&call.life));
        let trace = batch.iter().find_map(Waiting::trace);
        let stop = Stop { closing: Arc::clone(&self.shared.closing), callers: batch.iter().map(|waiting| waiting.caller.clone()).collect() };
        let (items, answers): (Vec<_>, Vec<_>) = batch.into_iter().map(|waiting| (waiting.item, waiting.answer)).unzip();
        let since = Instant::now();
        let results = catch_unwind(AssertUnwindSafe(|| self.worker.run(items, &stop)))
            .unwrap_or_else(|_| vec_of(count, || Err(Fault::internal("the model's thread panicked on this batch; the service's log has the details"))));
        let took = since.elapsed();
        self.batch_items.observe(count as f64, trace);
        self.batch_seconds.observe(took.as_secs_f64(), trace);
        let failed = !results.is_empty() && results.iter().all(|result| matches!(result, Err(fault) if fault.code() == Code::Internal));
        if results.iter().any(|result| matches!(result, Err(fault) if fault.reason() == CALLER_GONE)) {
            self.stopped.inc();
        } else {
            let pace = took.as_secs_f64() / (units * self.count) as f64;
            let mut state = self.shared.lock();
            state.pace = if state.pace > 0.0 { 0.8 * state.pace + 0.2 * pace } else { pace };
        }
        let done: usize = costs.iter().zip(&results).filter(|(_, result)| result.is_ok()).map(|(cost, _)| *cost).sum();
        self.work.inc_by(done as u64);
        let mut results = results.into_iter();
        for answer in answers {
            let result = results.next().unwrap_or_else(|| Err(Fault::internal("the model gave fewer results than it was asked for")));
            let _ = answer.send(result);
        }
        self.failures = if failed { self.failures + 1 } else { 0 };
        if failed {
            self.failed.inc();
        }
        if self.failures >= FAILURES {
            // The inputs may have been to blame.
            match catch_unwind(AssertUnwindSafe(|| self.worker.warm_up())) {
                Ok(Ok(())) => self.failures = 0,
                broken => {
                    let why = broken.map_or_else(|_| "it panicked".to_owned(), |answered| answered.err().map_or_else(String::new, |fault| fault.to_string()));
                    error!(model = self.shared.name, why, "the model answers nothing any more");
                    if let Some(life) = life {
                        life.fail(format!("the {} model failed {} times in a row, and then at its warm-up: {why}", self.shared.name, self.failures));
                    }
                }
            }
        }
    }
}

impl<W: Worker> Drop for Owner<W> {
    fn drop(&mut self) {
        self.sessions.dec();
    }
}

/// The results of a batch of which only the good items were run: the fault of each bad one in its place, and for the good ones, in order, what
/// the run gave, or its fault for each.
pub fn spread<T>(read: Vec<Result<(), Fault>>, run: Result<Vec<T>, Fault>) -> Vec<Result<T, Fault>> {
    let mut results = run.map(Vec::into_iter);
    read.into_iter()
        .map(|read| {
            read?;
            match &mut results {
                Ok(results) => results.next().ok_or_else(|| Fault::internal("the model gave fewer results than it was asked for")),
                Err(fault) => Err(fault.clone()),
            }
        })
        .collect()
}

fn vec_of<T>(count: usize, make: impl Fn() -> T) -> Vec<T> {
    (0..count).map(|_| make()).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Doubles numbers; reports each batch and waits to be let through.
    struct Doubler {
        batches: mpsc::Sender<Vec<u32>>,
        gate: mpsc::Receiver<()>,
    }

    impl Worker for Doubler {
        type Item = u32;
        type Output = u32;
        type Key = bool;

        fn key(item: &u32) -> bool {
            item.is_multiple_of(2)
        }

        fn warm_up(&mut self) -> Result<(), Fault> {
            Ok(())
        }

        fn run(&mut self, batch: Vec<u32>, _: &Stop) -> Vec<Result<u32, Fault>> {
            self.batches.send(batch.clone()).unwrap();
            self.gate.recv().unwrap();
            if batch.contains(&13) {
                panic!("unlucky");
            }
            batch.into_iter().map(|n| Ok(n * 2)).collect()
        }
    }

    fn start(limits: Limits) -> (Arc<Batcher<Doubler>>, mpsc::Receiver<Vec<u32>>, mpsc::Sender<()>) {
        let (batches, seen) = mpsc::channel();
        let (open, gate) = mpsc::channel();
        let batcher = Batcher::start("doubler", vec![Doubler { batches, gate }], limits).unwrap();
        (Arc::new(batcher), seen, open)
    }

    fn waiting(batcher: &Batcher<Doubler>) -> usize {
        batcher.shared.lock().lines.iter().map(|line| line.items.len()).sum()
    }

    async fn queued(batcher: &Arc<Batcher<Doubler>>, item: u32) -> tokio::task::JoinHandle<Result<u32, Fault>> {
        let before = waiting(batcher);
        let handle = tokio::spawn({
            let batcher = Arc::clone(batcher);
            async move { batcher.submit(item).await }
        });
        while waiting(batcher) == before && !handle.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        handle
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_waits_is_run_together_when_keys_agree_and_callers_are_still_there() {
        let (batcher, seen, open) = start(Limits { queue: 16, batch: 3 });
        let first = tokio::spawn({
            let batcher = Arc::clone(&batcher);
            async move { batcher.submit(1).await }
        });
        assert_eq!(tokio::task::block_in_place(|| seen.recv()).unwrap(), [1]);
        let mut handles = Vec::new();
        for n in [2, 3, 4, 6, 8, 5] {
            handles.push(queued(&batcher, n).await);
        }
        handles.remove(2).abort();
        tokio::time::sleep(Duration::from_millis(20)).await;
        for _ in 0..8 {
            open.send(()).unwrap();
        }
        assert_eq!(first.await.unwrap().unwrap(), 2);
        let mut answers = Vec::new();
        for handle in handles {
            answers.push(handle.await.unwrap().unwrap());
        }
        assert_eq!(answers, [4, 6, 12, 16, 10]);
        let batches: Vec<_> = tokio::task::block_in_place(|| seen.try_iter().collect());
        assert_eq!(batches, [vec![2, 6, 8], vec![3, 5]]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_panic_answers_its_batch_and_the_worker_goes_on() {
        let (batcher, _seen, open) = start(Limits { queue: 16, batch: 4 });
        open.send(()).unwrap();
        open.send(()).unwrap();
        let fault = batcher.submit(13).await.unwrap_err();
        assert_eq!(fault.code(), tonic::Code::Internal);
        assert_eq!(batcher.submit(21).await.unwrap(), 42);
    }
}
