//! The model: Stable Diffusion's parts.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use dnd_mesh::{
    Fault,
    batch::{Batcher, Limits, Stop, Worker},
};
use dnd_method::{draw, prompts};
use dnd_onnx::{
    Error,
    decoder::ids_tensor,
    folder::ModelFolder,
    pictures::encode_png,
    runtime::{self, EngineArgs},
    tokenizer::FixedLength,
};
use dnd_proto::v1::{Model, ModelLimits};
use image::RgbImage;
use ort::{
    session::{Session, SessionInputValue},
    value::{Tensor, TensorElementType},
};
use serde::Deserialize;
use tracing::warn;

use crate::scheduler::{Scheduler, SchedulerConfig};

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

#[derive(Deserialize)]
struct ModelIndex {
    #[serde(rename = "_class_name")]
    class_name: String,
}

#[derive(Deserialize)]
struct UnetConfig {
    in_channels: usize,
    sample_size: SampleSize,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum SampleSize {
    Square(usize),
    Sides([usize; 2]),
}

#[derive(Deserialize)]
struct VaeConfig {
    scaling_factor: Option<f32>,
    shift_factor: Option<f32>,
}

/// Of Stable Diffusion 1.x, whose published configurations do not all say it.
const SCALING_FACTOR: f32 = 0.18215;

/// The files and constants of a model, of which each runner makes its sessions.
struct Parts {
    text_encoder: PathBuf,
    unet: PathBuf,
    vae_decoder: PathBuf,
    text: FixedLength,
    scheduler: Scheduler,
    latents: [usize; 3],
    scaling: f32,
    shift: f32,
}

impl Parts {
    fn read(folder: &ModelFolder) -> Result<Self, Error> {
        let index: ModelIndex = folder.json("pipeline", "model_index.json")?;
        if !index.class_name.contains("StableDiffusion") || index.class_name.contains("XL") {
            return Err(Error::file(
                folder.root().join("model_index.json"),
                format!("{}: pipelines of Stable Diffusion 1 and 2 can be loaded", index.class_name),
            ));
        }
        let unet: UnetConfig = folder.json("UNet configuration", "unet/config.json")?;
        let vae: VaeConfig = folder.json("decoder configuration", "vae_decoder/config.json")?;
        let scheduler: SchedulerConfig = folder.json("scheduler", "scheduler/scheduler_config.json")?;
        let scheduler = Scheduler::new(scheduler).map_err(|problem| Error::file(folder.root().join("scheduler/scheduler_config.json"), problem))?;
        let [height, width] = match unet.sample_size {
            SampleSize::Square(side) => [side, side],
            SampleSize::Sides(sides) => sides,
        };
        if vae.scaling_factor.is_none() {
            warn!("vae_decoder/config.json says no scaling_factor: {SCALING_FACTOR} of Stable Diffusion 1 is used");
        }
        Ok(Self {
            text_encoder: folder.file("text encoder", &["text_encoder/model.onnx"])?,
            unet: folder.file("UNet", &["unet/model.onnx"])?,
            vae_decoder: folder.file("decoder", &["vae_decoder/model.onnx"])?,
            text: FixedLength::read(folder, "tokenizer/", None)?,
            scheduler,
            latents: [unet.in_channels, height, width],
            scaling: vae.scaling_factor.unwrap_or(SCALING_FACTOR),
            shift: vae.shift_factor.unwrap_or(0.0),
        })
    }
}

impl Diffusion {
    /// Loads the model in a folder and runs it once.
    pub fn load(folder: &Path, args: &EngineArgs) -> Result<Self, Error> {
        let folder = ModelFolder::open(folder)?;
        let parts = Parts::read(&folder)?;
        let args = &args.for_model(folder.bytes()?);
        let runners = (0..args.session_count()).map(|_| Runner::load(&parts, args)).collect::<Result<Vec<_>, _>>()?;
        let limits = ModelLimits { picture_bytes: 0, picture_pixels: 0, text_tokens: parts.text.length() as u32, batch: args.batch() as u32 };
        let model = folder.model("stable-diffusion", args, limits)?;
        let concurrency = 2 * args.batch() * runners.len();
        let scheduler = parts.scheduler;
        let batcher = Batcher::start("diffusion", runners, Limits { queue: 2 * concurrency, batch: args.batch() }).map_err(|e| Error::Run(e.to_string()))?;
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

struct Runner {
    text_encoder: Session,
    text_ids: TensorElementType,
    unet: Session,
    timestep: Timestep,
    vae_decoder: Session,
    text: FixedLength,
    scheduler: Scheduler,
    latents: [usize; 3],
    scaling: f32,
    shift: f32,
    /// What the text encoder says of the empty text, which guidance leads away from.
    unconditional: Vec<f32>,
}

/// How the UNet takes its time step.
#[derive(Debug, Clone, Copy)]
struct Timestep {
    kind: TensorElementType,
    shape: TimestepShape,
}

#[derive(Debug, Clone, Copy)]
enum TimestepShape {
    Scalar,
    /// One for all pictures, which the graph broadcasts.
    One,
    OneEach,
}

impl Timestep {
    fn tensor(self, value: f64, batch: usize) -> Result<SessionInputValue<'static>, Error> {
        let (shape, count) = match self.shape {
            TimestepShape::Scalar => (vec![], 1),
            TimestepShape::One => (vec![1], 1),
            TimestepShape::OneEach => (vec![batch], batch),
        };
        Ok(match self.kind {
            TensorElementType::Int64 => Tensor::from_array((shape, vec![value as i64; count]))?.into(),
            TensorElementType::Int32 => Tensor::from_array((shape, vec![value as i32; count]))?.into(),
            TensorElementType::Float32 => Tensor::from_array((shape, vec![value as f32; count]))?.into(),
            other => return Err(Error::Run(format!("the UNet's timestep is {other}: int32, int64 and float32 are known"))),
        })
    }
}

impl Runner {
    fn load(parts: &Parts, args: &EngineArgs) -> Result<Self, Error> {
        let text_encoder = runtime::session(&parts.text_encoder, args)?;
        let unet = runtime::session(&parts.unet, args)?;
        let vae_decoder = runtime::session(&parts.vae_decoder, args)?;
        let input = |session: &Session, file: &Path, name: &str| {
            let missing = || Error::file(file, format!("no input named {name}"));
            session.inputs().iter().find(|input| input.name() == name).map(|input| input.dtype().clone()).ok_or_else(missing)
        };
        let no_tensor = |file: &Path, name: &str| Error::file(file, format!("{name} is no tensor"));
        let text_ids = input(&text_encoder, &parts.text_encoder, "input_ids")?.tensor_type().ok_or_else(|| no_tensor(&parts.text_encoder, "input_ids"))?;
        let timestep = input(&unet, &parts.unet, "timestep")?;
        let (Some(kind), Some(shape)) = (timestep.tensor_type(), timestep.tensor_shape()) else { return Err(no_tensor(&parts.unet, "timestep")) };
        let shape = match shape[..] {
            [] => TimestepShape::Scalar,
            [1] => TimestepShape::One,
            [_] => TimestepShape::OneEach,
            _ => return Err(Error::file(&parts.unet, "timestep has more than one axis")),
        };
        let timestep = Timestep { kind, shape };
        input(&unet, &parts.unet, "encoder_hidden_states")?;
        input(&vae_decoder, &parts.vae_decoder, "latent_sample")?;
        let mut runner = Self {
            text_encoder,
            text_ids,
            unet,
            timestep,
            vae_decoder,
            text: parts.text.clone(),
            scheduler: parts.scheduler.clone(),
            latents: parts.latents,
            scaling: parts.scaling,
            shift: parts.shift,
            unconditional: Vec::new(),
        };
        runner.unconditional = runner.encode(&[""])?;
        runner.draw(&[Request { concept: "nothing".to_owned(), index: 0, seed: 0, steps: 1, guidance: 7.5 }], &Stop::default())?;
        Ok(runner)
    }

    /// The text encoder's last hidden states: texts x length x width.
    fn encode(&mut self, texts: &[&str]) -> Result<Vec<f32>, Error> {
        let ids = texts.iter().map(|text| self.text.encode(text)).collect::<Result<Vec<_>, _>>()?.concat();
        let outputs = self.text_encoder.run(vec![("input_ids", ids_tensor(self.text_ids, [texts.len(), self.text.length()], &ids)?)])?;
        let states = outputs.get("last_hidden_state").ok_or_else(|| Error::Run("the text encoder has no output last_hidden_state".to_owned()))?;
        Ok(states.try_extract_tensor::<f32>()?.1.to_vec())
    }

    /// Draws pictures that have steps and guidance in common.
    fn draw(&mut self, requests: &[Request], stop: &Stop) -> Result<Vec<Drawing>, Error> {
        let Some(&Request { steps, guidance, .. }) = requests.first() else { return Ok(Vec::new()) };
        let count = requests.len();
        let [channels, height, width] = self.latents;
        let size = channels * height * width;
        let guided = guidance > 1.0;

        let prompts: Vec<String> = requests.iter().map(|request| prompts::generate(&request.concept)).collect();
        let conditional = self.encode(&prompts.iter().map(String::as_str).collect::<Vec<_>>())?;
        let states = if guided { [self.unconditional.repeat(count), conditional].concat() } else { conditional };
        let rows = if guided { 2 * count } else { count };
        let text_width = states.len() / (rows * self.text.length());
        let states = Tensor::from_array(([rows, self.text.length(), text_width], states))?;

        let mut latents: Vec<f32> = requests.iter().flat_map(|request| draw::noise(request.seed, &request.concept, request.index, size)).collect();
        let mut estimate = Vec::new();
        for step in &self.scheduler.schedule(steps as usize).map_err(Error::Run)?.steps {
            stop.check()?;
            let sample = if guided { latents.repeat(2) } else { latents.clone() };
            let inputs: Vec<(&str, SessionInputValue<'_>)> = vec![
                ("sample", Tensor::from_array(([rows, channels, height, width], sample))?.into()),
                ("timestep", self.timestep.tensor(step.timestep, rows)?),
                ("encoder_hidden_states", (&states).into()),
            ];
            let outputs = self.unet.run(inputs)?;
            let (_, output) =
                outputs.get("out_sample").ok_or_else(|| Error::Run("the UNet has no output out_sample".to_owned()))?.try_extract_tensor::<f32>()?;
            if guided {
                let (without, with) = output.split_at(output.len() / 2);
                let led: Vec<f32> = without.iter().zip(with).map(|(without, with)| without + guidance * (with - without)).collect();
                step.advance(&mut latents, &led, &mut estimate);
            } else {
                step.advance(&mut latents, output, &mut estimate);
            }
        }
        for latent in &mut latents {
            *latent = *latent / self.scaling + self.shift;
        }
        let outputs = self.vae_decoder.run(vec![("latent_sample", Tensor::from_array(([count, channels, height, width], latents))?)])?;
        let (shape, values) = outputs.get("sample").ok_or_else(|| Error::Run("the decoder has no output sample".to_owned()))?.try_extract_tensor::<f32>()?;
        match **shape {
            [n, 3, height, width] if n as usize == count => {
                values.chunks_exact(values.len() / count).map(|picture| finish(picture, height as u32, width as u32)).collect()
            }
            ref other => Err(Error::Run(format!("the decoder's sample has the shape {other:?}, not [{count}, 3, height, width]"))),
        }
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
