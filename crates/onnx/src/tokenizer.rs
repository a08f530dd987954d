//! Texts to ids and back.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use serde::Deserialize;
use tokenizers::{ModelWrapper, Tokenizer as Inner};

use crate::{
    Error,
    folder::{ModelFolder, read_json},
};

/// A tokenizer as `tokenizer.json` describes it, without the padding and cutting that the file may ask for: callers say those.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Inner,
    /// Whether [`Tokenizer::decode`] takes out the spaces before punctuation and in contractions.
    clean_up: bool,
}

#[derive(Default, Deserialize)]
struct Decoding {
    #[serde(default)]
    clean_up_tokenization_spaces: bool,
}

impl Tokenizer {
    /// The tokenizer under `prefix` of a model's folder: `tokenizer.json`, and what `tokenizer_config.json`, where there is one, says of decoding.
    pub fn of(folder: &ModelFolder, prefix: &str) -> Result<Self, Error> {
        let Some(path) = folder.optional(&[&format!("{prefix}tokenizer.json")]) else {
            let problem = format!(
                "no tokenizer: looked for {prefix}tokenizer.json. transformers makes it of vocab.json and merges.txt, vocab.txt or tokenizer.model: \
                 AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            );
            return Err(Error::file(folder.root(), problem));
        };
        let mut tokenizer = Self::read(&path)?;
        if let Some(config) = folder.optional(&[&format!("{prefix}tokenizer_config.json")]) {
            let decoding: Decoding = read_json(&config)?;
            // As transformers has it: a BPE says itself where its spaces are.
            tokenizer.clean_up = decoding.clean_up_tokenization_spaces && !matches!(tokenizer.inner.get_model(), ModelWrapper::BPE(_));
        }
        Ok(tokenizer)
    }

    /// Reads a `tokenizer.json` alone.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let read = no_panic(|| Inner::from_file(path)).map_err(|panic| Error::file(path, format!("it is no tokenizer: {panic}")))?;
        let mut inner = read.map_err(|e| Error::file(path, e.to_string()))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::file(path, e.to_string()))?;
        Ok(Self { inner, clean_up: false })
    }

    /// The ids of a text; `special` adds the tokens that the post-processor puts around it.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, Error> {
        let encoded = no_panic(|| self.inner.encode_fast(text, special)).map_err(broken)?;
        encoded.map(|encoding| encoding.get_ids().to_vec()).map_err(broken)
    }

    /// The text of ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        let text = no_panic(|| self.inner.decode(ids, true)).map_err(broken)?.map_err(broken)?;
        Ok(if self.clean_up { clean_up(text) } else { text })
    }

    /// The id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }
}

fn broken(error: impl std::fmt::Display) -> Error {
    Error::Run(format!("the tokenizer: {error}"))
}

/// The tokenizers crate panics on some files that it should refuse; that is an error like any other.
fn no_panic<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic: Box<dyn Any + Send>| {
        let words = panic.downcast_ref::<&str>().map(|text| (*text).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
        words.unwrap_or_else(|| "it can't be read".to_owned())
    })
}

/// What transformers' `clean_up_tokenization` replaces, in its order.
fn clean_up(text: String) -> String {
    const SPACED: [(&str, &str); 10] =
        [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")];
    SPACED.iter().fold(text, |text, (spaced, joined)| text.replace(spaced, joined))
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
        let tokenizer = Tokenizer::of(folder, prefix)?;
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
