//! The parts of a Stable Diffusion model and what each of them does: texts to states, noise to latents, latents to pictures.

use std::path::{Path, PathBuf};

use dnd_mesh::batch::Stop;
use dnd_method::{draw, prompts};
use dnd_onnx::{
    Error,
    decoder::ids_tensor,
    folder::{ModelFolder, read_json},
    runtime::{self, EngineArgs},
    tensors::{float_tensor, floats, input_kind},
    tokenizer::FixedLength,
};
use ort::{
    session::{Session, SessionInputValue},
    value::{DynValue, Tensor, TensorElementType},
};
use serde::Deserialize;

use crate::{
    Request,
    scheduler::{Schedule, Scheduler, SchedulerConfig},
};

#[derive(Deserialize)]
struct ModelIndex {
    #[serde(rename = "_class_name")]
    class_name: String,
}

#[derive(Deserialize)]
struct UnetConfig {
    in_channels: usize,
    sample_size: SampleSize,
    time_cond_proj_dim: Option<usize>,
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

/// The pipelines whose parts these are; exports put `Onnx` or `ORT` before the name.
const PIPELINES: [&str; 2] = ["StableDiffusionPipeline", "LatentConsistencyModelPipeline"];

/// Of Stable Diffusion 1.x, whose published configurations do not all say it.
const SCALING_FACTOR: f32 = 0.18215;

/// The files and constants of a model, of which each [`Pipeline`] makes its sessions.
pub struct Parts {
    text_encoder: PathBuf,
    unet: PathBuf,
    vae_decoder: PathBuf,
    text: FixedLength,
    scheduler: Scheduler,
    latents: [usize; 3],
    guidance_width: Option<usize>,
    scaling: f32,
    shift: f32,
    notice: Option<String>,
}

impl Parts {
    /// Reads a folder as diffusers and optimum lay it out.
    pub fn read(folder: &ModelFolder) -> Result<Self, Error> {
        let index: ModelIndex = folder.json("pipeline", "model_index.json")?;
        let class = index.class_name.trim_start_matches("Onnx").trim_start_matches("ORT");
        if !PIPELINES.contains(&class) {
            return Err(Error::file(
                folder.root().join("model_index.json"),
                format!("{}: pipelines of Stable Diffusion 1 and 2 can be loaded ({})", index.class_name, PIPELINES.join(", ")),
            ));
        }
        let unet: UnetConfig = folder.json("UNet configuration", "unet/config.json")?;
        let vae_file = folder.file("decoder configuration", &["vae_decoder/config.json", "vae/config.json"])?;
        let vae: VaeConfig = read_json(&vae_file)?;
        let mut scheduler: SchedulerConfig = folder.json("scheduler", "scheduler/scheduler_config.json")?;
        if class == "StableDiffusionPipeline" {
            // The library's pipeline overrules the file here.
            scheduler.steps_offset = 1;
        }
        let scheduler = Scheduler::new(scheduler).map_err(|problem| Error::file(folder.root().join("scheduler/scheduler_config.json"), problem))?;
        let [height, width] = match unet.sample_size {
            SampleSize::Square(side) => [side, side],
            SampleSize::Sides(sides) => sides,
        };
        let notice = vae.scaling_factor.is_none().then(|| {
            let file = vae_file.strip_prefix(folder.root()).unwrap_or(&vae_file).display();
            format!("{file} says no scaling_factor: latents are scaled by Stable Diffusion 1's, {SCALING_FACTOR}.")
        });
        Ok(Self {
            text_encoder: folder.file("text encoder", &["text_encoder/model.onnx"])?,
            unet: folder.file("UNet", &["unet/model.onnx"])?,
            vae_decoder: folder.file("decoder", &["vae_decoder/model.onnx"])?,
            text: FixedLength::read(folder, "tokenizer/", None)?,
            scheduler,
            latents: [unet.in_channels, height, width],
            guidance_width: unet.time_cond_proj_dim,
            scaling: vae.scaling_factor.unwrap_or(SCALING_FACTOR),
            shift: vae.shift_factor.unwrap_or(0.0),
            notice,
        })
    }

    /// The graphs that each pipeline has a session of.
    pub(crate) fn graphs(&self) -> [&Path; 3] {
        [&self.text_encoder, &self.unet, &self.vae_decoder]
    }

    /// Tokens that a text is cut or padded to.
    pub fn text_length(&self) -> usize {
        self.text.length()
    }

    /// The steps that its `scheduler_config.json` asks for.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// What users of the pictures have to be told of how the folder was read.
    pub fn notice(&self) -> Option<&str> {
        self.notice.as_deref()
    }
}

/// Sessions of a model's parts. Whatever floats a part takes and gives, here they are f32.
pub struct Pipeline {
    text_encoder: Session,
    text_ids: TensorElementType,
    unet: Unet,
    vae_decoder: Session,
    vae_kind: TensorElementType,
    text: FixedLength,
    latents: [usize; 3],
    scaling: f32,
    shift: f32,
    /// What the text encoder says of the empty text, which guidance leads away from.
    unconditional: Vec<f32>,
}

/// Decoded pictures: -1 to 1 by pictures, channels, rows, columns.
pub struct Pictures {
    /// Height of each.
    pub height: usize,
    /// Width of each.
    pub width: usize,
    /// pictures x 3 x height x width values.
    pub values: Vec<f32>,
}

impl Pipeline {
    /// Makes sessions of the parts.
    pub fn load(parts: &Parts, args: &EngineArgs) -> Result<Self, Error> {
        let text_encoder = runtime::session(&parts.text_encoder, args)?;
        let unet = Unet::load(parts, args)?;
        let vae_decoder = runtime::session(&parts.vae_decoder, args)?;
        let (text_ids, _) = input(&text_encoder, &parts.text_encoder, "input_ids")?;
        let (vae_kind, _) = input(&vae_decoder, &parts.vae_decoder, "latent_sample")?;
        let mut pipeline = Self {
            text_encoder,
            text_ids,
            unet,
            vae_decoder,
            vae_kind,
            text: parts.text.clone(),
            latents: parts.latents,
            scaling: parts.scaling,
            shift: parts.shift,
            unconditional: Vec::new(),
        };
        pipeline.unconditional = pipeline.encode(&[""])?;
        Ok(pipeline)
    }

    /// The text encoder's last hidden states: texts x length x width.
    pub fn encode(&mut self, texts: &[&str]) -> Result<Vec<f32>, Error> {
        let ids = texts.iter().map(|text| self.text.encode(text)).collect::<Result<Vec<_>, _>>()?.concat();
        let outputs = self.text_encoder.run(vec![("input_ids", ids_tensor(self.text_ids, [texts.len(), self.text.length()], &ids)?)])?;
        let states = outputs.get("last_hidden_state").ok_or_else(|| Error::Run("the text encoder has no output last_hidden_state".to_owned()))?;
        Ok(floats(states)?.1.into_owned())
    }

    /// What the UNet says of `sample` (rows x channels x height x width) at a time step, given the text encoder's `states` (rows x length x width).
    /// `guidance` is told to a UNet that takes it.
    pub fn predict(&mut self, sample: Vec<f32>, timestep: f64, states: &[f32], guidance: f32) -> Result<Vec<f32>, Error> {
        let states = self.states(sample.len() / self.size(), states.to_vec())?;
        self.unet.run(self.latents, sample, timestep, &states, guidance)
    }

    /// The latents of pictures that have steps and guidance in common: requests x channels x height x width.
    pub fn denoise(&mut self, schedule: &Schedule, requests: &[Request], stop: &Stop) -> Result<Vec<f32>, Error> {
        let Some(&Request { guidance, .. }) = requests.first() else { return Ok(Vec::new()) };
        let (count, size) = (requests.len(), self.size());
        // A UNet that is told the guidance has learnt what it does.
        let guided = guidance > 1.0 && self.unet.guidance.is_none();

        let prompts: Vec<String> = requests.iter().map(|request| prompts::generate(&request.concept)).collect();
        let conditional = self.encode(&prompts.iter().map(String::as_str).collect::<Vec<_>>())?;
        let states = if guided { [self.unconditional.repeat(count), conditional].concat() } else { conditional };
        let states = self.states(if guided { 2 * count } else { count }, states)?;

        let noise = |draw: u32| requests.iter().flat_map(move |request| draw::noise(request.seed, &request.concept, request.index, draw, size));
        let mut latents: Vec<f32> = noise(0).map(|value| (f64::from(value) * schedule.init_noise_sigma) as f32).collect();
        let mut estimate = Vec::new();
        for (number, step) in (1..).zip(&schedule.steps) {
            stop.check()?;
            let sample: Vec<f32> = latents.iter().map(|latent| (f64::from(*latent) * step.input_scale) as f32).collect();
            let output = self.unet.run(self.latents, if guided { sample.repeat(2) } else { sample }, step.timestep, &states, guidance)?;
            if guided {
                let (without, with) = output.split_at(output.len() / 2);
                let led: Vec<f32> = without.iter().zip(with).map(|(without, with)| without + guidance * (with - without)).collect();
                step.advance(&mut latents, &led, &mut estimate);
            } else {
                step.advance(&mut latents, &output, &mut estimate);
            }
            if step.noise > 0.0 {
                latents.iter_mut().zip(noise(number)).for_each(|(latent, fresh)| *latent += (step.noise * f64::from(fresh)) as f32);
            }
        }
        Ok(latents)
    }

    /// The pictures that latents stand for.
    pub fn decode(&mut self, latents: &[f32]) -> Result<Pictures, Error> {
        let [channels, height, width] = self.latents;
        let count = latents.len() / self.size();
        let scaled = latents.iter().map(|latent| latent / self.scaling + self.shift).collect();
        let input = float_tensor(self.vae_kind, &[count, channels, height, width], scaled)?;
        let outputs = self.vae_decoder.run(vec![("latent_sample", SessionInputValue::from(input))])?;
        let (shape, values) = floats(outputs.get("sample").ok_or_else(|| Error::Run("the decoder has no output sample".to_owned()))?)?;
        match **shape {
            [n, 3, height, width] if n as usize == count => Ok(Pictures { height: height as usize, width: width as usize, values: values.into_owned() }),
            ref other => Err(Error::Run(format!("the decoder's sample has the shape {other:?}, not [{count}, 3, height, width]"))),
        }
    }

    /// Values of a picture's latents.
    fn size(&self) -> usize {
        self.latents.iter().product()
    }

    fn states(&self, rows: usize, states: Vec<f32>) -> Result<DynValue, Error> {
        let (length, width) = (self.text.length(), states.len() / (rows * self.text.length()));
        float_tensor(self.unet.states, &[rows, length, width], states)
    }
}

struct Unet {
    session: Session,
    sample: TensorElementType,
    states: TensorElementType,
    timestep: Timestep,
    /// What the guidance is told as, and in how many values: a latent consistency model's `timestep_cond`.
    guidance: Option<(TensorElementType, usize)>,
}

impl Unet {
    fn load(parts: &Parts, args: &EngineArgs) -> Result<Self, Error> {
        let file = &parts.unet;
        let session = runtime::session(file, args)?;
        let (sample, _) = input(&session, file, "sample")?;
        let (states, _) = input(&session, file, "encoder_hidden_states")?;
        let (kind, shape) = input(&session, file, "timestep")?;
        let shape = match shape[..] {
            [] => TimestepShape::Scalar,
            [1] => TimestepShape::One,
            [_] => TimestepShape::OneEach,
            _ => return Err(Error::file(file, "timestep has more than one axis")),
        };
        let guidance = match (input_kind(&session, "timestep_cond"), parts.guidance_width) {
            (Some((kind, _)), Some(width)) => Some((kind, width)),
            (None, None) => None,
            (Some(_), None) => return Err(Error::file(file, "takes timestep_cond, and config.json beside it says no time_cond_proj_dim")),
            (None, Some(width)) => {
                return Err(Error::file(file, format!("no input named timestep_cond, and config.json beside it says time_cond_proj_dim {width}")));
            }
        };
        Ok(Self { session, sample, states, timestep: Timestep { kind, shape }, guidance })
    }

    fn run(&mut self, [channels, height, width]: [usize; 3], sample: Vec<f32>, timestep: f64, states: &DynValue, guidance: f32) -> Result<Vec<f32>, Error> {
        let rows = sample.len() / (channels * height * width);
        let mut inputs: Vec<(&str, SessionInputValue<'_>)> = vec![
            ("sample", float_tensor(self.sample, &[rows, channels, height, width], sample)?.into()),
            ("timestep", self.timestep.tensor(timestep, rows)?),
            ("encoder_hidden_states", states.into()),
        ];
        if let Some((kind, width)) = self.guidance {
            inputs.push(("timestep_cond", float_tensor(kind, &[rows, width], guidance_embedding(guidance, width).repeat(rows))?.into()));
        }
        let outputs = self.session.run(inputs)?;
        let output = outputs.get("out_sample").ok_or_else(|| Error::Run("the UNet has no output out_sample".to_owned()))?;
        Ok(floats(output)?.1.into_owned())
    }
}

/// Sines, then cosines of the guidance scale less 1, as the library has them: in single precision, which their large arguments show.
fn guidance_embedding(guidance: f32, width: usize) -> Vec<f32> {
    let half = width / 2;
    let rate = 10_000f32.ln() / (half as f32 - 1.0);
    let angles: Vec<f32> = (0..half).map(|i| (guidance - 1.0) * 1000.0 * (i as f32 * -rate).exp()).collect();
    let mut embedding: Vec<f32> = angles.iter().map(|angle| angle.sin()).chain(angles.iter().map(|angle| angle.cos())).collect();
    embedding.resize(width, 0.0);
    embedding
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
    /// Where the graph takes whole numbers only, a step between two of them is the lower one, as in the library's exports.
    fn tensor(self, value: f64, batch: usize) -> Result<SessionInputValue<'static>, Error> {
        let (shape, count) = match self.shape {
            TimestepShape::Scalar => (vec![], 1),
            TimestepShape::One => (vec![1], 1),
            TimestepShape::OneEach => (vec![batch], batch),
        };
        Ok(match self.kind {
            TensorElementType::Int64 => Tensor::from_array((shape, vec![value as i64; count]))?.into(),
            TensorElementType::Int32 => Tensor::from_array((shape, vec![value as i32; count]))?.into(),
            kind => float_tensor(kind, &shape, vec![value as f32; count])?.into(),
        })
    }
}

/// The element type and shape of an input that has to be there.
fn input(session: &Session, file: &Path, name: &str) -> Result<(TensorElementType, Vec<i64>), Error> {
    input_kind(session, name).ok_or_else(|| Error::file(file, format!("no input named {name}")))
}
