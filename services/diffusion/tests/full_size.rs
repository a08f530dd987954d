//! Stable Diffusion 1.5 at full size against the diffusers library: `tests/parity/diffusion.py` made the model and what is expected of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod reference;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use dnd_onnx::format::{ModelProto, TensorProto};
use dnd_testing::sketch;
use prost::Message as _;
use reference::{Expected, LIMIT, Run, load, off};
use serde_json::{Value, json};

fn folder() -> PathBuf {
    PathBuf::from(env::var_os("DND_PARITY").expect("DND_PARITY names the folder of the full-size models")).join("diffusion")
}

/// A copy of the model beside it, with links for files; the sketch suite's UNet, which is quick to load, where the UNet is not run.
fn linked(with_unet: bool) -> PathBuf {
    let (model, copy) = (folder().join("model"), folder().join("changed"));
    let _ = fs::remove_dir_all(&copy);
    fs::create_dir(&copy).unwrap();
    fs::copy(model.join("model_index.json"), copy.join("model_index.json")).unwrap();
    for part in ["scheduler", "text_encoder", "tokenizer", "unet", "vae_decoder"] {
        fs::create_dir(copy.join(part)).unwrap();
        for entry in fs::read_dir(model.join(part)).unwrap().map(Result::unwrap) {
            let name = entry.file_name();
            if part != "unet" || with_unet || name == "config.json" {
                fs::hard_link(entry.path(), copy.join(part).join(name)).unwrap();
            }
        }
    }
    if !with_unet {
        fs::copy(sketch("diffusion/unet/model.onnx"), copy.join("unet/model.onnx")).unwrap();
    }
    copy
}

/// Swaps the contents of the first two large weights of one shape. What is linked to the file stays as it is.
fn swap_weights(file: &Path) {
    let mut model = ModelProto::decode(&*fs::read(file).unwrap()).unwrap();
    let weights = &mut model.graph.as_mut().unwrap().initializer;
    let large = |tensor: &TensorProto| tensor.dims.len() > 1 && tensor.dims.iter().product::<i64>() > 1 << 18;
    let large: Vec<usize> = (0..weights.len()).filter(|i| large(&weights[*i])).collect();
    let (a, b) = large.iter().flat_map(|&a| large.iter().map(move |&b| (a, b))).find(|&(a, b)| a < b && weights[a].dims == weights[b].dims).unwrap();
    let (first, second) = weights.split_at_mut(b);
    std::mem::swap(&mut first[a].raw_data, &mut second[0].raw_data);
    std::mem::swap(&mut first[a].external_data, &mut second[0].external_data);
    fs::remove_file(file).unwrap();
    fs::write(file, model.encode_to_vec()).unwrap();
}

/// Holds what was measured to the limit, which the controls must exceed, and adds it to what the folder's `measured.json` says.
fn record(folder: &Path, rows: &mut Vec<Value>, what: String, measured: f64, controls: &[(&str, f64)]) {
    println!("{what}: {measured:.2e}; {controls:?}");
    assert!(measured <= LIMIT, "{what}: {measured}");
    assert!(controls.iter().all(|(_, control)| *control > LIMIT), "{what}: {controls:?}");
    let control: Vec<String> = controls.iter().map(|(name, value)| format!("{name}: {value:.1e}")).collect();
    rows.push(json!({
        "what": what, "reference": "diffusers 0.42.1", "measured": format!("at most {measured:.1e} of the standard deviation"),
        "limit": format!("{LIMIT:.0e}"), "control": control.join("; "),
    }));
    fs::write(folder.join("measured.json"), serde_json::to_vec_pretty(rows).unwrap()).unwrap();
}

#[test]
#[ignore = "needs the full-size model of tests/parity/diffusion.py in $DND_PARITY/diffusion"]
fn latents_and_pictures_are_those_of_the_library() {
    let expected = Expected::read(&folder());
    let mut rows: Vec<Value> = Vec::new();
    let mut row = |what: String, measured: f64, controls: &[(&str, f64)]| record(&folder(), &mut rows, what, measured, controls);
    let (states, step, picture) = (expected.floats(&expected.states), expected.floats(&expected.step.output), expected.floats(&expected.picture));
    let latents = expected.floats(&expected.runs["dpm-solver++"].latents);

    // Each part with two weights swapped.
    let changed = linked(false);
    swap_weights(&changed.join("text_encoder/model.onnx"));
    swap_weights(&changed.join("vae_decoder/model.onnx"));
    let mut pipeline = load(&changed);
    let swapped_states = off(&expected.encode(&mut pipeline), &states);
    let swapped_picture = off(&pipeline.decode(&latents).unwrap().values, &picture);
    drop(pipeline);
    let changed = linked(true);
    swap_weights(&changed.join("unet/model.onnx"));
    let swapped_step = off(&expected.predict(&mut load(&changed), expected.step.timestep, 1), &step);
    fs::remove_dir_all(changed).unwrap();

    let mut pipeline = load(&folder().join("model"));
    let ours = expected.encode(&mut pipeline);
    let other_text = off(&expected.state(2), &expected.state(1));
    row(
        format!("text embeddings of {} texts, one cut at 77 tokens", expected.texts.len()),
        off(&ours, &states),
        &[("another text", other_text), ("two weights swapped", swapped_states)],
    );

    let decoded = pipeline.decode(&latents).unwrap();
    let rescaled: Vec<f32> = latents.iter().map(|latent| latent * 0.18215 / 0.18).collect();
    row(
        format!("decoded picture, {} x {} px", decoded.height, decoded.width),
        off(&decoded.values, &picture),
        &[("a scaling factor of 0.18", off(&pipeline.decode(&rescaled).unwrap().values, &picture)), ("two weights swapped", swapped_picture)],
    );

    let size = format!("latents of {0} x {0}", expected.side);
    let at = expected.step.timestep;
    row(
        format!("one UNet step, {size}"),
        off(&expected.predict(&mut pipeline, at, 1), &step),
        &[
            ("the time step less 1", off(&expected.predict(&mut pipeline, at - 1.0, 1), &step)),
            ("another text", off(&expected.predict(&mut pipeline, at, 2), &step)),
            ("two weights swapped", swapped_step),
        ],
    );

    // What the control changes in a run's configuration.
    let changes = [
        ("dpm-solver++, v-prediction", "beta_end", json!(0.0121)),
        ("ddim", "set_alpha_to_one", json!(true)),
        ("euler", "steps_offset", json!(0)),
        ("euler ancestral", "timestep_spacing", json!("leading")),
        ("turbo, no guidance", "timestep_spacing", json!("linspace")),
        ("lcm, no guidance", "original_inference_steps", json!(40)),
    ];
    for (name, run) in &expected.runs {
        let theirs = expected.floats(&run.latents);
        let mut other: Run = run.clone();
        let change = if let Some((_, key, value)) = changes.iter().find(|(of, ..)| of == name) {
            other.config[*key] = value.clone();
            format!("{key} {value}")
        } else {
            other.steps = 4;
            "4 steps".to_owned()
        };
        let control = off(&expected.draw(&mut pipeline, &other, 0), &theirs);
        row(format!("{} steps of {name}, {size}", run.steps), off(&expected.draw(&mut pipeline, run, 0), &theirs), &[(&change, control)]);
    }
}

#[test]
#[ignore = "needs the full-size model of tests/parity/diffusion.py in $DND_PARITY/diffusion/512"]
fn one_step_and_one_picture_of_512_px_are_those_of_the_library() {
    let folder = folder().join("512");
    let (expected, mut pipeline) = (Expected::read(&folder), load(&folder.join("model")));
    let (step, at, mut rows) = (expected.floats(&expected.step.output), expected.step.timestep, Vec::new());
    let controls = [
        ("the time step less 1", off(&expected.predict(&mut pipeline, at - 1.0, 1), &step)),
        ("another text", off(&expected.predict(&mut pipeline, at, 2), &step)),
    ];
    let what = format!("one UNet step, latents of {0} x {0}", expected.side);
    record(&folder, &mut rows, what, off(&expected.predict(&mut pipeline, at, 1), &step), &controls);

    let (picture, latents) = (expected.floats(&expected.picture), expected.noise());
    let decoded = pipeline.decode(&latents).unwrap();
    let rescaled: Vec<f32> = latents.iter().map(|latent| latent * 0.18215 / 0.18).collect();
    let control = ("a scaling factor of 0.18", off(&pipeline.decode(&rescaled).unwrap().values, &picture));
    let what = format!("decoded picture, {} x {} px", decoded.height, decoded.width);
    record(&folder, &mut rows, what, off(&decoded.values, &picture), &[control]);
}
