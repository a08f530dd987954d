//! `dnd-orchestrator`: sequences the three steps over the model services, over gRPC.

use std::{convert::Infallible, sync::Arc};

use anyhow::Result;
use clap::Parser;
use dnd_mesh::{
    args::ServeArgs,
    blobs,
    channel::Dial,
    config, program,
    server::{self, Services},
};
use dnd_orchestrator::{Data, DataArgs, Endpoints, Models, OrchestratorArgs, WorksOn};

/// Labels units of vision networks in words, over gRPC, with the model services that it is told of.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    endpoints: Endpoints,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    options: OrchestratorArgs,
    #[command(flatten)]
    serve: ServeArgs,
}

fn main() -> ! {
    program::run(run(config::parse()))
}

async fn run(args: Args) -> Result<()> {
    let Args { endpoints, data, options, serve } = args;
    let data = Data::open(&data).await?;
    let services = blobs::add_to(Services::default(), Arc::clone(&data.blobs));
    let models = Models::at(&endpoints, &Dial::open(&serve.tls, endpoints.token_file.as_deref())?)?;
    let services = dnd_orchestrator::add_to(services, models, data, &options, WorksOn::AllJobs);
    server::serve(&serve, services, || Ok::<_, Infallible>(())).await?;
    Ok(())
}
