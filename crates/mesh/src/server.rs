//! The stack around every service, and its life: listen, load, serve, drain, end.

use std::{any::Any, convert::Infallible, future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use futures::Stream;
use http::{Request, Response};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::oneshot,
    task::JoinSet,
};
use tonic::{
    Status,
    body::Body,
    server::NamedService,
    service::Routes,
    transport::{Channel, Server, server::Connected},
};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::{Service, ServiceBuilder};
use tower_http::{
    auth::AsyncRequireAuthorizationLayer,
    catch_panic::CatchPanicLayer,
    classify::{GrpcCode, GrpcErrorsAsFailures, SharedClassifier},
    trace::TraceLayer,
};
use tracing::{error, info, warn};

use crate::{
    Fault,
    admin::Admin,
    args::{ServeArgs, TlsArgs},
    auth::Guard,
    call::{CallLayer, Life, State},
    channel,
    metrics::MeasureLayer,
    program, telemetry,
    tls::{Acceptor, ClientCertificate},
};

/// Why a server could not start, or ended by itself.
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
    /// What the server was told of certificates, tokens or names can't be used.
    #[error("{0}")]
    Access(String),
    /// The model can't be loaded.
    #[error("{0}")]
    Load(String),
    /// The model answers nothing any more.
    #[error("{0}")]
    Failing(String),
    /// The transport broke.
    #[error("the server broke: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// A file for the port, or the signals, can't be set up.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Reflection can't be set up: a defect of the build.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// The services of one server.
#[derive(Debug, Clone, Default)]
pub struct Services {
    routes: Routes,
    names: Vec<&'static str>,
}

impl Services {
    /// Adds a service.
    #[must_use]
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + NamedService + Clone + Send + Sync + 'static,
        S::Future: Send + 'static,
    {
        self.routes = self.routes.add_service(service);
        self.names.push(S::NAME);
        self
    }
}

/// Runs a service's whole life: logs, listens at once, loads its model, says SERVING, and on SIGTERM or Ctrl-C says NOT_SERVING, lets running
/// calls end and returns, after the grace period at the latest. It ends by itself, with an error, if its model answers nothing any more. `load` runs on a thread
/// of its own.
pub async fn serve<E>(args: &ServeArgs, services: Services, load: impl FnOnce() -> Result<(), E> + Send + 'static) -> Result<(), ServeError>
where
    E: std::fmt::Display + Send + 'static,
{
    // Goes after telemetry: the spans of work that the end cuts off are left to whoever goes on with it, as those of a process that was killed are.
    let _cut_off = services.clone();
    let _telemetry = telemetry::init(&args.log, args.otlp.as_deref());
    let guard = Guard::open(&args.access).map_err(ServeError::Access)?;
    // Callers that show tokens need no certificate.
    let clients = if args.access.tokens.is_some() { ClientCertificate::Optional } else { ClientCertificate::Required };
    let acceptor = acceptor(args.listen, &args.tls, clients).map_err(ServeError::Access)?;
    let admin = match args.admin {
        Some(address) => Some(Admin::open(address, args.port_file.as_deref()).await?),
        None => None,
    };
    let listen = |source| ServeError::Listen { address: args.listen, source };
    let listener = TcpListener::bind(args.listen).await.map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    if let Some(file) = &args.port_file {
        std::fs::write(file, address.to_string())?;
    }
    info!(%address, "listening; the model is loading");

    let life = Arc::new(Life::default());
    let (health, health_service) = tonic_health::server::health_reporter();
    let names = services.names.clone();
    mark(&health, &names, ServingStatus::NotServing).await;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let drain = async {
        tokio::select! { _ = terminate.recv() => (), _ = interrupt.recv() => () }
        info!("stopping: no new calls, running ones get {} s", args.grace);
        mark(&health, &names, ServingStatus::NotServing).await;
        life.state.send_replace(State::Stopping);
        life.stopping.cancel();
    };
    let overdue = async {
        life.stopping.cancelled().await;
        // The program's end takes its part of the grace period.
        tokio::time::sleep(args.grace().saturating_sub(program::AT_THE_END).max(args.grace() / 2)).await;
    };
    // On a thread of its own, not one that the runtime waits for: a load that takes long must not hold up the end.
    let (loaded, loading) = oneshot::channel();
    std::thread::Builder::new().name("load".to_owned()).spawn(move || {
        let _ = loaded.send(load());
    })?;
    let broken = async {
        let problem = match loading.await {
            Ok(Ok(())) if life.stopping.is_cancelled() => return std::future::pending().await,
            Ok(Ok(())) => {
                mark(&health, &names, ServingStatus::Serving).await;
                life.state.send_replace(State::Serving);
                info!(%address, "serving");
                let why = life.failed().await;
                mark(&health, &names, ServingStatus::NotServing).await;
                return ServeError::Failing(why);
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the model's loader panicked; the log has the details".to_owned(),
        };
        ServeError::Load(problem)
    };
    let administer = async {
        match admin {
            Some(admin) => admin.serve(life.state.subscribe(), health_service.clone()).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        served = run(services.with(health_service.clone()), guard, acceptor.incoming(listener), Arc::clone(&life), drain) => served,
        error = broken => Err(error),
        administered = administer => administered,
        () = overdue => {
            warn!("calls were still running at the end of the grace period; leaving them");
            Ok(())
        }
    }
}

/// What takes the connections: with TLS, or in the clear where that can't be overheard, or is wanted.
///
/// # Errors
///
/// If that is so of neither, or a file of the certificates can't be used.
pub fn acceptor(listen: SocketAddr, tls: &TlsArgs, clients: ClientCertificate) -> Result<Acceptor, String> {
    if tls.tls_cert.is_none() && !tls.insecure && !listen.ip().is_loopback() {
        return Err(format!(
            "{listen} can be reached from other machines, and calls would come in the clear: name a certificate with --tls-cert, --tls-key and --tls-ca, or say --insecure"
        ));
    }
    Acceptor::open(tls, clients)
}

/// Serves on connections as they come in, until `shutdown` resolves and the running calls have ended.
pub async fn serve_on<IO>(
    services: Services,
    guard: Guard,
    incoming: impl Stream<Item = io::Result<IO>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError>
where
    IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    run(services, guard, incoming, Arc::default(), shutdown).await
}

async fn run<IO>(
    services: Services,
    guard: Guard,
    incoming: impl Stream<Item = io::Result<IO>>,
    life: Arc<Life>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError>
where
    IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let reflection = |builder: tonic_reflection::server::Builder<'static>| {
        builder.register_encoded_file_descriptor_set(dnd_proto::FILE_DESCRIPTOR_SET).register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let services = services
        .with(reflection(tonic_reflection::server::Builder::configure()).build_v1()?)
        // Older clients, Python's among them, speak no other.
        .with(reflection(tonic_reflection::server::Builder::configure()).build_v1alpha()?);
    let stack = ServiceBuilder::new()
        // Outermost, so that a call's span holds everything that happens in it, refusals and panics included.
        .layer(TraceLayer::new(callers_faults_are_no_failures()).make_span_with(telemetry::span_of::<Body>))
        // Outside of all that answers by itself: each call is counted once, with the code that its caller sees.
        .layer(MeasureLayer(services.names.into()))
        // Outside of all that can panic; the connection and its other calls go on.
        .layer(CatchPanicLayer::custom(panicked))
        // Before anything is done for a caller.
        .layer(AsyncRequireAuthorizationLayer::new(guard))
        // Innermost, so that what the service does knows its call, and is dropped with it at its deadline.
        .layer(CallLayer(life));
    Server::builder()
        .layer(stack)
        .tcp_nodelay(true)
        .initial_connection_window_size(channel::CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .add_routes(services.routes)
        .serve_with_incoming_shutdown(incoming, shutdown)
        .await?;
    Ok(())
}

/// Services on a network inside the process; they end with this value.
#[derive(Debug)]
pub struct InProcess {
    dialer: channel::Dialer,
    _server: JoinSet<()>,
}

impl InProcess {
    /// Starts serving.
    pub fn start(services: Services) -> Self {
        Self::guarded(services, Guard::default())
    }

    /// Starts serving those that the guard lets through.
    pub fn guarded(services: Services, guard: Guard) -> Self {
        let (dialer, accepted) = channel::in_memory();
        let mut server = JoinSet::new();
        server.spawn(async move {
            if let Err(error) = serve_on(services, guard, accepted, std::future::pending()).await {
                error!(%error, "the servers in this process broke");
            }
        });
        Self { dialer, _server: server }
    }

    /// A channel to the services, over a connection of its own.
    pub fn channel(&self) -> Channel {
        self.dialer.channel()
    }
}

async fn mark(health: &HealthReporter, names: &[&'static str], status: ServingStatus) {
    for name in names.iter().copied().chain([""]) {
        health.set_service_status(name, status).await;
    }
}

/// What a caller asked wrongly is told to the caller, and is no line in this service's log of failures.
fn callers_faults_are_no_failures() -> SharedClassifier<GrpcErrorsAsFailures> {
    let codes =
        [GrpcCode::InvalidArgument, GrpcCode::NotFound, GrpcCode::FailedPrecondition, GrpcCode::OutOfRange, GrpcCode::AlreadyExists, GrpcCode::Cancelled];
    SharedClassifier::new(codes.into_iter().fold(GrpcErrorsAsFailures::new(), GrpcErrorsAsFailures::with_success))
}

fn panicked(_: Box<dyn Any + Send>) -> Response<Body> {
    error!("a call panicked");
    Status::from(Fault::internal("the service panicked on this call; its log has the details")).into_http()
}

#[cfg(test)]
mod tests {
    use dnd_proto::v1::{
        CheckUploadsRequest, CheckUploadsResponse, GetPicturesRequest, GetPicturesResponse, UploadRequest, UploadResponse, get_pictures_response,
        picture_service_client::PictureServiceClient,
        picture_service_server::{PictureService, PictureServiceServer},
        upload_service_client::UploadServiceClient,
        upload_service_server::{UploadService, UploadServiceServer},
    };
    use futures::StreamExt as _;
    use tonic::{Code, Streaming};

    use super::*;

    struct Panics;

    #[tonic::async_trait]
    impl UploadService for Panics {
        async fn check_uploads(&self, request: tonic::Request<CheckUploadsRequest>) -> Result<tonic::Response<CheckUploadsResponse>, Status> {
            assert!(request.into_inner().digests.is_empty(), "a panic in a handler");
            Ok(tonic::Response::new(CheckUploadsResponse::default()))
        }

        async fn upload(&self, _: tonic::Request<Streaming<UploadRequest>>) -> Result<tonic::Response<UploadResponse>, Status> {
            Err(Status::unimplemented("not here"))
        }
    }

    /// Streams answers without end; each is large.
    struct Endless;

    #[tonic::async_trait]
    impl PictureService for Endless {
        type GetPicturesStream = crate::items::Responses<GetPicturesResponse>;

        async fn get_pictures(&self, request: tonic::Request<GetPicturesRequest>) -> Result<tonic::Response<Self::GetPicturesStream>, Status> {
            let picture = || GetPicturesResponse { digest: String::new(), result: Some(get_pictures_response::Result::Picture(vec![0; 1 << 20].into())) };
            let count = if request.into_inner().digests.is_empty() { usize::MAX } else { 1 };
            Ok(tonic::Response::new(Box::pin(futures::stream::repeat_with(move || Ok(picture())).take(count))))
        }
    }

    #[tokio::test]
    async fn streams_that_nobody_reads_do_not_hold_up_the_others_of_their_connection() {
        let server = InProcess::start(Services::default().with(PictureServiceServer::new(Endless)));
        let mut client = PictureServiceClient::new(server.channel());
        let mut unread = Vec::new();
        for _ in 0..12 {
            unread.push(client.get_pictures(GetPicturesRequest::default()).await.unwrap().into_inner());
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut read = client.get_pictures(GetPicturesRequest { digests: vec!["one".into()] }).await.unwrap().into_inner();
        let picture = tokio::time::timeout(Duration::from_secs(20), read.message()).await.expect("it comes, though twelve others wait");
        assert!(picture.unwrap().is_some());
    }

    #[tokio::test]
    async fn a_panic_in_one_call_is_internal_and_the_connection_goes_on() {
        let server = InProcess::start(Services::default().with(UploadServiceServer::new(Panics)));
        let mut client = UploadServiceClient::new(server.channel());
        let status = client.check_uploads(CheckUploadsRequest { digests: vec!["x".into()] }).await.unwrap_err();
        assert_eq!(status.code(), Code::Internal);
        client.check_uploads(CheckUploadsRequest::default()).await.unwrap();
    }
}
