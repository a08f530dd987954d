//! A job's results as files that people and other programs read: what `dnd` writes and what the gateway sends are the same bytes.

mod columns;
mod export;
pub mod report;
pub mod table;

pub use export::{Format, Mesh, export};
