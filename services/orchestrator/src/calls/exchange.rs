//! Streams of items to a service and back, made again where they break.

use std::hash::Hash;

use dnd_mesh::{fault, retry::Patience};
use futures::stream;
use serde::{Serialize, de::DeserializeOwned};
use tonic::{Response, Status, Streaming};

use crate::{failure::Failure, memo::Memo};

/// Items of one stream at most, so that load can move between replicas.
const ITEMS: usize = 64;
/// How often a call whose service is away is tried again: some seconds, enough for a service that is started anew at once. Then the job pauses until it is there.
pub(crate) const TRIES: u32 = 5;
/// As [`TRIES`], where a mesh that was just started is waited for: about a minute, in which a service loads its model.
pub(crate) const TRIES_AT_FIRST: u32 = 12;

/// One an item, in their order.
pub(super) type Results<V> = Vec<Result<V, Failure>>;

/// What an answer of a stream of items holds: one of the named results, the failure of its status, or nothing, which is a failure too.
macro_rules! answered {
    ($result:expr, $module:ident, $($variant:ident($value:pat) => $made:expr),+) => {
        match $result {
            $(Some($module::Result::$variant($value)) => $made,)+
            Some($module::Result::Status(status)) => Err(Failure::item(&status)),
            None => Err(Failure::empty()),
        }
    };
}
pub(super) use answered;

/// Makes a call again while its service is still loading its model or says when to come again, so often.
pub(crate) async fn once_loaded<T, F: Future<Output = Result<T, Status>>>(tries: u32, call: impl Fn() -> F) -> Result<T, Status> {
    let mut patience = Patience::of(tries);
    loop {
        match call().await {
            Err(status) if is_there(&status) && patience.wait_after(&status).await => {}
            answered => return answered,
        }
    }
}

fn is_there(status: &Status) -> bool {
    fault::reason_of(status).as_deref() == Some("MODEL_LOADING") || fault::retry_after(status).is_some()
}

/// What is made of all messages of a call that streams answers to one request.
pub(super) async fn listed<A, B, F, K>(call: impl Fn() -> F, keep: impl Fn(A) -> K) -> Result<Vec<B>, Status>
where
    F: Future<Output = Result<Response<Streaming<A>>, Status>>,
    K: Future<Output = B>,
{
    let mut patience = Patience::of(TRIES);
    loop {
        let mut kept = Vec::new();
        let attempt = async {
            let mut messages = call().await?.into_inner();
            while let Some(message) = messages.message().await? {
                kept.push(keep(message).await);
            }
            Ok::<_, Status>(())
        };
        match attempt.await {
            Ok(()) => return Ok(kept),
            Err(status) if patience.wait_after(&status).await => {}
            Err(status) => return Err(status),
        }
    }
}

/// Sends items to a service over streams of a few, and gives each one's result in its place. `request` makes an item's message, when its turn comes;
/// an item for which it can't is not sent. Each value is kept as soon as it has come. Items that a broken stream left open are sent again.
pub(super) async fn each<I, Q, A, V, M, F, R>(
    service: &str,
    items: &[I],
    request: impl Fn(u64, I) -> M,
    call: impl Fn(stream::Iter<std::vec::IntoIter<Q>>) -> F,
    read: impl Fn(A) -> R,
    memo: &Memo<I, V>,
) -> Results<V>
where
    I: Clone + Hash + Eq + Serialize,
    V: Clone + Serialize + DeserializeOwned,
    M: Future<Output = Result<Q, Failure>>,
    F: Future<Output = Result<Response<Streaming<A>>, Status>>,
    R: Future<Output = (u64, Result<V, Failure>)>,
{
    let mut results: Vec<Option<Result<V, Failure>>> = items.iter().map(|_| None).collect();
    for (first, items) in (0..items.len()).step_by(ITEMS).zip(items.chunks(ITEMS)) {
        let mut patience = Patience::of(TRIES);
        loop {
            let mut requests: Vec<Q> = Vec::new();
            for (id, item) in (first..).zip(items) {
                let Some(place @ None) = results.get_mut(id) else { continue };
                match request(id as u64, item.clone()).await {
                    Ok(request) => requests.push(request),
                    Err(failure) => *place = Some(Err(failure)),
                }
            }
            if requests.is_empty() {
                break;
            }
            let mut went_on = false;
            let exchange = async {
                let mut answers = call(stream::iter(requests)).await?.into_inner();
                while let Some(answer) = answers.message().await? {
                    went_on = true;
                    let (id, result) = read(answer).await;
                    if let (Some(place), Some(item)) = (results.get_mut(id as usize), items.get((id as usize).wrapping_sub(first))) {
                        *place = Some(match result {
                            Ok(value) => memo.keep(item, value).await,
                            failed => failed,
                        });
                    }
                }
                Ok::<_, Status>(())
            };
            let Err(status) = exchange.await else { break };
            if went_on {
                patience = Patience::of(TRIES);
            }
            if !patience.wait_after(&status).await {
                let failure = Failure::of(service, &status);
                results.iter_mut().skip(first).take(items.len()).filter(|place| place.is_none()).for_each(|place| *place = Some(Err(failure.clone())));
                break;
            }
        }
    }
    results.into_iter().map(|result| result.unwrap_or_else(|| Err(Failure::empty()))).collect()
}
