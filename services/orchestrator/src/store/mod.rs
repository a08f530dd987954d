//! Jobs, what happened in them, and their units, and studies of their labels, in the database. Any number of processes may work on the same jobs.
//!
//! What is worked on is leased: whoever takes a unit has it until a time by the database's clock, which is prolonged while its process lives, and gets the
//! next number of its fence. Every write about it names owner and fence and is refused once the lease is over, so that a process that was stopped past it
//! changes nothing. A transaction that tells of an event holds the job's row, whose counter numbers it: events are seen in the order of their numbers.
//! Transactions that hold a job's row and a unit's take the job's first.

mod events;
mod jobs;
mod studies;
#[cfg(test)]
mod tests;
mod units;

use std::{sync::Arc, time::Duration};

use dnd_mesh::Fault;
use dnd_proto::v1::{Stage, Usage};
use sqlx::{Any, Row as _, Transaction, any::AnyRow};
use tokio::sync::watch;
use tonic::Code;

use crate::{database::Database, failure::Failure, progress::Tally};

pub(crate) use events::EVENTS;
pub(crate) use jobs::{NewJob, Pause};
pub(crate) use units::{Claim, Lease, Passed, UnitFilter};

/// Jobs in a database, as one process of those that work on them sees it.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    database: Database,
    /// This process.
    owner: Arc<str>,
    /// How long a unit stays taken unless that is prolonged.
    lease: Duration,
    /// Told of what this process writes.
    changed: watch::Sender<()>,
    /// Told of jobs that this process stops.
    stopped: watch::Sender<()>,
}

/// Why the store did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// The lease is over: another process has the unit, or the job has ended.
    #[error("the lease of the unit is over")]
    Lost,
    /// The database.
    #[error("the database: {0}")]
    Database(#[from] sqlx::Error),
}

type Result<T> = std::result::Result<T, StoreError>;

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        Self::new(Code::Unavailable, "STORE", error.to_string())
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::storage(error.to_string())
    }
}

impl Store {
    pub(crate) fn new(database: Database, lease: Duration) -> Self {
        let owner = uuid::Uuid::new_v4().to_string().into();
        Self { database, owner, lease, changed: watch::Sender::default(), stopped: watch::Sender::default() }
    }

    /// Tells when this process has written something.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Tells when this process has stopped a job.
    pub(crate) fn stops(&self) -> watch::Receiver<()> {
        self.stopped.subscribe()
    }

    async fn commit(&self, transaction: Transaction<'static, Any>) -> Result<()> {
        transaction.commit().await?;
        self.changed.send_replace(());
        Ok(())
    }
}

/// Adds what stages took to what they took before.
async fn tally(transaction: &mut Transaction<'static, Any>, job: &str, tallies: impl IntoIterator<Item = (Stage, Tally)>) -> Result<()> {
    const ADD: &str = "INSERT INTO stages (job, stage, done, total, seconds, calls, reused, asked, prompt_tokens, answer_tokens, cost) \
        VALUES ($1, $2, 0, 0, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (job, stage) DO UPDATE SET seconds = stages.seconds + excluded.seconds, \
        calls = stages.calls + excluded.calls, reused = stages.reused + excluded.reused, asked = stages.asked + excluded.asked, \
        prompt_tokens = stages.prompt_tokens + excluded.prompt_tokens, answer_tokens = stages.answer_tokens + excluded.answer_tokens, \
        cost = COALESCE(stages.cost + excluded.cost, stages.cost, excluded.cost)";
    for (stage, Tally { time, calls, reused, usage }) in tallies {
        let Usage { calls: asked, prompt_tokens, answer_tokens, cost } = usage.unwrap_or_default();
        let add = sqlx::query(ADD).bind(job).bind(i64::from(stage as i32)).bind(time.as_secs_f64()).bind(calls as i64).bind(reused as i64);
        add.bind(asked as i64).bind(prompt_tokens as i64).bind(answer_tokens as i64).bind(cost).execute(&mut **transaction).await?;
    }
    Ok(())
}

/// A column that counts.
fn count(row: &AnyRow, column: usize) -> Result<u64> {
    Ok(row.try_get::<i64, _>(column)?.max(0) as u64)
}

/// A column that holds a message.
fn message<M: prost::Message + Default>(row: &AnyRow, column: usize) -> Result<Option<M>> {
    let bytes: Option<Vec<u8>> = row.try_get(column)?;
    bytes.map(|bytes| decoded(&bytes)).transpose()
}

fn decoded<M: prost::Message + Default>(bytes: &[u8]) -> Result<M> {
    M::decode(bytes).map_err(|error| sqlx::Error::Decode(error.into()).into())
}
