//! ONNX models in Rust, for all services of the mesh.
//!
//! [`runtime`] finds ONNX Runtime and makes sessions; [`graph`] reads a network's file and cuts out of it what a caller asks for;
//! [`pictures`] makes tensors of pictures; [`folder`] reads model folders in the layouts that they are published in;
//! [`decoder`] runs text decoders with their caches; [`tokenizer`] turns texts into ids and back; [`tensors`] casts floats;
//! [`service`] is the program around one model.

pub mod decoder;
mod error;
pub mod folder;
pub mod graph;
pub mod pictures;
pub mod runtime;
pub mod service;
pub mod tensors;
pub mod tokenizer;

pub use error::Error;

/// The ONNX file format.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::expect_used, unreachable_pub)]
pub mod format {
    include!(concat!(env!("OUT_DIR"), "/onnx.rs"));
}
