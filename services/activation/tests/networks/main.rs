//! Networks of kinds that the sketch suite does not have, small enough to be worked out by hand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod by_hand;
mod exported;
mod exports;
mod kinds;
mod passes;
mod preparing;

use std::{collections::HashMap, fs, path::Path, sync::Arc};

use dnd_activation::{Activation, ActivationArgs, add_to};
use dnd_mesh::{
    Slot,
    blobs::{self, Blobs},
    server::{InProcess, Services},
};
use dnd_onnx::{
    format::{
        AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto, ValueInfoProto,
        attribute_proto::AttributeType,
        tensor_proto::{DataLocation, DataType},
        type_proto,
    },
    runtime::EngineArgs,
};
use dnd_proto::v1::{
    DescribeTargetRequest, LayerKind, LayerUnits, Preprocessing, ProbeRequest, ProbedUnit, ProbingSet, ProbingSource, ResizeMode, Summary, Target,
    TokenSummary, activation_service_client::ActivationServiceClient, probe_response::Event, probing_source::Source,
};
use image::{Rgb, RgbImage};
use prost::Message as _;
use tempfile::TempDir;
use tonic::{Status, transport::Channel};

use by_hand::*;

/// Height and width of the networks' input.
const SIDE: u32 = 4;

fn service() -> (ActivationServiceClient<Channel>, InProcess) {
    service_of(3, 2)
}

/// One that runs so many pictures together, in so many sessions.
fn service_of(batch: usize, sessions: usize) -> (ActivationServiceClient<Channel>, InProcess) {
    service_with(EngineArgs::sized(batch, sessions), ActivationArgs::default())
}

fn service_with(engine: EngineArgs, args: ActivationArgs) -> (ActivationServiceClient<Channel>, InProcess) {
    let args = ActivationArgs { program: Some(env!("CARGO_BIN_EXE_dnd-activation").into()), ..args };
    let blobs = Arc::new(Blobs::temporary().unwrap());
    let activation = Activation::new(engine, args, Arc::clone(&blobs));
    let server = InProcess::start(blobs::add_to(add_to(Services::default(), Slot::filled(activation)), blobs));
    (ActivationServiceClient::new(server.channel()), server)
}

/// Pictures, each with one bright pixel among dark ones, in a folder; their values between 0 and 1, channel by channel.
fn probing_set(folder: &Path, count: u8) -> (ProbingSet, HashMap<String, [Vec<f32>; 3]>) {
    pictures_of(folder, count, (SIDE, SIDE))
}

/// Such pictures of that height and width.
fn pictures_of(folder: &Path, count: u8, (height, width): (u32, u32)) -> (ProbingSet, HashMap<String, [Vec<f32>; 3]>) {
    let pictures = folder.join("pictures");
    fs::create_dir_all(&pictures).unwrap();
    let mut values = HashMap::new();
    for i in 0..count {
        let bright = (u32::from(i) % width, u32::from(i) / width % height);
        let picture = RgbImage::from_fn(width, height, |x, y| if (x, y) == bright { Rgb([250 - i, 200, 10 * i]) } else { Rgb([i, 3 * i, 7]) });
        let name = format!("{i:02}.png");
        picture.save(pictures.join(&name)).unwrap();
        values.insert(name, [0, 1, 2].map(|channel| picture.pixels().map(|pixel| f32::from(pixel.0[channel]) / 255.0).collect()));
    }
    (ProbingSet { sources: vec![ProbingSource { source: Some(Source::Uri(format!("file:{}", pictures.display()))) }] }, values)
}

async fn probe(
    client: &mut ActivationServiceClient<Channel>,
    target: &Target,
    set: &ProbingSet,
    layer: &str,
    tokens: TokenSummary,
) -> Result<Vec<ProbedUnit>, Status> {
    probe_by(client, target, set, layer, Summary::Mean, tokens).await
}

async fn probe_by(
    client: &mut ActivationServiceClient<Channel>,
    target: &Target,
    set: &ProbingSet,
    layer: &str,
    summary: Summary,
    tokens: TokenSummary,
) -> Result<Vec<ProbedUnit>, Status> {
    let request = ProbeRequest {
        target: Some(target.clone()),
        probing_set: Some(set.clone()),
        layers: vec![LayerUnits { layer: layer.to_owned(), units: Vec::new() }],
        summary: summary.into(),
        token_summary: tokens.into(),
        top: Some(50),
        shard: None,
    };
    let mut events = client.probe(request).await?.into_inner();
    let mut units = Vec::new();
    while let Some(response) = events.message().await? {
        if let Some(Event::Unit(unit)) = response.event {
            units.push(unit);
        }
    }
    Ok(units)
}

fn mean(values: &[f32]) -> f32 {
    values.iter().sum::<f32>() / values.len() as f32
}

fn max(values: &[f32]) -> f32 {
    values.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Holds every unit's activation on every picture against what it is by hand.
fn assert_activations(units: &[ProbedUnit], values: &HashMap<String, [Vec<f32>; 3]>, by_hand: impl Fn(&[f32]) -> f32) {
    assert_eq!(units.len(), 3);
    for (channel, unit) in units.iter().enumerate() {
        assert_eq!(unit.top.len(), values.len());
        for top in &unit.top {
            let expected = by_hand(&values[&top.path][channel]);
            assert!((top.activation - expected).abs() < 1e-5, "unit {channel} on {}: {} and {expected}", top.path, top.activation);
        }
    }
}
