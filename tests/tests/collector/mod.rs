//! A collector of traces, as OpenTelemetry's is.

use std::sync::{Arc, Mutex};

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
pub(crate) struct Collector(pub(crate) Arc<Mutex<Vec<(String, Span)>>>);

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
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// Gives what a mesh does, told where to send its spans, to a collector, and what that got.
    pub(crate) async fn of(work: impl FnOnce(&Self, &str) + Send + 'static) -> Vec<(String, Span)> {
        let collector = Self::default();
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let url = format!("http://{}", incoming.local_addr().unwrap());
        let server = tokio::spawn(Server::builder().add_service(TraceServiceServer::new(collector.clone())).serve_with_incoming(incoming));
        let working = collector.clone();
        tokio::task::spawn_blocking(move || work(&working, &url)).await.unwrap();
        server.abort();
        let spans = collector.0.lock().unwrap();
        spans.clone()
    }
}
