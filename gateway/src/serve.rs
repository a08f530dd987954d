//! A gateway's life: listen, serve, and on SIGTERM or Ctrl-C end.

use std::{convert::Infallible, io, net::SocketAddr};

use axum::{Router, http::Response};
use dnd_mesh::{Fault, args::ServeArgs};
use dnd_proto::v1::{
    dissect_service_server::SERVICE_NAME as DISSECT, picture_service_server::SERVICE_NAME as PICTURES, upload_service_server::SERVICE_NAME as UPLOADS,
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body, transport::Channel};
use tonic_web::GrpcWebLayer;
use tower::{Layer as _, ServiceExt as _, service_fn};
use tracing::{info, warn};

use crate::{GatewayArgs, router};

/// Why a gateway could not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address can't be listened on.
    #[error("can't listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A file for the port, the signals or the server don't work.
    #[error("the gateway broke: {0}")]
    Io(#[from] io::Error),
}

/// Serves the gateway over an orchestrator. On SIGTERM or Ctrl-C streams of events end at once, running requests get to their end, and it returns, after the
/// grace period at the latest.
///
/// # Errors
///
/// If the address can't be listened on, or the server breaks.
pub async fn serve(args: &ServeArgs, gateway: &GatewayArgs, orchestrator: Channel) -> Result<(), ServeError> {
    let listen = |source| ServeError::Listen { address: args.listen, source };
    let listener = TcpListener::bind(args.listen).await.map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    if let Some(file) = &args.port_file {
        std::fs::write(file, address.to_string())?;
    }
    info!("pages and HTTP on http://{address}");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stopping = CancellationToken::new();
    let stop = async {
        tokio::select! { _ = terminate.recv() => (), _ = interrupt.recv() => () }
        stopping.cancel();
        tokio::time::sleep(args.grace()).await;
    };
    let router = router(orchestrator, gateway, stopping.clone());
    tokio::select! {
        served = axum::serve(listener, router).with_graceful_shutdown(stopping.clone().cancelled_owned()).into_future() => Ok(served?),
        () = stop => {
            warn!("requests were still running at the end of the grace period; leaving them");
            Ok(())
        }
    }
}

/// The orchestrator's services for browsers that speak gRPC-Web: calls are translated and passed on as they are.
pub(crate) fn grpc_web(orchestrator: Channel) -> Router {
    let passed_on = service_fn(move |request| {
        let answer = orchestrator.clone().oneshot(request);
        async {
            let away = |error| Status::from(Fault::new(Code::Unavailable, "NOBODY_THERE", format!("the orchestrator does not answer: {error}")));
            Ok::<Response<Body>, Infallible>(answer.await.unwrap_or_else(|error| away(error).into_http()))
        }
    });
    let service = GrpcWebLayer::new().layer(passed_on);
    [DISSECT, PICTURES, UPLOADS].into_iter().fold(Router::new(), |router, name| router.route_service(&format!("/{name}/{{method}}"), service.clone()))
}
