//! Streams of items: each request has an `item_id`, each is answered on its own, and one bad item never ends the stream.

use std::{future::Future, panic::AssertUnwindSafe, pin::Pin};

use futures::{FutureExt as _, Stream, StreamExt as _};
use tonic::{Status, Streaming};

use crate::Fault;

/// A stream of responses, as tonic's generated servers take it.
pub type Responses<A> = Pin<Box<dyn Stream<Item = Result<A, Status>> + Send>>;

/// Answers each request by `handle`, up to `concurrency` at a time and in the order in which they finish. A panic in `handle` becomes
/// INTERNAL for the call; requests are taken from the caller no faster than they are answered.
pub fn answer<Q, A, F, Fut>(requests: Streaming<Q>, concurrency: usize, handle: F) -> Responses<A>
where
    Q: Send + 'static,
    A: Send + 'static,
    F: Fn(Q) -> Fut + Send + 'static,
    Fut: Future<Output = A> + Send + 'static,
{
    let answers = requests
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
    Box::pin(answers)
}
