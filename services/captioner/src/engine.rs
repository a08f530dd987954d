//! The model: BLIP's vision encoder and text decoder.

use std::path::Path;

use bytes::Bytes;
use dnd_mesh::{
    Fault,
    batch::{self, Batcher, Limits, Stop, Worker},
};
use dnd_onnx::{
    Error,
    decoder::{Decoder, Names, argmax},
    folder::ModelFolder,
    pictures::{PictureLimits, Preprocessor, PreprocessorConfig},
    runtime::{self, EngineArgs},
    tokenizer::Tokenizer,
};
use dnd_proto::v1::{Caption, Model, ModelLimits};
use ort::{session::Session, value::Tensor};
use serde::Deserialize;

/// A loaded captioner.
pub struct Captioner {
    model: Model,
    batcher: Batcher<Runner>,
    concurrency: usize,
}

/// A picture to caption.
#[derive(Debug, Clone)]
pub struct Picture {
    /// As it came, encoded.
    pub bytes: Bytes,
    /// Tokens that may be generated.
    pub max_new_tokens: u32,
    /// Length below which the caption may not end, the start token counted.
    pub min_length: u32,
}

#[derive(Deserialize)]
struct Config {
    model_type: String,
    text_config: TextConfig,
}

#[derive(Deserialize)]
struct TextConfig {
    bos_token_id: u32,
    sep_token_id: u32,
}

impl Captioner {
    /// Loads the model in a folder and runs it once.
    pub fn load(folder: &Path, args: &EngineArgs) -> Result<Self, Error> {
        let folder = ModelFolder::open(folder)?;
        let config: Config = folder.json("configuration", "config.json")?;
        if config.model_type != "blip" {
            return Err(Error::file(
                folder.root().join("config.json"),
                format!("model_type is {:?}; captioners of type \"blip\" can be loaded", config.model_type),
            ));
        }
        let pre: PreprocessorConfig = folder.json("picture pre-processing", "preprocessor_config.json")?;
        let pre = pre.preprocessing().map_err(|problem| Error::file(folder.root().join("preprocessor_config.json"), problem))?;
        let vision = folder.file("vision encoder", &["onnx/vision_model.onnx", "vision_model.onnx"])?;
        let decoder = folder.file("text decoder", &["onnx/text_decoder_model.onnx", "text_decoder_model.onnx"])?;
        let tokenizer = Tokenizer::read(&folder.file("tokenizer", &["tokenizer.json"])?)?;
        let pre = Preprocessor::new(&pre)?;
        let args = &args.for_model(folder.bytes()?);
        let mut runners = (0..args.session_count())
            .map(|_| {
                Ok(Runner {
                    vision: runtime::session(&vision, args)?,
                    decoder: Decoder::load(&decoder, &Names::default(), args)?,
                    tokenizer: tokenizer.clone(),
                    pre: pre.clone(),
                    start: config.text_config.bos_token_id,
                    end: config.text_config.sep_token_id,
                })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        for runner in &mut runners {
            runner.warm_up()?;
        }
        let limits = PictureLimits::default();
        let model = folder.model(
            &config.model_type,
            args,
            ModelLimits { picture_bytes: limits.bytes as u64, picture_pixels: limits.pixels, text_tokens: 0, batch: args.batch() as u32 },
        )?;
        let concurrency = 2 * args.batch() * runners.len();
        let batcher = Batcher::start("captioner", runners, Limits { queue: 2 * concurrency, batch: args.batch() }).map_err(|e| Error::Run(e.to_string()))?;
        Ok(Self { model, batcher, concurrency })
    }

    /// What is loaded.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Pictures of one call that are worked on at a time.
    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Captions a picture, greedily.
    pub async fn caption(&self, picture: Picture) -> Result<Caption, Fault> {
        self.batcher.submit(picture).await
    }
}

struct Runner {
    vision: Session,
    decoder: Decoder,
    tokenizer: Tokenizer,
    pre: Preprocessor,
    start: u32,
    end: u32,
}

impl Worker for Runner {
    type Item = Picture;
    type Output = Caption;
    type Key = (u32, u32);

    fn key(item: &Picture) -> (u32, u32) {
        (item.max_new_tokens, item.min_length)
    }

    fn run(&mut self, pictures: Vec<Picture>, stop: &Stop) -> Vec<Result<Caption, Fault>> {
        let (max_new_tokens, min_length) = pictures.first().map(Self::key).unwrap_or_default();
        let mut tensor = Vec::with_capacity(pictures.len() * self.pre.values());
        let read: Vec<Result<(), Fault>> = pictures
            .iter()
            .map(|picture| {
                let decoded = dnd_onnx::pictures::decode(&picture.bytes, PictureLimits::default())?;
                Ok(self.pre.append(&decoded, &mut tensor)?)
            })
            .collect();
        let count = read.iter().filter(|r| r.is_ok()).count();
        let captions = self.generate(tensor, count, max_new_tokens as usize, min_length as usize, stop);
        batch::spread(read, captions.map_err(Fault::from))
    }
}

impl Runner {
    fn warm_up(&mut self) -> Result<(), Error> {
        self.generate(vec![0.0; self.pre.values()], 1, 2, 0, &Stop::default()).map(drop)
    }

    /// Captions `count` pictures.
    fn generate(&mut self, pixels: Vec<f32>, count: usize, max_new_tokens: usize, min_length: usize, stop: &Stop) -> Result<Vec<Caption>, Error> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let (height, width) = self.pre.size();
        let pixels = Tensor::from_array(([count, 3, height, width], pixels))?;
        let mut outputs = self.vision.run(vec![("pixel_values", pixels)])?;
        let seen = outputs.remove("last_hidden_state").ok_or_else(|| Error::Run("the vision encoder has no output last_hidden_state".to_owned()))?;
        drop(outputs);

        let mut sequences = self.decoder.begin(count)?;
        let mut next = vec![self.start; count];
        let mut texts: Vec<Vec<u32>> = vec![Vec::new(); count];
        let mut ended = vec![false; count];
        for _ in 0..max_new_tokens {
            stop.check()?;
            let mut logits = self.decoder.append(&mut sequences, &next, Some(&seen))?;
            for (row, logits) in logits.iter_mut().enumerate() {
                if sequences.length() < min_length
                    && let Some(end) = logits.get_mut(self.end as usize)
                {
                    *end = f32::NEG_INFINITY;
                }
                next[row] = if ended[row] { self.end } else { argmax(logits) };
                ended[row] |= next[row] == self.end;
                if !ended[row] {
                    texts[row].push(next[row]);
                }
            }
            if ended.iter().all(|ended| *ended) {
                break;
            }
        }
        texts.into_iter().map(|token_ids| Ok(Caption { text: self.tokenizer.decode(&token_ids)?.trim().to_owned(), token_ids })).collect()
    }
}
