//! Draws pictures of concepts (paper 3.3, step 1).
//!
//! Stable Diffusion's parts: a text encoder, a UNet guided by it, a scheduler, and the decoder of a variational autoencoder.
//! [`Diffusion`] is the model, [`add_to`] its gRPC face, [`pipeline`] its parts, [`scheduler`] the steps from noise to latents.

mod engine;
pub mod pipeline;
pub mod scheduler;
mod server;

pub use engine::{Diffusion, Drawing, Request};
pub use server::add_to;
