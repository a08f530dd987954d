//! Language models are loaded in the layouts that they are published in, and refused with what is missing.
//!
//! The models are of a few thousand random weights (tests/parity/tiny_lm.py), with the sketch suite's tokenizer; the answers are transformers'.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use dnd_method::prompts::{self, Message};
use dnd_onnx::{Error, runtime::EngineArgs};
use dnd_summarizer::{Question, Summarizer};
use dnd_testing::sketch;
use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
struct Golden {
    answer: String,
}

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny").join(name)
}

/// Loads a folder with a tokenizer, the configurations, and these files of the fixtures under these names.
fn load(files: &[(&str, &str)]) -> Result<Summarizer, Error> {
    load_with(files, |_| {})
}

fn load_with(files: &[(&str, &str)], change: impl FnOnce(&Path)) -> Result<Summarizer, Error> {
    let folder = tempfile::tempdir().unwrap();
    let configurations = ["config.json", "generation_config.json"].map(|name| (tiny(name), name));
    let tokenizer = ["tokenizer.json", "tokenizer_config.json"].map(|name| (sketch("summarizer").join(name), name));
    let models = files.iter().map(|(fixture, name)| (tiny(fixture), *name));
    for (from, name) in configurations.into_iter().chain(tokenizer).chain(models) {
        let to = folder.path().join(name);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    }
    change(folder.path());
    Summarizer::load(folder.path(), &EngineArgs::sized(1, 1))
}

fn questions() -> [Vec<Message>; 2] {
    [prompts::simplify("a large red circle"), prompts::summarize(&["a red star", "a red ring on a blue background"])]
}

async fn answers(summarizer: &Summarizer) -> Vec<String> {
    let mut answers = Vec::new();
    for messages in questions() {
        let question = Question { messages, seed: 0, attempt: 0, temperature: 0.0, max_new_tokens: 12 };
        answers.push(summarizer.ask(question).await.unwrap().text);
    }
    answers
}

fn expected() -> Vec<String> {
    let goldens: Vec<Golden> = serde_json::from_str(&fs::read_to_string(tiny("answers.json")).unwrap()).unwrap();
    goldens.into_iter().map(|golden| golden.answer).collect()
}

/// Writes a configuration of onnxruntime-genai, and takes Hugging Face's away.
fn genai(folder: &Path) {
    let config = json!({"model": {
        "type": "llama", "context_length": 2048, "eos_token_id": [0, 952], "bos_token_id": 1, "vocab_size": 953,
        "decoder": {
            "filename": "renamed.onnx", "num_hidden_layers": 2,
            "inputs": {"input_ids": "tokens", "past_key_names": "cache/in/%d.key", "past_value_names": "cache/in/%d.value"},
            "outputs": {"logits": "scores", "present_key_names": "cache/out/%d.key", "present_value_names": "cache/out/%d.value"},
        },
    }});
    fs::write(folder.join("genai_config.json"), config.to_string()).unwrap();
    fs::remove_file(folder.join("config.json")).unwrap();
}

#[tokio::test]
async fn every_layout_answers_as_transformers_does() {
    // Optimum, transformers.js, optimum's merged decoder, onnxruntime-genai with names of its own. Weights beside the model are tried below.
    for (fixture, name, layout) in [
        ("merged.onnx", "decoder_model_merged.onnx", "llama, decoder_model_merged.onnx"),
        ("merged.onnx", "onnx/decoder_model_merged.onnx", "llama, onnx/decoder_model_merged.onnx"),
        ("merged.onnx", "onnx/model.onnx", "llama, onnx/model.onnx"),
    ] {
        let summarizer = load(&[(fixture, name)]).unwrap();
        assert_eq!((summarizer.model().layout.as_str(), answers(&summarizer).await), (layout, expected()));
    }
    let summarizer = load_with(&[("renamed.onnx", "renamed.onnx")], genai).unwrap();
    assert_eq!((summarizer.model().layout.as_str(), answers(&summarizer).await), ("llama, renamed.onnx", expected()));
}

#[tokio::test]
async fn weights_may_lie_beside_the_model_under_the_name_that_it_says() {
    let whole = load(&[("external.onnx", "onnx/model.onnx"), ("weights", "onnx/weights")]).unwrap();
    assert_eq!(answers(&whole).await, expected());
    let other = load_with(&[("external.onnx", "onnx/model.onnx"), ("weights", "onnx/weights")], |folder| {
        let mut weights = fs::read(folder.join("onnx/weights")).unwrap();
        weights[3] ^= 1;
        fs::write(folder.join("onnx/weights"), weights).unwrap();
    });
    assert_ne!(other.unwrap().model().digest, whole.model().digest, "the digest is of the weights, too");
    let error = load(&[("external.onnx", "onnx/model.onnx")]).err().unwrap().to_string();
    assert!(error.contains("onnx/weights") && error.contains("onnx/model.onnx keeps weights in it"), "{error}");
}

#[tokio::test]
async fn weights_of_less_precision_answer_and_the_file_with_the_most_is_taken() {
    for fixture in ["fp16.onnx", "int8.onnx"] {
        let name = if fixture == "fp16.onnx" { "onnx/model_fp16.onnx" } else { "onnx/model_quantized.onnx" };
        let summarizer = load(&[(fixture, name)]).unwrap();
        assert_eq!(summarizer.model().layout, format!("llama, {name}"));
        assert!(answers(&summarizer).await.iter().all(|answer| !answer.is_empty()), "{fixture}");
    }
    let both = load(&[("int8.onnx", "onnx/model_int8.onnx"), ("fp16.onnx", "model_fp16.onnx")]).unwrap();
    assert_eq!(both.model().layout, "llama, model_fp16.onnx");
}

#[test]
fn a_folder_that_cannot_answer_is_refused_with_what_is_wrong() {
    for (files, part) in [
        (&[][..], "looked for onnx/model.onnx and model.onnx, and the same with _fp16, _quantized"),
        (&[("without_past.onnx", "model.onnx")], "a decoder without a cache (no input past_key_values.0.key)"),
        (&[("without_past.onnx", "decoder_model.onnx")], "use decoder_model_merged.onnx"),
        (&[("renamed.onnx", "model.onnx")], "no input named input_ids"),
    ] {
        let error = load(files).err().unwrap().to_string();
        assert!(error.contains(part), "{files:?}: {error}");
    }
    let changed = |change: fn(&Path)| load_with(&[("merged.onnx", "model.onnx")], change).err().unwrap().to_string();
    let error = changed(|folder| fs::remove_file(folder.join("tokenizer.json")).unwrap());
    assert!(error.contains("looked for tokenizer.json") && error.contains("save_pretrained"), "{error}");
    let error = changed(|folder| {
        fs::write(folder.join("config.json"), "{}").unwrap();
        fs::remove_file(folder.join("generation_config.json")).unwrap();
    });
    assert!(error.contains("no eos_token_id"), "{error}");
    let error = changed(genai);
    assert!(error.contains("looked for renamed.onnx"), "{error}");
    let error = changed(|folder| fs::write(folder.join("genai_config.json"), r#"{"model": {"type": "llama"}}"#).unwrap());
    assert!(error.contains("genai_config.json") && error.contains("context_length"), "{error}");
}
