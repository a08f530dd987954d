//! The admin port: liveness, readiness, metrics and gRPC health over plain HTTP, and nothing else.

use std::{future::pending, net::SocketAddr, path::Path};

use axum::{
    Router,
    http::{HeaderMap, StatusCode, header::CONTENT_TYPE},
    routing::get,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{service::Routes, transport::Server};
use tonic_health::pb::health_server::{Health, HealthServer};
use tracing::info;

pub use crate::call::State;
use crate::{metrics, server::ServeError};

/// An admin port that is open.
pub struct Admin {
    listener: TcpListener,
}

impl Admin {
    /// Opens the port.
    ///
    /// # Errors
    ///
    /// If the address can't be listened on.
    pub async fn open(address: SocketAddr, port_file: Option<&Path>) -> Result<Self, ServeError> {
        let listen = |source| ServeError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let bound = listener.local_addr().map_err(listen)?;
        if let Some(file) = port_file {
            std::fs::write(file.with_added_extension("admin"), bound.to_string())?;
        }
        info!(address = %bound, "the admin port is open");
        metrics::begin();
        Ok(Self { listener })
    }

    /// As [`Self::serve`], for a program that has no model.
    ///
    /// # Errors
    ///
    /// If the port breaks.
    pub async fn serve_alone(self, state: watch::Receiver<State>) -> Result<(), ServeError> {
        let (_reporter, health) = tonic_health::server::health_reporter();
        self.serve(state, health).await
    }

    /// Serves as long as the process lives.
    pub(crate) async fn serve(self, state: watch::Receiver<State>, health: HealthServer<impl Health>) -> Result<(), ServeError> {
        let routes = Routes::from(router(state, health));
        Server::builder().accept_http1(true).add_routes(routes).serve_with_incoming(TcpListenerStream::new(self.listener)).await?;
        pending().await
    }
}

/// Liveness is that of the process: a restart mends no model that is loading, and no peer that is away.
fn router(state: watch::Receiver<State>, health: HealthServer<impl Health>) -> Router {
    let ready = move || {
        let (code, text) = match &*state.borrow() {
            State::Serving => (StatusCode::OK, "serving\n".to_owned()),
            State::Loading => (StatusCode::SERVICE_UNAVAILABLE, "the model is loading\n".to_owned()),
            State::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping\n".to_owned()),
            State::Failing(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        };
        async move { (code, text) }
    };
    let measured = async |asked: HeaderMap| {
        // Written to memory, which takes it.
        metrics::exposed(&asked).map(|(kind, text)| ([(CONTENT_TYPE, kind)], text)).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
    };
    Router::new()
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(measured))
        .route_service("/grpc.health.v1.Health/{method}", health)
}
