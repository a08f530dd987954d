//! `dnd-summarizer`: simplifies captions and finds what they share, over gRPC.

use std::error::Error;

use clap::Parser;
use dnd_onnx::service::{self, ModelServiceArgs};
use dnd_summarizer::{Summarizer, add_to};

/// Simplifies captions and finds what they share, over gRPC, with a causal language model in ONNX.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    service: ModelServiceArgs,
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    service::run(Args::parse().service, add_to, Summarizer::load)
}
