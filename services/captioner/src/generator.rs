//! Captions that are written token by token: an encoder that sees, and a decoder that attends to what it saw or goes on from it.

use std::path::{Path, PathBuf};

use dnd_mesh::{
    Fault,
    batch::{self, Stop, Worker},
};
use dnd_onnx::{
    Error,
    decoder::{Decoder, Names, select_rows},
    folder::ModelFolder,
    pictures::{self, PictureLimits, Preprocessor, PreprocessorConfig},
    runtime::{self, EngineArgs},
    tensors::float_tensor,
    tokenizer::Tokenizer,
};
use dnd_proto::v1::Caption;
use ort::{session::Session, value::TensorElementType};
use serde::Deserialize;

use crate::{
    Picture,
    search::{Generation, Search},
};

/// Which model it is: they differ in the names of their files and in where their configurations say how a text starts and ends.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Architecture {
    /// BLIP: `vision_model.onnx` and `text_decoder_model.onnx`, as the project's recipe writes them.
    Blip,
    /// BLIP-2, in transformers.js's layout of models whose texts begin with a picture: `vision_encoder.onnx`, `embed_tokens.onnx` and
    /// `decoder_model_merged.onnx`.
    Blip2,
    /// Any image encoder with any text decoder, as optimum and transformers.js write them: `encoder_model.onnx` and `decoder_model_merged.onnx`.
    VisionEncoderDecoder,
}

/// How a model's texts start and end, and how long they can be.
#[derive(Clone)]
struct Text {
    /// The last is the start token; before it stands what counts as said already.
    start: Vec<u32>,
    ends: Vec<u32>,
    longest: u32,
}

#[derive(Deserialize)]
struct BlipConfig {
    text_config: BlipTextConfig,
}

/// What a published configuration leaves out has BLIP's value.
#[derive(Deserialize)]
#[serde(default)]
struct BlipTextConfig {
    bos_token_id: u32,
    sep_token_id: u32,
    max_position_embeddings: u32,
}

impl Default for BlipTextConfig {
    fn default() -> Self {
        Self { bos_token_id: 30522, sep_token_id: 102, max_position_embeddings: 512 }
    }
}

#[derive(Deserialize)]
struct Blip2Config {
    image_token_index: u32,
    #[serde(default = "Blip2Config::num_query_tokens")]
    num_query_tokens: u32,
    text_config: OptConfig,
}

impl Blip2Config {
    fn num_query_tokens() -> u32 {
        32
    }
}

/// What a published configuration leaves out has OPT's value.
#[derive(Deserialize)]
#[serde(default)]
struct OptConfig {
    bos_token_id: u32,
    eos_token_id: Ids,
    max_position_embeddings: u32,
}

impl Default for OptConfig {
    fn default() -> Self {
        Self { bos_token_id: 2, eos_token_id: Ids::One(2), max_position_embeddings: 2048 }
    }
}

#[derive(Default, Deserialize)]
struct EncoderDecoderConfig {
    decoder: DecoderConfig,
    #[serde(flatten)]
    tokens: Tokens,
}

#[derive(Default, Deserialize)]
struct DecoderConfig {
    max_position_embeddings: Option<u32>,
    n_positions: Option<u32>,
    #[serde(flatten)]
    tokens: Tokens,
}

#[derive(Default, Deserialize)]
struct Tokens {
    decoder_start_token_id: Option<u32>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<Ids>,
}

#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Several(Vec<u32>),
}

impl Ids {
    fn all(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Several(ids) => ids,
        }
    }
}

impl Text {
    fn read(folder: &ModelFolder, architecture: Architecture) -> Result<Self, Error> {
        let generation = || match folder.optional(&["generation_config.json"]) {
            Some(_) => folder.json("generation configuration", "generation_config.json"),
            None => Ok(Tokens::default()),
        };
        match architecture {
            Architecture::Blip => {
                // BLIP ends its texts with the separator whatever its eos_token_id is.
                let BlipConfig { text_config: text } = folder.json("configuration", "config.json")?;
                Ok(Self { start: vec![text.bos_token_id], ends: vec![text.sep_token_id], longest: text.max_position_embeddings })
            }
            Architecture::Blip2 => {
                let Blip2Config { image_token_index, num_query_tokens, text_config: text } = folder.json("configuration", "config.json")?;
                let ends = generation()?.eos_token_id.unwrap_or(text.eos_token_id).all();
                // A repetition penalty is on the picture's token, too.
                Ok(Self { start: vec![image_token_index, text.bos_token_id], ends, longest: text.max_position_embeddings.saturating_sub(num_query_tokens) })
            }
            Architecture::VisionEncoderDecoder => {
                let config: EncoderDecoderConfig = folder.json("configuration", "config.json")?;
                let longest = config.decoder.max_position_embeddings.or(config.decoder.n_positions).unwrap_or(1024);
                // generation_config.json says it, else the model's configuration, else the decoder's.
                let places = [generation()?, config.tokens, config.decoder.tokens];
                let start = places.iter().find_map(|tokens| tokens.decoder_start_token_id).or_else(|| places.iter().find_map(|tokens| tokens.bos_token_id));
                let ends = places.iter().find_map(|tokens| tokens.eos_token_id.clone());
                let missing = |name: &str| Error::file(folder.root(), format!("no {name} in generation_config.json or config.json"));
                let ends = ends.ok_or_else(|| missing("eos_token_id"))?.all();
                Ok(Self { start: vec![start.ok_or_else(|| missing("decoder_start_token_id"))?], ends, longest })
            }
        }
    }
}

/// The model on a thread of its own.
pub(crate) struct Generator {
    vision: Session,
    /// What the encoder calls its output: its states, which the decoder attends to, or the embeddings that the text goes on from.
    seen: &'static str,
    /// The floats that the encoder takes.
    pixels: TensorElementType,
    decoder: Decoder,
    tokenizer: Tokenizer,
    pre: Preprocessor,
    text: Text,
    /// Rows that the decoder runs together, unless one picture has more beams.
    rows: usize,
}

impl Generator {
    /// Loads the model of a folder, as often as it is to have sessions; also the tokens that a text of it has at most.
    pub(crate) fn load(folder: &ModelFolder, architecture: Architecture, args: &EngineArgs) -> Result<(Vec<Self>, u32), Error> {
        let text = Text::read(folder, architecture)?;
        let pre: PreprocessorConfig = folder.json("picture pre-processing", "preprocessor_config.json")?;
        let pre = pre.preprocessing().map_err(|problem| Error::file(folder.root().join("preprocessor_config.json"), problem))?;
        let pre = Preprocessor::new(&pre)?;
        let (encoder, embeddings, decoder) = match architecture {
            Architecture::Blip => (folder.graph("vision encoder", "vision_model")?, None, folder.graph("text decoder", "text_decoder_model")?),
            Architecture::Blip2 => (
                folder.graph("vision encoder", "vision_encoder")?,
                Some(folder.graph("token embeddings", "embed_tokens")?),
                folder.graph("text decoder", "decoder_model_merged")?,
            ),
            Architecture::VisionEncoderDecoder => {
                let decoder = folder.graph("text decoder", "decoder_model_merged").map_err(|missing| match folder.graph("", "decoder_model") {
                    Ok(half) => Error::file(
                        half,
                        "one half of a pair; its other half, decoder_with_past_model.onnx, can't begin a text: use decoder_model_merged.onnx, which is both",
                    ),
                    Err(_) => missing,
                })?;
                (folder.graph("image encoder", "encoder_model")?, None, decoder)
            }
        };
        let tokenizer = Tokenizer::of(folder, "")?;
        let seen = if embeddings.is_some() { "image_features" } else { "last_hidden_state" };
        let graphs: Vec<&Path> = [Some(&encoder), embeddings.as_ref(), Some(&decoder)].into_iter().flatten().map(PathBuf::as_path).collect();
        let args = &args.for_model(folder.bytes()?).for_graphs(&graphs)?;
        let generators = (0..args.session_count())
            .map(|_| {
                let vision = runtime::session(&encoder, args)?;
                if !vision.outputs().iter().any(|output| output.name() == seen) {
                    return Err(Error::file(&encoder, format!("not the image encoder of such a model: no output named {seen}")));
                }
                let pixels = vision.inputs().iter().find(|input| input.name() == "pixel_values").and_then(|input| input.dtype().tensor_type());
                Ok(Self {
                    pixels: pixels.unwrap_or(TensorElementType::Float32),
                    vision,
                    seen,
                    decoder: Decoder::load(&decoder, embeddings.as_deref(), &Names::default(), args)?,
                    tokenizer: tokenizer.clone(),
                    pre: pre.clone(),
                    text: text.clone(),
                    rows: args.batch(),
                })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        Ok((generators, text.longest))
    }

    /// Captions `count` pictures; a caption of its own can fail alone.
    fn generate(&mut self, pixels: Vec<f32>, count: usize, generation: Generation, stop: &Stop) -> Result<Vec<Result<Caption, Error>>, Error> {
        let (height, width) = self.pre.size();
        let pixels = float_tensor(self.pixels, &[count, 3, height, width], pixels)?;
        let mut outputs = self.vision.run(vec![("pixel_values", pixels)])?;
        let seen = outputs.remove(self.seen).ok_or_else(|| Error::Run(format!("the vision encoder gave no {}", self.seen)))?;
        drop(outputs);
        let mut sequences = self.decoder.begin(count)?;
        // Either the text goes on from what is seen, or it attends to it.
        let mut attended = if self.decoder.takes_embeddings() {
            self.decoder.append_embeddings(&mut sequences, &seen)?;
            None
        } else {
            Some(seen)
        };

        let Text { start, ends, .. } = &self.text;
        let mut searches: Vec<Result<Search, Error>> = (0..count).map(|_| Ok(Search::new(generation, start, ends))).collect();
        let mut next: Vec<u32> = searches.iter().flatten().flat_map(Search::running).map(|beam| beam.last()).collect();
        let mut rows = Vec::new();
        loop {
            stop.check()?;
            let logits = self.decoder.append(&mut sequences, &next, attended.as_ref())?;
            next.clear();
            rows.clear();
            let mut first = 0;
            for search in &mut searches {
                let Ok(searching) = search else { continue };
                let width = searching.running().len();
                if width == 0 {
                    continue;
                }
                match searching.step(&logits[first..first + width]) {
                    Ok(()) => {
                        rows.extend(searching.running().iter().map(|beam| first + beam.row));
                        next.extend(searching.running().iter().map(|beam| beam.last()));
                    }
                    Err(error) => *search = Err(error),
                }
                first += width;
            }
            if rows.is_empty() {
                break;
            }
            if sequences.select(&rows)?
                && let Some(attended) = &mut attended
            {
                *attended = select_rows(attended, &rows)?;
            }
        }
        let caption = |search: Search| {
            let token_ids = search.best();
            Ok(Caption { text: self.tokenizer.decode(&token_ids)?.trim().to_owned(), token_ids })
        };
        Ok(searches.into_iter().map(|search| search.and_then(caption)).collect())
    }
}

impl Worker for Generator {
    type Item = Picture;
    type Output = Caption;
    type Key = Generation;

    fn key(item: &Picture) -> Generation {
        item.generation
    }

    /// Tokens.
    fn cost(item: &Picture) -> usize {
        item.generation.tokens()
    }

    fn warm_up(&mut self) -> Result<(), Fault> {
        let blank = vec![0.0; self.pre.values()];
        for caption in self.generate(blank, 1, Generation { max_new_tokens: 2, ..Generation::default() }, &Stop::default())? {
            caption?;
        }
        Ok(())
    }

    fn run(&mut self, items: Vec<Picture>, stop: &Stop) -> Vec<Result<Caption, Fault>> {
        let generation = items.first().map(Self::key).unwrap_or_default();
        let values = self.pre.values();
        let mut tensor = Vec::with_capacity(items.len() * values);
        let read: Vec<Result<(), Fault>> = items
            .iter()
            .map(|picture| {
                let decoded = pictures::decode(&picture.bytes, PictureLimits::default())?;
                Ok(self.pre.append(&decoded, &mut tensor)?)
            })
            .collect();
        // Each beam is a row, with a cache of its own.
        let together = (self.rows / generation.num_beams.max(1) as usize).max(1);
        let captions = tensor.chunks(together * values).map(|pixels| self.generate(pixels.to_vec(), pixels.len() / values, generation, stop));
        let captions: Result<Vec<_>, Error> = captions.collect();
        let captions = captions.map(|captions| captions.into_iter().flatten().map(|caption| caption.map_err(Fault::from)).collect());
        batch::spread(read, captions.map_err(Fault::from)).into_iter().map(Result::flatten).collect()
    }
}
