//! Finds what captions share (paper 3.2, step 2B).
//!
//! A language model answers the two prompts of A.1.2. [`Summarizer`] is the model, in ONNX or behind an HTTP endpoint, [`add_to`] its gRPC face.

mod chat;
mod engine;
mod http;
mod model;
mod server;

pub use chat::ChatTemplate;
pub use engine::{OnnxModel, Question};
pub use http::{BaseUrl, HttpModel, LlmArgs};
pub use model::Summarizer;
pub use server::add_to;
