//! `dnd models`: looking at model folders.

use std::{path::PathBuf, process::ExitCode};

use clap::Subcommand;
use dnd_captioner::{Captioner, CaptionerArgs};
use dnd_clip::Clip;
use dnd_diffusion::Diffusion;
use dnd_onnx::{Error, runtime::EngineArgs};
use dnd_proto::v1::Model;
use dnd_summarizer::Summarizer;

use crate::{
    local::{MODELS, Suite},
    problem::Problem,
};

/// Looks at model folders.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Load each model of a suite, run it once, and say what it is or what is wrong with it
    Check {
        /// Folder of the suite
        dir: PathBuf,
        #[command(flatten)]
        captioner: CaptionerArgs,
    },
}

pub(crate) async fn run(args: Args) -> Result<ExitCode, Problem> {
    let Command::Check { dir, captioner } = args.command;
    tokio::task::spawn_blocking(move || check(&dir, &captioner)).await.map_err(|_| Problem::failure("the check panicked"))?
}

fn check(dir: &std::path::Path, captioner: &CaptionerArgs) -> Result<ExitCode, Problem> {
    let suite = Suite::read(dir)?;
    println!("suite {} in {}", suite.name, dir.display());
    if !suite.notice.is_empty() {
        println!("notice: {}", suite.notice);
    }
    let args = EngineArgs::one_session();
    let mut wrong = 0;
    for name in MODELS {
        let folder = suite.model(name);
        let loaded: Result<Model, Error> = match name {
            "captioner" => Captioner::load(&folder, captioner, &args).map(|model| model.model().clone()),
            "summarizer" => Summarizer::load(&folder, &args).map(|model| model.model().clone()),
            "diffusion" => Diffusion::load(&folder, &args).map(|model| model.model().clone()),
            _ => Clip::load(&folder, &args).map(|model| model.model().clone()),
        };
        match loaded {
            Ok(model) => println!("  {name:<10} ok     {}, {}, sha256 {}", model.layout, model.engine, &model.digest[..12.min(model.digest.len())]),
            Err(error) => {
                wrong += 1;
                println!("  {name:<10} WRONG  {error}");
            }
        }
    }
    if wrong == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    Err(Problem::input(format!("{}: {wrong} of {} models can't be used", dir.display(), MODELS.len())))
}
