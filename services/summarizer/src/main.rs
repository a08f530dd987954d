//! `dnd-summarizer`: simplifies captions and finds what they share, over gRPC.

use std::path::PathBuf;

use clap::Parser;
use dnd_mesh::{
    Slot,
    args::ServeArgs,
    config, program,
    server::{self, Services},
};
use dnd_onnx::runtime::EngineArgs;
use dnd_summarizer::{LlmArgs, Summarizer, add_to};

/// Simplifies captions and finds what they share, over gRPC, with a causal language model in ONNX or one behind an HTTP endpoint.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Folder of the model; needed unless --llm-url is given
    #[arg(long, env = "DND_MODEL", required_unless_present = "llm_url")]
    model: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    serve: ServeArgs,
    #[command(flatten)]
    llm: LlmArgs,
}

fn main() -> ! {
    let Args { model, engine, serve, llm } = config::parse();
    let slot = Slot::default();
    let services = add_to(Services::default(), slot.clone());
    let load = move || Summarizer::open(&model.unwrap_or_default(), &engine, &llm).map(|loaded| slot.fill(loaded));
    program::run(server::serve(&serve, services, load))
}
