//! What every server and every client of the mesh shares.
//!
//! A service is made of its tonic server, the [`Slot`] that its model goes into once it has loaded, and [`server::serve`], which puts
//! the same stack of layers, health, metrics, reflection and shutdown around each. Work that a model does goes through a [`batch::Batcher`];
//! streams of items are answered by [`items::answer`]. Who may connect is [`tls`]'s business, and who may call what is [`auth`]'s. Clients reach a service over a
//! [`balance::Balanced`].

#[cfg(test)]
mod access_tests;
pub mod admin;
pub mod args;
pub mod auth;
pub mod balance;
pub mod batch;
pub mod blobs;
pub mod call;
pub mod channel;
pub mod config;
pub mod deadline;
pub mod errors;
pub mod fault;
pub mod items;
pub mod metrics;
pub mod parameters;
pub mod program;
mod reloaded;
pub mod retry;
pub mod server;
mod slot;
pub mod telemetry;
pub mod tls;
pub mod uri;

pub use fault::Fault;
pub use slot::Slot;

/// Bytes of one message at most, both ways: an encoded picture and a little more. Beyond it a call ends with OUT_OF_RANGE.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Bytes of one request that holds no picture at most: its messages, of which two bytes may be one, take many times that in memory.
pub const MAX_REQUEST_BYTES: usize = 16 << 20;

/// Bytes of one text of a request at most: a concept, a caption, a description.
pub const MAX_TEXT_BYTES: usize = 16 << 10;

/// Bytes of one encoded picture at most.
pub const MAX_PICTURE_BYTES: usize = 48 << 20;
