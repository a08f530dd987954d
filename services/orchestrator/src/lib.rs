//! Sequences the three steps of Describe-and-Dissect over the model services.
//!
//! `steps` reads as the paper's section 3: a unit goes in, its label and all the evidence for it come out. What the steps ask of the models
//! goes through `calls`, where each pure call is made once, and what it gave is kept in `results`, in the `database`, as far as there is `room`; `probing` runs
//! the probing set so. Jobs and their units are in the `store`, from which the `engine` takes what there is to do and into which it writes what came of it;
//! `watch` tells what happened, from there, too.

mod accept;
mod calls;
mod data;
mod database;
mod engine;
mod failure;
mod memo;
mod models;
mod nearest;
mod probing;
mod progress;
mod results;
mod room;
mod selection;
mod server;
mod steps;
mod store;
mod studies;
mod uploads;
mod watch;

pub use data::{Data, DataArgs, DataError};
pub use database::{Database, DatabaseError};
pub use engine::WorksOn;
pub use models::{Endpoints, Models, StageTimeout};
pub use probing::ProbingArgs;
pub use room::{KeptOf, Stats};
pub use server::{OrchestratorArgs, add_to};
