//! Models of kinds that the sketch suite does not have, small enough to be worked out by hand: other types and shapes at the edges of the graphs, half
//! precision, other layouts, weights in files of their own, pictures that can't be used.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path};

use dnd_diffusion::{
    Diffusion, Drawing, Request,
    pipeline::{Parts, Pipeline},
};
use dnd_onnx::{
    folder::ModelFolder,
    format::{
        AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto, ValueInfoProto,
        attribute_proto::AttributeType,
        tensor_proto::{DataLocation, DataType},
    },
    pictures::{PictureLimits, decode},
    runtime::EngineArgs,
};
use dnd_testing::{
    by_hand::{floats, ints, node, value},
    copy_without, sketch,
};
use futures::future::join_all;
use prost::Message as _;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Side of the latents, which are the pictures.
const SIDE: i64 = 4;
/// Tokens of a text.
const LENGTH: i64 = 32;
/// Any number of pictures.
const N: Option<i64> = None;

fn cast(input: &str, output: &str, to: DataType) -> NodeProto {
    let to = AttributeProto { name: Some("to".to_owned()), r#type: Some(AttributeType::Int as i32), i: Some(to as i64), ..Default::default() };
    NodeProto { attribute: vec![to], ..node("Cast", &[input], output) }
}

fn write(file: &Path, input: Vec<ValueInfoProto>, node: Vec<NodeProto>, initializer: Vec<TensorProto>, output: ValueInfoProto) {
    let graph = GraphProto { name: Some("by hand".to_owned()), node, initializer, input, output: vec![output], ..Default::default() };
    let opset_import = vec![OperatorSetIdProto { version: Some(17), ..Default::default() }];
    let model = ModelProto { ir_version: Some(8), graph: Some(graph), opset_import, ..Default::default() };
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, model.encode_to_vec()).unwrap();
}

/// How a model is made: what stands at the edges of its graphs, and what its UNet says.
struct Made {
    ids: DataType,
    floats: DataType,
    timestep: DataType,
    timestep_shape: &'static [Option<i64>],
    /// From the latents `x`, the time step `t` and the mean of the states `s` (pictures x 1 x 1 x 1), the mean latents `y`.
    unet: Vec<NodeProto>,
}

impl Default for Made {
    fn default() -> Self {
        let unet = vec![node("Mul", &["t", "thousandth"], "at"), node("Mul", &["s", "thousandth"], "said"), node("Sub", &["said", "at"], "y")];
        Self { ids: DataType::Int64, floats: DataType::Float, timestep: DataType::Int64, timestep_shape: &[Some(1)], unet }
    }
}

impl Made {
    /// Writes the model: pictures of 4 x 4, whose latents are their pixels. The text encoder's states are the ids; the UNet's output is `y` times a
    /// pattern, 0 to 1 over a picture, and taken for the denoised picture.
    fn write(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let (root, floating) = (folder.path(), self.floats);
        copy_without(&sketch("diffusion"), root, &["unet/model.onnx", "text_encoder/model.onnx", "vae_decoder/model.onnx"]);
        let states = [N, Some(LENGTH), Some(1)];
        write(
            &root.join("text_encoder/model.onnx"),
            vec![value("input_ids", self.ids, &[N, Some(LENGTH)])],
            vec![cast("input_ids", "ids", DataType::Float), node("Unsqueeze", &["ids", "last"], "wide"), cast("wide", "last_hidden_state", floating)],
            vec![ints("last", &[2])],
            value("last_hidden_state", floating, &states),
        );
        let latents = [N, Some(3), Some(SIDE), Some(SIDE)];
        let mut nodes = vec![
            cast("sample", "x", DataType::Float),
            cast("timestep", "flat", DataType::Float),
            node("Reshape", &["flat", "column"], "t"),
            cast("encoder_hidden_states", "states", DataType::Float),
            node("ReduceMean", &["states"], "mean"),
            node("Reshape", &["mean", "column"], "s"),
        ];
        let axes = AttributeProto { name: Some("axes".to_owned()), r#type: Some(AttributeType::Ints as i32), ints: vec![1, 2], ..Default::default() };
        nodes[4].attribute.push(axes);
        nodes.extend(self.unet.iter().cloned());
        nodes.extend([
            node("Mul", &["y", "pattern"], "drawn"),
            node("Mul", &["x", "zero"], "nothing"),
            node("Add", &["drawn", "nothing"], "out"),
            cast("out", "out_sample", floating),
        ]);
        let count = 3 * SIDE * SIDE;
        write(
            &root.join("unet/model.onnx"),
            vec![value("sample", floating, &latents), value("timestep", self.timestep, self.timestep_shape), value("encoder_hidden_states", floating, &states)],
            nodes,
            vec![
                ints("column", &[-1, 1, 1, 1]),
                floats("thousandth", &[1], vec![1e-3]),
                floats("zero", &[1], vec![0.0]),
                floats("pattern", &[1, 3, SIDE, SIDE], (0..count).map(|i| i as f32 / (count - 1) as f32).collect()),
            ],
            value("out_sample", floating, &latents),
        );
        write(
            &root.join("vae_decoder/model.onnx"),
            vec![value("latent_sample", floating, &latents)],
            vec![node("Identity", &["latent_sample"], "sample")],
            vec![],
            value("sample", floating, &latents),
        );
        say(root, "unet/config.json", json!({ "in_channels": 3, "sample_size": SIDE }));
        say(root, "vae_decoder/config.json", json!({ "scaling_factor": 1.0 }));
        say(root, "scheduler/scheduler_config.json", json!({ "_class_name": "DDIMScheduler", "prediction_type": "sample" }));
        folder
    }
}

fn say(folder: &Path, file: &str, value: Value) {
    fs::write(folder.join(file), value.to_string()).unwrap();
}

fn load(folder: &TempDir) -> Diffusion {
    Diffusion::load(folder.path(), &EngineArgs::sized(4, 1)).unwrap()
}

fn refusal(folder: &TempDir) -> String {
    Diffusion::load(folder.path(), &EngineArgs::sized(4, 1)).err().expect("it can't be right").to_string()
}

fn request(concept: &str, guidance: f32) -> Request {
    Request { concept: concept.to_owned(), index: 0, seed: 0, steps: 4, guidance }
}

/// The bytes of the picture's pixels.
async fn draw(diffusion: &Diffusion, guidance: f32) -> Vec<u8> {
    match diffusion.draw(request("red circles", guidance)).await.unwrap() {
        Drawing::Png(png) => decode(&png, PictureLimits::default()).unwrap().into_raw(),
        other => panic!("{other:?}"),
    }
}

/// The nodes of a UNet that says how many rows it is given, in eighths.
fn rows() -> Vec<NodeProto> {
    vec![
        node("Shape", &["x"], "shape"),
        node("Slice", &["shape", "nought", "first", "nought"], "rows"),
        cast("rows", "count", DataType::Float),
        node("Mul", &["count", "eighth"], "y"),
    ]
}

#[tokio::test]
async fn a_time_step_of_any_type_and_shape_draws_the_same_picture() {
    let expected = draw(&load(&Made::default().write()), 7.5).await;
    for timestep in [DataType::Int64, DataType::Int32, DataType::Float, DataType::Float16, DataType::Double] {
        for timestep_shape in [&[][..], &[Some(1)], &[N]] {
            let made = Made { timestep, timestep_shape, ..Default::default() };
            assert_eq!(draw(&load(&made.write()), 7.5).await, expected, "{timestep:?} {timestep_shape:?}");
        }
    }
    let made = Made { timestep_shape: &[N, Some(1)], ..Default::default() };
    assert!(refusal(&made.write()).contains("timestep has more than one axis"));
    // And it is heard: other steps, another picture.
    let made = Made { unet: vec![node("Mul", &["s", "thousandth"], "y")], ..Default::default() };
    assert_ne!(draw(&load(&made.write()), 7.5).await, expected);
}

#[tokio::test]
async fn token_ids_are_of_either_width() {
    let expected = draw(&load(&Made::default().write()), 7.5).await;
    assert_eq!(draw(&load(&Made { ids: DataType::Int32, ..Default::default() }.write()), 7.5).await, expected);
}

#[tokio::test]
async fn a_half_precision_model_draws_what_the_full_one_draws() {
    let expected = draw(&load(&Made::default().write()), 1.0).await;
    let halved = draw(&load(&Made { floats: DataType::Float16, ..Default::default() }.write()), 1.0).await;
    assert!(expected.iter().zip(&halved).all(|(a, b)| a.abs_diff(*b) <= 1), "{expected:?} {halved:?}");
}

#[tokio::test]
async fn a_picture_that_is_not_finite_or_all_one_value_is_unusable_and_the_others_are_good() {
    // The exclamation mark's id is the smallest, and the mean of many less 500 is negative: its root is no number, and cut off at 0 it is all one value.
    for (operator, reason) in [("Sqrt", "not finite"), ("Relu", "all one value")] {
        for floats in [DataType::Float, DataType::Float16] {
            let unet = vec![node("Sub", &["s", "fivehundred"], "less"), node(operator, &["less"], "large"), node("Mul", &["large", "thousandth"], "y")];
            let folder = Made { floats, unet, ..Default::default() }.write();
            add(&folder, vec![floats_of("fivehundred", 500.0)]);
            let diffusion = load(&folder);
            let loud = "! ".repeat(20);
            let drawings = join_all(["red circles", &loud, "blue stars"].map(|concept| diffusion.draw(request(concept, 1.0)))).await;
            let [Ok(Drawing::Png(first)), Ok(Drawing::Unusable(said)), Ok(Drawing::Png(_))] = &drawings[..] else { panic!("{drawings:?}") };
            assert!(said.contains(reason), "{said}");
            let alone = diffusion.draw(request("red circles", 1.0)).await.unwrap();
            assert_eq!(alone, Drawing::Png(first.clone()), "its company changes nothing");
        }
    }
}

fn floats_of(name: &str, value: f32) -> TensorProto {
    floats(name, &[1], vec![value])
}

/// Adds weights to the UNet.
fn add(folder: &TempDir, weights: Vec<TensorProto>) {
    change(folder, |graph| graph.initializer.extend(weights));
}

fn change(folder: &TempDir, change: impl FnOnce(&mut GraphProto)) {
    let file = folder.path().join("unet/model.onnx");
    let mut model = ModelProto::decode(&*fs::read(&file).unwrap()).unwrap();
    change(model.graph.as_mut().unwrap());
    fs::write(&file, model.encode_to_vec()).unwrap();
}

/// What the brightest byte is for a UNet that says a number of eighths.
fn eighths(count: f32) -> u8 {
    ((count / 16.0 + 0.5) * 255.0).round_ties_even() as u8
}

#[tokio::test]
async fn guidance_of_one_and_below_runs_half_the_rows() {
    let folder = Made { unet: rows(), ..Default::default() }.write();
    add(&folder, vec![ints("nought", &[0]), ints("first", &[1]), floats_of("eighth", 0.125)]);
    let diffusion = load(&folder);
    for (guidance, rows) in [(7.5, 2.0), (1.01, 2.0), (1.0, 1.0), (0.0, 1.0)] {
        assert_eq!(draw(&diffusion, guidance).await.into_iter().max(), Some(eighths(rows)), "guidance {guidance}");
    }
}

/// A UNet that is told the guidance scale, and gives back how.
fn latent_consistency_model(unet: Vec<NodeProto>) -> TempDir {
    let folder = Made { unet, ..Default::default() }.write();
    let width = 3 * SIDE * SIDE;
    change(&folder, |graph| graph.input.push(value("timestep_cond", DataType::Float, &[N, Some(width)])));
    say(folder.path(), "unet/config.json", json!({ "in_channels": 3, "sample_size": SIDE, "time_cond_proj_dim": width }));
    say(folder.path(), "model_index.json", json!({ "_class_name": "LatentConsistencyModelPipeline" }));
    folder
}

#[tokio::test]
async fn a_latent_consistency_model_is_told_the_guidance_and_run_once() {
    let folder = latent_consistency_model(rows());
    add(&folder, vec![ints("nought", &[0]), ints("first", &[1]), floats_of("eighth", 0.125)]);
    assert_eq!(draw(&load(&folder), 7.5).await.into_iter().max(), Some(eighths(1.0)), "one row a picture");

    let folder = latent_consistency_model(vec![node("Reshape", &["timestep_cond", "picture"], "told")]);
    change(&folder, |graph| {
        graph.node.retain(|node| node.output[0] != "drawn");
        graph.node.iter_mut().filter(|node| node.output[0] == "out").for_each(|node| node.input[0] = "told".to_owned());
        graph.initializer.push(ints("picture", &[-1, 3, SIDE, SIDE]));
    });
    let parts = Parts::read(&ModelFolder::open(folder.path()).unwrap()).unwrap();
    let mut pipeline = Pipeline::load(&parts, &EngineArgs::sized(1, 1)).unwrap();
    let expected: Vec<(f32, Vec<f32>)> = serde_json::from_str(include_str!("goldens/guidance.json")).unwrap();
    for (guidance, embedding) in expected {
        let told = pipeline.predict(vec![0.0; embedding.len()], 999.0, &[0.0; LENGTH as usize], guidance).unwrap();
        assert!(told.iter().zip(&embedding).all(|(ours, theirs)| (ours - theirs).abs() < 1e-3), "{guidance}: {told:?}");
    }
}

#[test]
fn a_unet_and_its_configuration_have_to_agree_on_being_told_the_guidance() {
    let folder = Made::default().write();
    say(folder.path(), "unet/config.json", json!({ "in_channels": 3, "sample_size": SIDE, "time_cond_proj_dim": 256 }));
    let problem = refusal(&folder);
    assert!(problem.contains("unet/model.onnx") && problem.contains("timestep_cond") && problem.contains("time_cond_proj_dim 256"), "{problem}");
    let folder = latent_consistency_model(vec![node("Mul", &["s", "thousandth"], "y")]);
    say(folder.path(), "unet/config.json", json!({ "in_channels": 3, "sample_size": SIDE }));
    assert!(refusal(&folder).contains("no time_cond_proj_dim"));
}

#[tokio::test]
async fn a_decoder_without_a_scaling_factor_takes_stable_diffusions_and_says_so() {
    let folder = Made::default().write();
    let drawn = |scaling: Value| {
        say(folder.path(), "vae_decoder/config.json", scaling);
        load(&folder)
    };
    let said = drawn(json!({ "scaling_factor": 0.18215 }));
    assert!(!said.model().notice.contains("scaling_factor"));
    let unsaid = drawn(json!({}));
    assert!(unsaid.model().notice.contains("vae_decoder/config.json") && unsaid.model().notice.contains("0.18215"), "{}", unsaid.model().notice);
    assert_eq!(draw(&unsaid, 1.0).await, draw(&said, 1.0).await);
    assert_ne!(draw(&unsaid, 1.0).await, draw(&drawn(json!({ "scaling_factor": 0.5 })), 1.0).await);
}

#[tokio::test]
async fn a_decoders_configuration_may_be_the_whole_autoencoders() {
    let folder = Made::default().write();
    let expected = draw(&load(&folder), 7.5).await;
    fs::create_dir(folder.path().join("vae")).unwrap();
    fs::rename(folder.path().join("vae_decoder/config.json"), folder.path().join("vae/config.json")).unwrap();
    assert_eq!(draw(&load(&folder), 7.5).await, expected);
}

#[test]
fn a_tokenizer_may_pad_with_another_token_than_the_end() {
    // As Stable Diffusion 2's does.
    let folder = Made::default().write();
    let config = json!({ "model_max_length": LENGTH, "eos_token": "<|endoftext|>", "pad_token": "!" });
    say(folder.path(), "tokenizer/tokenizer_config.json", config);
    let parts = Parts::read(&ModelFolder::open(folder.path()).unwrap()).unwrap();
    let ids = Pipeline::load(&parts, &EngineArgs::sized(1, 1)).unwrap().encode(&["red circles"]).unwrap();
    let end = ids.iter().position(|id| *id == 660.0).expect("the end token");
    assert_eq!(ids.len() as i64, LENGTH);
    assert!(end < 10 && ids[end + 1..].iter().all(|id| *id == 0.0), "{ids:?}");
}

#[tokio::test]
async fn weights_may_lie_beside_the_graph_and_are_missed_by_name() {
    let folder = Made::default().write();
    let expected = draw(&load(&folder), 7.5).await;
    for name in ["model.onnx_data", "model.onnx.data", "weights.pb"] {
        let file = folder.path().join("unet").join(name);
        change(&folder, |graph| {
            let pattern = graph.initializer.iter_mut().find(|tensor| tensor.name() == "pattern").unwrap();
            if !pattern.float_data.is_empty() {
                let values = std::mem::take(&mut pattern.float_data);
                fs::write(&file, values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
                pattern.data_location = Some(DataLocation::External as i32);
            } else {
                let before = pattern.external_data[0].value().to_owned();
                fs::rename(folder.path().join("unet").join(before), &file).unwrap();
            }
            pattern.external_data = vec![StringStringEntryProto { key: Some("location".to_owned()), value: Some(name.to_owned()) }];
        });
        assert_eq!(draw(&load(&folder), 7.5).await, expected, "{name}");
        fs::rename(&file, folder.path().join("elsewhere")).unwrap();
        let problem = refusal(&folder);
        assert!(problem.contains(&format!("unet/{name}")) && problem.contains("no such file"), "{problem}");
        fs::rename(folder.path().join("elsewhere"), &file).unwrap();
    }
}

#[test]
fn stable_diffusions_pipeline_overrules_the_offset_of_its_scheduler() {
    let folder = Made::default().write();
    for (class, timesteps) in [("StableDiffusionPipeline", [751.0, 501.0, 251.0, 1.0]), ("LatentConsistencyModelPipeline", [750.0, 500.0, 250.0, 0.0])] {
        say(folder.path(), "model_index.json", json!({ "_class_name": class }));
        let parts = Parts::read(&ModelFolder::open(folder.path()).unwrap()).unwrap();
        let steps = parts.scheduler().schedule(4).unwrap().steps;
        assert_eq!(steps.iter().map(|step| step.timestep).collect::<Vec<_>>(), timesteps, "{class}");
    }
}

#[test]
fn pipelines_of_other_kinds_are_refused_by_name() {
    let folder = Made::default().write();
    for class in ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "StableDiffusionInpaintPipeline", "FluxPipeline"] {
        say(folder.path(), "model_index.json", json!({ "_class_name": class }));
        let problem = refusal(&folder);
        assert!(problem.contains("model_index.json") && problem.contains(class) && problem.contains("StableDiffusionPipeline"), "{problem}");
    }
    for class in ["StableDiffusionPipeline", "OnnxStableDiffusionPipeline", "ORTStableDiffusionPipeline"] {
        say(folder.path(), "model_index.json", json!({ "_class_name": class }));
        load(&folder);
    }
    say(folder.path(), "scheduler/scheduler_config.json", json!({ "_class_name": "HeunDiscreteScheduler" }));
    let problem = refusal(&folder);
    assert!(problem.contains("scheduler_config.json") && problem.contains("HeunDiscreteScheduler") && problem.contains("EulerDiscreteScheduler"), "{problem}");
}
