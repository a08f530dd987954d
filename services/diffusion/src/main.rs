//! `dnd-diffusion`: draws pictures of concepts over gRPC.

use clap::Parser;
use dnd_diffusion::{Diffusion, add_to};
use dnd_mesh::config;
use dnd_onnx::service::{self, ModelServiceArgs};

/// Draws pictures of concepts over gRPC with a Stable Diffusion model in ONNX.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    service: ModelServiceArgs,
}

fn main() -> ! {
    service::run(config::parse::<Args>().service, add_to, Diffusion::load)
}
