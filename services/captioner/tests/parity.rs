//! Captions token by token beside the `generate` of transformers 5.24. The goldens and the tiny vision encoder-decoder in `fixtures` are made by
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

/// The tiny encoder-decoder, without some of its files.
fn fixture(without: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_without(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vit_gpt2"), folder.path(), without);
    folder
}

/// Captions the pictures that the goldens are of in every case, and compares up to the reference's near-ties, of which there may be few.
async fn same_as_reference(folder: &Path, goldens: &str, batch: usize) {
    let captioner = Captioner::load(folder, &CaptionerArgs::default(), &EngineArgs::sized(batch, 1)).unwrap();
    let pictures: Vec<Bytes> = pictures(32, 7).into_iter().map(|(_, bytes)| bytes).collect();
    for Case { max_new_tokens, min_length, num_beams, repetition_penalty, length_penalty, token_ids, sure } in cases(goldens) {
        let generation = Generation { max_new_tokens, min_length, num_beams, repetition_penalty, length_penalty };
        let captions = pictures.iter().map(|bytes| captioner.caption(Picture { bytes: bytes.clone(), generation }));
        let captions = try_join_all(captions).await.unwrap();
        assert_eq!((captions.len(), token_ids.len()), (32, 32));
        for (at, (caption, (want, sure))) in captions.iter().zip(token_ids.iter().zip(&sure)).enumerate() {
            let got = &caption.token_ids;
            if *sure > want.len() {
                assert_eq!(got, want, "picture {at}, {generation:?}");
            } else {
                assert_eq!(got.get(..*sure), Some(&want[..*sure]), "picture {at}, {generation:?}");
            }
        }
        let ties = token_ids.iter().zip(&sure).filter(|(want, sure)| **sure <= want.len()).count();
        assert!(ties <= 4, "{ties} near-ties leave little to compare: {generation:?}");
    }
}

#[tokio::test]
async fn blip_says_what_it_says_in_transformers() {
    same_as_reference(&sketch("captioner"), "blip.json", 8).await;
}

#[tokio::test]
async fn an_encoder_decoder_with_a_merged_decoder_says_what_it_says_in_transformers() {
    same_as_reference(fixture(&[]).path(), "vit_gpt2.json", 8).await;
}

#[tokio::test]
async fn so_does_one_whose_cache_is_of_the_text_alone() {
    let folder = fixture(&["onnx/decoder_model_merged.onnx"]);
    let place = |name: &str| folder.path().join(name);
    fs::rename(place("decoder_model_merged_seeing.onnx"), place("onnx/decoder_model_merged.onnx")).unwrap();
    same_as_reference(folder.path(), "vit_gpt2.json", 5).await;
}

#[tokio::test]
async fn so_does_one_in_half_precision() {
    let folder = fixture(&["onnx/encoder_model.onnx", "onnx/decoder_model_merged.onnx"]);
    same_as_reference(folder.path(), "vit_gpt2_half.json", 8).await;
}
