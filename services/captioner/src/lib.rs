//! Puts pictures into words (paper 3.2, step 2A).
//!
//! BLIP, or another vision encoder with a text decoder that attends to what the encoder saw; BLIP-2, whose text goes on from it; or CLIP over a
//! fixed set of concepts (4.5.1).
//! [`Captioner`] is the model, [`add_to`] its gRPC face.

mod concepts;
mod engine;
mod generator;
mod search;
mod server;

pub use engine::{Captioner, CaptionerArgs, Picture};
pub use search::Generation;
pub use server::add_to;
