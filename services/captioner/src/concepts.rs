//! Captions from a fixed set of concepts: the one whose embedding CLIP finds nearest to the picture's (paper 4.5.1).

use std::{fs, path::Path};

use bytes::Bytes;
use dnd_clip::Clip;
use dnd_mesh::{Fault, blobs::hex};
use dnd_method::embedding::{Embedding, mean_cosine};
use dnd_onnx::{Error, runtime::EngineArgs};
use dnd_proto::v1::{Caption, Model};
use futures::{StreamExt as _, TryStreamExt as _, executor, stream};
use sha2::{Digest as _, Sha256};

/// CLIP and the concepts that it chooses among.
pub(crate) struct Concepts {
    clip: Clip,
    model: Model,
    concepts: Vec<(String, Embedding)>,
}

impl Concepts {
    /// Loads CLIP from its folder, and embeds the concepts of a file, one a line; empty lines say nothing.
    pub(crate) fn load(folder: &Path, file: &Path, args: &EngineArgs) -> Result<Self, Error> {
        let text = fs::read_to_string(file).map_err(|e| Error::file(file, e.to_string()))?;
        let lines: Vec<String> = text.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect();
        if lines.is_empty() {
            return Err(Error::file(file, "no concepts: one a line is expected"));
        }
        let clip = Clip::load(folder, args)?;
        let clip_ref = &clip;
        let embed = |concept: String| async move {
            let embedding = clip_ref.text(concept.clone()).await?;
            let embedding = Embedding::new(&embedding.values).map_err(|e| Error::file(file, format!("{concept:?}: {e}")))?;
            Ok::<_, Error>((concept, embedding))
        };
        // Loading is no part of the runtime's work; the model's own threads embed.
        let concepts = executor::block_on(stream::iter(lines).map(embed).buffered(clip.concurrency()).try_collect())?;
        let digest = Sha256::new().chain_update(&clip.model().digest).chain_update([0]).chain_update(&text).finalize();
        let model = Model { digest: hex(&digest), ..clip.model().clone() };
        Ok(Self { clip, model, concepts })
    }

    /// What is loaded; the digest is also of the concepts.
    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    /// Pictures of one call that are worked on at a time.
    pub(crate) fn concurrency(&self) -> usize {
        self.clip.concurrency()
    }

    /// The concept with the largest cosine; the first of equals.
    pub(crate) async fn caption(&self, picture: Bytes) -> Result<Caption, Fault> {
        let picture = self.clip.image(picture).await?;
        let picture = Embedding::new(&picture.values).map_err(|e| Fault::internal(e.to_string()))?;
        let mut best: Option<(&str, f64)> = None;
        for (concept, embedding) in &self.concepts {
            let cosine = mean_cosine(&[&picture], &[embedding]).map_err(|e| Fault::internal(e.to_string()))?;
            if best.is_none_or(|(_, highest)| cosine > highest) {
                best = Some((concept, cosine));
            }
        }
        let text = best.map(|(concept, _)| concept.to_owned()).unwrap_or_default();
        Ok(Caption { text, token_ids: Vec::new() })
    }
}
