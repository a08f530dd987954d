//! What is measured, and under which names: always, for Prometheus to read where there is an admin port.

use std::{
    array, fmt,
    pin::Pin,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, Request, Response, header::ACCEPT};
use http_body::{Frame, SizeHint};
use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, prometheus_text, text},
    metrics::{MetricType, TypedMetric, counter, exemplar::HistogramWithExemplars, family::Family, gauge},
    registry::Registry,
};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use crate::{program, telemetry::Trace};

/// Only grows.
pub type Counter = counter::Counter<u64>;

/// Goes up and down.
pub type Gauge = gauge::Gauge<f64, AtomicU64>;

/// How often values fell into each of some ranges, and for each range the trace of a value that fell into it lately, as an example.
#[derive(Debug, Clone)]
pub struct Histogram(HistogramWithExemplars<Trace>);

impl Histogram {
    /// Counts a value, which is an example of the trace that it came about in, if it is of one.
    pub fn observe(&self, value: f64, trace: Option<Trace>) {
        self.0.observe(value, trace, trace.map(|_| SystemTime::now()));
    }
}

impl TypedMetric for Histogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Histogram {
    fn encode(&self, encoder: MetricEncoder<'_>) -> fmt::Result {
        self.0.encode(encoder)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// A kind of number.
trait Kind {
    /// One that nothing was counted of yet.
    fn new(metric: &str) -> Self;
}

impl Kind for Counter {
    fn new(_: &str) -> Self {
        Self::default()
    }
}

impl Kind for Gauge {
    fn new(_: &str) -> Self {
        Self::default()
    }
}

impl Kind for Histogram {
    fn new(metric: &str) -> Self {
        let bounds = if metric.ends_with("_items") { &ITEMS[..] } else { &SECONDS };
        Self(HistogramWithExemplars::new(bounds.iter().copied()))
    }
}

/// From a millisecond to an hour.
const SECONDS: [f64; 14] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3600.0];
const ITEMS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Something that is measured: a number of kind `M` for all values of its `N` labels.
#[derive(Debug)]
pub struct Metric<M, const N: usize> {
    /// What Prometheus knows it by.
    pub name: &'static str,
    labels: [&'static str; N],
    numbers: LazyLock<Family<[(&'static str, String); N], M>>,
}

impl<M: Clone, const N: usize> Metric<M, N> {
    /// The number that has these values of the labels, in the order of the table. Whoever needs it often keeps it.
    pub fn of(&self, values: [&str; N]) -> M {
        self.numbers.get_or_create_owned(&array::from_fn(|i| (self.labels[i], values[i].to_owned())))
    }
}

macro_rules! metrics {
    ($($constant:ident = $name:literal, $kind:ident, [$($label:literal),*], $help:literal;)+) => {
        $(#[doc = $help] pub static $constant: Metric<$kind, { <[&str]>::len(&[$($label),*]) }> = Metric {
            name: $name,
            labels: [$($label),*],
            numbers: LazyLock::new(|| Family::<_, _, fn() -> _>::new_with_constructor(|| Kind::new($name))),
        };)+

        /// All that is measured.
        static REGISTRY: LazyLock<Registry> = LazyLock::new(|| {
            let mut registry = Registry::default();
            // It adds the ending of counters, and the full stop.
            $(registry.register($name.trim_end_matches("_total"), $help.trim_end_matches('.'), LazyLock::force(&$constant.numbers).clone());)+
            registry
        });

        /// The name, the kind, the labels and what it says of all that is measured.
        #[cfg(test)]
        const TABLE: &[(&str, &str, &[&str], &str)] = &[$(($name, stringify!($kind), &[$($label),*], $help)),+];
    };
}

metrics! {
    BUILD = "dnd_build_info", Gauge, ["program", "version"], "Always 1: which program it is, and its version.";
    STARTED = "dnd_start_time_seconds", Gauge, [], "When the program began to measure, in seconds since 1970.";
    CALLS = "dnd_calls_total", Counter, ["service", "method", "code"], "Calls that have ended, by their gRPC code; cancelled are also those whose caller left.";
    CALL_SECONDS = "dnd_call_duration_seconds", Histogram, ["service", "method"], "Seconds from a call's arrival to the end of its response.";
    CALLS_OPEN = "dnd_calls_open", Gauge, ["service"], "Calls that are being answered.";
    RECEIVED = "dnd_received_bytes_total", Counter, ["service", "method"], "Bytes of the requests of calls that have ended.";
    SENT = "dnd_sent_bytes_total", Counter, ["service", "method"], "Bytes of the responses of calls that have ended.";
    REFUSED = "dnd_refused_total", Counter, ["reason"], "Connections and calls that were refused because of who asked, by the reason of the fault.";
    UNITS = "dnd_units_total", Counter, ["state"], "Units that this orchestrator has brought to their end: labelled, dead or failed.";
    UNITS_OPEN = "dnd_units_open", Gauge, [], "Units and probing passes that this orchestrator works on.";
    STAGE_SECONDS = "dnd_stage_duration_seconds", Histogram, ["stage"], "Seconds that a unit took to get through a stage; of probe, those of a whole pass.";
    RESULTS = "dnd_results_total", Counter, ["stage", "origin"], "Results of models that units asked for: made for them, or reused, since they were there or on their way.";
    SESSIONS = "dnd_model_sessions", Gauge, ["model"], "Sessions that run batches of a model.";
    WORK = "dnd_model_work_total", Counter, ["model"], "Work that a model has done, in its unit: pictures, texts, tokens or denoising steps.";
    QUEUE_UNITS = "dnd_queue_depth_units", Gauge, ["model"], "Work that waits for a model, in its unit: pictures, texts, tokens or denoising steps.";
    QUEUE_SECONDS = "dnd_queue_wait_seconds", Histogram, ["model"], "Seconds that an item waited before it was run.";
    QUEUE_DROPPED = "dnd_queue_dropped_total", Counter, ["model", "reason"], "Items that were dropped unrun, because their caller left (left) or their deadline passed (deadline).";
    QUEUE_REFUSED = "dnd_queue_refused_total", Counter, ["model"], "Calls that were refused because the queue was full.";
    BATCH_ITEMS = "dnd_batch_size_items", Histogram, ["model"], "Items that were run together.";
    BATCH_SECONDS = "dnd_batch_duration_seconds", Histogram, ["model"], "Seconds that a batch took.";
    BATCH_STOPPED = "dnd_batch_stopped_total", Counter, ["model"], "Batches that were stopped on the way, because nobody waited for them any more.";
    ENGINE_FAILURES = "dnd_engine_failures_total", Counter, ["model"], "Batches of which the model answered nothing.";
    TARGET_DEATHS = "dnd_target_deaths_total", Counter, ["reason"], "Processes of targets that were lost: killed or ended (died), by the limit of memory (memory), or of time (timeout).";
}

/// Says which program it is, and that it begins.
pub(crate) fn begin() {
    BUILD.of([&program::name(), env!("CARGO_PKG_VERSION")]).set(1.0);
    STARTED.of([]).set(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
}

/// All that was measured, and the type of the text: OpenMetrics 1.0, which has examples, for whoever asks for it, else Prometheus' own.
pub(crate) fn exposed(asked: &HeaderMap) -> Result<(&'static str, String), fmt::Error> {
    let mut said = String::new();
    if asked.get_all(ACCEPT).iter().filter_map(|accept| accept.to_str().ok()).flat_map(|accept| accept.split(',')).any(is_openmetrics) {
        text::encode(&mut said, &REGISTRY)?;
        return Ok(("application/openmetrics-text; version=1.0.0; charset=utf-8", said));
    }
    prometheus_text::encode(&mut said, &REGISTRY)?;
    Ok((prometheus_text::CONTENT_TYPE, said))
}

/// Whether a type that is asked for is OpenMetrics, in its version 1.0 or in none that is said.
fn is_openmetrics(asked: &str) -> bool {
    let mut parts = asked.split(';').map(str::trim);
    parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case("application/openmetrics-text"))
        && parts.all(|part| part != "q=0" && part.strip_prefix("version=").is_none_or(|version| version == "1.0.0"))
}

/// Measures the rate, the errors and the duration of calls, by service and method.
#[derive(Clone)]
pub(crate) struct MeasureLayer(pub(crate) Arc<[&'static str]>);

impl<S> Layer<S> for MeasureLayer {
    type Service = Measure<S>;

    fn layer(&self, inner: S) -> Measure<S> {
        Measure { inner, services: Arc::clone(&self.0) }
    }
}

#[derive(Clone)]
pub(crate) struct Measure<S> {
    inner: S,
    services: Arc<[&'static str]>,
}

impl<S, B> Service<Request<Body>> for Measure<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<tonic::codegen::StdError>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let mut measured = Measured::begin(request.uri().path(), &self.services);
        let received = Arc::clone(&measured.received);
        let answered = self.inner.call(request.map(|body| Body::new(ReceivedBody { body, received })));
        Box::pin(async move {
            let response = answered.await?;
            measured.look_at(response.headers());
            Ok(response.map(|body| Body::new(MeasuredBody { body: Body::new(body), measured })))
        })
    }
}

/// A call, measured until it is dropped.
struct Measured {
    service: &'static str,
    method: String,
    since: Instant,
    trace: Option<Trace>,
    open: Gauge,
    code: Code,
    /// Bytes.
    received: Arc<AtomicU64>,
    sent: u64,
}

impl Measured {
    /// What a caller can make up is no label.
    fn begin(path: &str, services: &[&'static str]) -> Self {
        let (service, method) = path.trim_start_matches('/').split_once('/').unwrap_or_default();
        let service = services.iter().find(|known| **known == service).copied().unwrap_or(OTHER);
        let open = CALLS_OPEN.of([service]);
        open.inc();
        let (since, trace) = (Instant::now(), Trace::current());
        Self { service, method: method.to_owned(), since, trace, open, code: Code::Cancelled, received: Arc::default(), sent: 0 }
    }

    fn look_at(&mut self, headers: &HeaderMap) {
        if let Some(code) = headers.get("grpc-status") {
            self.code = Code::from_bytes(code.as_bytes());
        }
    }
}

const OTHER: &str = "other";

impl Drop for Measured {
    fn drop(&mut self) {
        let Self { service, code, .. } = *self;
        let unknown = service == OTHER || code == Code::Unimplemented;
        let method = if unknown { OTHER } else { &self.method };
        self.open.dec();
        CALL_SECONDS.of([service, method]).observe(self.since.elapsed().as_secs_f64(), self.trace);
        RECEIVED.of([service, method]).inc_by(self.received.load(Ordering::Relaxed));
        SENT.of([service, method]).inc_by(self.sent);
        CALLS.of([service, method, name_of(code)]).inc();
    }
}

/// A code as its users know it, such as `invalid_argument`.
fn name_of(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}

/// The body of a request, whose bytes are counted as they are read.
struct ReceivedBody {
    body: Body,
    received: Arc<AtomicU64>,
}

impl http_body::Body for ReceivedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            self.received.fetch_add(data.len() as u64, Ordering::Relaxed);
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

struct MeasuredBody {
    body: Body,
    measured: Measured,
}

impl http_body::Body for MeasuredBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => {
                self.measured.sent += frame.data_ref().map_or(0, Bytes::len) as u64;
                if let Some(trailers) = frame.trailers_ref() {
                    self.measured.look_at(trailers);
                }
            }
            Some(Err(status)) => self.measured.code = status.code(),
            None => {}
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

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    /// The page that is made of the table.
    fn page() -> String {
        let mut page = "# Metrics\n\nWhat the programs measure, for Prometheus to read at `/metrics` of the admin port (`--admin`). \
             `deploy/telemetry` and `k8s/components/monitoring` have alerts and a dashboard of them, and `dnd top` shows the most important ones in a terminal.\n\n\
             Who asks for `application/openmetrics-text; version=1.0.0`, as Prometheus does, gets OpenMetrics 1.0, in which the buckets of histograms have exemplars: \
             the trace (`trace_id`) of a value that fell into the bucket lately, if its trace was taken ([operations.md](operations.md) says how to use them). \
             Everybody else gets Prometheus' text format 0.0.4, without them.\n\n\
             This page is made of the table in `crates/mesh/src/metrics.rs`.\n\n| name | kind | labels | what it says |\n|---|---|---|---|\n"
            .to_owned();
        for (name, kind, labels, help) in TABLE {
            page += &format!("| `{name}` | {kind} | {} | {help} |\n", labels.join(", "));
        }
        page
    }

    #[test]
    fn the_page_of_metrics_says_what_the_table_does() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/metrics.md");
        if std::env::var_os("DND_WRITE_METRICS").is_some() {
            fs::write(&file, page()).unwrap();
        }
        let written = fs::read_to_string(&file).unwrap_or_default();
        assert!(written == page(), "docs/metrics.md is not what the table says: run `DND_WRITE_METRICS=1 cargo test -p dnd-mesh metrics`");
    }

    #[test]
    fn each_metric_is_named_by_the_rules_and_said_once() {
        for (i, (name, kind, _, help)) in TABLE.iter().enumerate() {
            assert!(name.starts_with("dnd_") && help.ends_with('.') && !help.contains(['\\', '"', '\n']), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == "Counter", "{name}");
            assert!(TABLE[..i].iter().all(|(other, ..)| other != name), "{name}");
        }
    }

    #[test]
    fn openmetrics_is_for_those_who_ask_for_it() {
        let kind = |accept: &[&str]| {
            let asked = accept.iter().map(|accept| (ACCEPT, accept.parse().unwrap())).collect();
            exposed(&asked).unwrap().0
        };
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,\
             text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        for open in [&[prometheus][..], &["application/openmetrics-text; version=1.0.0"], &["text/plain", "application/openmetrics-text"]] {
            assert_eq!(kind(open), "application/openmetrics-text; version=1.0.0; charset=utf-8", "{open:?}");
        }
        for plain in [&[][..], &["*/*"], &["text/plain;version=0.0.4"], &["application/openmetrics-text;version=2.0.0"], &["application/openmetrics-text;q=0"]]
        {
            assert_eq!(kind(plain), "text/plain; version=0.0.4; charset=utf-8", "{plain:?}");
        }
    }
}
