//! Runs the network that is dissected (paper 3.1, 3.2, step 2 of 3.3).
//!
//! [`Activation`] keeps a few targets loaded, each cut down to the layers that are asked for; [`add_to`] its gRPC face.

mod engine;
mod server;

pub use engine::{Activation, ActivationArgs};
pub use server::add_to;
