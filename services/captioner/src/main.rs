//! `dnd-captioner`: captions pictures over gRPC.

use std::error::Error;

use clap::Parser;
use dnd_captioner::{Captioner, add_to};
use dnd_onnx::service::{self, ModelServiceArgs};

/// Captions pictures over gRPC with a BLIP model in ONNX.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    service: ModelServiceArgs,
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    service::run(Args::parse().service, add_to, Captioner::load)
}
