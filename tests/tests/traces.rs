//! What a collector of traces gets to see: a unit is one tree, whichever services it visits.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex},
};

use dnd_testing::sketch;
use dnd_tests::{Mesh, dnd};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::Span,
};
use tonic::{Request, Response, Status, transport::Server, transport::server::TcpIncoming};

/// Spans, each with the name of the service that it is of.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for group in request.into_inner().resource_spans {
            let attributes = group.resource.unwrap().attributes;
            let name = attributes.into_iter().find(|attribute| attribute.key == "service.name").unwrap().value.unwrap().value.unwrap();
            let Value::StringValue(service) = name else { panic!("{name:?}") };
            let spans = group.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().unwrap().extend(spans.map(|span| (service.clone(), span)));
        }
        Ok(Response::default())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_is_one_tree_over_all_services() {
    let collector = Collector::default();
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("http://{}", incoming.local_addr().unwrap());
    let server = tokio::spawn(Server::builder().add_service(TraceServiceServer::new(collector.clone())).serve_with_incoming(incoming));

    tokio::task::spawn_blocking(move || {
        let folder = tempfile::tempdir().unwrap();
        let (network, pictures) = (sketch("targets/planted/planted.onnx"), sketch("probing.tar"));
        let mut mesh = Mesh::start_with(&sketch(""), &["--otlp", &url]);
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
    .await
    .unwrap();
    server.abort();

    let spans = collector.0.lock().unwrap();
    let units: Vec<&Span> = spans.iter().map(|(_, span)| span).filter(|span| span.name == "unit").collect();
    assert_eq!(units.len(), 2);
    assert_ne!(units[0].trace_id, units[1].trace_id);
    for unit in units {
        assert!(unit.parent_span_id.is_empty(), "a unit is the root of its trace");
        let tree: HashMap<&[u8], &(String, Span)> =
            spans.iter().filter(|(_, span)| span.trace_id == unit.trace_id).map(|span| (span.1.span_id.as_slice(), span)).collect();
        for (service, span) in tree.values().filter(|(_, span)| span.span_id != unit.span_id) {
            let (above, parent) = tree.get(span.parent_span_id.as_slice()).unwrap_or_else(|| panic!("{service}'s {} has no parent in its trace", span.name));
            assert_eq!(above, "dnd-orchestrator", "the orchestrator alone calls others");
            let expected = if service == "dnd-orchestrator" { "unit" } else { "STAGE_" };
            assert!(parent.name.starts_with(expected), "{service}'s {} is a child of {}", span.name, parent.name);
        }
        let calls: BTreeSet<(&str, &str)> =
            tree.values().filter(|(service, _)| service != "dnd-orchestrator").map(|(service, span)| (service.as_str(), span.name.as_str())).collect();
        // Units share what is drawn of a concept and said of a caption, so the calls of the models may all be in the trace of the one that was first.
        assert!(calls.contains(&("dnd-activation", "dnd.v1.ActivationService/Crop")), "{calls:?}");
        let stages: BTreeSet<&str> = tree.values().filter(|(_, span)| span.name.starts_with("STAGE_")).map(|(_, span)| span.name.as_str()).collect();
        assert_eq!(stages, BTreeSet::from(["STAGE_CAPTION", "STAGE_CROP", "STAGE_GENERATE", "STAGE_SCORE", "STAGE_SUMMARIZE"]));
    }
    let services: BTreeSet<&str> = spans.iter().map(|(service, _)| service.as_str()).collect();
    assert_eq!(services, BTreeSet::from(["dnd-activation", "dnd-captioner", "dnd-clip", "dnd-diffusion", "dnd-orchestrator", "dnd-summarizer"]));
}
