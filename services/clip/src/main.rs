//! `dnd-clip`: embeds pictures and texts over gRPC.

use clap::Parser;
use dnd_clip::{Clip, add_to};
use dnd_mesh::config;
use dnd_onnx::service::{self, ModelServiceArgs};

/// Embeds pictures and texts over gRPC with a CLIP model in ONNX.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    service: ModelServiceArgs,
}

fn main() -> ! {
    service::run(config::parse::<Args>().service, add_to, Clip::load)
}
