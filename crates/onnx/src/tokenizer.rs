//! Texts to ids and back.

use std::path::Path;

use serde::Deserialize;
use tokenizers::Tokenizer as Inner;

use crate::{
    Error,
    folder::{ModelFolder, read_json},
};

/// A tokenizer as `tokenizer.json` describes it, without the padding and cutting that the file may ask for: callers say those.
#[derive(Debug, Clone)]
pub struct Tokenizer(Inner);

impl Tokenizer {
    /// Reads `tokenizer.json`.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let mut inner = Inner::from_file(path).map_err(|e| Error::file(path, e.to_string()))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::file(path, e.to_string()))?;
        Ok(Self(inner))
    }

    /// The ids of a text; `special` adds the tokens that the post-processor puts around it.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, Error> {
        self.0.encode_fast(text, special).map(|encoding| encoding.get_ids().to_vec()).map_err(|e| Error::Run(format!("the tokenizer: {e}")))
    }

    /// The text of ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        self.0.decode(ids, true).map_err(|e| Error::Run(format!("the tokenizer: {e}")))
    }

    /// The id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }
}

/// A tokenizer for texts of one length, as CLIP's text encoders take them: longer texts are cut with the end token kept, shorter ones are padded.
#[derive(Debug, Clone)]
pub struct FixedLength {
    tokenizer: Tokenizer,
    length: usize,
    end: u32,
    padding: u32,
}

#[derive(Deserialize)]
struct Config {
    model_max_length: Option<f64>,
    eos_token: SpecialToken,
    pad_token: Option<SpecialToken>,
}

/// A special token in `tokenizer_config.json`: its text, or its text and how it is to be treated.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum SpecialToken {
    /// The text alone.
    Text(String),
    /// The text among other things.
    Added {
        /// The text.
        content: String,
    },
}

impl SpecialToken {
    /// Its text.
    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Added { content: text } => text,
        }
    }
}

impl FixedLength {
    /// Of the files `tokenizer.json` and `tokenizer_config.json` under `prefix` of a model's folder. The length is the encoder's if its configuration says
    /// one, else the tokenizer's, else CLIP's 77.
    pub fn read(folder: &ModelFolder, prefix: &str, length: Option<usize>) -> Result<Self, Error> {
        let tokenizer = Tokenizer::read(&folder.file("tokenizer", &[&format!("{prefix}tokenizer.json")])?)?;
        let path = folder.file("tokenizer configuration", &[&format!("{prefix}tokenizer_config.json")])?;
        let config: Config = read_json(&path)?;
        let id = |token: &SpecialToken| tokenizer.id(token.text()).ok_or_else(|| Error::file(&path, format!("{:?} is not in the vocabulary", token.text())));
        let end = id(&config.eos_token)?;
        let padding = config.pad_token.as_ref().map_or(Ok(end), id)?;
        // Tokenizers without a limit say 1e30.
        let own = config.model_max_length.filter(|length| (2.0..=4096.0).contains(length)).map(|length| length as usize);
        let length = length.or(own).unwrap_or(77);
        Ok(Self { tokenizer, length, end, padding })
    }

    /// Tokens of every text.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The token that ends a text.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// The ids of a text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids = self.tokenizer.encode(text, true)?;
        if ids.len() > self.length {
            ids.truncate(self.length);
            if let Some(last) = ids.last_mut() {
                *last = self.end;
            }
        }
        ids.resize(self.length, self.padding);
        Ok(ids)
    }
}
