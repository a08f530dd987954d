//! The sketch suite's model in the layouts that others are published in: half precision, both encoders in one graph, files of other names.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path};

use dnd_clip::Clip;
use dnd_onnx::{
    format::{AttributeProto, ModelProto, NodeProto, attribute_proto::AttributeType, tensor_proto::DataType, type_proto},
    runtime::EngineArgs,
};
use dnd_testing::{copy_without, pictures, sketch};
use prost::Message as _;
use tempfile::TempDir;

const SAID: [&str; 3] = ["red circles", "a large blue star on a yellow background", ""];

fn copy() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_without(&sketch("clip"), folder.path(), &[]);
    folder
}

/// Embeddings of some pictures and texts.
async fn embed(folder: &Path) -> Vec<Vec<f32>> {
    let clip = Clip::load(folder, &EngineArgs::sized(2, 1)).unwrap();
    let mut embeddings = Vec::new();
    for (_, picture) in pictures(3, 50) {
        embeddings.push(clip.image(picture).await.unwrap().values);
    }
    for text in SAID {
        embeddings.push(clip.text(text.to_owned()).await.unwrap().values);
    }
    embeddings
}

fn read(file: &Path) -> ModelProto {
    ModelProto::decode(&*fs::read(file).unwrap()).unwrap()
}

fn cast(input: &str, output: &str, to: DataType) -> NodeProto {
    let to = AttributeProto { name: Some("to".to_owned()), r#type: Some(AttributeType::Int as i32), i: Some(to as i64), ..Default::default() };
    NodeProto { op_type: Some("Cast".to_owned()), input: vec![input.to_owned()], output: vec![output.to_owned()], attribute: vec![to], ..Default::default() }
}

/// Gives the values of a graph other names.
fn rename(model: &mut ModelProto, name: impl Fn(&str) -> String) {
    let graph = model.graph.as_mut().unwrap();
    graph.value_info.clear();
    for node in &mut graph.node {
        assert!(node.attribute.iter().all(|attribute| attribute.g.is_none()), "no graph inside of the graph");
        node.name = Some(name(node.name()));
        node.input.iter_mut().chain(&mut node.output).filter(|value| !value.is_empty()).for_each(|value| *value = name(value));
    }
    graph.initializer.iter_mut().for_each(|tensor| tensor.name = Some(name(tensor.name())));
    graph.input.iter_mut().chain(&mut graph.output).for_each(|value| value.name = Some(name(value.name())));
}

/// Makes a graph take and give half precision, as exports in half precision do.
fn halve(file: &Path) {
    let mut model = read(file);
    let edges: Vec<String> = {
        let graph = model.graph.as_ref().unwrap();
        graph.input.iter().chain(&graph.output).map(|value| value.name().to_owned()).collect()
    };
    rename(&mut model, |value| if edges.iter().any(|edge| edge == value) { format!("full_{value}") } else { value.to_owned() });
    let graph = model.graph.as_mut().unwrap();
    let mut first = Vec::new();
    for (value, given) in graph.input.iter_mut().map(|value| (value, true)).chain(graph.output.iter_mut().map(|value| (value, false))) {
        let full = value.name().to_owned();
        let half = full.trim_start_matches("full_").to_owned();
        value.name = Some(half.clone());
        let Some(type_proto::Value::TensorType(tensor)) = value.r#type.as_mut().and_then(|kind| kind.value.as_mut()) else { panic!("{half}") };
        let kind = tensor.elem_type();
        if kind == DataType::Float as i32 {
            tensor.elem_type = Some(DataType::Float16 as i32);
        }
        if given {
            first.push(cast(&half, &full, DataType::try_from(kind).unwrap()));
        } else {
            graph.node.push(cast(&full, &half, DataType::Float16));
        }
    }
    graph.node.splice(0..0, first);
    fs::write(file, model.encode_to_vec()).unwrap();
}

/// Puts both encoders into one graph, as the exports of a whole model have them.
fn join(folder: &Path) {
    let (vision, text) = (folder.join("onnx/vision_model.onnx"), folder.join("onnx/text_model.onnx"));
    let (mut both, mut other) = (read(&vision), read(&text));
    rename(&mut other, |value| if ["input_ids", "text_embeds"].contains(&value) { value.to_owned() } else { format!("text_{value}") });
    let (graph, other) = (both.graph.as_mut().unwrap(), other.graph.unwrap());
    graph.node.extend(other.node);
    graph.initializer.extend(other.initializer);
    graph.input.extend(other.input);
    graph.output.extend(other.output);
    // The two are given different numbers.
    let dims = graph.input.iter_mut().chain(&mut graph.output).filter_map(|value| {
        let name = value.name().to_owned();
        match value.r#type.as_mut()?.value.as_mut()? {
            type_proto::Value::TensorType(tensor) => Some((name, tensor.shape.as_mut()?)),
            _ => None,
        }
    });
    for (name, shape) in dims {
        shape.dim[0].value = Some(dnd_onnx::format::tensor_shape_proto::dimension::Value::DimParam(format!("batch of {name}")));
    }
    fs::write(folder.join("onnx/model.onnx"), both.encode_to_vec()).unwrap();
    fs::remove_file(vision).unwrap();
    fs::remove_file(text).unwrap();
}

#[tokio::test]
async fn a_half_precision_model_embeds_as_the_full_one_does() {
    let folder = copy();
    halve(&folder.path().join("onnx/vision_model.onnx"));
    halve(&folder.path().join("onnx/text_model.onnx"));
    for (full, half) in embed(&sketch("clip")).await.iter().zip(embed(folder.path()).await) {
        let cosine: f32 = full.iter().zip(&half).map(|(a, b)| a * b).sum();
        assert!(cosine > 0.9999 && *full != half, "{cosine}");
    }
}

#[tokio::test]
async fn an_embedding_that_is_not_finite_is_no_answer() {
    let folder = copy();
    let file = folder.path().join("onnx/vision_model.onnx");
    let mut model = read(&file);
    rename(&mut model, |value| if value == "image_embeds" { "projected".to_owned() } else { value.to_owned() });
    let graph = model.graph.as_mut().unwrap();
    graph.output[0].name = Some("image_embeds".to_owned());
    // Of what is negative.
    let (input, output) = (vec!["projected".to_owned()], vec!["image_embeds".to_owned()]);
    graph.node.push(NodeProto { op_type: Some("Sqrt".to_owned()), input, output, ..Default::default() });
    fs::write(&file, model.encode_to_vec()).unwrap();
    let clip = Clip::load(folder.path(), &EngineArgs::sized(2, 1)).unwrap();
    let fault = clip.image(pictures(1, 1).remove(0).1).await.unwrap_err();
    assert!(fault.to_string().contains("not finite"), "{fault}");
    assert!(clip.text("red circles".to_owned()).await.is_ok());
}

#[tokio::test]
async fn both_encoders_may_be_in_one_graph() {
    let folder = copy();
    join(folder.path());
    for (apart, together) in embed(&sketch("clip")).await.iter().zip(embed(folder.path()).await) {
        assert!(apart.iter().zip(&together).all(|(a, b)| (a - b).abs() < 1e-5));
    }
}

#[tokio::test]
async fn the_fullest_precision_that_is_there_is_used() {
    let folder = copy();
    let file = |name: &str| folder.path().join("onnx").join(name);
    let expected = embed(folder.path()).await;
    for (from, to) in [("", "_fp16"), ("_fp16", "_quantized")] {
        for encoder in ["vision_model", "text_model"] {
            fs::rename(file(&format!("{encoder}{from}.onnx")), file(&format!("{encoder}{to}.onnx"))).unwrap();
        }
        if to == "_fp16" {
            fs::write(file("vision_model_quantized.onnx"), "not read").unwrap();
        }
        assert_eq!(embed(folder.path()).await, expected, "{to}");
    }
    fs::remove_file(file("text_model_quantized.onnx")).unwrap();
    let error = Clip::load(folder.path(), &EngineArgs::default()).err().unwrap().to_string();
    assert!(error.contains("onnx/text_model.onnx") && error.contains("text_model_fp16.onnx"), "{error}");
}
