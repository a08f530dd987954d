//! The admin port: liveness, readiness, metrics and gRPC health over plain HTTP, and nothing else.

use std::{future::pending, io, net::SocketAddr, path::Path, time::Duration};

use axum::{
    Router,
    http::{StatusCode, header::CONTENT_TYPE},
    routing::get,
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{service::Routes, transport::Server};
use tonic_health::pb::health_server::{Health, HealthServer};
use tracing::info;

pub use crate::call::State;
use crate::{metrics, server::ServeError};

/// What was measured is put together so often, whether or not anybody asks for it.
const UPKEEP: Duration = Duration::from_secs(5);

/// An admin port that is open.
pub struct Admin {
    listener: TcpListener,
    metrics: PrometheusHandle,
}

impl Admin {
    /// Opens the port, and starts to measure.
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
        Ok(Self { listener, metrics: metrics::record().map_err(io::Error::other)? })
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
        let Self { listener, metrics } = self;
        let routes = Routes::from(router(state, health, metrics.clone()));
        let upkeep = async {
            let mut ticks = interval(UPKEEP);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                metrics.run_upkeep();
            }
        };
        let served = Server::builder().accept_http1(true).add_routes(routes).serve_with_incoming(TcpListenerStream::new(listener));
        tokio::select! {
            served = served => served?,
            () = upkeep => {}
        }
        pending().await
    }
}

/// Liveness is that of the process: a restart mends no model that is loading, and no peer that is away.
fn router(state: watch::Receiver<State>, health: HealthServer<impl Health>, metrics: PrometheusHandle) -> Router {
    let ready = move || {
        let (code, text) = match &*state.borrow() {
            State::Serving => (StatusCode::OK, "serving\n".to_owned()),
            State::Loading => (StatusCode::SERVICE_UNAVAILABLE, "the model is loading\n".to_owned()),
            State::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping\n".to_owned()),
            State::Failing(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        };
        async move { (code, text) }
    };
    let measured = move || {
        let text = metrics.render();
        async move { ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text) }
    };
    Router::new()
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(measured))
        .route_service("/grpc.health.v1.Health/{method}", health)
}
