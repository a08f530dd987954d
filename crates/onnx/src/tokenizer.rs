//! Texts to ids and back.

use std::path::Path;

use tokenizers::Tokenizer as Inner;

use crate::Error;

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

    /// Ids of a text cut or padded to `length`, as CLIP's library does: the start and end tokens stay, the text between is cut.
    pub fn encode_to(&self, text: &str, length: usize, end: u32, padding: u32) -> Result<Vec<u32>, Error> {
        let mut ids = self.encode(text, true)?;
        if ids.len() > length {
            ids.truncate(length);
            if let Some(last) = ids.last_mut() {
                *last = end;
            }
        }
        ids.resize(length, padding);
        Ok(ids)
    }
}
