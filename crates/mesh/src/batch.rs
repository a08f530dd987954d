//! Dynamic batching: callers queue items, owner threads take what waits.
//!
//! A session runs on one thread at a time, so each [`Worker`] lives on a thread of its own. An idle worker takes the oldest item and
//! whatever compatible ones wait beside it, up to the limit; it never waits for more. Items whose caller has gone are dropped unrun.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
};

use crate::Fault;

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

    /// Runs a batch of items of equal keys: as many results as items, in their order. Long loops look at `stop` at each step.
    fn run(&mut self, batch: Vec<Self::Item>, stop: &Stop) -> Vec<Result<Self::Output, Fault>>;
}

/// Whether the results are still wanted: not when the service is shutting down.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// The fault to end with, if the results are wanted no more.
    pub fn check(&self) -> Result<(), Fault> {
        if self.0.load(Ordering::Relaxed) { Err(shutting_down()) } else { Ok(()) }
    }
}

fn shutting_down() -> Fault {
    Fault::new(tonic::Code::Unavailable, "SHUTTING_DOWN", "the service is shutting down")
}

/// How much waits, and how much is run together.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Items that may wait; further callers wait for room.
    pub queue: usize,
    /// Items of a batch at most.
    pub batch: usize,
}

struct Waiting<W: Worker> {
    item: W::Item,
    answer: oneshot::Sender<Result<W::Output, Fault>>,
    _room: OwnedSemaphorePermit,
}

struct State<W: Worker> {
    waiting: VecDeque<Waiting<W>>,
    closed: bool,
}

struct Shared<W: Worker> {
    state: Mutex<State<W>>,
    changed: Condvar,
}

impl<W: Worker> Shared<W> {
    /// The queue is only pushed to and taken from under the lock, so it is whole even after a panic.
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The queue of a model, and the threads that own its sessions.
pub struct Batcher<W: Worker> {
    shared: Arc<Shared<W>>,
    room: Arc<Semaphore>,
    stop: Stop,
    threads: Vec<JoinHandle<()>>,
}

impl<W: Worker> Batcher<W> {
    /// Starts a thread for each worker; `name` is what a debugger shows.
    pub fn start(name: &str, workers: Vec<W>, limits: Limits) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::new(State { waiting: VecDeque::new(), closed: false }), changed: Condvar::new() });
        let stop = Stop::default();
        let threads = workers
            .into_iter()
            .map(|worker| {
                let (shared, stop) = (Arc::clone(&shared), stop.clone());
                std::thread::Builder::new().name(name.to_owned()).spawn(move || own(worker, &shared, limits.batch.max(1), &stop))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { shared, room: Arc::new(Semaphore::new(limits.queue.max(1))), stop, threads })
    }

    /// Queues an item, once there is room, and waits for what becomes of it. Dropping the future takes the item back unless it is running.
    pub async fn submit(&self, item: W::Item) -> Result<W::Output, Fault> {
        let room = Arc::clone(&self.room).acquire_owned().await.map_err(|_| shutting_down())?;
        let (answer, answered) = oneshot::channel();
        self.shared.lock().waiting.push_back(Waiting { item, answer, _room: room });
        self.shared.changed.notify_one();
        answered.await.map_err(|_| shutting_down())?
    }
}

impl<W: Worker> Drop for Batcher<W> {
    fn drop(&mut self) {
        self.stop.0.store(true, Ordering::Relaxed);
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

/// The oldest item whose caller still waits, and the compatible ones behind it; the others keep their places. Empty when closed.
fn take<W: Worker>(shared: &Shared<W>, limit: usize) -> Vec<Waiting<W>> {
    let mut state = shared.lock();
    loop {
        state.waiting.retain(|w| !w.answer.is_closed());
        if let Some(first) = state.waiting.pop_front() {
            let key = W::key(&first.item);
            let mut batch = vec![first];
            let mut rest = VecDeque::with_capacity(state.waiting.len());
            for waiting in state.waiting.drain(..) {
                if batch.len() < limit && W::key(&waiting.item) == key {
                    batch.push(waiting);
                } else {
                    rest.push_back(waiting);
                }
            }
            state.waiting = rest;
            return batch;
        }
        if state.closed {
            return Vec::new();
        }
        state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
}

fn own<W: Worker>(mut worker: W, shared: &Shared<W>, limit: usize, stop: &Stop) {
    loop {
        let batch = take(shared, limit);
        if batch.is_empty() {
            return;
        }
        if batch.len() < limit {
            // More may wait than this worker could use: let another see to it.
            shared.changed.notify_one();
        }
        let (items, answers): (Vec<_>, Vec<_>) = batch.into_iter().map(|w| (w.item, w.answer)).unzip();
        let count = items.len();
        let results = catch_unwind(AssertUnwindSafe(|| worker.run(items, stop)))
            .unwrap_or_else(|_| vec_of(count, || Err(Fault::internal("the model's thread panicked on this batch; the service's log has the details"))));
        let mut results = results.into_iter();
        for answer in answers {
            let result = results.next().unwrap_or_else(|| Err(Fault::internal("the model gave fewer results than it was asked for")));
            let _ = answer.send(result);
        }
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
    use std::{sync::mpsc, time::Duration};

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

    async fn queued(batcher: &Arc<Batcher<Doubler>>, item: u32) -> tokio::task::JoinHandle<Result<u32, Fault>> {
        let before = batcher.shared.lock().waiting.len();
        let handle = tokio::spawn({
            let batcher = Arc::clone(batcher);
            async move { batcher.submit(item).await }
        });
        while batcher.shared.lock().waiting.len() == before && !handle.is_finished() {
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

    #[tokio::test(flavor = "multi_thread")]
    async fn callers_wait_for_room_in_the_queue() {
        let (batcher, seen, open) = start(Limits { queue: 1, batch: 1 });
        let running = tokio::spawn({
            let batcher = Arc::clone(&batcher);
            async move { batcher.submit(1).await }
        });
        tokio::task::block_in_place(|| seen.recv()).unwrap();
        let waiting = tokio::spawn({
            let batcher = Arc::clone(&batcher);
            async move { batcher.submit(2).await }
        });
        while batcher.shared.lock().waiting.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let outside = tokio::spawn({
            let batcher = Arc::clone(&batcher);
            async move { batcher.submit(3).await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(batcher.shared.lock().waiting.len(), 1);
        open.send(()).unwrap();
        open.send(()).unwrap();
        open.send(()).unwrap();
        assert_eq!(running.await.unwrap().unwrap(), 2);
        assert_eq!(waiting.await.unwrap().unwrap(), 4);
        assert_eq!(outside.await.unwrap().unwrap(), 6);
    }
}
