//! `dnd-orchestrator`: sequences the three steps over the model services, over gRPC.

use std::{convert::Infallible, path::PathBuf, sync::Arc};

use anyhow::{Context as _, Result};
use clap::Parser;
use dnd_mesh::{
    args::ServeArgs,
    blobs::{self, Blobs},
    channel::Dial,
    program,
    server::{self, Services},
    telemetry,
};
use dnd_orchestrator::{Endpoints, Models, OrchestratorArgs, Results};

/// Labels units of vision networks in words, over gRPC, with the model services that it is told of.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    endpoints: Endpoints,
    /// Folder that uploads, pictures and results of models are kept in, so that no later job or process makes them again; by default one that goes with the process
    #[arg(long, env = "DND_DATA")]
    data: Option<PathBuf>,
    #[command(flatten)]
    options: OrchestratorArgs,
    #[command(flatten)]
    serve: ServeArgs,
}

fn main() -> Result<()> {
    program::run(run(Args::parse()))?
}

async fn run(args: Args) -> Result<()> {
    let Args { endpoints, data, options, serve } = args;
    telemetry::init(&serve.log);
    let (blobs, results) = match &data {
        Some(folder) => {
            let wrong = || format!("can't keep pictures and results in {}", folder.display());
            (Blobs::open(folder).with_context(wrong)?, Some(Results::open(folder).await.with_context(wrong)?))
        }
        None => (Blobs::temporary().context("can't make a folder for pictures")?, None),
    };
    let blobs = Arc::new(blobs);
    let services = blobs::add_to(Services::default(), Arc::clone(&blobs));
    let models = Models::at(&endpoints, &Dial::open(&serve.tls)?)?;
    let services = dnd_orchestrator::add_to(services, models, blobs, results, options);
    server::serve(&serve, services, || Ok::<_, Infallible>(())).await?;
    Ok(())
}
