//! Captions token by token beside the `generate` of transformers 5.24. The goldens, and the tiny models in `fixtures`, are made by
//! `tests/parity/captions_small.py`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path};

use bytes::Bytes;
use dnd_captioner::{Captioner, CaptionerArgs, Generation, Picture};
use dnd_onnx::runtime::EngineArgs;
use dnd_testing::{copy_without, pictures, sketch};
use futures::future::try_join_all;
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    max_new_tokens: u32,
    min_length: u32,
    num_beams: u32,
    repetition_penalty: f32,
    length_penalty: f32,
    /// Of each picture.
    token_ids: Vec<Vec<u32>>,
    /// Tokens, the end token counted, before the reference's two best are as good as equal.
    sure: Vec<usize>,
}

fn cases(name: &str) -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// A copy of a tiny model, without some of its files.
fn fixture(name: &str, without: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_without(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name), folder.path(), without);
    folder
}

/// Captions the pictures that the goldens are of in every case, and tells which are not the reference's, up to its near-ties, of which there may be few.
/// Each is compared with what the reference says of the picture that is `shift` further on.
async fn differing(folder: &Path, goldens: &str, batch: usize, shift: usize) -> Vec<String> {
    let captioner = Captioner::load(folder, &CaptionerArgs::default(), &EngineArgs::sized(batch, 1)).unwrap();
    let pictures: Vec<Bytes> = pictures(32, 7).into_iter().map(|(_, bytes)| bytes).collect();
    let mut differ = Vec::new();
    for Case { max_new_tokens, min_length, num_beams, repetition_penalty, length_penalty, mut token_ids, mut sure } in cases(goldens) {
        let generation = Generation { max_new_tokens, min_length, num_beams, repetition_penalty, length_penalty };
        let captions = pictures.iter().map(|bytes| captioner.caption(Picture { bytes: bytes.clone(), generation }));
        let captions = try_join_all(captions).await.unwrap();
        assert_eq!((captions.len(), token_ids.len(), sure.len()), (32, 32, 32));
        token_ids.rotate_left(shift);
        sure.rotate_left(shift);
        for (at, (caption, (want, sure))) in captions.iter().zip(token_ids.iter().zip(&sure)).enumerate() {
            let got = &caption.token_ids;
            let same = if *sure > want.len() { got == want } else { got.get(..*sure) == Some(&want[..*sure]) };
            if !same {
                differ.push(format!("picture {at}, {generation:?}: {got:?}, not {want:?}, of which {sure} are sure"));
            }
        }
        let ties = token_ids.iter().zip(&sure).filter(|(want, sure)| **sure <= want.len()).count();
        assert!(ties <= 4, "{ties} near-ties leave little to compare: {generation:?}");
    }
    differ
}

async fn same_as_reference(folder: &Path, goldens: &str, batch: usize) {
    let differ = differing(folder, goldens, batch, 0).await;
    assert!(differ.is_empty(), "{differ:#?}");
}

#[tokio::test]
async fn blip_says_what_it_says_in_transformers() {
    same_as_reference(&sketch("captioner"), "blip.json", 8).await;
}

#[tokio::test]
async fn an_encoder_decoder_with_a_merged_decoder_says_what_it_says_in_transformers() {
    same_as_reference(fixture("vit_gpt2", &[]).path(), "vit_gpt2.json", 8).await;
}

#[tokio::test]
async fn so_does_one_whose_cache_is_of_the_text_alone() {
    let folder = fixture("vit_gpt2", &["onnx/decoder_model_merged.onnx"]);
    let place = |name: &str| folder.path().join(name);
    fs::rename(place("decoder_model_merged_seeing.onnx"), place("onnx/decoder_model_merged.onnx")).unwrap();
    same_as_reference(folder.path(), "vit_gpt2.json", 5).await;
}

#[tokio::test]
async fn so_does_one_in_half_precision() {
    let folder = fixture("vit_gpt2", &["onnx/encoder_model.onnx", "onnx/decoder_model_merged.onnx"]);
    same_as_reference(folder.path(), "vit_gpt2_half.json", 8).await;
}

#[tokio::test]
async fn blip_2_says_what_it_says_in_transformers() {
    same_as_reference(fixture("blip2", &[]).path(), "blip2.json", 8).await;
}

#[tokio::test]
async fn so_does_a_blip_2_of_another_size_in_half_precision() {
    same_as_reference(fixture("blip2_half", &[]).path(), "blip2_half.json", 3).await;
}

#[tokio::test]
async fn another_picture_or_another_constant_gives_other_captions() {
    let folder = fixture("blip2", &[]);
    // Of 32 pictures in each of 10 cases.
    let others = differing(folder.path(), "blip2.json", 8, 1).await.len();
    assert!(others > 240, "{others} of 320");
    for (file, constant, changed, at_least) in [
        ("preprocessor_config.json", "\"resample\": 3", "\"resample\": 0", 64),
        ("preprocessor_config.json", "0.4578275", "0.4078275", 64),
        ("config.json", "\"bos_token_id\": 0", "\"bos_token_id\": 1", 200),
        ("generation_config.json", "\"eos_token_id\": 5", "\"eos_token_id\": 6", 200),
        // Only a penalty for repetition heeds it.
        ("config.json", "\"image_token_index\": 320", "\"image_token_index\": 319", 16),
    ] {
        let folder = fixture("blip2", &[]);
        let text = fs::read_to_string(folder.path().join(file)).unwrap();
        assert!(text.contains(constant), "{file}: no {constant}");
        fs::write(folder.path().join(file), text.replace(constant, changed)).unwrap();
        let differ = differing(folder.path(), "blip2.json", 8, 0).await.len();
        assert!(differ >= at_least, "{changed}: {differ} of 320 differ");
    }
}
