//! `dnd doctor`: what this machine has.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use dnd_mesh::program::ExitCode;

use dnd_onnx::runtime::{self, Provider};

use crate::problem::Problem;

/// Says what this machine has: ONNX Runtime, providers, models, ports, space.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the model suite to look for
    #[arg(long, env = "DND_MODELS", value_name = "DIR", default_value = "models/sketch")]
    models: PathBuf,
}

/// The port that services listen on by default.
const PORT: u16 = 50051;

pub(crate) async fn run(args: Args) -> Result<ExitCode, Problem> {
    tokio::task::spawn_blocking(move || look(&args.models)).await.map_err(|_| Problem::failure("the look panicked"))
}

fn look(models: &Path) -> ExitCode {
    let mut well = true;
    println!("dnd {}", env!("CARGO_PKG_VERSION"));
    println!("processor threads   {}", std::thread::available_parallelism().map_or(1, usize::from));
    match runtime::library_path() {
        Ok(path) => println!("ONNX Runtime        {} in {}", runtime::library_version().unwrap_or_else(|| "?".to_owned()), path.display()),
        Err(error) => {
            well = false;
            println!("ONNX Runtime        MISSING: {error}");
        }
    }
    for provider in [Provider::Cpu, Provider::Cuda, Provider::Tensorrt] {
        match runtime::check_provider(provider) {
            Ok(()) => println!("provider {provider:<10} works"),
            Err(error) => println!("provider {provider:<10} not here: {}", first_line(&error.to_string())),
        }
    }
    match crate::local::Suite::read(models) {
        Ok(suite) => println!("models              {} in {} (`dnd models check {}` tries them)", suite.name, models.display(), models.display()),
        Err(problem) => println!("models              none: {problem}"),
    }
    match TcpListener::bind(("127.0.0.1", PORT)) {
        Ok(_) => println!("port {PORT}          free"),
        Err(error) => println!("port {PORT}          taken: {error}"),
    }
    println!("space               {} free for temporary files in {}", free_space(&std::env::temp_dir()), std::env::temp_dir().display());
    if well { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or(text)
}

/// What `df` says; the standard library can't tell.
fn free_space(folder: &Path) -> String {
    let said = Command::new("df").args(["-h", "--output=avail"]).arg(folder).output().ok();
    let said = said.and_then(|output| String::from_utf8(output.stdout).ok());
    said.and_then(|text| text.lines().nth(1).map(|line| line.trim().to_owned())).unwrap_or_else(|| "unknown".to_owned())
}
