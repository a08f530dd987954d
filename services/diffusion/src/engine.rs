//! The model: pipelines that draw what waits in line.

use std::path::Path;

use bytes::Bytes;
use dnd_mesh::{
    Fault,
    batch::{Batcher, Stop, Worker},
};
use dnd_method::parameters::Parameters;
use dnd_onnx::{Error, folder::ModelFolder, pictures::encode_png, runtime::EngineArgs};
use dnd_proto::v1::{Model, ModelLimits};
use image::RgbImage;
use tracing::warn;

use crate::{
    pipeline::{Parts, Pictures, Pipeline},
    scheduler::Scheduler,
};

/// A loaded diffusion model.
pub struct Diffusion {
    model: Model,
    scheduler: Scheduler,
    batcher: Batcher<Runner>,
    concurrency: usize,
}

/// A picture to draw.
#[derive(Debug, Clone)]
pub struct Request {
    /// The concept.
    pub concept: String,
    /// Which of its pictures.
    pub index: u32,
    /// Noise is keyed by (seed, concept, index).
    pub seed: u64,
    /// Denoising steps.
    pub steps: u32,
    /// Scale of classifier-free guidance; 1 and below mean none.
    pub guidance: f32,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drawing {
    /// The picture.
    Png(Bytes),
    /// Why what was drawn can't be used.
    Unusable(String),
}

impl Diffusion {
    /// Loads the model in a folder and runs it once.
    pub fn load(folder: &Path, args: &EngineArgs) -> Result<Self, Error> {
        let folder = ModelFolder::open(folder)?;
        let parts = Parts::read(&folder)?;
        let args = &args.for_model(folder.bytes()?).for_graphs(&parts.graphs())?;
        let runners = (0..args.session_count()).map(|_| Runner::load(&parts, args)).collect::<Result<Vec<_>, _>>()?;
        let limits = ModelLimits { picture_bytes: 0, picture_pixels: 0, text_tokens: parts.text_length() as u32, batch: args.batch() as u32 };
        let mut model = folder.model("stable-diffusion", args, limits)?;
        if let Some(notice) = parts.notice() {
            warn!("{notice}");
            model.notice = format!("{} {notice}", model.notice).trim_start().to_owned();
        }
        let concurrency = 2 * args.batch() * runners.len();
        let scheduler = parts.scheduler().clone();
        let batcher = Batcher::start("diffusion", runners, args.limits(Parameters::default().num_inference_steps as usize))?;
        Ok(Self { model, scheduler, batcher, concurrency })
    }

    /// What is loaded.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Pictures of one call that are worked on at a time.
    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Draws a picture.
    pub async fn draw(&self, request: Request) -> Result<Drawing, Fault> {
        // Refused here, before it waits in line.
        self.scheduler.schedule(request.steps as usize).map_err(|problem| Fault::field("num_inference_steps", problem))?;
        self.batcher.submit(request).await
    }
}

/// A pipeline and the schedules that it is run with.
struct Runner {
    pipeline: Pipeline,
    scheduler: Scheduler,
}

impl Runner {
    fn load(parts: &Parts, args: &EngineArgs) -> Result<Self, Error> {
        Ok(Self { pipeline: Pipeline::load(parts, args)?, scheduler: parts.scheduler().clone() })
    }

    /// Draws pictures that have steps and guidance in common.
    fn draw(&mut self, requests: &[Request], stop: &Stop) -> Result<Vec<Drawing>, Error> {
        let Some(first) = requests.first() else { return Ok(Vec::new()) };
        let schedule = self.scheduler.schedule(first.steps as usize).map_err(Error::Run)?;
        let latents = self.pipeline.denoise(&schedule, requests, stop)?;
        let Pictures { height, width, values } = self.pipeline.decode(&latents)?;
        values.chunks_exact(3 * height * width).map(|picture| finish(picture, height as u32, width as u32)).collect()
    }
}

/// A decoded picture, -1 to 1 by channels, as PNG; one that is not finite or all one value is unusable.
fn finish(values: &[f32], height: u32, width: u32) -> Result<Drawing, Error> {
    if values.iter().any(|v| !v.is_finite()) {
        return Ok(Drawing::Unusable("the drawn picture holds values that are not finite".to_owned()));
    }
    let plane = (height * width) as usize;
    let byte = |value: f32| ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
    let bytes: Vec<u8> = (0..plane).flat_map(|i| [values[i], values[plane + i], values[2 * plane + i]]).map(byte).collect();
    if bytes.iter().all(|byte| Some(byte) == bytes.first()) {
        return Ok(Drawing::Unusable("the drawn picture is all one value".to_owned()));
    }
    let picture = RgbImage::from_raw(width, height, bytes).ok_or_else(|| Error::Run("the drawn picture has the wrong size".to_owned()))?;
    Ok(Drawing::Png(encode_png(&picture)?.into()))
}

impl Worker for Runner {
    type Item = Request;
    type Output = Drawing;
    type Key = (u32, u32);

    fn key(item: &Request) -> (u32, u32) {
        (item.steps, item.guidance.to_bits())
    }

    /// Denoising steps.
    fn cost(item: &Request) -> usize {
        item.steps as usize
    }

    fn warm_up(&mut self) -> Result<(), Fault> {
        self.draw(&[Request { concept: "nothing".to_owned(), index: 0, seed: 0, steps: 1, guidance: 7.5 }], &Stop::default())?;
        Ok(())
    }

    fn run(&mut self, batch: Vec<Request>, stop: &Stop) -> Vec<Result<Drawing, Fault>> {
        match self.draw(&batch, stop) {
            Ok(drawings) => drawings.into_iter().map(Ok).collect(),
            Err(error) => {
                let fault = Fault::from(error);
                batch.iter().map(|_| Err(fault.clone())).collect()
            }
        }
    }
}
