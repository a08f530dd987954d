//! The model: CLIP's two encoders, with their projections.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use dnd_mesh::{
    Fault, MAX_TEXT_BYTES,
    batch::{self, Batcher, Stop, Worker},
};
use dnd_onnx::{
    Error,
    decoder::ids_tensor,
    folder::ModelFolder,
    pictures::{self, PictureLimits, Preprocessor, PreprocessorConfig},
    runtime::{self, EngineArgs},
    tensors::{float_tensor, floats, input_kind},
    tokenizer::FixedLength,
};
use dnd_proto::v1::{Embedding, Model, ModelLimits};
use ort::{
    session::{Session, SessionInputValue},
    value::{DynValue, TensorElementType},
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
        let (vision, text) = encoders(&folder)?;
        let text_tokens = FixedLength::read(&folder, "", config.text_config.max_position_embeddings)?;
        let args = &args.for_model(folder.bytes()?).for_graphs(&[&vision, &text])?;
        let images = (0..args.session_count()).map(|_| ImageRunner::load(&vision, &pre, &text_tokens, args)).collect::<Result<Vec<_>, _>>()?;
        // Texts are few and short: one session is enough for them.
        let length = text_tokens.length();
        let texts = vec![TextRunner::load(&text, text_tokens.clone(), &pre, args)?];
        let limits = PictureLimits::default();
        let model = folder.model(
            &config.model_type,
            args,
            ModelLimits { picture_bytes: limits.bytes as u64, picture_pixels: limits.pixels, text_tokens: length as u32, batch: args.batch() as u32 },
        )?;
        let concurrency = 2 * args.batch() * images.len();
        let limits = args.limits(1);
        Ok(Self { model, images: Batcher::start("clip-images", images, limits)?, texts: Batcher::start("clip-texts", texts, limits)?, concurrency })
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
        if text.len() > MAX_TEXT_BYTES {
            return Err(Fault::field("text", format!("{} bytes; at most {MAX_TEXT_BYTES} are read", text.len())));
        }
        self.texts.submit(text).await
    }
}

/// The files of the image and the text encoder; both may be in one.
fn encoders(folder: &ModelFolder) -> Result<(PathBuf, PathBuf), Error> {
    let apart = folder.graph("image encoder", "vision_model").and_then(|vision| Ok((vision, folder.graph("text encoder", "text_model")?)));
    apart.or_else(|missing| folder.graph("model", "model").map(|both| (both.clone(), both)).map_err(|_| missing))
}

/// One of the two encoders.
struct Encoder {
    session: Session,
    output: &'static str,
}

impl Encoder {
    /// A graph that gives what it was made with and not `output` lacks CLIP's projection: its vectors can't be compared across encoders.
    fn load(file: &Path, output: &'static str, args: &EngineArgs) -> Result<Self, Error> {
        let session = runtime::session(file, args)?;
        if !session.outputs().iter().any(|found| found.name() == output) {
            let outputs: Vec<_> = session.outputs().iter().map(|found| found.name()).collect();
            return Err(Error::file(file, format!("no output {output} (it has {}): export the model with its projection", outputs.join(", "))));
        }
        Ok(Self { session, output })
    }

    /// The type of an input that has to be there.
    fn input(&self, file: &Path, name: &str) -> Result<TensorElementType, Error> {
        input_kind(&self.session, name).map(|(kind, _)| kind).ok_or_else(|| Error::file(file, format!("no input named {name}")))
    }

    fn run(&mut self, inputs: Vec<(&'static str, SessionInputValue<'_>)>, count: usize) -> Result<Vec<Embedding>, Error> {
        let outputs = self.session.run(inputs)?;
        unit_rows(outputs.get(self.output).ok_or_else(|| Error::Run(format!("no output {}", self.output)))?, self.output, count)
    }
}

/// An embedding that is not finite, as half precision can give, is no answer.
fn finite(embedded: Result<Embedding, Fault>) -> Result<Embedding, Fault> {
    let all = |embedding: &Embedding| embedding.values.iter().all(|value| value.is_finite());
    embedded.and_then(|embedding| if all(&embedding) { Ok(embedding) } else { Err(Error::Run("its embedding is not finite".to_owned()).into()) })
}

fn pixels_tensor(kind: TensorElementType, pre: &Preprocessor, count: usize, pixels: Vec<f32>) -> Result<SessionInputValue<'static>, Error> {
    let (height, width) = pre.size();
    Ok(float_tensor(kind, &[count, 3, height, width], pixels)?.into())
}

/// The rows of an encoder's output, each of unit length.
fn unit_rows(output: &DynValue, name: &str, count: usize) -> Result<Vec<Embedding>, Error> {
    let (shape, values) = floats(output)?;
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
    encoder: Encoder,
    kind: TensorElementType,
    pre: Preprocessor,
    tokens: FixedLength,
    /// What the text encoder takes, where it is in the same graph: it then runs, too, on an empty text.
    others: Vec<(&'static str, TensorElementType)>,
}

impl ImageRunner {
    fn load(file: &Path, pre: &Preprocessor, tokens: &FixedLength, args: &EngineArgs) -> Result<Self, Error> {
        let encoder = Encoder::load(file, "image_embeds", args)?;
        let kind = encoder.input(file, "pixel_values")?;
        let others = ["input_ids", "attention_mask"].into_iter().filter_map(|name| Some((name, input_kind(&encoder.session, name)?.0))).collect();
        Ok(Self { encoder, kind, pre: pre.clone(), tokens: tokens.clone(), others })
    }

    fn embed(&mut self, pixels: Vec<f32>, count: usize) -> Result<Vec<Embedding>, Error> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let mut inputs = vec![("pixel_values", pixels_tensor(self.kind, &self.pre, count, pixels)?)];
        for &(name, kind) in &self.others {
            inputs.push((name, ids_tensor(kind, [1, self.tokens.length()], &vec![self.tokens.end(); self.tokens.length()])?));
        }
        self.encoder.run(inputs, count)
    }
}

impl Worker for ImageRunner {
    type Item = Bytes;
    type Output = Embedding;
    type Key = ();

    fn key(_: &Bytes) {}

    fn warm_up(&mut self) -> Result<(), Fault> {
        self.embed(vec![0.0; self.pre.values()], 1)?;
        Ok(())
    }

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
        batch::spread(read, self.embed(tensor, count).map_err(Fault::from)).into_iter().map(finite).collect()
    }
}

struct TextRunner {
    encoder: Encoder,
    ids: TensorElementType,
    mask: Option<TensorElementType>,
    /// What the image encoder takes, where it is in the same graph: it then runs, too, on an empty picture.
    pixels: Option<TensorElementType>,
    pre: Preprocessor,
    tokens: FixedLength,
}

impl TextRunner {
    fn load(file: &Path, tokens: FixedLength, pre: &Preprocessor, args: &EngineArgs) -> Result<Self, Error> {
        let encoder = Encoder::load(file, "text_embeds", args)?;
        let ids = encoder.input(file, "input_ids")?;
        let kind = |name: &str| input_kind(&encoder.session, name).map(|(kind, _)| kind);
        let (mask, pixels) = (kind("attention_mask"), kind("pixel_values"));
        Ok(Self { encoder, ids, mask, pixels, pre: pre.clone(), tokens })
    }

    /// Embeds texts that are `length` tokens each. What follows the end token changes nothing: the encoder looks backwards only.
    fn embed(&mut self, texts: &[Vec<u32>]) -> Result<Vec<Embedding>, Error> {
        let shape = [texts.len(), self.tokens.length()];
        let mut inputs = vec![("input_ids", ids_tensor(self.ids, shape, &texts.concat())?)];
        if let Some(kind) = self.mask {
            let mask: Vec<u32> = texts.iter().flat_map(|ids| up_to_end(ids, self.tokens.end())).collect();
            inputs.push(("attention_mask", ids_tensor(kind, shape, &mask)?));
        }
        if let Some(kind) = self.pixels {
            inputs.push(("pixel_values", pixels_tensor(kind, &self.pre, 1, vec![0.0; self.pre.values()])?));
        }
        self.encoder.run(inputs, texts.len())
    }
}

/// 1 for each token up to the first end token and for it, 0 after.
fn up_to_end(ids: &[u32], end: u32) -> impl Iterator<Item = u32> {
    let last = ids.iter().position(|id| *id == end).unwrap_or(ids.len());
    (0..ids.len()).map(move |i| u32::from(i <= last))
}

impl Worker for TextRunner {
    type Item = String;
    type Output = Embedding;
    type Key = ();

    fn key(_: &String) {}

    fn warm_up(&mut self) -> Result<(), Fault> {
        self.embed(&[vec![self.tokens.end(); self.tokens.length()]])?;
        Ok(())
    }

    fn run(&mut self, items: Vec<String>, _: &Stop) -> Vec<Result<Embedding, Fault>> {
        let mut texts = Vec::with_capacity(items.len());
        let mut read = Vec::with_capacity(items.len());
        for text in &items {
            read.push(self.tokens.encode(text).map(|ids| texts.push(ids)).map_err(Fault::from));
        }
        let embedded = if texts.is_empty() { Ok(Vec::new()) } else { self.embed(&texts) };
        batch::spread(read, embedded.map_err(Fault::from)).into_iter().map(finite).collect()
    }
}
