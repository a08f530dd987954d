//! `dnd`: labels neurons of vision networks in words.

mod args;
mod card;
mod commands;
mod inputs;
mod local;
mod mesh;
mod out;
mod problem;
mod watch;

use std::process;

use clap::{Parser, Subcommand};
use dnd_mesh::{
    config,
    program::{self, ExitCode},
};

use commands::{cache, demo, dissect, doctor, jobs, layers, models, plan, select, tokens, top, up};
use problem::{Problem, unless_interrupted};

/// Labels neurons of vision networks in words (Describe-and-Dissect), with the evidence for each label.
#[derive(Debug, Parser)]
#[command(name = "dnd", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// What to log to standard error: error, warn, info, debug, trace, or a filter
    #[arg(long, global = true, env = "DND_LOG", default_value = "warn")]
    log: String,
    /// OpenTelemetry collector that traces are sent to (OTLP over gRPC), such as http://localhost:4317
    #[arg(long, global = true, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    otlp: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Label the neurons of the embedded networks, and say how many labels are right
    Demo(demo::Args),
    /// Label units of a network's layers
    Dissect(dissect::Args),
    /// Create, look at, stop and go on with jobs
    #[command(subcommand)]
    Jobs(jobs::Command),
    /// List the layers of a network, and their units, that can be asked for
    Layers(layers::Args),
    /// Let your own candidate concepts compete for a unit (step 3 alone)
    Select(select::Args),
    /// Say how long a large run will take, on how many replicas of each service, and what it will cost
    Plan(plan::Args),
    /// Look at model folders
    Models(models::Args),
    /// Look at what is kept of what models made, or make room
    Cache(cache::Args),
    /// Say what this machine has: ONNX Runtime, providers, models, ports, space
    Doctor(doctor::Args),
    /// Serve the whole mesh from this process, on one port
    Up(up::Args),
    /// Show what the programs of a running mesh do
    Top(top::Args),
    /// Make tokens for callers
    Tokens(tokens::Args),
}

fn main() -> process::ExitCode {
    if dnd_activation::is_target_process() {
        return dnd_activation::run_target();
    }
    let Cli { command, log, otlp } = config::parse();
    let outcome = program::block_on(async {
        let _telemetry = dnd_mesh::telemetry::init(&log, otlp.as_deref());
        run(command, &log).await
    });
    let outcome = outcome.unwrap_or_else(|e| Err(Problem::failure(format!("the program's threads can't be started: {e}"))));
    program::end(outcome.unwrap_or_else(|problem| {
        eprintln!("dnd: {problem}");
        problem.exit_code()
    }))
}

async fn run(command: Command, log: &str) -> Result<ExitCode, Problem> {
    match command {
        Command::Demo(args) => demo::run(args).await,
        Command::Dissect(args) => dissect::run(args).await,
        Command::Jobs(command) => unless_interrupted(jobs::run(command)).await,
        Command::Layers(args) => unless_interrupted(layers::run(args)).await,
        Command::Select(args) => unless_interrupted(select::run(args)).await,
        Command::Plan(args) => plan::run(args).await,
        Command::Models(args) => unless_interrupted(models::run(args)).await,
        Command::Cache(args) => unless_interrupted(cache::run(args)).await,
        Command::Doctor(args) => unless_interrupted(doctor::run(args)).await,
        Command::Top(args) => top::run(args).await,
        Command::Up(args) => up::run(args, log).await,
        Command::Tokens(args) => tokens::run(args),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
