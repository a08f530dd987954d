//! The call that is being answered: who asked, until when, and on which server. It is known to all that is done for it, without being handed on.

use std::{
    convert::Infallible,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::future::{BoxFuture, Either};
use http::{HeaderMap, Request, Response};
use http_body::{Frame, SizeHint};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, Sleep, sleep_until, timeout_at},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};
use tracing::error;

use crate::{Fault, deadline, telemetry::Trace};

/// Calls that one server answers at a time.
const MOST_CALLS: usize = 1024;

tokio::task_local! {
    static CALL: Arc<Call>;
}

/// A call that is being answered.
#[derive(Debug)]
pub(crate) struct Call {
    /// Tells it from the other calls of the process.
    pub(crate) id: u64,
    pub(crate) life: Arc<Life>,
    pub(crate) deadline: Option<Instant>,
    pub(crate) trace: Option<Trace>,
    /// Whether a queue has taken anything of it.
    pub(crate) admitted: AtomicBool,
    /// What is being done for it, if that was said.
    doing: Mutex<String>,
    refusal: OnceLock<Fault>,
}

/// The call that the present work is done for.
pub(crate) fn current() -> Option<Arc<Call>> {
    CALL.try_with(Arc::clone).ok()
}

/// Work for the present call, wherever it is polled: the call's deadline holds for it, too.
pub fn carried<F: Future>(work: F) -> impl Future<Output = F::Output> {
    let work = deadline::under(deadline::current(), work);
    match current() {
        Some(call) => Either::Left(CALL.scope(call, work)),
        None => Either::Right(work),
    }
}

/// Says what is being done for the present call: one that is over time ends with it.
pub fn doing(what: impl FnOnce() -> String) {
    let _ = CALL.try_with(|call| call.deadline.map(|_| *call.doing() = what()));
}

impl Call {
    fn new(life: Arc<Life>, deadline: Option<Instant>) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            life,
            deadline,
            trace: Trace::current(),
            admitted: AtomicBool::new(false),
            doing: Mutex::default(),
            refusal: OnceLock::new(),
        })
    }

    fn doing(&self) -> MutexGuard<'_, String> {
        self.doing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it ends with when its caller does not wait for it any more.
    fn late(&self, path: &str) -> Fault {
        let doing = match self.doing().as_str() {
            "" => String::new(),
            doing => format!("; it was at {doing}"),
        };
        Fault::new(Code::DeadlineExceeded, "DEADLINE", format!("{path} had not ended at its caller's deadline{doing}"))
    }

    /// Ends the whole call with a fault, whatever comes of its items.
    pub(crate) fn refuse(&self, fault: Fault) {
        let _ = self.refusal.set(fault);
    }
}

/// How a server is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Its model is being loaded.
    Loading,
    /// It serves.
    Serving,
    /// It takes no new calls.
    Stopping,
    /// Why it can serve no more.
    Failing(String),
}

/// What the calls of a server share.
#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) stopping: CancellationToken,
    pub(crate) state: watch::Sender<State>,
    calls: Arc<Semaphore>,
}

impl Default for Life {
    fn default() -> Self {
        Self { stopping: CancellationToken::new(), state: watch::Sender::new(State::Loading), calls: Arc::new(Semaphore::new(MOST_CALLS)) }
    }
}

impl Life {
    /// Says that the model answers nothing any more.
    pub(crate) fn fail(&self, why: String) {
        self.state.send_if_modified(|state| {
            let serves = *state == State::Serving;
            if serves {
                *state = State::Failing(why);
            }
            serves
        });
    }

    /// Waits until that is said, and gives why.
    pub(crate) async fn failed(&self) -> String {
        let mut states = self.state.subscribe();
        loop {
            if let State::Failing(why) = &*states.borrow_and_update() {
                return why.clone();
            }
            if states.changed().await.is_err() {
                // Its sender is in `self`.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// The fault of what is not done any more.
pub(crate) fn shutting_down() -> Fault {
    Fault::new(Code::Unavailable, "SHUTTING_DOWN", "the service is shutting down")
}

/// Makes the [`Call`], ends it at its deadline, and refuses it where too many are being answered.
#[derive(Clone)]
pub(crate) struct CallLayer(pub(crate) Arc<Life>);

impl<S> Layer<S> for CallLayer {
    type Service = Calls<S>;

    fn layer(&self, inner: S) -> Calls<S> {
        Calls { inner, life: Arc::clone(&self.0) }
    }
}

#[derive(Clone)]
pub(crate) struct Calls<S> {
    inner: S,
    life: Arc<Life>,
}

impl<S> Service<Request<Body>> for Calls<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let life = Arc::clone(&self.life);
        Box::pin(async move {
            let Ok(permit) = Arc::clone(&life.calls).try_acquire_owned() else {
                let full = Fault::new(Code::ResourceExhausted, "TOO_MANY_CALLS", format!("{MOST_CALLS} calls are being answered; come again in a moment"));
                return Ok(Status::from(full.retry_after(Duration::from_secs(1))).into_http());
            };
            let path = request.uri().path().trim_start_matches('/').to_owned();
            let deadline = deadline::of(request.headers());
            // Health and reflection have streams that nobody ends.
            let stopping = path.starts_with("grpc.").then(|| Box::pin(life.stopping.clone().cancelled_owned()));
            let call = Call::new(life, deadline);
            let answered = CALL.scope(Arc::clone(&call), deadline::under(deadline, inner.call(request)));
            let mut response = match deadline {
                None => answered.await?,
                Some(at) => match timeout_at(at, answered).await {
                    Ok(response) => response?,
                    Err(_) => return Ok(Status::from(call.late(&path)).into_http()),
                },
            };
            with_reason(response.headers_mut());
            let late = deadline.map(|at| Box::pin(sleep_until(at)));
            Ok(response.map(|body| Body::new(Answer { work: Some(Work { body, _permit: permit }), call, late, stopping, path })))
        })
    }
}

/// Gives a reason to what is refused before the service sees it: messages that can't be read, or are too large.
fn with_reason(headers: &mut HeaderMap) {
    let Some(status) = Status::from_header_map(headers) else { return };
    let fault = match status.code() {
        Code::Internal if status.message().starts_with("failed to decode Protobuf message") => {
            Fault::new(Code::InvalidArgument, "INVALID_MESSAGE", status.message())
        }
        Code::OutOfRange if status.message().contains("message length too large") => Fault::new(Code::OutOfRange, "MESSAGE_TOO_LARGE", status.message()),
        _ => return,
    };
    // Its message is text and its details are bytes, which headers take.
    let _ = Status::from(fault).add_header(headers);
}

/// The body of a response. What it is made of is dropped, and with it all work for it, as soon as nobody is to have it.
struct Answer {
    work: Option<Work>,
    call: Arc<Call>,
    late: Option<Pin<Box<Sleep>>>,
    stopping: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    path: String,
}

struct Work {
    body: Body,
    _permit: OwnedSemaphorePermit,
}

impl Answer {
    fn is_late(&mut self, context: &mut Context<'_>) -> bool {
        self.late.as_mut().is_some_and(|late| late.as_mut().poll(context).is_ready())
    }

    fn is_stopped(&mut self, context: &mut Context<'_>) -> bool {
        self.stopping.as_mut().is_some_and(|stopping| stopping.as_mut().poll(context).is_ready())
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let Some(work) = &mut this.work else { return Poll::Ready(None) };
        let (call, deadline) = (Arc::clone(&this.call), this.call.deadline);
        let poll = || CALL.sync_scope(call, || deadline::step(deadline, || Pin::new(&mut work.body).poll_frame(context)));
        let polled = catch_unwind(AssertUnwindSafe(poll));
        let fault = match polled {
            Err(_) => {
                error!(path = this.path, "a stream panicked");
                Fault::internal("the service panicked on this call; its log has the details")
            }
            Ok(polled) => match this.call.refusal.get().cloned() {
                Some(refusal) => refusal,
                None if this.is_late(context) => this.call.late(&this.path),
                None if polled.is_pending() && this.is_stopped(context) => shutting_down(),
                None => {
                    let polled = polled.map_ok(|mut frame| {
                        frame.trailers_mut().map(with_reason);
                        frame
                    });
                    let over = match &polled {
                        Poll::Ready(Some(Ok(frame))) => frame.is_trailers(),
                        Poll::Ready(_) => true,
                        Poll::Pending => false,
                    };
                    if over {
                        this.work = None;
                    }
                    return polled;
                }
            },
        };
        this.work = None;
        let mut trailers = HeaderMap::new();
        Poll::Ready(Some(Status::from(fault).add_header(&mut trailers).map(|()| Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.work.as_ref().is_none_or(|work| work.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.work.as_ref().map_or_else(SizeHint::default, |work| work.body.size_hint())
    }
}
