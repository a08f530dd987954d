//! CLIP ViT-B/16 at full size against the transformers library: `tests/parity/clip.py` made the model and what is expected of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod reference;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use dnd_clip::Clip;
use dnd_onnx::{format::ModelProto, runtime::EngineArgs};
use prost::Message as _;
use reference::{LIMIT, cosines, floats, smallest};
use serde_json::{Value, json};

fn folder() -> PathBuf {
    PathBuf::from(env::var_os("DND_PARITY").expect("DND_PARITY names the folder of the full-size models")).join("clip")
}

async fn images(clip: &Clip, folder: &Path, order: impl Iterator<Item = usize>) -> Vec<Vec<f32>> {
    let mut embeddings = Vec::new();
    for i in order {
        let picture = fs::read(folder.join(format!("pictures/{i:02}.png"))).unwrap();
        embeddings.push(clip.image(picture.into()).await.unwrap().values);
    }
    embeddings
}

async fn texts(clip: &Clip, said: &[String]) -> Vec<Vec<f32>> {
    let mut embeddings = Vec::new();
    for text in said {
        embeddings.push(clip.text(text.clone()).await.unwrap().values);
    }
    embeddings
}

fn load(model: &Path) -> Clip {
    Clip::load(model, &EngineArgs::one_session()).unwrap()
}

/// A copy of the model beside it, with links for files.
fn linked(model: &Path, name: &str) -> PathBuf {
    let copy = model.with_file_name(name);
    let _ = fs::remove_dir_all(&copy);
    fs::create_dir_all(copy.join("onnx")).unwrap();
    for inside in ["", "onnx"] {
        for entry in fs::read_dir(model.join(inside)).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file()) {
            fs::hard_link(entry.path(), copy.join(inside).join(entry.file_name())).unwrap();
        }
    }
    copy
}

/// Replaces a file of a copy: what is linked stays as it is.
fn replace(file: &Path, contents: Vec<u8>) {
    fs::remove_file(file).unwrap();
    fs::write(file, contents).unwrap();
}

/// Swaps the contents of the first two weights of a graph that are matrices of one shape.
fn with_swapped_weights(file: &Path) -> Vec<u8> {
    let mut model = ModelProto::decode(&*fs::read(file).unwrap()).unwrap();
    let weights = &mut model.graph.as_mut().unwrap().initializer;
    let matrix = |i: &usize| weights[*i].dims.len() == 2 && weights[*i].raw_data.as_ref().is_some_and(|data| data.len() > 1 << 20);
    let large: Vec<usize> = (0..weights.len()).filter(matrix).collect();
    let (a, b) = large.iter().flat_map(|&a| large.iter().map(move |&b| (a, b))).find(|&(a, b)| a < b && weights[a].dims == weights[b].dims).unwrap();
    let data = weights[a].raw_data.take();
    weights[a].raw_data = std::mem::replace(&mut weights[b].raw_data, data);
    model.encode_to_vec()
}

#[tokio::test]
#[ignore = "needs the full-size model of tests/parity/clip.py in $DND_PARITY/clip"]
async fn embeddings_are_those_of_the_library() {
    let folder = folder();
    let expected: Value = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let said: Vec<String> = serde_json::from_value(expected["texts"].clone()).unwrap();
    let width = expected["width"].as_u64().unwrap() as usize;
    let (their_images, their_texts) = (floats(&folder.join("images.f32"), width), floats(&folder.join("texts.f32"), width));
    let count = their_images.len();
    let model = folder.join("model");

    let clip = load(&model);
    let our_images = images(&clip, &folder, 0..count).await;
    let our_texts = texts(&clip, &said).await;
    let (seen, read) = (cosines(&our_images, &their_images), cosines(&our_texts, &their_texts));
    println!("pictures {:.7}, texts {:.7}; spread: {}", smallest(&seen), smallest(&read), expected["spread"]);
    assert!(count >= 32 && smallest(&seen) >= LIMIT, "{seen:?}");
    assert!(said.len() >= 32 && smallest(&read) >= LIMIT, "{read:?}");

    // One picture and one text are others than the library saw.
    let mut wrong = our_images.clone();
    wrong[3] = images(&clip, &folder, 20..21).await.remove(0);
    let wrong_picture = smallest(&cosines(&wrong, &their_images));
    let mut wrong = our_texts.clone();
    wrong[5] = texts(&clip, &["cat".to_owned()]).await.remove(0);
    let wrong_text = smallest(&cosines(&wrong, &their_texts));
    assert!(wrong_picture < LIMIT && wrong_text < LIMIT, "{wrong_picture} {wrong_text}");
    drop(clip);

    let changed = linked(&model, "changed");
    for encoder in ["vision_model", "text_model"] {
        let file = changed.join("onnx").join(format!("{encoder}.onnx"));
        let swapped = with_swapped_weights(&file);
        replace(&file, swapped);
    }
    let clip = load(&changed);
    let swapped_seen = smallest(&cosines(&images(&clip, &folder, 0..count).await, &their_images));
    let swapped_read = smallest(&cosines(&texts(&clip, &said).await, &their_texts));
    drop(clip);
    assert!(swapped_seen < LIMIT && swapped_read < LIMIT, "{swapped_seen} {swapped_read}");

    let changed = linked(&model, "changed");
    let file = changed.join("preprocessor_config.json");
    let mut pre: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    pre["image_mean"] = json!([0.5, 0.5, 0.5]);
    replace(&file, pre.to_string().into_bytes());
    let clip = load(&changed);
    let other_mean = smallest(&cosines(&images(&clip, &folder, 0..count).await, &their_images));
    assert!(other_mean < LIMIT, "{other_mean}");
    fs::remove_dir_all(changed).unwrap();

    let row = |what: &str, measured: f64, control: String| {
        let measured = format!("smallest cosine less the mean {measured:.7}");
        json!({ "what": what, "reference": "transformers 5.24.0", "measured": measured, "limit": format!("at least {LIMIT}"), "control": control })
    };
    let rows = [
        row(
            "CLIP ViT-B/16, 32 pictures",
            smallest(&seen),
            format!("a wrong picture {wrong_picture:.4}; two weights swapped {swapped_seen:.4}; another image_mean {other_mean:.4}"),
        ),
        row("CLIP ViT-B/16, 32 texts, two cut at 77 tokens", smallest(&read), format!("a wrong text {wrong_text:.4}; two weights swapped {swapped_read:.4}")),
    ];
    fs::write(folder.join("measured.json"), serde_json::to_vec_pretty(&rows).unwrap()).unwrap();
}
