//! The sketch suite's model does in ONNX what it does in PyTorch under the transformers library: `tests/parity/clip_small.py` asked it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod reference;

use std::path::Path;

use dnd_clip::Clip;
use dnd_onnx::runtime::EngineArgs;
use dnd_testing::{pictures, sketch};
use reference::{LIMIT, cosines, floats, smallest};
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    every: usize,
    texts: Vec<String>,
    width: usize,
}

#[tokio::test]
async fn embeddings_are_those_of_the_library() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let expected: Expected = serde_json::from_slice(&std::fs::read(goldens.join("parity.json")).unwrap()).unwrap();
    let clip = Clip::load(&sketch("clip"), &EngineArgs::sized(4, 1)).unwrap();
    let theirs = floats(&goldens.join("images.f32"), expected.width);
    let mut ours = Vec::new();
    for (_, picture) in pictures(theirs.len(), expected.every) {
        ours.push(clip.image(picture).await.unwrap().values);
    }
    let images = cosines(&ours, &theirs);
    assert!(ours.len() >= 24 && smallest(&images) >= LIMIT, "{images:?}");
    ours.swap(0, 1);
    assert!(smallest(&cosines(&ours, &theirs)) < LIMIT, "pictures taken for each other");

    let theirs = floats(&goldens.join("texts.f32"), expected.width);
    let mut ours = Vec::new();
    for text in &expected.texts {
        ours.push(clip.text(text.clone()).await.unwrap().values);
    }
    let texts = cosines(&ours, &theirs);
    assert!(ours.len() == theirs.len() && smallest(&texts) >= LIMIT, "{texts:?}");
    // The last two differ only in what is cut off.
    let count = ours.len();
    assert!(ours[count - 1] == ours[count - 2] && theirs[count - 1] == theirs[count - 2]);
    ours[1] = clip.text("a red ring".to_owned()).await.unwrap().values;
    assert!(smallest(&cosines(&ours, &theirs)) < LIMIT, "a text taken for another");
}
