//! `dnd cache`: how much is kept of what models made, and making room.

use bytesize::ByteSize;
use clap::Subcommand;
use dnd_mesh::program::ExitCode;
use dnd_orchestrator::{Data, DataArgs};

use crate::{local::kept_in, problem::Problem};

/// Looks at what is kept of what models made, or makes room.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say how much is kept, by what it is
    Stats {
        #[command(flatten)]
        data: DataArgs,
    },
    /// Remove what was used longest ago; pictures of jobs that are not deleted stay
    Prune {
        #[command(flatten)]
        data: DataArgs,
        /// How much may stay, such as 20GB; without it all goes that can be made again
        #[arg(long, value_name = "SIZE", default_value = "0")]
        to: ByteSize,
    },
}

pub(crate) async fn run(args: Args) -> Result<ExitCode, Problem> {
    match args.command {
        Command::Stats { data } => {
            let stats = open(&data).await?.stats().await.map_err(|e| Problem::failure(e.to_string()))?;
            for kept in &stats.kept {
                println!("{:<16} {:>12} {:>12}", kept.what, kept.count, ByteSize(kept.bytes).to_string());
            }
            let limit = stats.limit.map(|limit| format!(" of {}", ByteSize(limit))).unwrap_or_default();
            println!("{:<16} {:>12} {:>12}{limit}", "in all", stats.kept.iter().map(|kept| kept.count).sum::<u64>(), ByteSize(stats.bytes()).to_string());
            let (pinned, bytes) = stats.pinned;
            println!("{pinned} pictures, {}, belong to results of jobs: they stay until those are deleted", ByteSize(bytes));
        }
        Command::Prune { data, to } => {
            let freed = open(&data).await?.prune(to.as_u64()).await.map_err(|e| Problem::failure(e.to_string()))?;
            println!("{} removed", ByteSize(freed));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn open(args: &DataArgs) -> Result<Data, Problem> {
    let folder = args.data.as_ref().ok_or_else(|| Problem::input("--data is not set; `dnd dissect` keeps what it makes in the folder .dnd in its --out"))?;
    kept_in(folder, args)?;
    Data::open(args).await.map_err(|e| Problem::failure(e.to_string()))
}
