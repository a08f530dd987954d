//! A real network on real photographs: EfficientNet-Lite0 on 20 of ImageNet, against what Python's onnxruntime says of them
//! (`tests/photographs/make.py`, run by `scripts/photographs.sh`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use dnd_activation::{Activation, ActivationArgs, add_to};
use dnd_mesh::{
    Slot,
    blobs::Blobs,
    server::{InProcess, Services},
};
use dnd_onnx::{folder::read_json, pictures::PreprocessorConfig, runtime::EngineArgs};
use dnd_proto::v1::{
    LayerUnits, Preprocessing, ProbeRequest, ProbedUnit, ProbingSet, ProbingSource, Resampling, ResizeMode, Target,
    activation_service_client::ActivationServiceClient, probe_response::Event, probing_source::Source,
};
use dnd_testing::sketch;
use dnd_tests::dnd;
use serde::Deserialize;

/// What Python says: of each layer, picture by picture, the mean activation of each unit.
#[derive(Deserialize)]
struct Reference {
    pictures: Vec<String>,
    right: usize,
    layers: BTreeMap<String, Vec<Vec<f64>>>,
}

fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../third_party/photographs");
    assert!(folder.join("made").is_file(), "the network is not there: run scripts/photographs.sh");
    folder.canonicalize().unwrap()
}

/// All pictures of a folder, ordered by each unit of the layers.
async fn probe(pictures: &str, preprocessing: Preprocessing, layers: &[&str]) -> Vec<ProbedUnit> {
    let blobs = Arc::new(Blobs::temporary().unwrap());
    let limits = ActivationArgs { program: Some(dnd_tests::program("dnd-activation")), ..Default::default() };
    let activation = Activation::new(EngineArgs::sized(4, 2), limits, blobs);
    let server = InProcess::start(add_to(Services::default(), Slot::filled(activation)));
    let uri = |name: &str| format!("file:{}", folder().join(name).display());
    let request = ProbeRequest {
        target: Some(Target { uri: uri("network.onnx"), preprocessing: Some(preprocessing), ..Default::default() }),
        probing_set: Some(ProbingSet { sources: vec![ProbingSource { source: Some(Source::Uri(uri(pictures))) }] }),
        layers: layers.iter().map(|layer| LayerUnits { layer: (*layer).to_owned(), units: Vec::new() }).collect(),
        top: Some(20),
        ..Default::default()
    };
    let mut client = ActivationServiceClient::new(server.channel()).max_decoding_message_size(dnd_mesh::MAX_MESSAGE_BYTES);
    let mut events = client.probe(request).await.unwrap().into_inner();
    let mut units = Vec::new();
    while let Some(response) = events.message().await.unwrap() {
        if let Some(Event::Unit(unit)) = response.event {
            units.push(unit);
        }
    }
    units
}

/// The picture's number in the reference.
fn number(reference: &Reference, path: &str) -> usize {
    let stem = Path::new(path).file_stem().unwrap().to_str().unwrap();
    reference.pictures.iter().position(|name| name == stem).unwrap()
}

#[tokio::test]
async fn every_unit_puts_the_pictures_in_the_order_that_python_does() {
    let reference: Reference = read_json(&folder().join("reference.json")).unwrap();
    let layers: Vec<&str> = reference.layers.keys().map(String::as_str).collect();
    // The pictures are at the input's size already: both sides see the same pixels.
    let as_they_are = Preprocessing {
        resize_mode: ResizeMode::Squash.into(),
        height: 224,
        width: 224,
        shortest_edge: 0,
        resampling: Resampling::Bilinear.into(),
        mean: vec![127.0 / 255.0; 3],
        std: vec![128.0 / 255.0; 3],
    };
    let units = probe("prepared", as_they_are, &layers).await;
    assert_eq!(units.len(), reference.layers.values().map(|layer| layer[0].len()).sum::<usize>());
    for unit in &units {
        let theirs = |picture: usize| reference.layers[&unit.layer][picture][unit.unit as usize];
        let range = f64::from(unit.highest) - f64::from(unit.lowest);
        let order: Vec<usize> = unit.top.iter().map(|top| number(&reference, &top.path)).collect();
        assert_eq!(order.len(), 20);
        for (top, picture) in unit.top.iter().zip(&order) {
            let difference = (f64::from(top.activation) - theirs(*picture)).abs();
            assert!(difference <= 1e-4 * range, "{} {}: {} and {}", unit.layer, unit.unit, top.activation, theirs(*picture));
        }
        for pair in order.windows(2) {
            // Where Python's own values are a rounding apart, either order is its order.
            assert!(theirs(pair[0]) >= theirs(pair[1]) - 1e-5 * range, "{} {}: {order:?}", unit.layer, unit.unit);
        }
    }
}

#[tokio::test]
async fn units_of_classes_know_their_own_photographs() {
    let reference: Reference = read_json(&folder().join("reference.json")).unwrap();
    let config: PreprocessorConfig = read_json(&folder().join("preprocessor_config.json")).unwrap();
    let units = probe("photographs", config.preprocessing().unwrap(), &["logits"]).await;
    let class = |path: &str| Path::new(path).file_stem().unwrap().to_str().unwrap().rsplit('_').next().unwrap().parse::<u32>().unwrap();
    let classes: Vec<u32> = reference.pictures.iter().map(|name| class(name)).collect();
    let own_first = units.iter().filter(|unit| classes.contains(&unit.unit) && class(&unit.top[0].path) == unit.unit).count();
    let mut exact = 0;
    for unit in &units {
        let theirs = |picture: usize| reference.layers["logits"][picture][unit.unit as usize];
        let range = f64::from(unit.highest) - f64::from(unit.lowest);
        let order: Vec<usize> = unit.top.iter().map(|top| number(&reference, &top.path)).collect();
        exact += usize::from(order.windows(2).all(|pair| theirs(pair[0]) >= theirs(pair[1])));
        for pair in order.windows(2) {
            // JPEGs are decoded, and pictures resized, by other code than Python's: a little may lie between.
            assert!(theirs(pair[0]) >= theirs(pair[1]) - 0.08 * range, "{}: {} and {} of {range}", unit.unit, theirs(pair[0]), theirs(pair[1]));
        }
    }
    println!(
        "photographs: {own_first} of {} units of the photographs' classes put their own photograph first; {exact} of {} units have exactly Python's order",
        classes.len(),
        units.len()
    );
    assert!(own_first >= reference.right, "{own_first} of {}", classes.len());
}

#[test]
fn a_job_runs_on_a_real_network_and_photographs() {
    let here = tempfile::tempdir().unwrap();
    let (network, photographs, suite) = (folder().join("network.onnx"), folder().join("photographs"), sketch(""));
    let args = [
        "dissect",
        "--target",
        network.to_str().unwrap(),
        "--layer",
        "blocks.10,logits",
        "--units",
        "1,30",
        "--images",
        photographs.to_str().unwrap(),
        "--out",
        "out",
        "--models",
        suite.to_str().unwrap(),
        "--num-inference-steps",
        "4",
        "--images-per-concept",
        "3",
    ];
    let ran = dnd(here.path(), &args);
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
    let results = fs::read_to_string(here.path().join("out/results.jsonl")).unwrap();
    let units: Vec<serde_json::Value> = results.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(units.len(), 4);
    let crops = |layer: &str| units.iter().filter(|unit| unit["layer"] == layer).map(|unit| unit["crops"].as_array().unwrap().len()).sum::<usize>();
    assert!(crops("blocks.10") > 0, "a convolution's units have crops");
    assert_eq!(crops("logits"), 0, "those of the last layer have no map to crop by");
}
