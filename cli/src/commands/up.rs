//! `dnd up`: the whole mesh in one process, on a port.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use dnd_mesh::{
    args::{AccessArgs, ServeArgs, TlsArgs},
    server::{self, ServeError},
};

use dnd_orchestrator::WorksOn;

use crate::{
    args::MeshArgs,
    local::{LocalMesh, Suite, no_suite},
    problem::Problem,
};

/// Serves the whole mesh from this process, on one port.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Address to listen on
    #[arg(long, env = "DND_LISTEN", default_value = "127.0.0.1:50051")]
    listen: SocketAddr,
    /// Address of the admin port, which serves plain HTTP: /livez, /readyz, /metrics and gRPC health, and nothing else; none unless it is given
    #[arg(long, env = "DND_ADMIN", value_name = "ADDRESS")]
    admin: Option<SocketAddr>,
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
    let Args { data, engine, mut activation, captioner, orchestrator, llm, tls, access, .. } = args;
    activation.remote = !args.listen.ip().is_loopback();
    let mesh = MeshArgs { models: None, endpoint: None, data, engine, activation, captioner, orchestrator, llm, token_file: None, tls: TlsArgs::default() };
    let local = LocalMesh::new(&mesh, WorksOn::AllJobs).await?;
    let serve =
        ServeArgs { listen: args.listen, admin: args.admin, grace: args.grace, log: log.to_owned(), otlp: None, port_file: args.port_file, tls, access };
    let (engines, blobs) = (local.engines.clone(), local.blobs.clone());
    let load = move || engines.load(&suite, &mesh, blobs);
    server::serve(&serve, local.services.clone(), load).await.map_err(|error| match error {
        ServeError::Load(problem) => Problem::input(problem),
        error => Problem::failure(error.to_string()),
    })?;
    Ok(ExitCode::SUCCESS)
}
