//! The sketch suite's model does in ONNX what it does in PyTorch under the diffusers library: `tests/parity/diffusion_small.py` asked it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod reference;

use std::path::Path;

use dnd_testing::sketch;
use reference::{Expected, LIMIT, load, off};

fn expected() -> Expected {
    Expected::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/parity"))
}

#[test]
fn texts_are_embedded_as_the_library_does_the_longest_cut() {
    let expected = expected();
    let states = expected.encode(&mut load(&sketch("diffusion")));
    assert!(off(&states, &expected.floats(&expected.states)) <= LIMIT);
    assert!(off(&states[..states.len() / 3], &expected.state(1)) > 0.1, "another text's");
}

#[test]
fn one_step_of_the_unet_is_the_librarys() {
    let (expected, mut pipeline) = (expected(), load(&sketch("diffusion")));
    let output = expected.floats(&expected.step.output);
    assert!(off(&expected.predict(&mut pipeline, expected.step.timestep, 1), &output) <= LIMIT);
    for (timestep, text) in [(expected.step.timestep - 1.0, 1), (expected.step.timestep, 2)] {
        assert!(off(&expected.predict(&mut pipeline, timestep, text), &output) > LIMIT, "at {timestep}, text {text}");
    }
}

#[test]
fn latents_of_every_sampler_are_the_librarys_from_the_same_noise() {
    let (expected, mut pipeline) = (expected(), load(&sketch("diffusion")));
    assert_eq!(expected.runs.len(), 6);
    for (name, run) in &expected.runs {
        let latents = expected.floats(&run.latents);
        let measured = off(&expected.draw(&mut pipeline, run, 0), &latents);
        assert!(measured <= LIMIT, "{name}: {measured}");
        let other = off(&expected.draw(&mut pipeline, run, 1), &latents);
        assert!(other > 100.0 * LIMIT, "{name}, another picture: {other}");
    }
}

#[test]
fn latents_are_decoded_to_the_librarys_picture() {
    let (expected, mut pipeline) = (expected(), load(&sketch("diffusion")));
    let picture = expected.floats(&expected.picture);
    let mut latents = expected.floats(&expected.runs["dpm-solver++"].latents);
    assert!(off(&pipeline.decode(&latents).unwrap().values, &picture) <= LIMIT);
    latents.iter_mut().for_each(|latent| *latent *= 1.01);
    assert!(off(&pipeline.decode(&latents).unwrap().values, &picture) > LIMIT, "another scaling factor");
}
