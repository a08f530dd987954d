//! `dnd tokens`: what callers of a served mesh show.

use clap::Subcommand;
use dnd_mesh::{
    auth::{Scope, new_token},
    program::ExitCode,
};

use crate::problem::Problem;

/// Makes tokens for callers of `dnd up` and of an orchestrator.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print a new token, which is kept nowhere, and the line for the file that --tokens names, which holds its digest
    New {
        /// Whose it is, as refusals in the log name it
        name: String,
        /// What it is good for; each scope has what those before it have
        #[arg(long, value_enum)]
        scope: Scope,
    },
}

pub(crate) fn run(args: Args) -> Result<ExitCode, Problem> {
    let Command::New { name, scope } = args.command;
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).map_err(|e| Problem::failure(format!("the system gives no random numbers: {e}")))?;
    let (token, line) = new_token(&name, scope, secret);
    println!("{token}\n{line}");
    Ok(ExitCode::SUCCESS)
}
