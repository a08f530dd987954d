//! `dnd up`: the whole mesh in one process, on a port.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use dnd_mesh::{
    args::ServeArgs,
    server::{self, InProcess, ServeError},
};

use dnd_orchestrator::WorksOn;

use crate::{
    args::MeshArgs,
    local::{LocalMesh, Suite, no_suite},
    problem::Problem,
};

/// Serves the whole mesh from this process, on one port, and the pages and HTTP on another if they are wanted.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Address to listen on
    #[arg(long, env = "DND_LISTEN", default_value = "127.0.0.1:50051")]
    listen: SocketAddr,
    /// Address to serve the pages and HTTP on, such as 127.0.0.1:8080; by default there are none
    #[arg(long, env = "DND_HTTP", value_name = "ADDR")]
    http: Option<SocketAddr>,
    /// Write the address that the pages are on to this file, once the port is open
    #[arg(long, hide = true)]
    http_port_file: Option<PathBuf>,
    #[command(flatten)]
    gateway: dnd_gateway::GatewayArgs,
    /// Seconds that running calls get to end after SIGTERM or Ctrl-C
    #[arg(long, env = "DND_GRACE", default_value_t = 20)]
    grace: u64,
    /// Write the address that is listened on to this file, once the port is open
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
    activation: dnd_activation::ActivationArgs,
    #[command(flatten)]
    captioner: dnd_captioner::CaptionerArgs,
    #[command(flatten)]
    orchestrator: dnd_orchestrator::OrchestratorArgs,
    #[command(flatten)]
    llm: dnd_summarizer::LlmArgs,
}

pub(crate) async fn run(args: Args, log: &str) -> Result<ExitCode, Problem> {
    let suite = Suite::read(args.models.as_ref().ok_or_else(no_suite)?)?;
    if !suite.notice.is_empty() {
        eprintln!("{}: {}", suite.name, suite.notice);
    }
    let Args { data, engine, activation, captioner, orchestrator, llm, .. } = args;
    let all = MeshArgs { models: None, endpoint: None, data, engine, activation, captioner, orchestrator, llm };
    let local = LocalMesh::new(&all, WorksOn::AllJobs).await?;
    let serve = ServeArgs { listen: args.listen, grace: args.grace, log: log.to_owned(), port_file: args.port_file };
    let pages = args.http.map(|listen| ServeArgs { listen, port_file: args.http_port_file, ..serve.clone() });
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
        let inside = InProcess::start(local.services.clone());
        dnd_gateway::serve(&pages, &args.gateway, inside.channel()).await.map_err(|error| Problem::failure(error.to_string()))
    };
    tokio::try_join!(mesh, pages)?;
    Ok(ExitCode::SUCCESS)
}
