//! Units, and the probing pass before them: taken by one process at a time, stage by stage to their ends.

use std::{collections::BTreeMap, time::Duration};

use dnd_mesh::{Fault, telemetry::Ids};
use dnd_proto::v1::{JobDone, JobState, ProbedUnit, SkippedPicture, Stage, UnitResult, UnitState, UnitSummary, job_event::Event};
use prost::Message as _;
use sqlx::{Any, AnyConnection, AssertSqlSafe, Row as _, Transaction};

use super::{
    Result, Store, StoreError, count,
    events::{say, say_unit},
    jobs::{self, Pause},
    message, tally,
};
use crate::{progress::Tally, room};

/// Pictures that a unit's summary shows.
const IMAGES: usize = 4;

/// What this process has taken, until its lease is over.
#[derive(Debug, Clone)]
pub(crate) struct Lease {
    pub(crate) job: String,
    pub(crate) place: i64,
    fence: i64,
    /// Times that it was tried to an end before.
    pub(crate) attempts: u64,
    /// The stage that it was through when it was taken.
    through: i64,
    /// Times that it was given back in order before.
    round: u64,
}

impl Lease {
    /// What the spans of the unit have in this round, and had in the one before; none of a unit that is taken for the first time.
    pub(crate) fn spans(&self) -> (Ids, Option<Ids>) {
        let of = |round: u64| Ids::of(&["unit", &self.job, &self.place.to_string(), &round.to_string()]);
        (of(self.round), self.round.checked_sub(1).map(of))
    }

    /// What the span of a stage has: of one that was not ended, that which it had with whoever was killed over it.
    pub(crate) fn span(&self, stage: Stage) -> Ids {
        let again = if i64::from(stage as i32) > self.through { String::new() } else { self.fence.to_string() };
        Ids::of(&["stage", &self.job, &self.place.to_string(), &self.round.to_string(), stage.as_str_name(), &again])
    }
}

/// What was taken.
#[derive(Debug)]
pub(crate) enum Claim {
    /// A job's probing pass.
    Pass(Lease),
    /// A unit that the pass has found the top pictures of.
    Unit(Lease, Box<ProbedUnit>),
}

impl Claim {
    pub(crate) fn lease(&self) -> &Lease {
        let (Self::Pass(lease) | Self::Unit(lease, _)) = self;
        lease
    }
}

/// What a probing pass says beside its units.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    /// Pictures that could not be used.
    pub(crate) skipped: Vec<SkippedPicture>,
    /// Pictures that were.
    pub(crate) pictures: u64,
    pub(crate) warnings: Vec<String>,
}

/// Which units are asked for.
#[derive(Debug, Default)]
pub(crate) struct UnitFilter {
    /// After this place.
    pub(crate) after: i64,
    pub(crate) most: u32,
    /// Of this layer; of all if it is empty.
    pub(crate) layer: String,
    /// That ended so; all if it is not said.
    pub(crate) state: UnitState,
    /// With this part of a label, whatever its case; all if it is empty.
    pub(crate) text: String,
}

type Tallies = BTreeMap<Stage, Tally>;

impl Store {
    /// Takes what there is to do next, for a job that has as little in work as any, so that a large one does not hold up a small one. Only of jobs that
    /// `wanted` says yes to, and that run when it is taken: one may be cancelled between the two statements.
    pub(crate) async fn claim(&self, wanted: impl Fn(&str) -> bool) -> Result<Option<Claim>> {
        const JOBS: &str = "SELECT jobs.id FROM jobs LEFT JOIN (SELECT job, COUNT(*) AS units FROM units WHERE owner IS NOT NULL GROUP BY job) AS taken \
            ON taken.job = jobs.id WHERE jobs.state = 1 ORDER BY COALESCE(taken.units, 0), random()";
        let take = format!(
            "UPDATE units SET owner = $2, until = (SELECT now FROM clock) + $3, fence = fence + 1 WHERE job = $1 AND place = (SELECT place FROM units \
             WHERE job = $1 AND state = 0 AND (stage > 0 OR place = 0) AND until <= (SELECT now FROM clock) ORDER BY place LIMIT 1{}) \
             AND EXISTS (SELECT 1 FROM jobs WHERE id = $1 AND state = 1) RETURNING place, fence, attempts, probed, stage, rounds",
            self.database.for_update_of_free_rows()
        );
        let jobs: Vec<String> = sqlx::query_scalar(JOBS).fetch_all(&self.database.pool).await?;
        for job in jobs.into_iter().filter(|job| wanted(job)) {
            let take = sqlx::query(AssertSqlSafe(take.as_str())).bind(&job).bind(&*self.owner).bind(self.lease.as_millis() as i64);
            if let Some(row) = take.fetch_optional(&self.database.writes).await? {
                let lease =
                    Lease { job, place: row.try_get(0)?, fence: row.try_get(1)?, attempts: count(&row, 2)?, through: row.try_get(4)?, round: count(&row, 5)? };
                return Ok(Some(match message(&row, 3)? {
                    Some(probed) => Claim::Unit(lease, Box::new(probed)),
                    None => Claim::Pass(lease),
                }));
            }
        }
        Ok(None)
    }

    /// Prolongs a lease, if it is not over.
    pub(crate) async fn renew(&self, lease: &Lease) -> Result<()> {
        self.hold(&mut *self.database.writes.acquire().await?, lease).await
    }

    /// Says how far a probing pass is.
    pub(crate) async fn probing(&self, lease: &Lease, done: u64, pictures: u64) -> Result<()> {
        const SET: &str = "INSERT INTO stages (job, stage, done, total, seconds, calls, reused, asked, prompt_tokens, answer_tokens) \
            VALUES ($1, 1, $2, $3, 0, 0, 0, 0, 0, 0) ON CONFLICT (job, stage) DO UPDATE SET done = excluded.done, total = excluded.total";
        let mut transaction = self.database.begin().await?;
        self.hold(&mut transaction, lease).await?;
        sqlx::query(SET).bind(&lease.job).bind(done as i64).bind(pictures as i64).execute(&mut *transaction).await?;
        self.commit(transaction).await
    }

    /// Keeps what a probing pass has found of units, by their places: they can be taken from now on.
    pub(crate) async fn probed(&self, lease: &Lease, units: &[(i64, ProbedUnit)]) -> Result<()> {
        const KEEP: &str = "UPDATE units SET stage = 1, probed = $3 WHERE job = $1 AND place = $2 AND state = 0 AND stage = 0";
        let mut transaction = self.database.begin().await?;
        self.hold(&mut transaction, lease).await?;
        for (place, unit) in units {
            sqlx::query(KEEP).bind(&lease.job).bind(*place).bind(unit.encode_to_vec()).execute(&mut *transaction).await?;
        }
        self.commit(transaction).await
    }

    /// A probing pass is through.
    pub(crate) async fn passed(&self, lease: &Lease, passed: Passed, tallies: Tallies) -> Result<()> {
        const TELL: &str = "UPDATE jobs SET done = $2 WHERE id = $1 AND state IN (1, 2) RETURNING labelled + dead + failed, total";
        const GONE: &str = "DELETE FROM units WHERE job = $1 AND place = $2 AND owner = $3 AND fence = $4 AND until > (SELECT now FROM clock)";
        let Passed { skipped, pictures, warnings } = passed;
        let done = JobDone { pictures, warnings, ..Default::default() };
        let mut transaction = self.database.begin().await?;
        let row = sqlx::query(TELL).bind(&lease.job).bind(done.encode_to_vec()).fetch_optional(&mut *transaction).await?.ok_or(StoreError::Lost)?;
        let gone = sqlx::query(GONE).bind(&lease.job).bind(lease.place).bind(&*self.owner).bind(lease.fence).execute(&mut *transaction).await?;
        if gone.rows_affected() == 0 {
            return Err(StoreError::Lost);
        }
        say(&mut transaction, &lease.job, skipped.into_iter().map(Event::Skipped).collect()).await?;
        tally(&mut transaction, &lease.job, tallies).await?;
        if count(&row, 0)? == count(&row, 1)? {
            jobs::end(&mut transaction, &lease.job, JobState::Done).await?;
        }
        self.commit(transaction).await
    }

    /// A unit is through a stage.
    pub(crate) async fn through(&self, lease: &Lease, stage: Stage, tallies: Tallies) -> Result<()> {
        const THROUGH: &str = "UPDATE units SET stage = CASE WHEN stage < $5 THEN $5 ELSE stage END, until = (SELECT now FROM clock) + $6 WHERE job = $1 AND place = $2 AND owner = $3 \
            AND fence = $4 AND until > (SELECT now FROM clock)";
        let mut transaction = self.database.begin().await?;
        let through = sqlx::query(THROUGH).bind(&lease.job).bind(lease.place).bind(&*self.owner).bind(lease.fence);
        let through = through.bind(i64::from(stage as i32)).bind(self.lease.as_millis() as i64).execute(&mut *transaction).await?;
        if through.rows_affected() == 0 {
            return Err(StoreError::Lost);
        }
        tally(&mut transaction, &lease.job, tallies).await?;
        self.commit(transaction).await
    }

    /// A unit has ended. With the last of them its job is done.
    pub(crate) async fn finish(&self, lease: &Lease, result: &UnitResult, tallies: Tallies) -> Result<()> {
        const COUNT: &str = "UPDATE jobs SET last_event = last_event + 1, labelled = labelled + $2, dead = dead + $3, failed = failed + $4 \
            WHERE id = $1 AND state IN (1, 2) RETURNING last_event, labelled + dead + failed, total";
        const FINISH: &str = "UPDATE units SET state = $5, labels = $6, summary = $7, result = $8, probed = CASE WHEN $5 = 3 THEN probed END, \
            attempts = attempts + 1, rounds = rounds + 1, owner = NULL, until = 0 WHERE job = $1 AND place = $2 AND owner = $3 AND fence = $4 AND until > (SELECT now FROM clock)";
        let one = |state: UnitState| i64::from(result.state() == state);
        let mut transaction = self.database.begin().await?;
        let counted = sqlx::query(COUNT).bind(&lease.job).bind(one(UnitState::Labelled)).bind(one(UnitState::Dead)).bind(one(UnitState::Failed));
        let row = counted.fetch_optional(&mut *transaction).await?.ok_or(StoreError::Lost)?;
        let finish = sqlx::query(FINISH).bind(&lease.job).bind(lease.place).bind(&*self.owner).bind(lease.fence).bind(i64::from(result.state));
        let finish = finish.bind(result.labels.join("\n").to_lowercase()).bind(summary(result).encode_to_vec()).bind(result.encode_to_vec());
        if finish.execute(&mut *transaction).await?.rows_affected() == 0 {
            return Err(StoreError::Lost);
        }
        room::pin(&mut transaction, &lease.job, result).await?;
        say_unit(&mut transaction, &lease.job, row.try_get(0)?, lease.place).await?;
        tally(&mut transaction, &lease.job, tallies).await?;
        if count(&row, 1)? == count(&row, 2)? {
            jobs::end(&mut transaction, &lease.job, JobState::Done).await?;
        }
        self.commit(transaction).await
    }

    /// Gives back what an attempt at failed: it can be taken again after a while.
    pub(crate) async fn again(&self, lease: &Lease, after: Duration, tallies: Tallies) -> Result<()> {
        let mut transaction = self.database.begin().await?;
        self.release(&mut transaction, lease, after, 1).await?;
        tally(&mut transaction, &lease.job, tallies).await?;
        self.commit(transaction).await
    }

    /// Gives back what met what its whole job waits for.
    pub(crate) async fn pause(&self, lease: &Lease, why: &Pause, tallies: Tallies) -> Result<()> {
        let mut transaction = self.database.begin().await?;
        jobs::pause(&mut transaction, &lease.job, why).await?;
        self.release(&mut transaction, lease, Duration::ZERO, 0).await?;
        tally(&mut transaction, &lease.job, tallies).await?;
        self.commit(transaction).await
    }

    /// Fails the whole job.
    pub(crate) async fn fail(&self, lease: &Lease, why: &Fault) -> Result<()> {
        let mut transaction = self.database.begin().await?;
        jobs::fail(&mut transaction, &lease.job, why).await?;
        self.release(&mut transaction, lease, Duration::ZERO, 1).await?;
        jobs::free(&mut transaction, &lease.job).await?;
        self.commit(transaction).await
    }

    /// Checks a lease and prolongs it; in a transaction, holds its row.
    async fn hold(&self, connection: &mut AnyConnection, lease: &Lease) -> Result<()> {
        const HOLD: &str = "UPDATE units SET until = (SELECT now FROM clock) + $5 WHERE job = $1 AND place = $2 AND owner = $3 AND fence = $4 \
            AND until > (SELECT now FROM clock)";
        let hold = sqlx::query(HOLD).bind(&lease.job).bind(lease.place).bind(&*self.owner).bind(lease.fence).bind(self.lease.as_millis() as i64);
        let held = hold.execute(connection).await?.rows_affected() > 0;
        if held { Ok(()) } else { Err(StoreError::Lost) }
    }

    async fn release(&self, transaction: &mut Transaction<'static, Any>, lease: &Lease, after: Duration, attempts: i64) -> Result<()> {
        const RELEASE: &str = "UPDATE units SET owner = NULL, until = (SELECT now FROM clock) + $5, attempts = attempts + $6, rounds = rounds + 1 WHERE job = $1 AND place = $2 \
            AND owner = $3 AND fence = $4 AND until > (SELECT now FROM clock)";
        let release = sqlx::query(RELEASE).bind(&lease.job).bind(lease.place).bind(&*self.owner).bind(lease.fence);
        let released = release.bind(after.as_millis() as i64).bind(attempts).execute(&mut **transaction).await?.rows_affected() > 0;
        if released { Ok(()) } else { Err(StoreError::Lost) }
    }

    /// Units of a job as they stand, each with its place.
    pub(crate) async fn units(&self, job: &str, filter: &UnitFilter) -> Result<Vec<(i64, UnitSummary)>> {
        const LIST: &str = "SELECT place, layer, unit, stage, attempts, summary FROM units WHERE job = $1 AND place > $2 \
            AND ($3 = '' OR layer = $3) AND ($4 = 0 OR state = $4) AND ($5 = '' OR labels LIKE $5 ESCAPE '\\') ORDER BY place LIMIT $6";
        let UnitFilter { after, most, layer, state, text } = filter;
        let text = text.to_lowercase().replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_");
        let like = if text.is_empty() { text } else { format!("%{text}%") };
        let list = sqlx::query(LIST).bind(job).bind((*after).max(0)).bind(layer).bind(i64::from(*state as i32)).bind(like).bind(i64::from(*most));
        let rows = list.fetch_all(&self.database.pool).await?;
        let unit = |row: &sqlx::any::AnyRow| {
            let of_open = UnitSummary { layer: row.try_get(1)?, unit: count(row, 2)? as u32, ..Default::default() };
            let summary = message(row, 5)?.unwrap_or(of_open);
            Ok((row.try_get(0)?, UnitSummary { stage: count(row, 3)? as i32, attempts: count(row, 4)? as u32, ..summary }))
        };
        rows.iter().map(unit).collect()
    }

    /// A unit's result; only its name, if it has not ended.
    pub(crate) async fn unit(&self, job: &str, layer: &str, unit: u32) -> Result<Option<UnitResult>> {
        // Were `place` bounded below, SQLite would go through all units by it.
        const FIND: &str = "SELECT result FROM units WHERE job = $1 AND layer = $2 AND unit = $3 AND place <> 0";
        let row = sqlx::query(FIND).bind(job).bind(layer).bind(i64::from(unit)).fetch_optional(&self.database.pool).await?;
        let named = UnitResult { layer: layer.to_owned(), unit, ..Default::default() };
        row.map(|row| Ok(message(&row, 0)?.unwrap_or(named))).transpose()
    }
}

fn summary(result: &UnitResult) -> UnitSummary {
    UnitSummary {
        layer: result.layer.clone(),
        unit: result.unit,
        state: result.state,
        label: result.label.clone(),
        labels: result.labels.clone(),
        score: result.concepts.first().and_then(|concept| concept.score),
        reason: result.reason.clone(),
        message: result.message.clone(),
        images: result.images.iter().take(IMAGES).map(|image| image.digest.clone()).collect(),
        highest: result.highest,
        ..Default::default()
    }
}
