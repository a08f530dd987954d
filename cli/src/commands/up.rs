//! `dnd up`: the whole mesh in one process, on a port.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use dnd_mesh::{
    args::ServeArgs,
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
    let mesh = MeshArgs { models: None, endpoint: None, data, engine, activation, captioner, orchestrator, llm };
    let local = LocalMesh::new(&mesh, WorksOn::AllJobs).await?;
    let serve = ServeArgs { listen: args.listen, grace: args.grace, log: log.to_owned(), port_file: args.port_file };
    let (engines, blobs) = (local.engines.clone(), local.blobs.clone());
    let load = move || engines.load(&suite, &mesh, blobs);
    server::serve(&serve, local.services.clone(), load).await.map_err(|error| match error {
        ServeError::Load(problem) => Problem::input(problem),
        error => Problem::failure(error.to_string()),
    })?;
    Ok(ExitCode::SUCCESS)
}
