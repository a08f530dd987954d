//! `dnd-captioner`: captions pictures over gRPC.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use dnd_captioner::Captioner;
use dnd_mesh::{
    Slot,
    args::ServeArgs,
    server::{self, Services},
    telemetry,
};
use dnd_onnx::runtime::EngineArgs;

/// Captions pictures over gRPC with a BLIP model in ONNX.
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
        move || Captioner::load(&model, &engine).map(|loaded| slot.fill(loaded))
    };
    server::serve(&serve, dnd_captioner::add_to(Services::default(), slot), load).await?;
    Ok(())
}
