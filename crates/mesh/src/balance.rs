//! A channel over all replicas of a service.
//!
//! An endpoint names a host, or several in a list, and each of its addresses has a connection of its own: HTTP/2 alone would keep all calls on the first. A
//! call goes to that one of two replicas, drawn at random, which has fewer items in flight, counted until the response has ended (for tonic's own balancer a
//! call is over when its response begins). A replica that fails is left alone for a while, unless there is no other.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use http_body::{Frame, SizeHint};
use tokio::{
    net::lookup_host,
    sync::oneshot,
    time::{Instant, Sleep, sleep, sleep_until, timeout, timeout_at},
};
use tonic::{Code, Status, body::Body, transport::Channel};
use tower::{Service, ServiceExt as _};
use tracing::{debug, warn};

use crate::{
    Fault,
    auth::Bearer,
    channel,
    deadline::{self, HEADER},
    retry, telemetry,
};

/// How long a name server has to answer.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a replica failed that took a call and never answered.
const SILENT: &str = "it said nothing";

/// How replicas are found and watched.
#[derive(Debug, Clone, Copy)]
pub struct Watch {
    /// Names are looked up again after so long, and after a failure.
    pub lookup: Duration,
    /// A replica that failed is left alone for so long, twice as long after each further failure in a row, up to 64 times.
    pub eject: Duration,
    /// A replica that has said nothing for so long is asked whether it is there,
    pub ping: Duration,
    /// and has failed if it does not say so within this.
    pub ping_timeout: Duration,
    /// A call of which nothing is heard for so long is given up: its replica is there, and its model hangs. Not limited by default.
    pub silence: Option<Duration>,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            lookup: Duration::from_secs(10),
            eject: Duration::from_secs(1),
            ping: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            silence: None,
        }
    }
}

/// A channel over all replicas of a service, for any generated client.
#[derive(Clone)]
pub struct Balanced(Arc<Shared>);

struct Shared {
    /// What is looked up; nothing for a network inside the process.
    names: Vec<channel::Name>,
    watch: Watch,
    bearer: Bearer,
    replicas: Mutex<Replicas>,
    /// One looks up at a time.
    looking_up: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Replicas {
    all: Vec<Arc<Replica>>,
    /// When they are to be looked up again.
    due: Option<Instant>,
}

impl Replicas {
    fn is_due(&self) -> bool {
        self.due.is_none_or(|due| due <= Instant::now())
    }
}

impl fmt::Debug for Balanced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Balanced").field(&self.0.names).finish()
    }
}

impl From<Channel> for Balanced {
    /// A channel to one replica, which stays where it is.
    fn from(channel: Channel) -> Self {
        let replica = Replica { address: None, channel, watch: Watch::default(), load: AtomicUsize::new(0), health: Mutex::default() };
        Self::over(Vec::new(), Watch::default(), Bearer::default(), vec![Arc::new(replica)])
    }
}

impl Balanced {
    pub(crate) fn new(names: Vec<channel::Name>, watch: Watch, bearer: Bearer) -> Self {
        Self::over(names, watch, bearer, Vec::new())
    }

    fn over(names: Vec<channel::Name>, watch: Watch, bearer: Bearer, all: Vec<Arc<Replica>>) -> Self {
        Self(Arc::new(Shared { names, watch, bearer, replicas: Mutex::new(Replicas { all, due: None }), looking_up: tokio::sync::Mutex::default() }))
    }

    /// Whether any replica takes a connection.
    pub(crate) async fn connect(&self) -> Result<(), Fault> {
        let mut problem = Ok(());
        for (address, name) in self.0.look_up().await? {
            match name.endpoint(address, self.0.watch)?.connect_with_connector(name.connector(address)).await {
                Ok(_) => return Ok(()),
                Err(error) => problem = Err(channel::nobody(&name, &error)),
            }
        }
        problem
    }
}

impl Shared {
    /// The list is only ever replaced, so it is whole even after a panic.
    fn lock(&self) -> MutexGuard<'_, Replicas> {
        self.replicas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The replica that the next call goes to; none if all were tried.
    async fn choose(&self, tried: &[Arc<Replica>]) -> Result<Option<Arc<Replica>>, Fault> {
        self.refresh().await?;
        let now = Instant::now();
        let replicas = self.lock();
        let untried = || replicas.all.iter().filter(|replica| !tried.iter().any(|other| Arc::ptr_eq(other, replica)));
        let mut among: Vec<_> = untried().filter(|replica| !replica.is_out(now)).collect();
        if among.is_empty() {
            // A replica that may be well again is better than none.
            among = untried().collect();
        }
        let one = (!among.is_empty()).then(|| among.swap_remove(fastrand::usize(..among.len())));
        let other = (!among.is_empty()).then(|| among.swap_remove(fastrand::usize(..among.len())));
        Ok(one.into_iter().chain(other).min_by_key(|replica| replica.load.load(Ordering::Relaxed)).cloned())
    }

    /// Looks the names up if it is time. Where something is known already one call does, and the others go on with that.
    async fn refresh(&self) -> Result<(), Fault> {
        if self.names.is_empty() || !self.lock().is_due() {
            return Ok(());
        }
        let known = !self.lock().all.is_empty();
        let _alone = match self.looking_up.try_lock() {
            Ok(alone) => alone,
            Err(_) if known => return Ok(()),
            Err(_) => self.looking_up.lock().await,
        };
        if !self.lock().is_due() {
            return Ok(());
        }
        let found = match self.look_up().await {
            Err(fault) if known => {
                warn!(%fault, "a name can't be looked up; going on with the addresses that are known");
                None
            }
            found => Some(found?),
        };
        let mut replicas = self.lock();
        if let Some(found) = found {
            let all = found.into_iter().map(|(address, name)| match replicas.all.iter().find(|replica| replica.address == Some(address)) {
                Some(replica) => Ok(Arc::clone(replica)),
                None => Replica::at(address, &name, self.watch).map(Arc::new),
            });
            replicas.all = all.collect::<Result<_, Fault>>()?;
        }
        replicas.due = Some(Instant::now() + self.watch.lookup);
        Ok(())
    }

    /// The addresses of all names; what one of several names is for can be away.
    async fn look_up(&self) -> Result<Vec<(SocketAddr, channel::Name)>, Fault> {
        let mut found: Vec<(SocketAddr, channel::Name)> = Vec::new();
        let mut problem = None;
        for name in &self.names {
            match timeout(LOOKUP_TIMEOUT, addresses(name)).await.unwrap_or_else(|late| Err(late.into())) {
                Ok(addresses) => {
                    for address in addresses {
                        if !found.iter().any(|(other, _)| *other == address) {
                            found.push((address, name.clone()));
                        }
                    }
                }
                Err(error) => problem = Some(channel::nobody(name, &error)),
            }
        }
        match problem {
            Some(problem) if found.is_empty() => Err(problem),
            _ => Ok(found),
        }
    }

    /// A replica may have gone, and another come.
    fn look_again(&self) {
        self.lock().due = None;
    }
}

/// What the system's name service knows of a name.
async fn addresses(name: &channel::Name) -> io::Result<Vec<SocketAddr>> {
    #[cfg(test)]
    if let Some(known) = tests::addresses(name.host()) {
        return Ok(known);
    }
    Ok(lookup_host((name.host(), name.port())).await?.collect())
}

/// A process of the service.
struct Replica {
    /// Where it is; nowhere, if it is in this process.
    address: Option<SocketAddr>,
    channel: Channel,
    watch: Watch,
    /// Calls in flight, and the items of those that were sent and not answered.
    load: AtomicUsize,
    health: Mutex<Health>,
}

#[derive(Default)]
struct Health {
    /// Failures in a row.
    failures: u32,
    /// Until when it is left alone.
    out: Option<Instant>,
}

impl Replica {
    fn at(address: SocketAddr, name: &channel::Name, watch: Watch) -> Result<Self, Fault> {
        let channel = name.endpoint(address, watch)?.connect_with_connector_lazy(name.connector(address));
        Ok(Self { address: Some(address), channel, watch, load: AtomicUsize::new(0), health: Mutex::default() })
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_out(&self, now: Instant) -> bool {
        self.health().out.is_some_and(|until| now < until)
    }

    fn failed(&self, why: &dyn fmt::Display) {
        let mut health = self.health();
        let out = self.watch.eject * (1 << health.failures.min(6));
        debug!(address = ?self.address, %why, "a replica failed; others are asked for {out:?}");
        health.failures = health.failures.saturating_add(1);
        health.out = Some(Instant::now() + out);
    }

    /// A full one works; it is only not the place to ask next.
    fn is_full(&self) {
        self.health().out = Some(Instant::now() + self.watch.eject);
    }

    fn answered(&self) {
        *self.health() = Health::default();
    }
}

/// A call on its replica, for as long as it is in flight.
struct Ticket {
    shared: Arc<Shared>,
    replica: Arc<Replica>,
    /// Items that were sent and not answered; nothing once the response has ended.
    open: Mutex<Option<usize>>,
}

impl Ticket {
    fn new(shared: Arc<Shared>, replica: Arc<Replica>) -> Arc<Self> {
        replica.load.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self { shared, replica, open: Mutex::new(Some(0)) })
    }

    fn open(&self) -> MutexGuard<'_, Option<usize>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sent(&self, items: usize) {
        if let Some(open) = &mut *self.open() {
            *open += items;
            self.replica.load.fetch_add(items, Ordering::Relaxed);
        }
    }

    /// There may be more answers than items, as of a call that streams to one request.
    fn received(&self, answers: usize) {
        if let Some(open) = &mut *self.open() {
            let items = answers.min(*open);
            *open -= items;
            self.replica.load.fetch_sub(items, Ordering::Relaxed);
        }
    }

    fn close(&self) {
        if let Some(open) = self.open().take() {
            self.replica.load.fetch_sub(1 + open, Ordering::Relaxed);
        }
    }

    fn failed(&self, why: &dyn fmt::Display) {
        self.replica.failed(why);
        self.shared.look_again();
    }

    /// What the end of a call says of its replica.
    fn ended(&self, status: &HeaderMap) {
        match status.get("grpc-status").map(|code| Code::from_bytes(code.as_bytes())) {
            Some(Code::Unavailable) => self.failed(&"it is not available"),
            Some(Code::ResourceExhausted) => self.replica.is_full(),
            Some(_) => {
                self.replica.answered();
                retry::answered();
            }
            None => {}
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.close();
    }
}

impl Service<Request<Body>> for Balanced {
    type Response = Response<Body>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Response<Body>, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        // Which replica has to be ready is known only with the call.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        telemetry::inject(request.headers_mut());
        Box::pin(send(Arc::clone(&self.0), request, deadline::current()))
    }
}

/// Sends a call to a replica. One that a replica has not begun to take, because it can't be reached, goes to the next.
async fn send(shared: Arc<Shared>, request: Request<Body>, deadline: Option<Instant>) -> Result<Response<Body>, Status> {
    let (mut parts, mut body) = request.into_parts();
    shared.bearer.show(&mut parts.headers);
    if let Some(at) = deadline {
        parts.headers.insert(HEADER, deadline::header(at.saturating_duration_since(Instant::now())));
    }
    let path = parts.uri.path().trim_start_matches('/').to_owned();
    let mut tried = Vec::new();
    let mut problem: Status = Fault::new(Code::Unavailable, "NOBODY_THERE", format!("{path}: the service's name has no address")).into();
    loop {
        let Some(replica) = before(deadline, shared.choose(&tried)).await.ok_or_else(|| late(&path))?? else { return Err(problem) };
        let ticket = Ticket::new(Arc::clone(&shared), Arc::clone(&replica));
        let (back, untouched) = oneshot::channel();
        let outgoing = Outgoing { body, back: Some(back), messages: Messages::default(), ticket: Arc::clone(&ticket) };
        let request = Request::from_parts(parts.clone(), Body::new(outgoing));
        let mut channel = replica.channel.clone();
        let silence = shared.watch.silence;
        let given_up = silence.and_then(|silence| Instant::now().checked_add(silence));
        let Some(answered) = before(deadline.into_iter().chain(given_up).min(), async { channel.ready().await?.call(request).await }).await else {
            ticket.failed(&SILENT);
            let deadline_came = deadline.is_some_and(|at| at <= Instant::now());
            return Err(if deadline_came { late(&path) } else { silent(&path, silence.unwrap_or_default()) });
        };
        match answered {
            Ok(response) => {
                ticket.ended(response.headers());
                let late = deadline.map(|at| Box::pin(sleep_until(at)));
                return Ok(response.map(|body| {
                    Body::new(Incoming {
                        body: Some(body),
                        messages: Messages::default(),
                        silent: true,
                        late,
                        silence: silence.map(Silence::new),
                        path,
                        ticket,
                    })
                }));
            }
            Err(error) => {
                ticket.failed(&channel::innermost(&error));
                problem = Status::from_error(error.into());
                match untouched.await {
                    Ok(whole) => body = whole,
                    Err(_) => return Err(problem),
                }
                tried.push(replica);
            }
        }
    }
}

/// What comes of work that is done before the deadline.
async fn before<F: Future>(deadline: Option<Instant>, work: F) -> Option<F::Output> {
    match deadline {
        Some(at) => timeout_at(at, work).await.ok(),
        None => Some(work.await),
    }
}

fn late(path: &str) -> Status {
    Fault::new(Code::DeadlineExceeded, "DEADLINE", format!("{path} did not end in time")).into()
}

fn silent(path: &str, silence: Duration) -> Status {
    Fault::new(Code::DeadlineExceeded, "SILENT", format!("{path} said nothing for {silence:?}")).into()
}

/// The body of a request. While nobody has begun to read it, it is given back when it is dropped.
struct Outgoing {
    body: Body,
    back: Option<oneshot::Sender<Body>>,
    messages: Messages,
    ticket: Arc<Ticket>,
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.back = None;
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            let items = self.messages.count(data);
            self.ticket.sent(items);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if let Some(back) = self.back.take() {
            let _ = back.send(std::mem::take(&mut self.body));
        }
    }
}

/// The body of a response: the call is in flight until it has ended.
struct Incoming {
    /// Nothing once it has ended.
    body: Option<Body>,
    messages: Messages,
    /// Whether nothing has come yet.
    silent: bool,
    late: Option<Pin<Box<Sleep>>>,
    silence: Option<Silence>,
    path: String,
    ticket: Arc<Ticket>,
}

/// How long nothing may be heard.
struct Silence {
    longest: Duration,
    ends: Pin<Box<Sleep>>,
}

impl Silence {
    fn new(longest: Duration) -> Self {
        Self { longest, ends: Box::pin(sleep(longest)) }
    }

    fn begin_again(&mut self) {
        if let Some(end) = Instant::now().checked_add(self.longest) {
            self.ends.as_mut().reset(end);
        }
    }
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        match Pin::new(body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                this.silent = false;
                if let Some(silence) = &mut this.silence {
                    silence.begin_again();
                }
                if let Some(data) = frame.data_ref() {
                    this.ticket.received(this.messages.count(data));
                }
                if let Some(status) = frame.trailers_ref() {
                    this.ticket.ended(status);
                }
                return Poll::Ready(Some(Ok(frame)));
            }
            Poll::Ready(Some(Err(status))) => {
                this.ticket.failed(&status);
                this.ticket.close();
                this.body = None;
                return Poll::Ready(Some(Err(status)));
            }
            Poll::Ready(None) => {
                this.ticket.close();
                this.body = None;
                return Poll::Ready(None);
            }
            Poll::Pending => {}
        }
        let late_now = this.late.as_mut().is_some_and(|late| late.as_mut().poll(context).is_ready());
        let silent_for = this.silence.as_mut().and_then(|silence| silence.ends.as_mut().poll(context).is_ready().then_some(silence.longest));
        let status = match (late_now, silent_for) {
            (true, _) => late(&this.path),
            (false, Some(longest)) => silent(&this.path, longest),
            (false, None) => return Poll::Pending,
        };
        if this.silent || silent_for.is_some() {
            this.ticket.failed(&SILENT);
        }
        this.ticket.close();
        this.body = None;
        Poll::Ready(Some(Err(status)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(SizeHint::default, |body| body.size_hint())
    }
}

/// Counts the messages that begin in the data of a gRPC body: each is a flag, four bytes of length, and so many bytes.
#[derive(Default)]
struct Messages {
    prefix: [u8; 5],
    /// Bytes of the prefix that were seen.
    seen: usize,
    /// Bytes of the message that are still to come.
    left: usize,
}

impl Messages {
    fn count(&mut self, mut data: &[u8]) -> usize {
        let mut begun = 0;
        while !data.is_empty() {
            let wanted = if self.left > 0 { self.left } else { self.prefix.len() - self.seen };
            let (some, rest) = data.split_at(wanted.min(data.len()));
            data = rest;
            if self.left > 0 {
                self.left -= some.len();
                continue;
            }
            self.prefix[self.seen..self.seen + some.len()].copy_from_slice(some);
            self.seen += some.len();
            if self.seen == self.prefix.len() {
                let [_, a, b, c, d] = self.prefix;
                *self = Self { left: u32::from_be_bytes([a, b, c, d]) as usize, ..Self::default() };
                begun += 1;
            }
        }
        begun
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, net::TcpListener};

    use tokio_stream::wrappers::TcpListenerStream;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

    use super::*;
    use crate::{
        args::TlsArgs,
        auth::Guard,
        channel::Dial,
        server::{Services, serve_on},
    };

    /// What names of tests lead to.
    static NAMES: Mutex<Option<HashMap<&str, Vec<SocketAddr>>>> = Mutex::new(None);

    pub(super) fn addresses(name: &str) -> Option<Vec<SocketAddr>> {
        NAMES.lock().unwrap().as_ref()?.get(name).cloned()
    }

    fn lead(name: &'static str, to: &[SocketAddr]) {
        NAMES.lock().unwrap().get_or_insert_default().insert(name, to.to_vec());
    }

    fn over(url: &str, watch: Watch) -> Balanced {
        let args = TlsArgs { insecure: true, ..TlsArgs::default() };
        Dial::open(&args, None).unwrap().watched(url, watch).unwrap()
    }

    /// An address that nobody listens at.
    fn nobody() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    #[tokio::test]
    async fn a_name_is_looked_up_again_after_its_interval_and_not_before() {
        let (first, second) = (nobody(), nobody());
        lead("moved.test", &[first]);
        let watch = Watch { lookup: Duration::from_millis(300), ..Watch::default() };
        let channel = over("http://moved.test:1", watch);
        let chosen = async || channel.0.choose(&[]).await.unwrap().unwrap().address.unwrap();
        assert_eq!(chosen().await, first);
        lead("moved.test", &[second]);
        assert_eq!(chosen().await, first);
        tokio::time::sleep(Duration::from_millis(350)).await;
        assert_eq!(chosen().await, second);
    }

    #[tokio::test]
    async fn a_name_is_looked_up_again_at_once_when_its_replica_fails() {
        lead("gone.test", &[nobody()]);
        let watch = Watch { lookup: Duration::from_secs(3600), ..Watch::default() };
        let channel = over("http://gone.test:1", watch);
        channel.0.refresh().await.unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        lead("gone.test", &[listener.local_addr().unwrap()]);
        let serve = serve_on(Services::default(), Guard::default(), TcpListenerStream::new(listener), std::future::pending());
        let mut client = HealthClient::new(channel);
        let ask = client.check(HealthCheckRequest::default());
        tokio::select! {
            // It has no such service, and says so itself.
            answered = ask => assert_eq!(answered.unwrap_err().code(), Code::Unimplemented),
            ended = serve => panic!("{ended:?}"),
        }
    }

    #[test]
    fn messages_are_counted_however_they_are_cut_into_frames() {
        let body: Vec<u8> =
            [3usize, 0, 300, 1].iter().flat_map(|length| [vec![0], (*length as u32).to_be_bytes().to_vec(), vec![7; *length]].concat()).collect();
        for cut in [1, 2, 5, 8, 1000] {
            let mut messages = Messages::default();
            assert_eq!(body.chunks(cut).map(|data| messages.count(data)).sum::<usize>(), 4, "frames of {cut} bytes");
        }
    }
}
