//! The model: CLIP's two encoders, with their projections.

use std::path::Path;

use bytes::Bytes;
use dnd_mesh::{
    Fault,
    batch::{self, Batcher, Limits, Stop, Worker},
};
use dnd_onnx::{
    Error,
    decoder::ids_tensor,
    folder::ModelFolder,
    pictures::{self, PictureLimits, Preprocessor, PreprocessorConfig},
    runtime::{self, EngineArgs},
    tokenizer::FixedLength,
};
use dnd_proto::v1::{Embedding, Model, ModelLimits};
use ort::{
    session::{Session, SessionInputValue},
    value::{Tensor, TensorElementType},
};
use serde::Deserialize;

/// A loaded CLIP model.
pub struct Clip {
    model: Model,
    images: Batcher<ImageRunner>,
    texts: Batcher<TextRunner>,
    concurrency: usize,
}

#[derive(Deserialize)]
struct Config {
    model_type: String,
    #[serde(default)]
    text_config: TextConfig,
}

#[derive(Default, Deserialize)]
struct TextConfig {
    max_position_embeddings: Option<usize>,
}

impl Clip {
    /// Loads the model in a folder and runs it once.
    pub fn load(folder: &Path, args: &EngineArgs) -> Result<Self, Error> {
        let folder = ModelFolder::open(folder)?;
        let config: Config = folder.json("configuration", "config.json")?;
        let pre: PreprocessorConfig = folder.json("picture pre-processing", "preprocessor_config.json")?;
        let pre = pre.preprocessing().map_err(|problem| Error::file(folder.root().join("preprocessor_config.json"), problem))?;
        let pre = Preprocessor::new(&pre)?;
        let vision = folder.file("image encoder", &["onnx/vision_model.onnx", "vision_model.onnx"])?;
        let text = folder.file("text encoder", &["onnx/text_model.onnx", "text_model.onnx"])?;
        let text_tokens = FixedLength::read(&folder, "", config.text_config.max_position_embeddings)?;
        let args = &args.for_model(folder.bytes()?);
        let mut images = (0..args.session_count()).map(|_| ImageRunner::load(&vision, &pre, args)).collect::<Result<Vec<_>, _>>()?;
        // Texts are few and short: one session is enough for them.
        let length = text_tokens.length();
        let mut texts = vec![TextRunner::load(&text, text_tokens.clone(), args)?];
        for runner in &mut images {
            runner.embed(vec![0.0; runner.pre.values()], 1)?;
        }
        for runner in &mut texts {
            runner.embed(&[vec![text_tokens.end(); length]])?;
        }
        let limits = PictureLimits::default();
        let model = folder.model(
            &config.model_type,
            args,
            ModelLimits { picture_bytes: limits.bytes as u64, picture_pixels: limits.pixels, text_tokens: length as u32, batch: args.batch() as u32 },
        )?;
        let concurrency = 2 * args.batch() * images.len();
        let limits = Limits { queue: 2 * concurrency, batch: args.batch() };
        let started = |e: std::io::Error| Error::Run(e.to_string());
        Ok(Self {
            model,
            images: Batcher::start("clip-images", images, limits).map_err(started)?,
            texts: Batcher::start("clip-texts", texts, limits).map_err(started)?,
            concurrency,
        })
    }

    /// What is loaded.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Items of one call that are worked on at a time.
    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Embeds an encoded picture.
    pub async fn image(&self, picture: Bytes) -> Result<Embedding, Fault> {
        self.images.submit(picture).await
    }

    /// Embeds a text, cut where it is longer than the model takes.
    pub async fn text(&self, text: String) -> Result<Embedding, Fault> {
        self.texts.submit(text).await
    }
}

/// A graph that gives what it was made with and not `name` lacks CLIP's projection: its vectors can't be compared across encoders.
fn check_output(session: &Session, file: &Path, name: &str) -> Result<(), Error> {
    if session.outputs().iter().any(|output| output.name() == name) {
        return Ok(());
    }
    let outputs: Vec<_> = session.outputs().iter().map(|output| output.name()).collect();
    Err(Error::file(file, format!("no output {name} (it has {}): export the model with its projection", outputs.join(", "))))
}

/// The rows of an encoder's output, each of unit length.
fn unit_rows(outputs: &ort::session::SessionOutputs<'_>, name: &str, count: usize) -> Result<Vec<Embedding>, Error> {
    let (shape, values) = outputs.get(name).ok_or_else(|| Error::Run(format!("no output {name}")))?.try_extract_tensor::<f32>()?;
    let width = match **shape {
        [n, d] if n as usize == count && d > 0 => d as usize,
        ref other => return Err(Error::Run(format!("{name} has the shape {other:?}, not [{count}, dimensions]"))),
    };
    let unit = |row: &[f32]| {
        let length = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
        Embedding { values: row.iter().map(|v| (f64::from(*v) / length) as f32).collect() }
    };
    Ok(values.chunks_exact(width).map(unit).collect())
}

struct ImageRunner {
    session: Session,
    pre: Preprocessor,
}

impl ImageRunner {
    fn load(file: &Path, pre: &Preprocessor, args: &EngineArgs) -> Result<Self, Error> {
        let session = runtime::session(file, args)?;
        check_output(&session, file, "image_embeds")?;
        Ok(Self { session, pre: pre.clone() })
    }

    fn embed(&mut self, pixels: Vec<f32>, count: usize) -> Result<Vec<Embedding>, Error> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let (height, width) = self.pre.size();
        let outputs = self.session.run(vec![("pixel_values", Tensor::from_array(([count, 3, height, width], pixels))?)])?;
        unit_rows(&outputs, "image_embeds", count)
    }
}

impl Worker for ImageRunner {
    type Item = Bytes;
    type Output = Embedding;
    type Key = ();

    fn key(_: &Bytes) {}

    fn run(&mut self, items: Vec<Bytes>, _: &Stop) -> Vec<Result<Embedding, Fault>> {
        let mut tensor = Vec::with_capacity(items.len() * self.pre.values());
        let read: Vec<Result<(), Fault>> = items
            .iter()
            .map(|bytes| {
                let decoded = pictures::decode(bytes, PictureLimits::default())?;
                Ok(self.pre.append(&decoded, &mut tensor)?)
            })
            .collect();
        let count = read.iter().filter(|r| r.is_ok()).count();
        batch::spread(read, self.embed(tensor, count).map_err(Fault::from))
    }
}

struct TextRunner {
    session: Session,
    ids: TensorElementType,
    mask: bool,
    tokens: FixedLength,
}

impl TextRunner {
    fn load(file: &Path, tokens: FixedLength, args: &EngineArgs) -> Result<Self, Error> {
        let session = runtime::session(file, args)?;
        check_output(&session, file, "text_embeds")?;
        let input = |name: &str| session.inputs().iter().find(|input| input.name() == name);
        let ids = input("input_ids").and_then(|i| i.dtype().tensor_type()).ok_or_else(|| Error::file(file, "not a text encoder: no input named input_ids"))?;
        let mask = input("attention_mask").is_some();
        Ok(Self { session, ids, mask, tokens })
    }

    /// Embeds texts that are `length` tokens each. What follows the end token changes nothing: the encoder looks backwards only.
    fn embed(&mut self, texts: &[Vec<u32>]) -> Result<Vec<Embedding>, Error> {
        let shape = [texts.len(), self.tokens.length()];
        let ids: Vec<u32> = texts.concat();
        let mut inputs: Vec<(&str, SessionInputValue<'_>)> = vec![("input_ids", ids_tensor(self.ids, shape, &ids)?)];
        if self.mask {
            let mask: Vec<i64> = texts.iter().flat_map(|ids| up_to_end(ids, self.tokens.end())).collect();
            inputs.push(("attention_mask", Tensor::from_array((shape, mask))?.into()));
        }
        let outputs = self.session.run(inputs)?;
        unit_rows(&outputs, "text_embeds", texts.len())
    }
}

/// 1 for each token up to the first end token and for it, 0 after.
fn up_to_end(ids: &[u32], end: u32) -> impl Iterator<Item = i64> {
    let last = ids.iter().position(|id| *id == end).unwrap_or(ids.len());
    (0..ids.len()).map(move |i| i64::from(i <= last))
}

impl Worker for TextRunner {
    type Item = String;
    type Output = Embedding;
    type Key = ();

    fn key(_: &String) {}

    fn run(&mut self, items: Vec<String>, _: &Stop) -> Vec<Result<Embedding, Fault>> {
        let mut texts = Vec::with_capacity(items.len());
        let mut read = Vec::with_capacity(items.len());
        for text in &items {
            read.push(self.tokens.encode(text).map(|ids| texts.push(ids)).map_err(Fault::from));
        }
        let embedded = if texts.is_empty() { Ok(Vec::new()) } else { self.embed(&texts) };
        batch::spread(read, embedded.map_err(Fault::from))
    }
}
