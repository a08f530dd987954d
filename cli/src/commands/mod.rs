//! The commands, a file each.

pub(crate) mod demo;
pub(crate) mod dissect;
pub(crate) mod doctor;
pub(crate) mod jobs;
pub(crate) mod layers;
pub(crate) mod models;
pub(crate) mod select;
pub(crate) mod tokens;
pub(crate) mod up;
