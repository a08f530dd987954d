//! What the diffusers library made of a model, kept by `tests/parity/drawn.py`, and how far off the project's is.
#![allow(dead_code)] // each test takes a part of it

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use dnd_diffusion::{
    Request,
    pipeline::{Parts, Pipeline},
    scheduler::{Scheduler, SchedulerConfig},
};
use dnd_mesh::batch::Stop;
use dnd_onnx::{folder::ModelFolder, runtime::EngineArgs};
use serde::Deserialize;
use serde_json::Value;

/// The largest difference that is allowed, in standard deviations of what is expected.
pub(crate) const LIMIT: f64 = 1e-3;

#[derive(Deserialize)]
pub(crate) struct Expected {
    #[serde(skip)]
    folder: PathBuf,
    /// Of the latents.
    pub(crate) side: usize,
    pub(crate) concept: String,
    /// The second is the concept's prompt.
    pub(crate) texts: Vec<String>,
    pub(crate) states: Kept,
    pub(crate) step: UnetStep,
    pub(crate) runs: BTreeMap<String, Run>,
    /// Decoded from the latents of `dpm-solver++`, or from the concept's first noise where nothing was drawn.
    pub(crate) picture: Kept,
}

#[derive(Clone, Deserialize)]
pub(crate) struct Kept {
    file: String,
}

#[derive(Deserialize)]
pub(crate) struct UnetStep {
    pub(crate) timestep: f64,
    pub(crate) output: Kept,
}

#[derive(Clone, Deserialize)]
pub(crate) struct Run {
    pub(crate) config: Value,
    pub(crate) steps: usize,
    pub(crate) guidance: f32,
    pub(crate) latents: Kept,
}

impl Expected {
    pub(crate) fn read(folder: &Path) -> Self {
        let expected: Self = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
        Self { folder: folder.to_owned(), ..expected }
    }

    pub(crate) fn floats(&self, kept: &Kept) -> Vec<f32> {
        fs::read(self.folder.join(&kept.file)).unwrap().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// The states of one of the texts.
    pub(crate) fn state(&self, text: usize) -> Vec<f32> {
        let states = self.floats(&self.states);
        states.chunks_exact(states.len() / self.texts.len()).nth(text).unwrap().to_vec()
    }

    pub(crate) fn encode(&self, pipeline: &mut Pipeline) -> Vec<f32> {
        pipeline.encode(&self.texts.iter().map(String::as_str).collect::<Vec<_>>()).unwrap()
    }

    /// The concept's first noise.
    pub(crate) fn noise(&self) -> Vec<f32> {
        dnd_method::draw::noise(0, &self.concept, 0, 0, self.floats(&self.step.output).len())
    }

    /// What the UNet says of the concept's first noise.
    pub(crate) fn predict(&self, pipeline: &mut Pipeline, timestep: f64, text: usize) -> Vec<f32> {
        pipeline.predict(self.noise(), timestep, &self.state(text), 1.0).unwrap()
    }

    /// Latents of a picture of the concept; the first is what is expected.
    pub(crate) fn draw(&self, pipeline: &mut Pipeline, run: &Run, index: u32) -> Vec<f32> {
        let config: SchedulerConfig = serde_json::from_value(run.config.clone()).unwrap();
        let schedule = Scheduler::new(config).unwrap().schedule(run.steps).unwrap();
        let request = Request { concept: self.concept.clone(), index, seed: 0, steps: run.steps as u32, guidance: run.guidance };
        pipeline.denoise(&schedule, &[request], &Stop::default()).unwrap()
    }
}

pub(crate) fn load(model: &Path) -> Pipeline {
    let parts = Parts::read(&ModelFolder::open(model).unwrap()).unwrap();
    Pipeline::load(&parts, &EngineArgs::one_session()).unwrap()
}

/// The largest difference, in standard deviations of what is expected.
pub(crate) fn off(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let mean = theirs.iter().map(|v| f64::from(*v)).sum::<f64>() / theirs.len() as f64;
    let deviation = (theirs.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / theirs.len() as f64).sqrt();
    // What is not a number differs by more than any number.
    let largest = ours.iter().zip(theirs).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).fold(0.0, |most, d| if d <= most { most } else { d });
    largest / deviation
}
