//! `dnd-activation`: runs the network that is dissected, over gRPC.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::{Context as _, Result};
use clap::Parser;
use dnd_activation::{Activation, ActivationArgs};
use dnd_mesh::{
    Slot,
    args::ServeArgs,
    blobs::{self, Blobs, ObjectArgs},
    config, program,
    server::{self, Services},
};
use dnd_onnx::{
    Error,
    runtime::{self, EngineArgs},
};

/// Runs the network that is dissected, over gRPC: probing passes, attention crops, activations of given pictures.
///
/// It loads no model at its start: each request names its target, by a file: URI that this machine can read, or by the digest of an upload.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Folder that uploads are kept in; by default one of its own that goes with the process
    #[arg(long, env = "DND_DATA")]
    data: Option<PathBuf>,
    /// Where uploads lie, if the orchestrators share them.
    #[command(flatten)]
    objects: ObjectArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    options: ActivationArgs,
    #[command(flatten)]
    serve: ServeArgs,
}

fn main() -> ExitCode {
    if dnd_activation::is_target_process() {
        return dnd_activation::run_target();
    }
    program::run(run(config::parse()))
}

async fn run(args: Args) -> Result<()> {
    let Args { data, objects, engine, mut options, serve } = args;
    options.remote = !serve.listen.ip().is_loopback();
    let blobs = match &data {
        Some(folder) => Blobs::open(folder).with_context(|| format!("can't keep uploads in {}", folder.display()))?,
        None => Blobs::temporary().context("can't make a folder for uploads")?,
    };
    let blobs = Arc::new(blobs.sharing(&objects).context("can't use the object store")?);
    let slot = Slot::default();
    let load = {
        let (slot, blobs) = (slot.clone(), Arc::clone(&blobs));
        move || {
            runtime::library_path()?;
            slot.fill(Activation::new(engine, options, blobs));
            Ok::<_, Error>(())
        }
    };
    let services = blobs::add_to(dnd_activation::add_to(Services::default(), slot), blobs);
    server::serve(&serve, services, load).await?;
    Ok(())
}
