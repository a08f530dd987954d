//! The model, of whichever architecture its folder holds.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::Args;
use dnd_mesh::{
    Fault,
    batch::{Batcher, Limits},
};
use dnd_onnx::{Error, folder::ModelFolder, pictures::PictureLimits, runtime::EngineArgs};
use dnd_proto::v1::{Caption, Model, ModelLimits};
use serde::Deserialize;

use crate::{
    concepts::Concepts,
    generator::{Architecture, Generator},
    search::Generation,
};

/// What a captioner needs to be told beside its folder.
#[derive(Debug, Clone, Default, Args)]
pub struct CaptionerArgs {
    /// For a CLIP model as the captioner: file of the concepts that it chooses captions from, one a line
    #[arg(long, env = "DND_CONCEPTS", value_name = "FILE")]
    pub concepts: Option<PathBuf>,
}

/// A loaded captioner.
pub struct Captioner {
    model: Model,
    engine: Engine,
    concurrency: usize,
}

enum Engine {
    Generator { batcher: Batcher<Generator>, longest: u32 },
    Concepts(Box<Concepts>),
}

/// A picture to caption.
#[derive(Debug, Clone)]
pub struct Picture {
    /// As it came, encoded.
    pub bytes: Bytes,
    /// How its caption is searched for; a fixed set of concepts needs no search.
    pub generation: Generation,
}

#[derive(Deserialize)]
struct Config {
    model_type: String,
}

impl Captioner {
    /// Loads the model in a folder and runs it once.
    pub fn load(folder: &Path, captioner: &CaptionerArgs, args: &EngineArgs) -> Result<Self, Error> {
        let opened = ModelFolder::open(folder)?;
        let Config { model_type } = opened.json("configuration", "config.json")?;
        let wrong = |problem: String| Err(Error::file(folder.join("config.json"), problem));
        let architecture = match (model_type.as_str(), &captioner.concepts) {
            ("clip", Some(file)) => {
                let concepts = Concepts::load(folder, file, args)?;
                let (model, concurrency) = (concepts.model().clone(), concepts.concurrency());
                return Ok(Self { model, engine: Engine::Concepts(Box::new(concepts)), concurrency });
            }
            ("clip", None) => return wrong("model_type is \"clip\": it chooses among concepts; name a file of them, one a line, with --concepts".to_owned()),
            ("blip", None) => Architecture::Blip,
            ("blip-2", None) => Architecture::Blip2,
            ("vision-encoder-decoder", None) => Architecture::VisionEncoderDecoder,
            ("blip" | "blip-2" | "vision-encoder-decoder", Some(file)) => {
                return wrong(format!("model_type is {model_type:?}, which writes its captions; --concepts {} is for one of type \"clip\"", file.display()));
            }
            _ => {
                return wrong(format!(
                    "model_type is {model_type:?}; captioners of type \"blip\", \"blip-2\", \"vision-encoder-decoder\" and \"clip\" can be loaded"
                ));
            }
        };
        let (generators, longest) = Generator::load(&opened, architecture, args)?;
        let limits = PictureLimits::default();
        let model = opened.model(
            &model_type,
            args,
            ModelLimits { picture_bytes: limits.bytes as u64, picture_pixels: limits.pixels, text_tokens: 0, batch: args.batch() as u32 },
        )?;
        let concurrency = 2 * args.batch() * generators.len();
        let batcher = Batcher::start("captioner", generators, Limits { queue: 2 * concurrency, batch: args.batch() }).map_err(|e| Error::Run(e.to_string()))?;
        Ok(Self { model, engine: Engine::Generator { batcher, longest }, concurrency })
    }

    /// What is loaded.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Pictures of one call that are worked on at a time.
    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Captions a picture.
    pub async fn caption(&self, picture: Picture) -> Result<Caption, Fault> {
        match &self.engine {
            Engine::Generator { batcher, longest } => {
                let asked = picture.generation.max_new_tokens;
                if asked > *longest {
                    return Err(Fault::field("max_new_tokens", format!("{asked}; this model's texts have {longest} tokens at most")));
                }
                batcher.submit(picture).await
            }
            Engine::Concepts(concepts) => concepts.caption(picture.bytes).await,
        }
    }
}
