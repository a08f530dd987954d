//! A gateway's life: listen, serve, and on SIGTERM or Ctrl-C end.

use std::{convert::Infallible, io, net::SocketAddr, time::Duration};

use axum::{Router, http::Response, middleware};
use dnd_mesh::{
    admin::{Admin, State},
    balance::Balanced,
    server,
    tls::{ClientCertificate, Connection},
};
use dnd_proto::v1::{
    dissect_service_server::SERVICE_NAME as DISSECT, picture_service_server::SERVICE_NAME as PICTURES, study_service_server::SERVICE_NAME as STUDIES,
    upload_service_server::SERVICE_NAME as UPLOADS,
};
use futures::{StreamExt as _, stream::BoxStream};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};
use tonic_web::GrpcWebLayer;
use tower::{Layer as _, ServiceExt as _, service_fn};
use tracing::{info, warn};

use crate::{GatewayArgs, guard, router};

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
    /// The certificate can't be used, or it would be spoken in the clear with other machines.
    #[error("{0}")]
    Access(String),
    /// The admin port can't be listened on, or broke.
    #[error(transparent)]
    Admin(#[from] server::ServeError),
    /// A file for the port, the signals or the server don't work.
    #[error("the gateway broke: {0}")]
    Io(#[from] io::Error),
}

/// Serves the gateway over an orchestrator. On SIGTERM or Ctrl-C streams of events end at once, running requests get to their end, and it returns, after the
/// grace period at the latest.
///
/// # Errors
///
/// If the address can't be listened on, the certificate can't be used, or the server breaks.
pub async fn serve(args: &GatewayArgs, orchestrator: Balanced) -> Result<(), ServeError> {
    // Browsers have no certificate; who may do what is the orchestrator's to say, by their tokens.
    let acceptor = server::acceptor(args.listen, &args.tls, ClientCertificate::Optional).map_err(ServeError::Access)?;
    let listen = |source| ServeError::Listen { address: args.listen, source };
    let listener = TcpListener::bind(args.listen).await.map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    if let Some(file) = &args.port_file {
        std::fs::write(file, address.to_string())?;
    }
    let admin = match args.admin {
        Some(address) => Some(Admin::open(address, args.port_file.as_deref()).await?),
        None => None,
    };
    let state = watch::Sender::new(State::Serving);
    let scheme = if args.tls.tls_cert.is_some() { "https" } else { "http" };
    info!("pages and HTTP on {scheme}://{address}");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stopping = CancellationToken::new();
    let stop = async {
        tokio::select! { _ = terminate.recv() => (), _ = interrupt.recv() => () }
        state.send_replace(State::Stopping);
        stopping.cancel();
        tokio::time::sleep(Duration::from_secs(args.grace)).await;
    };
    let router = router(orchestrator, args.max_upload_mib, stopping.clone());
    let router = if address.ip().is_loopback() { router.layer(middleware::from_fn(guard::this_machine)) } else { router };
    let connections = Connections { incoming: acceptor.incoming(listener).boxed(), address };
    let watched = state.subscribe();
    let administered = async {
        match admin {
            Some(admin) => admin.serve_alone(watched).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        broken = administered => Ok(broken?),
        served = axum::serve(connections, router).with_graceful_shutdown(stopping.clone().cancelled_owned()).into_future() => Ok(served?),
        () = stop => {
            warn!("requests were still running at the end of the grace period; leaving them");
            Ok(())
        }
    }
}

/// Connections as axum takes them.
struct Connections {
    incoming: BoxStream<'static, io::Result<Connection>>,
    address: SocketAddr,
}

impl axum::serve::Listener for Connections {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            match self.incoming.next().await {
                Some(Ok(connection)) => return (connection, self.address),
                Some(Err(error)) => {
                    // No file is free for another, mostly: some will be.
                    warn!(%error, "a connection can't be taken");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                None => std::future::pending().await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

/// The orchestrator's services for browsers that speak gRPC-Web: calls are translated and passed on as they are.
pub(crate) fn grpc_web(orchestrator: Balanced) -> Router {
    let passed_on = service_fn(move |request| {
        let answer = orchestrator.clone().oneshot(request);
        async { Ok::<Response<Body>, Infallible>(answer.await.unwrap_or_else(Status::into_http)) }
    });
    let service = GrpcWebLayer::new().layer(passed_on);
    [DISSECT, PICTURES, STUDIES, UPLOADS].into_iter().fold(Router::new(), |router, name| router.route_service(&format!("/{name}/{{method}}"), service.clone()))
}
