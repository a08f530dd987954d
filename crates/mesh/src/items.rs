//! Streams of items: each request has an `item_id`, each is answered on its own, and one bad item never ends the stream.

use std::{
    future::Future,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
};

use futures::{FutureExt as _, Stream, StreamExt as _, stream};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::{
    Fault,
    call::{self, shutting_down},
};

/// A stream of responses, as tonic's generated servers take it.
pub type Responses<A> = Pin<Box<dyn Stream<Item = Result<A, Status>> + Send>>;

/// Answers each request by `handle`, up to `concurrency` at a time and in the order in which they finish. A panic in `handle` becomes
/// INTERNAL for the call; requests are taken from the caller no faster than they are answered. When the service shuts down, what has come is answered, and then
/// the stream ends with UNAVAILABLE.
pub fn answer<Q, A, F, Fut>(requests: Streaming<Q>, concurrency: usize, handle: F) -> Responses<A>
where
    Q: Send + 'static,
    A: Send + 'static,
    F: Fn(Q) -> Fut + Send + 'static,
    Fut: Future<Output = A> + Send + 'static,
{
    let stopping = call::current().map_or_else(CancellationToken::new, |call| call.life.stopping.clone());
    let stopped = Arc::new(AtomicBool::new(false));
    let answers = until_stopped(requests, stopping, Arc::clone(&stopped))
        .map(move |request| {
            let handled = request.map(&handle);
            async move {
                match handled {
                    Ok(future) => AssertUnwindSafe(future)
                        .catch_unwind()
                        .await
                        .map_err(|_| Status::from(Fault::internal("the service panicked on an item; its log has the details"))),
                    Err(status) => Err(status),
                }
            }
        })
        .buffer_unordered(concurrency.max(1));
    let end = stream::once(async move { stopped.load(Ordering::Relaxed).then(|| Err(shutting_down().into())) }).filter_map(std::future::ready);
    Box::pin(answers.chain(end))
}

/// The requests that have come by the time that the service stops; `stopped` says whether that cut the stream off.
fn until_stopped<Q: Send + 'static>(
    mut requests: Streaming<Q>,
    stopping: CancellationToken,
    stopped: Arc<AtomicBool>,
) -> impl Stream<Item = Result<Q, Status>> + Send {
    let mut stopping = Box::pin(stopping.cancelled_owned());
    stream::poll_fn(move |context| {
        let next = requests.poll_next_unpin(context);
        if next.is_pending() && stopping.as_mut().poll(context).is_ready() {
            stopped.store(true, Ordering::Relaxed);
            return Poll::Ready(None);
        }
        next
    })
    .fuse()
}
