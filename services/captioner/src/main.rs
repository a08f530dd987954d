//! `dnd-captioner`: captions pictures over gRPC.

use clap::Parser;
use dnd_captioner::{Captioner, CaptionerArgs, add_to};
use dnd_mesh::config;
use dnd_onnx::service::{self, ModelServiceArgs};

/// Captions pictures over gRPC with a model in ONNX: BLIP, BLIP-2, a vision encoder with a text decoder, or CLIP over a fixed set of concepts.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    service: ModelServiceArgs,
    #[command(flatten)]
    captioner: CaptionerArgs,
}

fn main() -> ! {
    let Args { service, captioner } = config::parse();
    service::run(service, add_to, move |folder, engine| Captioner::load(folder, &captioner, engine))
}
