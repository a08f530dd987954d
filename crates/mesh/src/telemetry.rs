//! Logs and traces.
//!
//! Logs go to standard error, as text on a terminal and as JSON lines elsewhere; within a call they carry its trace. Traces go to an OpenTelemetry collector
//! where one is named. The context of a trace travels in the metadata of calls (W3C `traceparent`), so that a unit is one tree whichever services it visits.

use std::{cell::Cell, fmt, io::IsTerminal as _, time::Duration};

use http::{HeaderMap, Request};
use opentelemetry::{
    global,
    propagation::{Extractor, Injector},
    trace::{SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState, TracerProvider as _},
};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{BatchConfigBuilder, BatchSpanProcessor, IdGenerator, RandomIdGenerator, SdkTracerProvider},
};
use prometheus_client::encoding::{EncodeLabel as _, EncodeLabelSet, LabelSetEncoder};
use sha2::{Digest as _, Sha256};
use tracing::{Level, Metadata, Span, field, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, filter::filter_fn, fmt as log, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::program;

/// How long the end of a program waits for its last spans to be taken.
const LAST_SPANS: Duration = Duration::from_secs(5);

/// How long spans are kept back to be sent together. A process that is killed takes those along that it still has.
const TOGETHER: Duration = Duration::from_secs(1);

/// Traces on their way to a collector; the last ones are sent when this goes.
#[derive(Debug)]
#[must_use = "traces end with it"]
pub struct Telemetry(Option<SdkTracerProvider>);

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.as_ref().map(|provider| provider.shutdown_with_timeout(LAST_SPANS)) {
            warn!(%error, "the last spans were not taken");
        }
    }
}

/// Starts logging, and, where `collector` names one (its OTLP endpoint for gRPC, such as `http://localhost:4317`), tracing; within the runtime. The
/// program's name is the service's in traces, unless OTEL_SERVICE_NAME is set. `level` is a filter of the log such as `info` or `dnd_activation=debug,warn`, over which
/// `RUST_LOG` wins. OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG say which share of the traces is taken; by default all.
pub fn init(level: &str, collector: Option<&str>) -> Telemetry {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let logs = log::layer().with_writer(std::io::stderr);
    let logs = if std::io::stderr().is_terminal() { logs.with_target(false).boxed() } else { logs.json().flatten_event(true).with_span_list(false).boxed() };
    let (provider, problem) = match collector.map(provider).transpose() {
        Ok(provider) => (provider, None),
        Err(problem) => (None, Some(problem)),
    };
    let traces = provider.as_ref().map(|provider| tracing_opentelemetry::layer().with_tracer(provider.tracer("dnd")).with_filter(filter_fn(is_traced)));
    // A second call in one process (tests) changes nothing.
    let _ = tracing_subscriber::registry().with(logs.with_filter(filter)).with(traces).try_init();
    global::set_text_map_propagator(TraceContextPropagator::new());
    if let Some(problem) = problem {
        warn!(%problem, "no traces: the collector can't be reached over this endpoint");
    }
    Telemetry(provider)
}

/// What traces are made of, whatever the log's filter: this project's own spans and events, not those of the libraries below it.
fn is_traced(metadata: &Metadata<'_>) -> bool {
    *metadata.level() <= Level::INFO && metadata.target().starts_with("dnd")
}

fn provider(collector: &str) -> Result<SdkTracerProvider, ExporterBuildError> {
    let exporter = SpanExporter::builder().with_tonic().with_endpoint(collector).build()?;
    let name = std::env::var("OTEL_SERVICE_NAME").unwrap_or_else(|_| program::name());
    let resource = Resource::builder().with_service_name(name).build();
    let batches = BatchSpanProcessor::builder(exporter).with_batch_config(BatchConfigBuilder::default().with_scheduled_delay(TOGETHER).build()).build();
    Ok(SdkTracerProvider::builder().with_span_processor(batches).with_id_generator(Given::default()).with_resource(resource).build())
}

/// Ids of a span, made of what it is a span of. Whoever goes on with the same work in another process gives its span the same ones: a process that was killed has not
/// sent its own, and what was called from there finds its parent nevertheless.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    trace: TraceId,
    span: SpanId,
}

impl Ids {
    /// The ids of what these words say.
    pub fn of(words: &[&str]) -> Self {
        let bytes = Sha256::digest(words.join("\n"));
        let digest = bytes.iter().take(16).fold(0, |number: u128, byte| number << 8 | u128::from(*byte));
        Self { trace: TraceId::from(digest), span: SpanId::from(digest as u64) }
    }

    /// Gives the ids to a new span; that of the trace only counts where the span has no parent.
    pub fn give(self, span: &Span) {
        NEXT.set(Some(self));
        // It is started when its context is asked for the first time.
        let _ = span.context();
        NEXT.set(None);
    }

    /// Links a span to the one that has these ids.
    pub fn link(self, span: &Span) {
        span.add_link(SpanContext::new(self.trace, self.span, TraceFlags::SAMPLED, true, TraceState::NONE));
    }
}

thread_local! {
    /// The ids of the span that is started next on this thread, if it is given any.
    static NEXT: Cell<Option<Ids>> = const { Cell::new(None) };
}

/// Gives spans the ids that are meant for them, and random ones to the others.
#[derive(Debug, Default)]
struct Given(RandomIdGenerator);

impl IdGenerator for Given {
    fn new_trace_id(&self) -> TraceId {
        NEXT.get().map_or_else(|| self.0.new_trace_id(), |ids| ids.trace)
    }

    fn new_span_id(&self) -> SpanId {
        NEXT.get().map_or_else(|| self.0.new_span_id(), |ids| ids.span)
    }
}

/// A trace that is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trace(TraceId);

impl Trace {
    /// That of the current span, if it is taken.
    pub fn current() -> Option<Self> {
        let context = Span::current().context();
        let span = context.span();
        let span = span.span_context();
        span.is_sampled().then(|| Self(span.trace_id()))
    }
}

/// As an example of what was measured, it has its id.
impl EncodeLabelSet for Trace {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        ("trace_id", self.0.to_string()).encode(encoder.encode_label())
    }
}

/// The span of a call that comes in, a child of its caller's where the metadata say so.
pub fn span_of<B>(request: &Request<B>) -> Span {
    let method = request.uri().path().trim_start_matches('/');
    let span = tracing::info_span!("call", otel.name = method, otel.kind = "server", rpc.system = "grpc", method, trace_id = field::Empty);
    let parent = global::get_text_map_propagator(|propagator| propagator.extract(&Headers(request.headers())));
    // Without a collector there is nothing to be a child in.
    if span.set_parent(parent).is_ok() {
        let context = span.context();
        span.record("trace_id", field::display(context.span().span_context().trace_id()));
    }
    span
}

/// Puts the context of the current span into the metadata of a call that goes out.
pub fn inject(headers: &mut HeaderMap) {
    let context = Span::current().context();
    global::get_text_map_propagator(|propagator| propagator.inject_context(&context, &mut HeadersMut(headers)));
}

struct Headers<'h>(&'h HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

struct HeadersMut<'h>(&'h mut HeaderMap);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (http::HeaderName::try_from(key), http::HeaderValue::try_from(value)) {
            self.0.insert(name, value);
        }
    }
}
