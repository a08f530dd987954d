//! Finds what captions share (paper 3.2, step 2B).
//!
//! A causal language model answers the two prompts of A.1.2. [`Summarizer`] is the model, [`add_to`] its gRPC face.

mod chat;
mod engine;
mod server;

pub use chat::ChatTemplate;
pub use engine::{Question, Summarizer};
pub use server::add_to;
