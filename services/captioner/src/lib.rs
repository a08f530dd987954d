//! Puts pictures into words (paper 3.2, step 2A).
//!
//! A BLIP model: a vision encoder, and a text decoder that attends to what the encoder saw. [`Captioner`] is the model, [`add_to`] its
//! gRPC face.

mod engine;
mod server;

pub use engine::{Captioner, Picture};
pub use server::add_to;
