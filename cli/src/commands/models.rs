//! `dnd models`: fetching models, and looking at their folders.

mod check;
mod pull;

use std::path::PathBuf;

use dnd_mesh::program::ExitCode;

use clap::Subcommand;
use dnd_captioner::CaptionerArgs;

use crate::problem::Problem;

/// Fetches models, and looks at their folders.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what a folder is: load each model of a suite, or a single model, run it once, and say all that is missing or would be refused, and why
    Check {
        /// Folder of the suite, or of one model
        dir: PathBuf,
        #[command(flatten)]
        captioner: CaptionerArgs,
    },
    /// Fetch the models of a manifest into a suite; what is broken off goes on where it was
    Pull(pull::Args),
}

pub(crate) async fn run(args: Args) -> Result<ExitCode, Problem> {
    match args.command {
        Command::Check { dir, captioner } => {
            tokio::task::spawn_blocking(move || check::check(&dir, &captioner)).await.map_err(|_| Problem::failure("the check panicked"))?
        }
        Command::Pull(args) => pull::run(args).await,
    }
}
