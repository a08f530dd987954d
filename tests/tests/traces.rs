//! What a collector of traces gets to see: a unit is one tree, whichever services it visits.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod collector;

use std::{
    collections::{BTreeSet, HashMap},
    thread,
    time::{Duration, Instant},
};

use dnd_testing::{pictures, sketch, write_pictures};
use dnd_tests::{Mesh, dnd};
use opentelemetry_proto::tonic::trace::v1::Span;

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

const ALL: [&str; 6] = ["dnd-activation", "dnd-captioner", "dnd-clip", "dnd-diffusion", "dnd-orchestrator", "dnd-summarizer"];

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_is_one_tree_over_all_services() {
    let spans = Collector::of(|_, url| {
        let folder = tempfile::tempdir().unwrap();
        let (network, pictures) = (sketch("targets/planted/planted.onnx"), sketch("probing.tar"));
        let mut mesh = Mesh::start_with(&sketch(""), &["--otlp", url]);
        let endpoint = mesh.orchestrator.url();
        let job =
            ["dissect", "--layer", "colour", "--units", "0,1", "--num-inference-steps", "2", "--images-per-concept", "2", "--candidates", "1", "--out", "out"];
        let inputs = ["--target", network.to_str().unwrap(), "--images", pictures.to_str().unwrap(), "--endpoint", &endpoint];
        let ran = dnd(folder.path(), &[&job[..], &inputs].concat());
        assert_eq!(ran.code, 0, "{}", ran.err);
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
    for unit in units {
        // Units share what is drawn of a concept and said of a caption, so the calls of the models may all be in the trace of the one that was first.
        let calls = tree(&spans, unit);
        assert!(calls.contains(&("dnd-activation", "dnd.v1.ActivationService/Crop")), "{calls:?}");
    }
    assert_eq!(spans.iter().map(|(service, _)| service.as_str()).collect::<BTreeSet<_>>(), BTreeSet::from(ALL));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_is_one_tree_also_when_its_orchestrator_was_killed_over_it() {
    const DRAW: (&str, &str) = ("dnd-diffusion", "dnd.v1.DiffusionService/Generate");
    let spans = Collector::of(|collector, url| {
        let folder = tempfile::tempdir().unwrap();
        write_pictures(&folder.path().join("pictures"), &pictures(40, 8));
        let mut mesh = Mesh::start_with(&sketch(""), &["--otlp", url]);
        let data = folder.path().join("data").to_str().unwrap().to_owned();
        let start = |mesh: &Mesh| mesh.another_orchestrator(&["--otlp", url, "--data", &data, "--lease", "2"]);
        let mut first = start(&mesh);
        let target = sketch("targets/planted/planted.onnx");
        let what = ["jobs", "create", "--layer", "colour", "--units", "0", "--num-inference-steps", "40", "--images-per-concept", "8", "--candidates", "2"];
        let ran = dnd(folder.path(), &[&what[..], &["--images", "pictures", "--target", target.to_str().unwrap(), "--endpoint", &first.url()]].concat());
        assert_eq!(ran.code, 0, "{}", ran.err);
        let since = Instant::now();
        let summarized = || collector.0.lock().unwrap().iter().any(|(_, span)| span.name == "STAGE_SUMMARIZE");
        while !summarized() {
            assert!(since.elapsed() < Duration::from_secs(120), "{}", first.log());
            thread::sleep(Duration::from_millis(20));
        }
        first.kill();
        let mut second = start(&mesh);
        let ran = dnd(folder.path(), &["jobs", "watch", ran.out.trim(), "--endpoint", &second.url()]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        assert_eq!(second.terminate(), Some(0), "{}", second.log());
        for service in &mut mesh.models {
            assert_eq!(service.terminate(), Some(0), "{}", service.log());
        }
    })
    .await;
    let units: Vec<&Span> = spans.iter().map(|(_, span)| span).filter(|span| span.name == "unit").collect();
    assert_eq!(units.len(), 1);
    let calls = tree(&spans, units[0]);
    assert!(calls.iter().filter(|call| **call == DRAW).count() >= 2, "it was killed while pictures were drawn, and others were drawn after it: {calls:?}");
    let services: BTreeSet<&str> = calls.iter().map(|(service, _)| *service).chain(["dnd-orchestrator"]).collect();
    assert_eq!(services, BTreeSet::from(ALL));
}
