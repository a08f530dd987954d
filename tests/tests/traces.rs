//! What a collector of traces gets to see: a unit is one tree, whichever services it visits. And what is measured leads to the traces.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod collector;

use std::{
    collections::{BTreeSet, HashMap},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use dnd_proto::v1::{EmbedTextsRequest, embedding_service_client::EmbeddingServiceClient};
use dnd_testing::{pictures, sketch, write_pictures};
use dnd_tests::{Mesh, Service, dnd, get, get_as};
use opentelemetry_proto::tonic::trace::v1::Span;
use tempfile::TempDir;
use tokio::runtime::Handle;
use tonic::Request;

use collector::Collector;

/// Checks that a unit is one tree: all spans of its trace, each under the right one. Gives those that are not the orchestrator's, by service and name.
fn tree<'s>(spans: &'s [(String, Span)], unit: &Span) -> Vec<(&'s str, &'s str)> {
    assert!(unit.parent_span_id.is_empty(), "a unit is the root of its trace");
    let of: Vec<&(String, Span)> = spans.iter().filter(|(_, span)| span.trace_id == unit.trace_id).collect();
    let tree: HashMap<&[u8], &(String, Span)> = of.iter().map(|span| (span.1.span_id.as_slice(), *span)).collect();
    assert_eq!(of.len(), tree.len(), "each span is sent once");
    for (service, span) in tree.values().filter(|(_, span)| span.span_id != unit.span_id) {
        let (above, parent) = tree.get(span.parent_span_id.as_slice()).unwrap_or_else(|| panic!("{service}'s {} has no parent in its trace", span.name));
        assert_eq!(above, "dnd-orchestrator", "the orchestrator alone calls others");
        let expected = if service == "dnd-orchestrator" { "unit" } else { "STAGE_" };
        assert!(parent.name.starts_with(expected), "{service}'s {} is a child of {}", span.name, parent.name);
    }
    let stages: BTreeSet<&str> = tree.values().filter(|(_, span)| span.name.starts_with("STAGE_")).map(|(_, span)| span.name.as_str()).collect();
    assert_eq!(stages, BTreeSet::from(["STAGE_CAPTION", "STAGE_CROP", "STAGE_GENERATE", "STAGE_SCORE", "STAGE_SUMMARIZE"]));
    of.into_iter().filter(|(service, _)| service != "dnd-orchestrator").map(|(service, span)| (service.as_str(), span.name.as_str())).collect()
}

/// What an admin port says in OpenMetrics, by the rules of its text: families by their names, one after the other, each with the samples of its type, and
/// exemplars on buckets alone. Gives these: the bucket's series and the trace.
fn exemplars(admin: &str) -> Vec<(String, String)> {
    let (code, head, text) = get_as(admin, "/metrics", "application/openmetrics-text; version=1.0.0, text/plain; version=0.0.4; q=0.5");
    assert_eq!((code, head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n")), (200, true), "{head}");
    let text = String::from_utf8(text).unwrap();
    let lines: Vec<&str> = text.strip_suffix("# EOF\n").expect("it is said where it ends").lines().collect();
    let (mut families, mut exemplars) = (Vec::new(), Vec::new());
    for line in lines {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            let family = family.split_once(' ').unwrap();
            assert!(families.iter().all(|(name, _)| *name != family.0), "{line}: twice");
            families.push(family);
            continue;
        } else if line.starts_with("# HELP ") {
            continue;
        }
        let (name, kind) = *families.last().unwrap();
        let (sample, exemplar) = line.split_once(" # ").map_or((line, None), |(sample, exemplar)| (sample, Some(exemplar)));
        let (series, value) = sample.rsplit_once(' ').unwrap();
        let ending = series.split('{').next().unwrap().strip_prefix(name).unwrap_or_else(|| panic!("{line}: not of {name}"));
        let endings: &[&str] = match kind {
            "counter" => &["_total"],
            "gauge" => &[""],
            "histogram" => &["_bucket", "_sum", "_count"],
            other => panic!("{other}"),
        };
        assert!(endings.contains(&ending) && value.parse::<f64>().is_ok(), "{line}");
        let Some(exemplar) = exemplar else { continue };
        let (trace, rest) = exemplar.strip_prefix("{trace_id=\"").and_then(|rest| rest.split_once("\"} ")).unwrap_or_else(|| panic!("{line}"));
        let (value, at) = rest.split_once(' ').unwrap();
        let bound: f64 = series.split_once("le=\"").unwrap().1.split('"').next().unwrap().parse().unwrap();
        assert!(ending == "_bucket" && value.parse::<f64>().unwrap() <= bound && at.parse::<f64>().unwrap() > 1e9, "{line}");
        exemplars.push((series.to_owned(), trace.to_owned()));
    }
    exemplars
}

#[tokio::test(flavor = "multi_thread")]
async fn buckets_lead_to_the_traces_that_are_taken_and_to_no_others() {
    const METHOD: &str = "service=\"dnd.v1.EmbeddingService\",method=\"EmbedTexts\"";
    let embed = async |url: String, traceparent: &str| {
        let mut request = Request::new(futures::stream::iter([EmbedTextsRequest { item_id: 1, text: "a red ball".to_owned() }]));
        request.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
        let mut answers = EmbeddingServiceClient::connect(url).await.unwrap().embed_texts(request).await.unwrap().into_inner();
        while answers.message().await.unwrap().is_some() {}
    };
    let spans = Collector::of(move |_, url| {
        let mut service = Service::start("dnd-clip", &["--model", sketch("clip").to_str().unwrap(), "--admin", "127.0.0.1:0", "--otlp", url]);
        let since = Instant::now();
        let wait = |until: &dyn Fn() -> bool| {
            while !until() {
                assert!(since.elapsed() < Duration::from_secs(60), "{}", service.log());
                thread::sleep(Duration::from_millis(20));
            }
        };
        let counted = |count: u32| get(&service.admin(), "/metrics").1.contains(&format!("dnd_call_duration_seconds_count{{{METHOD}}} {count}\n"));
        wait(&|| get(&service.admin(), "/readyz").0 == 200);

        Handle::current().block_on(embed(service.url(), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"));
        wait(&|| counted(1));
        assert_eq!(exemplars(&service.admin()), [], "its caller did not take that trace");

        Handle::current().block_on(embed(service.url(), "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
        wait(&|| counted(2));
        let found = exemplars(&service.admin());
        assert!(found.iter().all(|(_, trace)| trace == "4bf92f3577b34da6a3ce929d0e0e4736"), "{found:?}");
        for of in ["dnd_call_duration_seconds", "dnd_queue_wait_seconds", "dnd_batch_duration_seconds", "dnd_batch_size_items"] {
            assert_eq!(found.iter().filter(|(series, _)| series.starts_with(of)).count(), 1, "one value of {of}: {found:?}");
        }
        assert!(
            found.iter().any(|(series, _)| series.contains(METHOD)) && found.iter().any(|(series, _)| series.contains("model=\"clip-texts\"")),
            "{found:?}"
        );
        assert!(!get(&service.admin(), "/metrics").1.contains("trace_id"), "the plain text has none");
        assert_eq!(service.terminate(), Some(0));
    })
    .await;
    let traces: BTreeSet<String> = spans.iter().map(|(_, span)| hex(&span.trace_id)).collect();
    assert_eq!(traces, BTreeSet::from(["4bf92f3577b34da6a3ce929d0e0e4736".to_owned()]), "where an exemplar leads, there is a trace");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

const ALL: [&str; 6] = ["dnd-activation", "dnd-captioner", "dnd-clip", "dnd-diffusion", "dnd-orchestrator", "dnd-summarizer"];

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_is_one_tree_over_all_services() {
    let (say, said) = mpsc::channel();
    let spans = Collector::of(move |_, url| {
        let folder = tempfile::tempdir().unwrap();
        let (network, pictures) = (sketch("targets/planted/planted.onnx"), sketch("probing.tar"));
        let mut mesh = Mesh::start_with(&sketch(""), &["--otlp", url, "--admin", "127.0.0.1:0"]);
        let endpoint = mesh.orchestrator.url();
        let job =
            ["dissect", "--layer", "colour", "--units", "0,1", "--num-inference-steps", "2", "--images-per-concept", "2", "--candidates", "1", "--out", "out"];
        let inputs = ["--target", network.to_str().unwrap(), "--images", pictures.to_str().unwrap(), "--endpoint", &endpoint];
        let ran = dnd(folder.path(), &[&job[..], &inputs].concat());
        assert_eq!(ran.code, 0, "{}", ran.err);
        say.send(exemplars(&mesh.orchestrator.admin())).unwrap();
        // Each sends its last spans before it ends.
        assert_eq!(mesh.orchestrator.terminate(), Some(0));
        for service in &mut mesh.models {
            assert_eq!(service.terminate(), Some(0), "{}", service.log());
        }
    })
    .await;
    let units: Vec<&Span> = spans.iter().map(|(_, span)| span).filter(|span| span.name == "unit").collect();
    assert_eq!(units.len(), 2);
    assert_ne!(units[0].trace_id, units[1].trace_id);
    // The stages of units are measured, and lead to them.
    let traces: Vec<String> = units.iter().map(|unit| hex(&unit.trace_id)).collect();
    let of_stages: Vec<(String, String)> = said.recv().unwrap().into_iter().filter(|(series, _)| series.starts_with("dnd_stage_duration_seconds")).collect();
    assert!(of_stages.iter().all(|(_, trace)| traces.contains(trace)), "{of_stages:?}");
    for stage in ["crop", "caption", "summarize", "generate", "score"] {
        assert!(of_stages.iter().any(|(series, _)| series.contains(&format!("stage=\"{stage}\""))), "{stage}: {of_stages:?}");
    }
    for unit in units {
        // Units share what is drawn of a concept and said of a caption, so the calls of the models may all be in the trace of the one that was first.
        let calls = tree(&spans, unit);
        assert!(calls.contains(&("dnd-activation", "dnd.v1.ActivationService/Crop")), "{calls:?}");
    }
    assert_eq!(spans.iter().map(|(service, _)| service.as_str()).collect::<BTreeSet<_>>(), BTreeSet::from(ALL));
}

/// A mesh that works on a job of one unit, and has begun to draw for it.
struct Drawing {
    mesh: Mesh,
    orchestrator: Service,
    job: String,
    /// What its orchestrators are told.
    told: Vec<String>,
    folder: TempDir,
}

impl Drawing {
    /// Gives the job to another orchestrator.
    fn go_on_with_another(&mut self) {
        self.orchestrator = self.mesh.another_orchestrator(&self.told.iter().map(String::as_str).collect::<Vec<_>>());
    }

    /// Waits until the job is paused.
    fn wait_for_the_pause(&self) {
        let since = Instant::now();
        while !dnd(self.folder.path(), &["jobs", "show", &self.job, "--json", "--endpoint", &self.orchestrator.url()]).out.contains("JOB_STATE_PAUSED") {
            assert!(since.elapsed() < Duration::from_secs(120), "{}", self.orchestrator.log());
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// What a collector gets of a job of one unit to which something happens while pictures are drawn for it: the spans that are units, and all.
async fn disturbed(happens: impl FnOnce(&mut Drawing) + Send + 'static) -> (Vec<Span>, Vec<(String, Span)>) {
    let spans = Collector::of(|collector, url| {
        let folder = tempfile::tempdir().unwrap();
        write_pictures(&folder.path().join("pictures"), &pictures(40, 8));
        let mesh = Mesh::start_with(&sketch(""), &["--otlp", url]);
        let data = folder.path().join("data").to_str().unwrap().to_owned();
        let told = ["--otlp", url, "--data", &data, "--lease", "2"].map(str::to_owned).to_vec();
        let orchestrator = mesh.another_orchestrator(&told.iter().map(String::as_str).collect::<Vec<_>>());
        let target = sketch("targets/planted/planted.onnx");
        let what = ["jobs", "create", "--layer", "colour", "--units", "0", "--num-inference-steps", "40", "--images-per-concept", "8", "--candidates", "2"];
        let ran = dnd(folder.path(), &[&what[..], &["--images", "pictures", "--target", target.to_str().unwrap(), "--endpoint", &orchestrator.url()]].concat());
        assert_eq!(ran.code, 0, "{}", ran.err);
        let mut drawing = Drawing { mesh, orchestrator, job: ran.out.trim().to_owned(), told, folder };
        let since = Instant::now();
        let summarized = || collector.0.lock().unwrap().iter().any(|(_, span)| span.name == "STAGE_SUMMARIZE");
        while !summarized() {
            assert!(since.elapsed() < Duration::from_secs(120), "{}", drawing.orchestrator.log());
            thread::sleep(Duration::from_millis(20));
        }
        happens(&mut drawing);
        let Drawing { mut mesh, mut orchestrator, job, folder, .. } = drawing;
        let ran = dnd(folder.path(), &["jobs", "watch", &job, "--endpoint", &orchestrator.url()]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        assert_eq!(orchestrator.terminate(), Some(0), "{}", orchestrator.log());
        for service in &mut mesh.models {
            assert_eq!(service.terminate(), Some(0), "{}", service.log());
        }
    })
    .await;
    let mut units: Vec<Span> = spans.iter().map(|(_, span)| span).filter(|span| span.name == "unit").cloned().collect();
    units.sort_by_key(|unit| unit.start_time_unix_nano);
    (units, spans)
}

/// Checks that a unit that was taken over by another orchestrator, while pictures were drawn, is one tree.
fn taken_over(units: &[Span], spans: &[(String, Span)]) {
    const DRAW: (&str, &str) = ("dnd-diffusion", "dnd.v1.DiffusionService/Generate");
    let [unit] = units else { panic!("{units:?}") };
    let calls = tree(spans, unit);
    assert!(calls.iter().filter(|call| **call == DRAW).count() >= 2, "some were drawn for the first, and others for the second: {calls:?}");
    let services: BTreeSet<&str> = calls.iter().map(|(service, _)| *service).chain(["dnd-orchestrator"]).collect();
    assert_eq!(services, BTreeSet::from(ALL));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_is_one_tree_also_when_its_orchestrator_was_killed_over_it() {
    let (units, spans) = disturbed(|drawing| {
        drawing.orchestrator.kill();
        drawing.go_on_with_another();
    })
    .await;
    taken_over(&units, &spans);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_is_one_tree_also_when_its_orchestrator_was_stopped_over_it() {
    let (units, spans) = disturbed(|drawing| {
        assert_eq!(drawing.orchestrator.terminate(), Some(0), "{}", drawing.orchestrator.log());
        drawing.go_on_with_another();
    })
    .await;
    taken_over(&units, &spans);
}

/// Checks that a unit was worked on twice, each time in a trace of its own, and that the second leads to the first.
fn linked(units: &[Span], spans: &[(String, Span)]) {
    let [first, second] = units else { panic!("{units:?}") };
    assert_ne!(first.trace_id, second.trace_id);
    assert!(second.parent_span_id.is_empty() && first.links.is_empty());
    let links: Vec<(&[u8], &[u8])> = second.links.iter().map(|link| (link.trace_id.as_slice(), link.span_id.as_slice())).collect();
    assert_eq!(links, [(first.trace_id.as_slice(), first.span_id.as_slice())]);
    tree(spans, second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_that_was_given_back_begins_a_new_trace_that_leads_to_the_one_before() {
    let (units, spans) = disturbed(|drawing| {
        drawing.mesh.models[3].kill();
        drawing.wait_for_the_pause();
        drawing.mesh.models[3].restart();
    })
    .await;
    linked(&units, &spans);
}
