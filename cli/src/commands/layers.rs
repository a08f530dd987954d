//! `dnd layers`: what can be asked of a network.

use std::{path::PathBuf, process::ExitCode};

use dnd_mesh::uri;
use dnd_onnx::runtime::EngineArgs;
use dnd_proto::v1::{DescribeTargetRequest, LayerKind, Target};

use crate::{
    args::{MeshArgs, TargetArgs},
    inputs::TargetFile,
    mesh::activation_alone,
    problem::Problem,
};

/// Lists the layers of a network, and their units, that can be asked for.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The network, an ONNX file
    #[arg(value_name = "NET.onnx")]
    target: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args) -> Result<ExitCode, Problem> {
    let file = TargetFile::open(&TargetArgs { target: args.target, preprocessing: None })?;
    let mesh = MeshArgs { engine: EngineArgs::one_session(), ..MeshArgs::default() };
    let (mut activation, _local) = activation_alone(&mesh)?;
    let target = Target { uri: uri::of_file(&file.path), digest: String::new(), preprocessing: file.preprocessing };
    let described = activation.describe_target(DescribeTargetRequest { target: Some(target), asked: Vec::new() }).await?.into_inner();
    if args.json {
        let text = serde_json::to_string_pretty(&described).map_err(|e| Problem::failure(e.to_string()))?;
        println!("{text}");
        return Ok(ExitCode::SUCCESS);
    }
    let width = described.layers.iter().map(|layer| layer.name.len()).max().unwrap_or(0).max(5);
    println!("{:<width$}  {:>6}  {:>9}  operator", "layer", "units", "map");
    for layer in &described.layers {
        let map = match layer.kind() {
            LayerKind::Tokens => "tokens".to_owned(),
            _ if layer.map.is_empty() => "-".to_owned(),
            _ => layer.map.iter().map(u32::to_string).collect::<Vec<_>>().join(" x "),
        };
        println!("{:<width$}  {:>6}  {map:>9}  {}", layer.name, layer.units, layer.operator);
    }
    Ok(ExitCode::SUCCESS)
}
