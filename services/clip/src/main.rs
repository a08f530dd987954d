//! `dnd-clip`: embeds pictures and texts over gRPC.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use dnd_clip::Clip;
use dnd_mesh::{
    Slot,
    args::ServeArgs,
    server::{self, Services},
    telemetry,
};
use dnd_onnx::runtime::EngineArgs;

/// Embeds pictures and texts over gRPC with a CLIP model in ONNX.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Folder of the model
    #[arg(long, env = "DND_MODEL")]
    model: PathBuf,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    serve: ServeArgs,
}

#[tokio::main]
async fn main() -> Result<()> {
    let Args { model, engine, serve } = Args::parse();
    telemetry::init(&serve.log);
    let slot = Slot::default();
    let load = {
        let slot = slot.clone();
        move || Clip::load(&model, &engine).map(|loaded| slot.fill(loaded))
    };
    server::serve(&serve, dnd_clip::add_to(Services::default(), slot), load).await?;
    Ok(())
}
