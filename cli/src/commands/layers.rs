//! `dnd layers`: what can be asked of a network.

use std::path::PathBuf;

use dnd_mesh::program::ExitCode;

use dnd_onnx::runtime::EngineArgs;
use dnd_proto::v1::{DescribeTargetRequest, Layer, LayerKind};

use crate::{
    args::{MeshArgs, TargetFlags},
    inputs::TargetFile,
    mesh::activation_alone,
    out::printable,
    problem::Problem,
};

/// Lists the layers of a network, and their units, that can be asked for.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The network, an ONNX file
    #[arg(value_name = "NET.onnx")]
    target: PathBuf,
    #[command(flatten)]
    flags: TargetFlags,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args) -> Result<ExitCode, Problem> {
    let target = TargetFile::open(&args.target, &args.flags)?.here().await?;
    let mesh = MeshArgs { engine: EngineArgs::one_session(), ..MeshArgs::default() };
    let (mut activation, _local) = activation_alone(&mesh).await?;
    let described = activation.describe_target(DescribeTargetRequest { target: Some(target), asked: Vec::new() }).await?.into_inner();
    for warning in &described.warnings {
        eprintln!("warning: {}", printable(warning));
    }
    if args.json {
        let text = serde_json::to_string_pretty(&described).map_err(|e| Problem::failure(e.to_string()))?;
        println!("{text}");
        return Ok(ExitCode::SUCCESS);
    }
    let width = described.layers.iter().map(|layer| layer.name.len()).max().unwrap_or(0).max(5);
    println!("{:<width$}  {:>6}  {:>12}  operator", "layer", "units", "map");
    for layer in &described.layers {
        println!("{:<width$}  {:>6}  {:>12}  {}", printable(&layer.name), layer.units, map(layer), printable(&layer.operator));
    }
    if let Some(preprocessing) = &described.preprocessing {
        println!("input {} x {}; pre-processing: {}", preprocessing.height, preprocessing.width, described.preprocessing_source);
    }
    Ok(ExitCode::SUCCESS)
}

/// Rows and columns of a layer's activation map, with the tokens before them.
fn map(layer: &Layer) -> String {
    match (layer.kind(), &layer.map[..], layer.prefix_tokens) {
        (LayerKind::Tokens, [], _) => "tokens".to_owned(),
        (LayerKind::Tokens, [rows, columns], prefix @ 1..) => format!("{prefix} + {rows} x {columns}"),
        (_, [rows, columns], _) => format!("{rows} x {columns}"),
        _ => "-".to_owned(),
    }
}
