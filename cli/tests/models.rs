//! `dnd models check`: what a folder is, and everything that is wrong with it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path};

use dnd_testing::{copy_without, sketch};
use dnd_tests::dnd;

#[test]
fn all_that_is_wrong_with_a_suite_is_told_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let suite = folder.path().join("suite");
    let missing =
        ["captioner/tokenizer.json", "captioner/onnx/vision_model.onnx", "diffusion/unet/model.onnx", "diffusion/vae_decoder/config.json", "probing.tar"];
    copy_without(&sketch(""), &suite, &missing);
    fs::write(suite.join("diffusion/scheduler/scheduler_config.json"), "{\"steps_offset\": 1,").unwrap();
    fs::write(suite.join("diffusion/text_encoder/model.onnx"), "this is no network").unwrap();
    fs::remove_dir_all(suite.join("clip")).unwrap();
    let ran = dnd(folder.path(), &["models", "check", "suite"]);
    assert_eq!(ran.code, 2, "{}{}", ran.out, ran.err);
    assert!(ran.err.contains("3 of 4 models can't be used"), "{}", ran.err);
    for line in [
        "notice: Trained on drawn pictures only",
        "summarizer ok     llama",
        "captioner  WRONG",
        "no vision encoder: looked for onnx/vision_model.onnx, vision_model.onnx",
        "no tokenizer: looked for tokenizer.json",
        "diffusion  WRONG",
        "no UNet: looked for unet/model.onnx",
        "no decoder configuration: looked for vae_decoder/config.json",
        "scheduler_config.json: EOF",
        "text_encoder/model.onnx: not an ONNX file",
        "suite/clip: no such folder",
    ] {
        assert!(ran.out.contains(line), "{line:?} is not in: {}", ran.out);
    }
    for once in ["no vision encoder", "no UNet", "no decoder configuration"] {
        assert_eq!(ran.out.matches(once).count(), 1, "{once:?} is said once: {}", ran.out);
    }
}

#[test]
fn a_single_model_is_known_by_its_files() {
    let folder = tempfile::tempdir().unwrap();
    for (name, title, layout) in [
        ("captioner", "a captioner in", "blip"),
        ("summarizer", "a language model in", "llama"),
        ("diffusion", "Stable Diffusion in", "stable-diffusion"),
        ("clip", "CLIP in", "clip"),
    ] {
        let ran = dnd(folder.path(), &["models", "check", sketch(name).to_str().unwrap()]);
        assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
        assert!(ran.out.contains(title) && ran.out.contains(&format!("model      ok     {layout}")), "{}", ran.out);
    }
    let blip2 = Path::new(env!("CARGO_MANIFEST_DIR")).join("../services/captioner/tests/fixtures/blip2");
    let ran = dnd(folder.path(), &["models", "check", blip2.to_str().unwrap()]);
    assert!(ran.code == 0 && ran.out.contains("model      ok     blip-2"), "{}{}", ran.out, ran.err);
    copy_without(&blip2, &folder.path().join("parts"), &["onnx/vision_encoder.onnx", "onnx/embed_tokens.onnx", "onnx/decoder_model_merged.onnx"]);
    let ran = dnd(folder.path(), &["models", "check", "parts"]);
    assert_eq!(ran.code, 2);
    for part in [
        "vision encoder: looked for onnx/vision_encoder",
        "token embeddings: looked for onnx/embed_tokens",
        "text decoder: looked for onnx/decoder_model_merged",
    ] {
        assert!(ran.out.contains(&format!("no {part}.onnx")), "{part:?} is not in: {}", ran.out);
    }
    // By its networks, where the configuration is what is missing.
    copy_without(&sketch("clip"), &folder.path().join("half"), &["config.json", "preprocessor_config.json"]);
    let ran = dnd(folder.path(), &["models", "check", "half"]);
    assert_eq!(ran.code, 2);
    for part in ["CLIP in half", "no configuration: looked for config.json", "no picture pre-processing: looked for preprocessor_config.json"] {
        assert!(ran.out.contains(part), "{part:?} is not in: {}", ran.out);
    }
    fs::create_dir(folder.path().join("empty")).unwrap();
    let ran = dnd(folder.path(), &["models", "check", "empty"]);
    assert!(ran.code == 2 && ran.err.contains("no model that dnd knows") && ran.err.contains("model_index.json"), "{}", ran.err);
    let ran = dnd(folder.path(), &["models", "check", "nowhere"]);
    assert!(ran.code == 2 && ran.err.contains("nowhere: no such folder"), "{}", ran.err);
}
