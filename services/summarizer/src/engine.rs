//! The model: a causal language model with its cache, sampled with keyed draws.

use std::{collections::BTreeMap, path::Path};

use dnd_mesh::{
    Fault,
    batch::{Batcher, Stop, Worker},
};
use dnd_method::{draw, prompts::Message};
use dnd_onnx::{
    Error,
    decoder::{Decoder, Names},
    folder::ModelFolder,
    runtime::EngineArgs,
    tokenizer::Tokenizer,
};
use dnd_proto::v1::{Answer, Model, ModelLimits};
use serde::Deserialize;

use crate::chat::ChatTemplate;

/// Tokens of a usual question with its answer.
const USUAL_TOKENS: usize = 1024;

/// A loaded language model.
pub struct OnnxModel {
    model: Model,
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    longest: usize,
    batcher: Batcher<Runner>,
    concurrency: usize,
}

/// What to ask, and how to draw the answer.
#[derive(Debug, Clone)]
pub struct Question {
    /// The conversation so far; its last turn is the user's.
    pub messages: Vec<Message>,
    /// Draws differ by it.
    pub seed: u64,
    /// Which of the attempts at the same conversation.
    pub attempt: u32,
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Tokens of the answer at most.
    pub max_new_tokens: u32,
}

#[derive(Default, Deserialize)]
struct Config {
    model_type: Option<String>,
    max_position_embeddings: Option<usize>,
    eos_token_id: Option<Ids>,
}

#[derive(Default, Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<Ids>,
}

/// onnxruntime-genai's `genai_config.json`.
#[derive(Deserialize)]
struct GenaiConfig {
    model: GenaiModel,
}

#[derive(Deserialize)]
struct GenaiModel {
    #[serde(rename = "type")]
    kind: String,
    context_length: usize,
    eos_token_id: Ids,
    decoder: GenaiDecoder,
}

#[derive(Deserialize)]
struct GenaiDecoder {
    filename: String,
    #[serde(default)]
    inputs: BTreeMap<String, String>,
    #[serde(default)]
    outputs: BTreeMap<String, String>,
}

impl GenaiDecoder {
    fn names(&self) -> Names {
        let mut names = Names::default();
        for (said, key, name) in [
            (&self.inputs, "input_ids", &mut names.input_ids),
            (&self.inputs, "attention_mask", &mut names.attention_mask),
            (&self.inputs, "position_ids", &mut names.position_ids),
            (&self.inputs, "past_key_names", &mut names.past_key),
            (&self.inputs, "past_value_names", &mut names.past_value),
            (&self.outputs, "logits", &mut names.logits),
            (&self.outputs, "present_key_names", &mut names.present_key),
            (&self.outputs, "present_value_names", &mut names.present_value),
        ] {
            if let Some(other) = said.get(key) {
                name.clone_from(other);
            }
        }
        names
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Several(Vec<u32>),
}

/// What optimum and transformers.js add to a file's name for the precision of its weights, in the order of preference.
const PRECISIONS: [&str; 8] = ["", "_fp16", "_quantized", "_q4", "_q4f16", "_int8", "_uint8", "_bnb4"];

/// A language model in one of the layouts that are published.
struct Layout {
    /// The file's name in the folder.
    file: String,
    names: Names,
    kind: String,
    longest: usize,
    ends: Vec<u32>,
}

impl Layout {
    /// That of onnxruntime-genai where `genai_config.json` is there; else Hugging Face's, whose files are beside the configuration or, as
    /// transformers.js has them, in `onnx`.
    fn find(folder: &ModelFolder) -> Result<Self, Error> {
        const GENAI: &str = "genai_config.json";
        if folder.optional(&[GENAI]).is_some() {
            let GenaiConfig { model } = folder.json("configuration", GENAI)?;
            let names = model.decoder.names();
            return Ok(Self { file: model.decoder.filename, names, kind: model.kind, longest: model.context_length, ends: model.eos_token_id.all() });
        }
        let config: Config = folder.json("configuration", "config.json")?;
        let generation: GenerationConfig = match folder.optional(&["generation_config.json"]) {
            Some(_) => folder.json("generation configuration", "generation_config.json")?,
            None => GenerationConfig::default(),
        };
        let Some(ends) = generation.eos_token_id.or(config.eos_token_id) else {
            return Err(Error::file(folder.root(), "no eos_token_id in generation_config.json or config.json: answers would not end"));
        };
        // The last is refused with what to take instead.
        let stems = ["model", "decoder_model_merged", "decoder_model"];
        let files = PRECISIONS.iter().flat_map(|precision| stems.map(|stem| [format!("onnx/{stem}{precision}.onnx"), format!("{stem}{precision}.onnx")]));
        let Some(file) = files.flatten().find(|file| folder.root().join(file).is_file()) else {
            let problem = format!("no language model: looked for onnx/model.onnx and model.onnx, and the same with {}", PRECISIONS[1..].join(", "));
            return Err(Error::file(folder.root(), problem));
        };
        let kind = config.model_type.unwrap_or_else(|| "causal language model".to_owned());
        Ok(Self { file, names: Names::default(), kind, longest: config.max_position_embeddings.unwrap_or(2048), ends: ends.all() })
    }
}

impl Ids {
    fn all(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Several(ids) => ids,
        }
    }
}

impl OnnxModel {
    /// Loads the model in a folder and runs it once.
    pub fn load(folder: &Path, args: &EngineArgs) -> Result<Self, Error> {
        let folder = ModelFolder::open(folder)?;
        let Layout { file, names, kind, longest, ends } = Layout::find(&folder)?;
        let path = folder.file("language model", &[&file])?;
        let tokenizer = Tokenizer::of(&folder, "")?;
        let chat = ChatTemplate::read(&folder)?;
        let args = &args.for_model(folder.bytes()?).for_graphs(&[&path])?;
        let runners = (0..args.session_count())
            .map(|_| Ok(Runner { decoder: Decoder::load(&path, None, &names, args)?, ends: ends.clone() }))
            .collect::<Result<Vec<_>, Error>>()?;
        let model = folder.model(
            &format!("{kind}, {file}"),
            args,
            ModelLimits { picture_bytes: 0, picture_pixels: 0, text_tokens: longest as u32, batch: args.batch() as u32 },
        )?;
        let concurrency = 2 * args.batch() * runners.len();
        let batcher = Batcher::start("summarizer", runners, args.limits(USUAL_TOKENS))?;
        Ok(Self { model, chat, tokenizer, longest, batcher, concurrency })
    }

    /// What is loaded.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Questions of one call that are worked on at a time.
    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Asks the model.
    pub async fn ask(&self, question: Question) -> Result<Answer, Fault> {
        let text = self.chat.render(&question.messages)?;
        // The template has written the special tokens; the tokenizer must not add its own.
        let tokens = self.tokenizer.encode(&text, false)?;
        let longest = self.longest.saturating_sub(question.max_new_tokens as usize);
        if tokens.is_empty() || tokens.len() > longest {
            let message = format!("the prompt has {} tokens; with {} for the answer the model takes 1 to {longest}", tokens.len(), question.max_new_tokens);
            return Err(Fault::new(tonic::Code::InvalidArgument, "PROMPT_LENGTH", message));
        }
        let prompt_tokens = tokens.len() as u32;
        let Question { seed, attempt, temperature, max_new_tokens, .. } = question;
        let said = self.batcher.submit(Prompt { tokens, text, seed, attempt, temperature, max_new_tokens }).await?;
        Ok(Answer {
            text: self.tokenizer.decode(&said.tokens)?.trim().to_owned(),
            prompt_tokens,
            answer_tokens: said.tokens.len() as u32,
            cut_off: !said.ended,
            ..Answer::default()
        })
    }
}

/// A rendered question.
struct Prompt {
    tokens: Vec<u32>,
    text: String,
    seed: u64,
    attempt: u32,
    temperature: f32,
    max_new_tokens: u32,
}

#[derive(Debug, Clone, Default)]
struct Said {
    tokens: Vec<u32>,
    ended: bool,
}

struct Runner {
    decoder: Decoder,
    ends: Vec<u32>,
}

impl Worker for Runner {
    type Item = Prompt;
    type Output = Said;
    /// Only prompts of equal length share a batch: without padding, an answer can't depend on its companions.
    type Key = (usize, u32);

    fn key(item: &Prompt) -> (usize, u32) {
        (item.tokens.len(), item.max_new_tokens)
    }

    /// Tokens, read and written.
    fn cost(item: &Prompt) -> usize {
        item.tokens.len() + item.max_new_tokens as usize
    }

    fn warm_up(&mut self) -> Result<(), Fault> {
        self.generate(&[Prompt { tokens: vec![0, 0], text: String::new(), seed: 0, attempt: 0, temperature: 0.0, max_new_tokens: 1 }], &Stop::default())?;
        Ok(())
    }

    fn run(&mut self, batch: Vec<Prompt>, stop: &Stop) -> Vec<Result<Said, Fault>> {
        match self.generate(&batch, stop) {
            Ok(said) => said.into_iter().map(Ok).collect(),
            Err(error) => {
                let fault = Fault::from(error);
                batch.iter().map(|_| Err(fault.clone())).collect()
            }
        }
    }
}

impl Runner {
    /// Answers prompts of equal length.
    fn generate(&mut self, prompts: &[Prompt], stop: &Stop) -> Result<Vec<Said>, Error> {
        let mut sequences = self.decoder.begin(prompts.len())?;
        let mut next: Vec<u32> = prompts.iter().flat_map(|prompt| prompt.tokens.iter().copied()).collect();
        let mut said = vec![Said::default(); prompts.len()];
        let steps = prompts.first().map_or(0, |prompt| prompt.max_new_tokens);
        for position in 0..steps {
            stop.check()?;
            let logits = self.decoder.append(&mut sequences, &next, None)?;
            next = prompts
                .iter()
                .zip(&mut said)
                .zip(&logits)
                .map(|((prompt, said), logits)| {
                    let token = draw::token(logits, prompt.temperature, prompt.seed, &prompt.text, prompt.attempt, position);
                    said.ended |= self.ends.contains(&token);
                    if !said.ended {
                        said.tokens.push(token);
                    }
                    token
                })
                .collect();
            if said.iter().all(|said| said.ended) {
                break;
            }
        }
        Ok(said)
    }
}
