//! Runs the network that is dissected (paper 3.1, 3.2, step 2 of 3.3).
//!
//! A target is untrusted, and runs in processes of its own: a program that has an [`Activation`] hands over to [`run_target`] where [`is_target_process`].
//!
//! [`Activation`] keeps a few targets loaded, each cut down to the layers that are asked for; [`add_to`] its gRPC face.

mod engine;
mod process;
mod server;

pub use engine::{Activation, ActivationArgs};
pub use process::{is_target_process, run_target};
pub use server::add_to;
