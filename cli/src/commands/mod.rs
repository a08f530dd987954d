//! The commands, a file each.

pub(crate) mod cache;
pub(crate) mod demo;
pub(crate) mod dissect;
pub(crate) mod doctor;
pub(crate) mod jobs;
pub(crate) mod layers;
pub(crate) mod models;
pub(crate) mod plan;
pub(crate) mod select;
pub(crate) mod tokens;
pub(crate) mod top;
pub(crate) mod up;
