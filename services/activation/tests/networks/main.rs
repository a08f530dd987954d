//! Networks of kinds that the sketch suite does not have, small enough to be worked out by hand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod exported;
mod exports;
mod kinds;
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
        AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto, TensorShapeProto, TypeProto,
        ValueInfoProto,
        attribute_proto::AttributeType,
        tensor_proto::{DataLocation, DataType},
        tensor_shape_proto::{Dimension, dimension},
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

/// Height and width of the networks' input.
const SIDE: u32 = 4;

fn service() -> (ActivationServiceClient<Channel>, InProcess) {
    service_of(3, 2)
}

/// One that runs so many pictures together, in so many sessions.
fn service_of(batch: usize, sessions: usize) -> (ActivationServiceClient<Channel>, InProcess) {
    let blobs = Arc::new(Blobs::temporary().unwrap());
    let activation = Activation::new(EngineArgs::sized(batch, sessions), ActivationArgs::default(), Arc::clone(&blobs));
    let server = InProcess::start(blobs::add_to(add_to(Services::default(), Slot::filled(activation)), blobs));
    (ActivationServiceClient::new(server.channel()), server)
}

fn node(operator: &str, inputs: &[&str], output: &str, attributes: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        op_type: Some(operator.to_owned()),
        input: inputs.iter().map(|name| (*name).to_owned()).collect(),
        output: vec![output.to_owned()],
        attribute: attributes,
        ..Default::default()
    }
}

fn ints(name: &str, ints: &[i64]) -> AttributeProto {
    AttributeProto { name: Some(name.to_owned()), r#type: Some(AttributeType::Ints as i32), ints: ints.to_vec(), ..Default::default() }
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: Some(name.to_owned()), r#type: Some(AttributeType::Int as i32), i: Some(value), ..Default::default() }
}

fn int_tensor(name: &str, values: &[i64]) -> TensorProto {
    TensorProto {
        name: Some(name.to_owned()),
        data_type: Some(DataType::Int64 as i32),
        dims: vec![values.len() as i64],
        int64_data: values.to_vec(),
        ..Default::default()
    }
}

fn floats(name: &str, dims: &[i64], values: Vec<f32>) -> TensorProto {
    TensorProto { name: Some(name.to_owned()), data_type: Some(DataType::Float as i32), dims: dims.to_vec(), float_data: values, ..Default::default() }
}

/// Weights of a convolution, or with two axes of a product, that give each channel as it is.
fn identity(name: &str, dims: &[i64]) -> TensorProto {
    floats(name, dims, vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
}

fn value(name: &str, shape: &[Option<i64>]) -> ValueInfoProto {
    let dim = shape
        .iter()
        .map(|size| Dimension { value: Some(size.map_or(dimension::Value::DimParam("n".to_owned()), dimension::Value::DimValue)), ..Default::default() });
    let tensor = type_proto::Tensor { elem_type: Some(DataType::Float as i32), shape: Some(TensorShapeProto { dim: dim.collect() }) };
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() }),
        ..Default::default()
    }
}

/// A network by hand.
#[derive(Clone)]
struct Net {
    opset: i64,
    ir_version: i64,
    inputs: Vec<ValueInfoProto>,
    nodes: Vec<NodeProto>,
    weights: Vec<TensorProto>,
    output: String,
    /// Height and width of its input.
    size: (u32, u32),
}

impl Net {
    fn new(input: ValueInfoProto, size: (u32, u32), output: &str) -> Self {
        Self { opset: 17, ir_version: 8, inputs: vec![input], nodes: vec![], weights: vec![], output: output.to_owned(), size }
    }

    /// Writes it into a folder.
    fn write(&self, folder: &Path) -> Target {
        let domains = ["", "com.microsoft"]
            .map(|domain| OperatorSetIdProto { domain: Some(domain.to_owned()), version: Some(if domain.is_empty() { self.opset } else { 1 }) });
        let graph = GraphProto {
            name: Some("by hand".to_owned()),
            node: self.nodes.clone(),
            initializer: self.weights.clone(),
            input: self.inputs.clone(),
            output: vec![ValueInfoProto { name: Some(self.output.clone()), ..Default::default() }],
            ..Default::default()
        };
        let model = ModelProto { ir_version: Some(self.ir_version), graph: Some(graph), opset_import: domains.to_vec(), ..Default::default() };
        let path = folder.join("net.onnx");
        fs::write(&path, model.encode_to_vec()).unwrap();
        let (height, width) = self.size;
        let preprocessing =
            Preprocessing { resize_mode: ResizeMode::Squash.into(), height, width, mean: vec![0.0; 3], std: vec![1.0; 3], ..Default::default() };
        Target { uri: format!("file:{}", path.display()), preprocessing: Some(preprocessing), ..Default::default() }
    }
}

/// Writes a network of these nodes into a folder. Its input is `pixels` (batch, 3, SIDE, SIDE).
fn write(folder: &Path, opset: i64, batch: Option<i64>, nodes: Vec<NodeProto>, weights: Vec<TensorProto>, output: &str) -> Target {
    let side = Some(i64::from(SIDE));
    Net { opset, nodes, weights, ..Net::new(value("pixels", &[batch, Some(3), side, side]), (SIDE, SIDE), output) }.write(folder)
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

#[tokio::test]
async fn a_fixed_batch_and_an_older_operator_set_change_nothing() {
    let (mut client, _server) = service();
    for (opset, batch) in [(7, None), (13, None), (18, None), (23, None), (13, Some(4)), (18, Some(1))] {
        let folder = tempfile::tempdir().unwrap();
        let target = write(folder.path(), opset, batch, vec![node("Relu", &["pixels"], "map", vec![])], vec![], "map");
        let (set, values) = probing_set(folder.path(), 10);
        let units = probe(&mut client, &target, &set, "map", TokenSummary::Unspecified).await.unwrap();
        assert_activations(&units, &values, mean);
        assert_eq!(units[0].top[0].map.as_ref().unwrap().values.len(), 16);
    }
}

/// Tokens of a grid of patches, a pixel each; before them, if asked for, a class token that is the largest of them in each dimension.
fn transformer(folder: &Path, with_class: bool) -> Target {
    let mut nodes = vec![
        node("Reshape", &["pixels", "flat"], "rows", vec![]),
        node("Transpose", &["rows"], "patches", vec![ints("perm", &[0, 2, 1])]),
        node("ReduceMax", &["patches"], "class", vec![ints("axes", &[1]), int("keepdims", 1)]),
        node("Concat", &["class", "patches"], "tokens", vec![int("axis", 1)]),
    ];
    nodes.truncate(if with_class { 4 } else { 2 });
    let output = if with_class { "tokens" } else { "patches" };
    write(folder, 13, None, nodes, vec![int_tensor("flat", &[0, 3, -1])], output)
}

#[tokio::test]
async fn a_transformers_units_are_read_at_the_class_token_or_over_the_patches() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let target = transformer(folder.path(), true);
    let (set, values) = probing_set(folder.path(), 12);
    let described = client.describe_target(DescribeTargetRequest { target: Some(target.clone()), asked: vec![] }).await.unwrap().into_inner();
    let tokens = described.layers.iter().find(|layer| layer.name == "tokens").unwrap();
    assert_eq!((tokens.kind(), tokens.units), (LayerKind::Tokens, 3));

    let class = probe(&mut client, &target, &set, "tokens", TokenSummary::Class).await.unwrap();
    assert_activations(&class, &values, max);
    assert!(class[0].top[0].map.is_none(), "a class token has no place in the picture");

    let patches = probe(&mut client, &target, &set, "tokens", TokenSummary::PatchMean).await.unwrap();
    assert_activations(&patches, &values, mean);
    for top in &patches[1].top {
        let map = top.map.as_ref().unwrap();
        assert_eq!((map.height, map.width), (SIDE, SIDE));
        assert_eq!(map.values, values[&top.path][1], "the patches in their places, without the class token");
    }
}

#[tokio::test]
async fn a_grid_without_a_class_token_has_no_class_to_read() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let target = transformer(folder.path(), false);
    let (set, values) = probing_set(folder.path(), 5);
    let status = probe(&mut client, &target, &set, "patches", TokenSummary::Class).await.unwrap_err();
    assert!(status.message().contains("without a class token") && status.message().contains("patch_mean"), "{}", status.message());
    assert_activations(&probe(&mut client, &target, &set, "patches", TokenSummary::PatchMean).await.unwrap(), &values, mean);
}

#[tokio::test]
async fn activations_that_are_not_finite_are_counted_and_never_among_the_top() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let target = write(folder.path(), 13, None, vec![node("Log", &["pixels"], "log", vec![])], vec![], "log");
    // Picture 0 is black but for a pixel, and its blue all but black: the logarithms' means are infinite in red and green.
    let (set, values) = probing_set(folder.path(), 8);
    let units = probe(&mut client, &target, &set, "log", TokenSummary::Unspecified).await.unwrap();
    assert_eq!(units.iter().map(|unit| unit.not_finite).collect::<Vec<_>>(), [1, 1, 1]);
    for (channel, unit) in units.iter().enumerate() {
        assert_eq!(unit.top.len(), 7);
        assert!(unit.top.iter().all(|top| top.path != "00.png" && top.activation.is_finite()));
        assert!(unit.lowest.is_finite() && unit.highest.is_finite() && !unit.dead);
        let first = &unit.top[0];
        let logs: Vec<f32> = values[&first.path][channel].iter().map(|value| value.ln()).collect();
        assert!((first.activation - mean(&logs)).abs() < 1e-4);
    }
}

/// A network whose units are the channels times weights that lie in a file of their own.
fn with_external_weights(folder: &Path, weights: [f32; 3], location: &str) -> Target {
    fs::write(folder.join("weights.bin"), weights.iter().flat_map(|weight| weight.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    let entry = StringStringEntryProto { key: Some("location".to_owned()), value: Some(location.to_owned()) };
    let tensor = TensorProto {
        float_data: vec![],
        external_data: vec![entry],
        data_location: Some(DataLocation::External as i32),
        ..floats("weights", &[1, 3, 1, 1], weights.to_vec())
    };
    write(folder, 13, None, vec![node("Mul", &["pixels", "weights"], "weighted", vec![])], vec![tensor], "weighted")
}

#[tokio::test]
async fn weights_in_a_file_of_their_own_are_a_part_of_the_network() {
    let (mut client, _server) = service();
    let folder: TempDir = tempfile::tempdir().unwrap();
    let (set, values) = probing_set(folder.path(), 6);
    let mut before: Option<Target> = None;
    for weights in [[1.0, 2.0, 3.0], [5.0, 0.5, 0.25]] {
        let target = with_external_weights(folder.path(), weights, "weights.bin");
        let described = client.describe_target(DescribeTargetRequest { target: Some(target.clone()), asked: vec![] }).await.unwrap().into_inner();
        let target = Target { digest: described.digest, ..target };
        if let Some(before) = before.replace(target.clone()) {
            let status = probe(&mut client, &before, &set, "weighted", TokenSummary::Unspecified).await.unwrap_err();
            assert!(status.message().contains("has the digest"), "other weights are another network: {}", status.message());
        }
        let units = probe(&mut client, &target, &set, "weighted", TokenSummary::Unspecified).await.unwrap();
        for (channel, unit) in units.iter().enumerate() {
            let expected = mean(&values[&unit.top[0].path][channel]) * weights[channel];
            assert!((unit.top[0].activation - expected).abs() < 1e-4, "weights that changed are read again: {} and {expected}", unit.top[0].activation);
        }
    }
    let outside = with_external_weights(folder.path(), [1.0; 3], "../weights.bin");
    let status = probe(&mut client, &outside, &set, "weighted", TokenSummary::Unspecified).await.unwrap_err();
    assert!(status.message().contains("../weights.bin"), "{}", status.message());
}
