//! `dnd up`: the whole mesh in one process, on a port.

use std::{net::SocketAddr, path::PathBuf};

use dnd_gateway::GatewayArgs;
use dnd_mesh::{
    args::{AccessArgs, ServeArgs, TlsArgs},
    auth::Guard,
    program::ExitCode,
    server::{self, InProcess, ServeError},
};

use dnd_orchestrator::WorksOn;

use crate::{
    args::MeshArgs,
    card::CardArgs,
    local::{LocalMesh, Suite, no_suite},
    problem::Problem,
};

/// Serves the whole mesh from this process, on one port, and the pages and HTTP on another if they are wanted.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Address to listen on
    #[arg(long, env = "DND_LISTEN", default_value = "127.0.0.1:50051")]
    listen: SocketAddr,
    /// Address of the admin port, which serves plain HTTP: /livez, /readyz, /metrics and gRPC health, and nothing else; none unless it is given
    #[arg(long, env = "DND_ADMIN", value_name = "ADDRESS")]
    admin: Option<SocketAddr>,
    /// Address to serve the pages and HTTP on, such as 127.0.0.1:8080; by default there are none
    #[arg(long, env = "DND_HTTP", value_name = "ADDR")]
    http: Option<SocketAddr>,
    /// Write the address that the pages are on to this file, once the port is open
    #[arg(long, hide = true)]
    http_port_file: Option<PathBuf>,
    /// MiB of one file at most that is uploaded over HTTP
    #[arg(long, env = "DND_MAX_UPLOAD_MIB", default_value_t = dnd_gateway::MAX_UPLOAD_MIB)]
    max_upload_mib: u64,
    /// Seconds that running calls get to end after SIGTERM or Ctrl-C
    #[arg(long, env = "DND_GRACE", default_value_t = 20)]
    grace: u64,
    /// Write the address that is listened on to this file, once the port is open; beside it, to FILE.admin, that of the admin port
    #[arg(long, hide = true)]
    port_file: Option<PathBuf>,
    /// Folder of the model suite
    #[arg(long, env = "DND_MODELS", value_name = "DIR")]
    models: Option<PathBuf>,
    #[command(flatten)]
    data: dnd_orchestrator::DataArgs,
    #[command(flatten)]
    engine: dnd_onnx::runtime::EngineArgs,
    #[command(flatten)]
    card: CardArgs,
    #[command(flatten)]
    activation: dnd_activation::ActivationArgs,
    #[command(flatten)]
    captioner: dnd_captioner::CaptionerArgs,
    #[command(flatten)]
    orchestrator: dnd_orchestrator::OrchestratorArgs,
    #[command(flatten)]
    llm: dnd_summarizer::LlmArgs,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    access: AccessArgs,
}

pub(crate) async fn run(args: Args, log: &str) -> Result<ExitCode, Problem> {
    let suite = Suite::read(args.models.as_ref().ok_or_else(no_suite)?)?;
    if !suite.notice.is_empty() {
        eprintln!("{}: {}", suite.name, suite.notice);
    }
    let Args { data, engine, card, mut activation, captioner, orchestrator, llm, tls, access, .. } = args;
    activation.remote = !args.listen.ip().is_loopback();
    let all =
        MeshArgs { models: None, endpoint: None, data, engine, card, activation, captioner, orchestrator, llm, token_file: None, tls: TlsArgs::default() };
    let local = LocalMesh::new(&all, WorksOn::AllJobs).await?;
    let pages = args.http.map(|listen| GatewayArgs {
        listen,
        // It is the mesh's, which has one.
        admin: None,
        grace: args.grace,
        port_file: args.http_port_file,
        tls: tls.clone(),
        max_upload_mib: args.max_upload_mib,
    });
    let serve =
        ServeArgs { listen: args.listen, admin: args.admin, grace: args.grace, log: log.to_owned(), otlp: None, port_file: args.port_file, tls, access };
    let (engines, blobs) = (local.engines.clone(), local.blobs.clone());
    let load = move || engines.load(&suite, &all, blobs);
    let mesh = async {
        server::serve(&serve, local.services.clone(), load).await.map_err(|error| match error {
            ServeError::Load(problem) => Problem::input(problem),
            error => Problem::failure(error.to_string()),
        })
    };
    let pages = async {
        let Some(pages) = pages else { return Ok(()) };
        // Who may call is the same as on the other port.
        let guard = Guard::open(&serve.access).map_err(Problem::input)?;
        let inside = InProcess::guarded(local.services.clone(), guard);
        dnd_gateway::serve(&pages, inside.channel().into()).await.map_err(|error| Problem::failure(error.to_string()))
    };
    tokio::try_join!(mesh, pages)?;
    Ok(ExitCode::SUCCESS)
}
