//! `dnd-gateway`: pages and HTTP over an orchestrator.

use anyhow::Result;
use clap::Parser;
use dnd_gateway::GatewayArgs;
use dnd_mesh::{channel::Dial, config, program, telemetry};

/// Serves the pages, and the mesh as HTTP and JSON, over an orchestrator.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Where the orchestrator is
    #[arg(long, env = "DND_ORCHESTRATOR", value_name = "URL", default_value = "http://127.0.0.1:50051")]
    orchestrator: String,
    #[command(flatten)]
    gateway: GatewayArgs,
    /// What to log: error, warn, info, debug, trace, or a filter such as `dnd_gateway=debug,warn`
    #[arg(long, env = "DND_LOG", default_value = "info")]
    log: String,
    /// OpenTelemetry collector that traces are sent to (OTLP over gRPC), such as http://localhost:4317
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    otlp: Option<String>,
}

fn main() -> ! {
    program::run(run(config::parse()))
}

async fn run(args: Args) -> Result<()> {
    let _telemetry = telemetry::init(&args.log, args.otlp.as_deref());
    // Without a token of its own: its callers show theirs, which it passes on.
    let orchestrator = Dial::open(&args.gateway.tls, None)?.lazy(&args.orchestrator)?;
    dnd_gateway::serve(&args.gateway, orchestrator).await?;
    Ok(())
}
