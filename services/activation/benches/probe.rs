//! The probing pass against the bare network: how much of the pass is not inference.
//!
//! Both run the same pictures on one session of one thread, in batches of eight, in turns. The reference is given tensors; the pass reads files, digests
//! and decodes them, runs the network with its maps as outputs, and keeps each unit's top pictures.
#![allow(clippy::unwrap_used, missing_docs)]

use std::{sync::Arc, time::Instant};

use dnd_activation::{Activation, ActivationArgs, add_to};
use dnd_mesh::{
    Slot,
    blobs::Blobs,
    server::{InProcess, Services},
};
use dnd_onnx::{
    folder::read_json,
    pictures::{PictureLimits, Preprocessor, PreprocessorConfig, decode},
    runtime::{self, EngineArgs},
};
use dnd_proto::v1::{LayerUnits, ProbeRequest, ProbingSet, ProbingSource, Target, activation_service_client::ActivationServiceClient, probing_source::Source};
use dnd_testing::{pictures, sketch, write_pictures};
use ort::value::Tensor;

const PICTURES: usize = 1000;
const BATCH: usize = 8;
const ROUNDS: usize = 5;

fn main() {
    let network = sketch("targets/resnet/resnet.onnx");
    let config: PreprocessorConfig = read_json(&network.with_file_name("preprocessor_config.json")).unwrap();
    let preprocessing = config.preprocessing().unwrap();
    let preprocessor = Preprocessor::new(&preprocessing).unwrap();
    let args = EngineArgs::sized(BATCH, 1);

    let pictures = pictures(PICTURES, 2);
    let folder = tempfile::tempdir().unwrap();
    write_pictures(folder.path(), &pictures);
    let tensors: Vec<Vec<f32>> = pictures
        .chunks(BATCH)
        .map(|some| {
            let mut tensor = Vec::new();
            some.iter().for_each(|(_, bytes)| preprocessor.append(&decode(bytes, PictureLimits::default()).unwrap(), &mut tensor).unwrap());
            tensor
        })
        .collect();
    let mut session = runtime::session(&network, &args).unwrap();
    let (height, width) = preprocessor.size();
    let input = session.inputs()[0].name().to_owned();
    let mut bare = || {
        let since = Instant::now();
        for tensor in &tensors {
            let count = tensor.len() / preprocessor.values();
            session.run(vec![(input.as_str(), Tensor::from_array(([count, 3, height, width], tensor.clone())).unwrap())]).unwrap();
        }
        since.elapsed().as_secs_f64()
    };

    let blobs = Arc::new(Blobs::temporary().unwrap());
    let limits = ActivationArgs { program: Some(env!("CARGO_BIN_EXE_dnd-activation").into()), ..Default::default() };
    let activation = Activation::new(args, limits, blobs);
    let request = ProbeRequest {
        target: Some(Target { uri: format!("file:{}", network.display()), preprocessing: Some(preprocessing), ..Default::default() }),
        probing_set: Some(ProbingSet { sources: vec![ProbingSource { source: Some(Source::Uri(format!("file:{}", folder.path().display()))) }] }),
        layers: ["layer1", "layer2", "layer3", "layer4", "fc"].map(|layer| LayerUnits { layer: layer.to_owned(), units: Vec::new() }).to_vec(),
        ..Default::default()
    };
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let server = tokio.block_on(async { InProcess::start(add_to(Services::default(), Slot::filled(activation))) });
    let mut client = tokio.block_on(async { ActivationServiceClient::new(server.channel()) });
    let mut pass = || {
        let since = Instant::now();
        tokio.block_on(async {
            let mut events = client.probe(request.clone()).await.unwrap().into_inner();
            while events.message().await.unwrap().is_some() {}
        });
        since.elapsed().as_secs_f64()
    };

    bare();
    pass();
    let mut ratios: Vec<(f64, f64)> = (0..ROUNDS).map(|_| (bare(), pass())).collect();
    ratios.sort_by(|a, b| (a.1 / a.0).total_cmp(&(b.1 / b.0)));
    let (bare, pass) = ratios[ROUNDS / 2];
    println!(
        "probing pass, {PICTURES} pictures, all units of 5 layers: {:.2} times the bare network (median of {ROUNDS}; {:.0} against {:.0} pictures a second)",
        pass / bare,
        PICTURES as f64 / pass,
        PICTURES as f64 / bare
    );
}
