//! The program of a service that has one model.

use std::path::{Path, PathBuf};

use clap::Args;
use dnd_mesh::{
    Slot,
    args::ServeArgs,
    program,
    server::{self, Services},
};

use crate::{Error, runtime::EngineArgs};

/// The arguments of a service that has one model.
#[derive(Debug, Args)]
pub struct ModelServiceArgs {
    /// Folder of the model
    #[arg(long, env = "DND_MODEL")]
    model: PathBuf,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    serve: ServeArgs,
}

/// Serves a model over gRPC, and ends the process: `add_to` adds its service, `load` loads it.
pub fn run<M: Send + Sync + 'static>(
    args: ModelServiceArgs,
    add_to: impl FnOnce(Services, Slot<M>) -> Services,
    load: impl FnOnce(&Path, &EngineArgs) -> Result<M, Error> + Send + 'static,
) -> ! {
    let ModelServiceArgs { model, engine, serve } = args;
    let slot = Slot::default();
    let services = add_to(Services::default(), slot.clone());
    program::run(server::serve(&serve, services, move || load(&model, &engine).map(|loaded| slot.fill(loaded))))
}
