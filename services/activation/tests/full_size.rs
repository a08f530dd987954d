//! Networks at full size against PyTorch. `tests/parity/targets.py` makes what is read here, in the folder `targets` of the folder that DND_PARITY names.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use dnd_activation::{Activation, ActivationArgs, add_to};
use dnd_mesh::{
    Slot,
    blobs::{self, Blobs},
    server::{InProcess, Services},
};
use dnd_onnx::{preprocessing, runtime::EngineArgs};
use dnd_proto::v1::{
    ActivatePicture, ActivateRequest, ActivateSetup, LayerUnits, Preprocessing, ProbeRequest, ProbedUnit, ProbingSet, ProbingSource, Summary, Target,
    TokenSummary, activate_request, activate_response, activation_service_client::ActivationServiceClient, probe_response::Event, probing_source::Source,
};
use futures::stream;
use serde::{Deserialize, Serialize};
use tonic::transport::Channel;

/// The largest difference of an activation, in parts of itself, or of the layer's root mean square where that is more.
const LIMIT: f64 = 5e-4;
const TOP: usize = 10;

#[derive(Deserialize)]
struct Expected {
    pictures: usize,
    /// Units whose maps are there.
    maps: usize,
    readings: Vec<Reading>,
}

/// A layer, read in one way.
#[derive(Deserialize)]
struct Reading {
    network: String,
    library: String,
    layer: String,
    reading: String,
    /// Beginning of the files' names: `.g.f32` (pictures, units), `.maps.f32` (pictures, maps, rows, columns).
    file: String,
    units: usize,
    /// How far the library is itself from what it gives in 64-bit floats.
    own: f64,
    /// Rows and columns; empty without space.
    map: Vec<usize>,
}

#[derive(Serialize)]
struct Row {
    what: String,
    reference: String,
    measured: String,
    limit: String,
    control: String,
}

fn numbers(path: &Path) -> Vec<f64> {
    fs::read(path).unwrap().chunks_exact(4).map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().unwrap()))).collect()
}

fn rms(values: &[f64]) -> f64 {
    (values.iter().map(|value| value * value).sum::<f64>() / values.len() as f64).sqrt()
}

/// The largest relative difference.
fn largest(ours: &[f64], theirs: &[f64], scale: f64) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let off = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs() / b.abs().max(scale));
    off.fold(0.0, |most, off| if off.is_nan() { f64::INFINITY } else { most.max(off) })
}

struct Service {
    client: ActivationServiceClient<Channel>,
    folder: PathBuf,
    _server: InProcess,
}

impl Service {
    fn target(&self, network: &str, preprocessing: Option<Preprocessing>) -> Target {
        Target { uri: format!("file:{}", self.folder.join(network).join("network.onnx").display()), preprocessing, ..Default::default() }
    }

    /// Every unit's activations on all pictures, highest first.
    async fn probe(&mut self, network: &str, layers: &[&str], (summary, token_summary): (Summary, TokenSummary), pictures: usize) -> Vec<ProbedUnit> {
        let uri = format!("file:{}", self.folder.join("pictures").display());
        let request = ProbeRequest {
            target: Some(self.target(network, None)),
            probing_set: Some(ProbingSet { sources: vec![ProbingSource { source: Some(Source::Uri(uri)) }] }),
            layers: layers.iter().map(|layer| LayerUnits { layer: (*layer).to_owned(), units: vec![] }).collect(),
            summary: summary.into(),
            token_summary: token_summary.into(),
            top: Some(pictures as u32),
            shard: None,
        };
        let mut events = self.client.probe(request).await.unwrap().into_inner();
        let mut units = Vec::new();
        while let Some(response) = events.message().await.unwrap() {
            units.extend(response.event.and_then(|event| if let Event::Unit(unit) = event { Some(unit) } else { None }));
        }
        units
    }

    /// g of all units of the layers, picture by picture, with another pre-processing.
    async fn activate(&mut self, network: &str, layers: &[&str], of: (Summary, TokenSummary), pictures: usize, with: Option<Preprocessing>) -> Vec<Vec<f32>> {
        let setup = ActivateSetup {
            target: Some(self.target(network, with)),
            layers: layers.iter().map(|layer| LayerUnits { layer: (*layer).to_owned(), units: vec![] }).collect(),
            summary: of.0.into(),
            token_summary: of.1.into(),
        };
        let picture = |i: usize| {
            let picture = fs::read(self.folder.join(format!("pictures/{i:02}.png"))).unwrap().into();
            activate_request::Message::Picture(ActivatePicture { item_id: i as u64, picture })
        };
        let messages = [activate_request::Message::Setup(setup)].into_iter().chain((0..pictures).map(picture));
        let requests: Vec<_> = messages.map(|message| ActivateRequest { message: Some(message) }).collect();
        let mut answers = self.client.activate(stream::iter(requests)).await.unwrap().into_inner();
        let mut all = vec![Vec::new(); pictures];
        while let Some(answer) = answers.message().await.unwrap() {
            let Some(activate_response::Result::Activations(activations)) = answer.result else { panic!("{answer:?}") };
            all[answer.item_id as usize] = activations.values;
        }
        all
    }
}

fn way(reading: &str) -> (Summary, TokenSummary) {
    match reading {
        "mean" | "class mean" => (Summary::Mean, TokenSummary::Class),
        "max" => (Summary::Max, TokenSummary::Class),
        "patch_mean mean" => (Summary::Mean, TokenSummary::PatchMean),
        "patch_mean max" => (Summary::Max, TokenSummary::PatchMean),
        other => panic!("{other}"),
    }
}

#[tokio::test]
#[ignore = "needs what tests/parity/targets.py makes"]
async fn activations_at_full_size_are_those_of_pytorch() {
    let folder = PathBuf::from(env::var_os("DND_PARITY").expect("DND_PARITY is not set: `make parity` sets it")).join("targets");
    let expected: Expected = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let blobs = Arc::new(Blobs::temporary().unwrap());
    let limits = ActivationArgs { program: Some(env!("CARGO_BIN_EXE_dnd-activation").into()), ..Default::default() };
    let activation = Activation::new(EngineArgs::sized(4, 1), limits, Arc::clone(&blobs));
    let server = InProcess::start(blobs::add_to(add_to(Services::default(), Slot::filled(activation)), blobs));
    let mut service = Service { client: ActivationServiceClient::new(server.channel()), folder: folder.clone(), _server: server };

    let mut passes: BTreeMap<(&str, &str), Vec<&Reading>> = BTreeMap::new();
    for reading in &expected.readings {
        passes.entry((&reading.network, &reading.reading)).or_default().push(reading);
    }
    let mut rows = Vec::new();
    for ((network, reading), readings) in passes {
        let (pictures, way) = (expected.pictures, way(reading));
        let layers: Vec<&str> = readings.iter().map(|reading| reading.layer.as_str()).collect();
        let probed = service.probe(network, &layers, way, pictures).await;
        let activated = service.activate(network, &layers, way, pictures, None).await;
        // The control: a deviation that is off by a hundredth.
        let (mut off, _) = preprocessing::beside(&folder.join(network).join("network.onnx"), None).unwrap().unwrap();
        off.std.iter_mut().for_each(|std| *std *= 1.01);
        let elsewhere = service.activate(network, &layers, way, pictures, Some(off)).await;
        let mut first = 0;
        for reading in readings {
            let theirs = numbers(&folder.join(format!("{}.g.f32", reading.file)));
            let scale = rms(&theirs);
            let of = |all: &[Vec<f32>]| all.iter().flat_map(|picture| picture[first..first + reading.units].iter().map(|g| f64::from(*g))).collect::<Vec<_>>();
            let (ours, control) = (of(&activated), of(&elsewhere));
            first += reading.units;
            let within = largest(&ours, &theirs, scale);
            let beyond = largest(&control, &theirs, scale);
            let turned: Vec<f64> = ours[reading.units..].iter().chain(&ours[..reading.units]).copied().collect();
            let shifted = largest(&turned, &theirs, scale);
            let what = format!("{network} {} {}: {} units, {pictures} pictures", reading.layer, reading.reading, reading.units);
            assert!(within <= LIMIT, "{what}: {within:e}");
            assert!(beyond > LIMIT && shifted > LIMIT, "{what}: the controls pass: {beyond:e}, {shifted:e}");

            let units: Vec<&ProbedUnit> = probed.iter().filter(|unit| unit.layer == reading.layer).collect();
            assert_eq!(units.len(), reading.units);
            let (mut equal, mut near) = (0, 0);
            for (unit, probed) in units.iter().enumerate() {
                let g = |picture: usize| theirs[picture * reading.units + unit];
                for top in &probed.top {
                    // Not to the bit: ONNX Runtime's mean over channels-last maps, with which Swin ends, depends on how many pictures run together.
                    let apart = (f64::from(top.activation) - ours[top.index as usize * reading.units + unit]).abs() / scale;
                    assert!(apart <= 0.1 * LIMIT, "{what}: Probe and Activate differ by {apart:e}");
                }
                let mut order: Vec<usize> = (0..pictures).collect();
                order.sort_by(|a, b| g(*b).total_cmp(&g(*a)).then(a.cmp(b)));
                let places = probed.top.iter().map(|top| top.index as usize).zip(order).take(TOP);
                let most = places.map(|(ours, theirs)| (g(ours) - g(theirs)).abs() / g(theirs).abs().max(scale)).fold(0.0, f64::max);
                match most {
                    0.0 => equal += 1,
                    most if most <= 2.0 * LIMIT => near += 1,
                    most => panic!("{what}: unit {unit} has another order: {most:e}"),
                }
            }
            let maps = if reading.map.is_empty() {
                assert!(units.iter().all(|unit| unit.top.iter().all(|top| top.map.is_none())));
                "none".to_owned()
            } else {
                let theirs = numbers(&folder.join(format!("{}.maps.f32", reading.file)));
                let (size, scale) = (reading.map.iter().product::<usize>(), rms(&theirs));
                let mut most: f64 = 0.0;
                for (unit, probed) in units.iter().enumerate().take(expected.maps) {
                    for top in &probed.top {
                        let map = top.map.as_ref().unwrap();
                        assert_eq!([map.height as usize, map.width as usize], reading.map[..], "{what}");
                        let ours: Vec<f64> = map.values.iter().map(|value| f64::from(*value)).collect();
                        let at = (top.index as usize * expected.maps + unit) * size;
                        most = most.max(largest(&ours, &theirs[at..at + size], scale));
                    }
                }
                assert!(most <= LIMIT, "{what}: maps {most:e}");
                format!("within {most:.1e}")
            };
            rows.push(Row {
                what,
                reference: reading.library.clone(),
                measured: format!("g within {within:.1e} (the library's own 32-bit floats within {:.1e} of 64-bit ones), maps {maps}; top {TOP} in the same order for {equal} units, {near} near ties", reading.own),
                limit: format!("{LIMIT:.0e}"),
                control: format!("deviation 1 % off: {beyond:.1e}; next picture: {shifted:.1e}"),
            });
        }
    }
    fs::write(folder.join("measured.json"), serde_json::to_string_pretty(&rows).unwrap()).unwrap();
}
