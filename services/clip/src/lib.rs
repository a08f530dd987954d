//! Embeds pictures and texts in one space (paper 3.4, A.5).
//!
//! A CLIP model: an image encoder and a text encoder. [`Clip`] is the model, [`add_to`] its gRPC face.

mod engine;
mod server;

pub use engine::Clip;
pub use server::add_to;
