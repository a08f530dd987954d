//! The mesh for browsers and for programs that speak HTTP: the pages, JSON, live events, gRPC-Web.
//!
//! It keeps nothing: each request becomes a call of the orchestrator, and messages are protobuf's JSON both ways. The pages in `pages/` are files as they are,
//! carried in the program, and use the same HTTP API as everybody else.

mod api;
mod export;
mod guard;
mod openapi;
mod pages;
mod pictures;
mod problem;
mod serve;
mod studies;
mod uploads;

use std::{net::SocketAddr, path::PathBuf};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    middleware,
    routing::{get, post, put},
};
use clap::Args;
use dnd_mesh::{MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, args::TlsArgs, balance::Balanced};
use dnd_proto::v1::{
    dissect_service_client::DissectServiceClient, picture_service_client::PictureServiceClient, study_service_client::StudyServiceClient,
    upload_service_client::UploadServiceClient,
};
use tokio_util::sync::CancellationToken;
use tower_http::{catch_panic::CatchPanicLayer, trace::TraceLayer};

pub use serve::{ServeError, serve};

/// Bytes of a JSON body at most. A list of a million pictures fits.
const MAX_JSON_BYTES: usize = MAX_REQUEST_BYTES;

/// MiB of one uploaded file at most, unless it is said.
pub const MAX_UPLOAD_MIB: u64 = 8192;

/// Where and how a gateway serves.
#[derive(Debug, Clone, Args)]
pub struct GatewayArgs {
    /// Address to listen on; port 0 takes a free one, which the log names
    #[arg(long, env = "DND_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Address of the admin port, which serves plain HTTP: /livez, /readyz, /metrics and gRPC health, and nothing else; none unless it is given
    #[arg(long, env = "DND_ADMIN", value_name = "ADDRESS")]
    pub admin: Option<SocketAddr>,
    /// Seconds that running requests get to end after SIGTERM or Ctrl-C
    #[arg(long, env = "DND_GRACE", default_value_t = 20)]
    pub grace: u64,
    /// Write the address that is listened on to this file, once the port is open
    #[arg(long, hide = true)]
    pub port_file: Option<PathBuf>,
    /// Its certificate, for those who ask it and for the orchestrator
    #[command(flatten)]
    pub tls: TlsArgs,
    /// MiB of one uploaded file at most
    #[arg(long, env = "DND_MAX_UPLOAD_MIB", default_value_t = MAX_UPLOAD_MIB)]
    pub max_upload_mib: u64,
}

/// What every request needs.
#[derive(Debug, Clone)]
struct Gateway {
    dissect: DissectServiceClient<Balanced>,
    pictures: PictureServiceClient<Balanced>,
    uploads: UploadServiceClient<Balanced>,
    studies: StudyServiceClient<Balanced>,
    max_upload_bytes: u64,
    /// Cancelled when the gateway ends: streams of events must not hold it up.
    stopping: CancellationToken,
}

/// The gateway's routes over an orchestrator. Streams end once `stopping` is cancelled.
pub fn router(orchestrator: Balanced, max_upload_mib: u64, stopping: CancellationToken) -> Router {
    let gateway = Gateway {
        dissect: DissectServiceClient::new(orchestrator.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES),
        pictures: PictureServiceClient::new(orchestrator.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
        uploads: UploadServiceClient::new(orchestrator.clone()),
        studies: StudyServiceClient::new(orchestrator.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES),
        max_upload_bytes: max_upload_mib << 20,
        stopping,
    };
    Router::new()
        .route("/v1/jobs", get(api::list_jobs).post(api::create_job))
        .route("/v1/jobs/{job}", get(api::get_job).delete(api::delete_job))
        .route("/v1/jobs/{job}/cancel", post(api::cancel_job))
        .route("/v1/jobs/{job}/resume", post(api::resume_job))
        .route("/v1/jobs/{job}/events", get(api::watch_job))
        .route("/v1/jobs/{job}/export", get(export::export))
        .route("/v1/jobs/{job}/nearest", get(api::nearest_units))
        .route("/v1/jobs/{job}/units", get(api::list_units))
        .route("/v1/jobs/{job}/units/{layer}/{unit}", get(api::get_unit))
        .route("/v1/select", post(api::select))
        .route("/v1/layers", post(api::layers))
        .route("/v1/pictures/{digest}", get(pictures::picture))
        .route("/v1/probing-sets", post(uploads::probing_set))
        .route("/v1/studies", get(studies::list).post(studies::create))
        .route("/v1/studies/{study}", get(studies::get).delete(studies::delete))
        .route("/v1/studies/{study}/task", get(studies::task))
        .route("/v1/studies/{study}/ratings", get(studies::ratings).post(studies::rate))
        .layer(DefaultBodyLimit::max(MAX_JSON_BYTES))
        // A network is larger than any message: its bytes are passed on as they come.
        .route("/v1/uploads", post(uploads::form).layer(DefaultBodyLimit::disable()))
        .route("/v1/uploads/{digest}", put(uploads::put).get(uploads::check).layer(DefaultBodyLimit::disable()))
        .route("/openapi.json", get(openapi::openapi))
        .merge(pages::routes())
        .with_state(gateway)
        .merge(serve::grpc_web(orchestrator))
        .fallback(problem::no_such_page)
        .method_not_allowed_fallback(problem::no_such_method)
        .layer(middleware::from_fn(guard::guard))
        .layer(CatchPanicLayer::custom(problem::panicked))
        .layer(TraceLayer::new_for_http())
}
