use std::path::Path;

use dnd_mesh::Fault;
use dnd_onnx::{Error, runtime::EngineArgs};
use dnd_proto::v1::{Answer, Model};

use crate::{
    engine::{OnnxModel, Question},
    http::{HttpModel, LlmArgs},
};

/// A language model.
pub enum Summarizer {
    /// Loaded from a folder.
    Onnx(Box<OnnxModel>),
    /// Behind an OpenAI-compatible endpoint.
    Http(Box<HttpModel>),
}

impl Summarizer {
    /// Loads the model in a folder and runs it once.
    pub fn load(folder: &Path, args: &EngineArgs) -> Result<Self, Error> {
        OnnxModel::load(folder, args).map(|model| Self::Onnx(Box::new(model)))
    }

    /// The model of an endpoint, if the arguments name one, else the one in a folder. Blocking; not to be called where a runtime drives tasks.
    ///
    /// # Errors
    ///
    /// If nobody answers at the endpoint, or it does not take the key; or as [`Self::load`].
    pub fn open(folder: &Path, args: &EngineArgs, llm: &LlmArgs) -> Result<Self, Fault> {
        match (&llm.llm_url, &llm.llm_model) {
            (Some(url), Some(name)) => HttpModel::open(url.clone(), name, llm).map(|model| Self::Http(Box::new(model))),
            _ => Ok(Self::load(folder, args)?),
        }
    }

    /// What is loaded, or asked.
    pub fn model(&self) -> &Model {
        match self {
            Self::Onnx(model) => model.model(),
            Self::Http(model) => model.model(),
        }
    }

    /// Questions of one call that are worked on at a time.
    pub fn concurrency(&self) -> usize {
        match self {
            Self::Onnx(model) => model.concurrency(),
            Self::Http(model) => model.concurrency(),
        }
    }

    /// Asks the model.
    pub async fn ask(&self, question: Question) -> Result<Answer, Fault> {
        match self {
            Self::Onnx(model) => model.ask(question).await,
            Self::Http(model) => model.ask(&question).await,
        }
    }

    /// Whether another attempt at a question may be answered otherwise.
    pub(crate) fn answers_vary(&self, temperature: f32) -> bool {
        matches!(self, Self::Http(_)) || temperature > 0.0
    }
}
