//! Sequences the three steps of Describe-and-Dissect over the model services.
//!
//! `steps` reads as the paper's section 3: a unit goes in, its label and all the evidence for it come out. What the steps ask of the models
//! goes through `calls`, where each pure call is made once, and what it gave kept in `results`, in the
//! `database`; `probing` runs the probing set so; `jobs` keeps what happens in a job, for whoever watches it.

mod calls;
mod data;
mod database;
mod jobs;
mod memo;
mod models;
mod probing;
mod progress;
mod results;
mod server;
mod steps;
mod uploads;

pub use data::{Data, DataArgs, DataError};
pub use database::{Database, DatabaseError};
pub use models::{Endpoints, Models};
pub use probing::ProbingArgs;
pub use server::{OrchestratorArgs, add_to};
