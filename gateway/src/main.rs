//! `dnd-gateway`: pages and HTTP over an orchestrator.

use anyhow::Result;
use clap::Parser;
use dnd_gateway::GatewayArgs;
use dnd_mesh::{args::ServeArgs, channel, program, telemetry};

/// Serves the pages, and the mesh as HTTP and JSON, over an orchestrator.
#[derive(Debug, Parser)]
#[command(version, mut_arg("listen", |listen| listen.default_value("127.0.0.1:8080")))]
struct Args {
    /// Where the orchestrator is
    #[arg(long, env = "DND_ORCHESTRATOR", value_name = "URL", default_value = "http://127.0.0.1:50051")]
    orchestrator: String,
    #[command(flatten)]
    gateway: GatewayArgs,
    #[command(flatten)]
    serve: ServeArgs,
}

fn main() -> Result<()> {
    program::run(run(Args::parse()))?
}

async fn run(args: Args) -> Result<()> {
    telemetry::init(&args.serve.log);
    dnd_gateway::serve(&args.serve, &args.gateway, channel::lazy(&args.orchestrator)?).await?;
    Ok(())
}
