//! Jobs: how they begin, stand, pause, go on and end.

use std::collections::BTreeMap;

use dnd_mesh::{Fault, fault};
use dnd_proto::v1::{
    DissectRequest, Job, JobAccepted, JobDone, JobPaused, JobResumed, JobState, Stage, StageProgress, StageTime, Target, UnitCounts, Usage, job_event::Event,
};
use prost::Message as _;
use sqlx::{Any, AssertSqlSafe, Row as _, Transaction, any::AnyRow};

use super::{Result, Store, count, events::say, message};
use crate::{database::places, room, steps::STAGES};

/// Milliseconds after which a paused job that goes on by itself is looked at again.
const RETRY: i64 = 3_000;
const ROWS: usize = 500;

/// What a job is made of.
#[derive(Debug)]
pub(crate) struct NewJob {
    pub(crate) id: String,
    /// As it was asked for.
    pub(crate) request: DissectRequest,
    /// What it works on.
    pub(crate) accepted: JobAccepted,
}

/// How a job stands, in short.
#[derive(Debug)]
pub(crate) struct Standing {
    pub(crate) state: JobState,
    pub(crate) last_event: u64,
    /// Why it is paused or failed.
    pub(crate) fault: Option<Fault>,
}

impl Standing {
    /// Whether nothing will happen in it unless it is resumed.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.state, JobState::Done | JobState::Cancelled | JobState::Failed)
    }
}

const COLUMNS: &str = "SELECT id, request_id, state, created, ended, last_event, total, labelled, dead, failed, request, accepted, done, fault FROM jobs";

impl Store {
    /// Creates a job, with its units, unless there is one of its request's id.
    pub(crate) async fn create(&self, new: &NewJob) -> Result<bool> {
        const INSERT: &str = "INSERT INTO jobs (id, request_id, state, created, last_event, total, labelled, dead, failed, request, accepted, done) \
            SELECT $1, $2, $3, now, 0, $4, 0, 0, 0, $5, $6, $7 FROM clock WHERE TRUE ON CONFLICT (request_id) DO NOTHING";
        let NewJob { id, request, accepted } = new;
        let units: Vec<(i64, &str, u32)> =
            (1..).zip(accepted.layers.iter().flat_map(|of| of.units.iter().map(|unit| (of.layer.as_str(), *unit)))).map(|(n, (l, u))| (n, l, u)).collect();
        let mut transaction = self.database.begin().await?;
        let request_id = Some(&request.request_id).filter(|id| !id.is_empty());
        let insert = sqlx::query(INSERT).bind(id).bind(request_id).bind(i64::from(JobState::Running as i32)).bind(units.len() as i64);
        let insert = insert.bind(request.encode_to_vec()).bind(accepted.encode_to_vec()).bind(JobDone::default().encode_to_vec());
        if insert.execute(&mut *transaction).await?.rows_affected() == 0 {
            return Ok(false);
        }
        let rows: Vec<(i64, &str, u32)> = std::iter::once((0, "", 0)).chain(units).collect();
        for rows in rows.chunks(ROWS) {
            const INTO: &str = "INSERT INTO units (job, place, layer, unit, state, stage, attempts, until, fence, labels) VALUES ";
            let values: Vec<String> = (0..rows.len()).map(|row| format!("($1, {}, 0, 0, 0, 0, 0, '')", places(2 + 3 * row, 3))).collect();
            let mut insert = sqlx::query(AssertSqlSafe(INTO.to_owned() + &values.join(", "))).bind(id);
            for (place, layer, unit) in rows {
                insert = insert.bind(*place).bind(*layer).bind(i64::from(*unit));
            }
            insert.execute(&mut *transaction).await?;
        }
        say(&mut transaction, id, vec![Event::Accepted(accepted.clone())]).await?;
        self.commit(transaction).await?;
        Ok(true)
    }

    /// The id of the job of a request, and the request.
    pub(crate) async fn find(&self, request_id: &str) -> Result<Option<(String, DissectRequest)>> {
        let row = sqlx::query("SELECT id, request FROM jobs WHERE request_id = $1").bind(request_id).fetch_optional(&self.database.pool).await?;
        row.map(|row| Ok((row.try_get(0)?, message(&row, 1)?.unwrap_or_default()))).transpose()
    }

    /// A job as it stands.
    pub(crate) async fn job(&self, id: &str) -> Result<Option<Job>> {
        let row = sqlx::query(AssertSqlSafe(format!("{COLUMNS} WHERE id = $1"))).bind(id).fetch_optional(&self.database.pool).await?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some(Job { progress: self.progress(id).await?, ..job(&row)? }))
    }

    /// Jobs, the newest first, after the one of this id; without what is long.
    pub(crate) async fn jobs(&self, after: Option<&str>, most: u32) -> Result<Vec<Job>> {
        let list = format!("{COLUMNS} WHERE id < $1 ORDER BY id DESC LIMIT $2");
        // No id begins with a character after these.
        let list = sqlx::query(AssertSqlSafe(list)).bind(after.unwrap_or("~")).bind(i64::from(most));
        let rows = list.fetch_all(&self.database.pool).await?;
        rows.iter().map(|row| Ok(Job { accepted: None, request: None, done: None, ..job(row)? })).collect()
    }

    /// How a job stands, in short.
    pub(crate) async fn standing(&self, id: &str) -> Result<Option<Standing>> {
        let row = sqlx::query("SELECT state, last_event, fault FROM jobs WHERE id = $1").bind(id).fetch_optional(&self.database.pool).await?;
        row.map(|row| {
            let fault = message(&row, 2)?.map(|status| Fault::relayed(&fault::item_status(&status)));
            Ok(Standing { state: state(&row, 0)?, last_event: count(&row, 1)?, fault })
        })
        .transpose()
    }

    /// What a job was asked for, and what it works on.
    pub(crate) async fn work(&self, id: &str) -> Result<Option<(DissectRequest, JobAccepted)>> {
        let row = sqlx::query("SELECT request, accepted FROM jobs WHERE id = $1").bind(id).fetch_optional(&self.database.pool).await?;
        row.map(|row| Ok((message(&row, 0)?.unwrap_or_default(), message(&row, 1)?.unwrap_or_default()))).transpose()
    }

    /// How far a job's stages are.
    pub(crate) async fn progress(&self, id: &str) -> Result<Vec<StageProgress>> {
        // All that are open, as if they were through the probing pass alone, and those that are elsewhere: in one statement, so that both are of one moment.
        const OPEN: &str = "SELECT CAST(1 AS BIGINT), total - labelled - dead - failed, total FROM jobs WHERE id = $1 UNION ALL \
            SELECT stage, COUNT(*), 0 FROM units WHERE job = $1 AND state = 0 AND stage <> 1 AND place <> 0 GROUP BY stage";
        let (mut total, mut open) = (0, BTreeMap::new());
        for row in sqlx::query(OPEN).bind(id).fetch_all(&self.database.pool).await? {
            open.insert(count(&row, 0)?, count(&row, 1)?);
            total += count(&row, 2)?;
        }
        let probed = Stage::Probe as u64;
        let elsewhere: u64 = open.iter().filter(|(stage, _)| **stage != probed).map(|(_, units)| units).sum();
        open.entry(probed).and_modify(|units: &mut u64| *units = units.saturating_sub(elsewhere));
        let taken = taken(&mut *self.database.pool.acquire().await?, id).await?;
        let mut progress = Vec::new();
        if let Some(Taken { done, total: pictures, .. }) = taken.get(&Stage::Probe).filter(|probe| probe.total > 0) {
            progress.push(StageProgress { stage: Stage::Probe.into(), done: *done, total: *pictures, usage: None });
        }
        progress.extend(STAGES.map(|stage| {
            let before: u64 = open.range(..stage as u64).map(|(_, units)| units).sum();
            let usage = taken.get(&stage).and_then(|taken| taken.usage);
            StageProgress { stage: stage.into(), done: total.saturating_sub(before), total, usage }
        }));
        Ok(progress)
    }

    /// Cancels a job that has not ended; the units that have ended stay.
    pub(crate) async fn cancel(&self, id: &str) -> Result<()> {
        let mut transaction = self.database.begin().await?;
        if !lock(&mut transaction, id, &[JobState::Running, JobState::Paused]).await? {
            return Ok(());
        }
        free(&mut transaction, id).await?;
        end(&mut transaction, id, JobState::Cancelled).await?;
        self.commit(transaction).await?;
        self.stopped.send_replace(());
        Ok(())
    }

    /// Deletes a job with all that is known of it.
    pub(crate) async fn delete(&self, id: &str) -> Result<bool> {
        let mut transaction = self.database.begin().await?;
        let deleted = sqlx::query("DELETE FROM jobs WHERE id = $1").bind(id).execute(&mut *transaction).await?.rows_affected() > 0;
        for table in ["DELETE FROM units WHERE job = $1", "DELETE FROM events WHERE job = $1", "DELETE FROM stages WHERE job = $1"] {
            sqlx::query(table).bind(id).execute(&mut *transaction).await?;
        }
        room::unpin(&mut transaction, id).await?;
        self.commit(transaction).await?;
        self.stopped.send_replace(());
        Ok(deleted)
    }

    /// Lets a job go on that is paused, cancelled or failed, and, where `failed` says so, has failed units tried again.
    pub(crate) async fn resume(&self, id: &str, failed: bool) -> Result<()> {
        // What was told of them stays as it was told.
        const KEEP: &str = "UPDATE events SET body = (SELECT result FROM units WHERE units.job = events.job AND units.place = events.place) WHERE job = $1 \
            AND body IS NULL AND place IN (SELECT place FROM units WHERE job = $1 AND state = 3)";
        const OPEN: &str = "UPDATE units SET state = 0, stage = 1, attempts = 0, until = 0, summary = NULL, result = NULL WHERE job = $1 AND state = 3";
        let mut transaction = self.database.begin().await?;
        let mut from = vec![JobState::Paused, JobState::Cancelled, JobState::Failed];
        let mut retried = 0;
        if failed {
            from.extend([JobState::Running, JobState::Done]);
        }
        if !lock(&mut transaction, id, &from).await? {
            return Ok(());
        }
        if failed {
            sqlx::query(KEEP).bind(id).execute(&mut *transaction).await?;
            retried = sqlx::query(OPEN).bind(id).execute(&mut *transaction).await?.rows_affected();
            sqlx::query("UPDATE jobs SET failed = 0 WHERE id = $1").bind(id).execute(&mut *transaction).await?;
        }
        // A pass that had failed for good has its tries again, too.
        sqlx::query("UPDATE units SET attempts = 0, until = 0 WHERE job = $1 AND place = 0 AND owner IS NULL").bind(id).execute(&mut *transaction).await?;
        let was: i64 = sqlx::query_scalar("SELECT state FROM jobs WHERE id = $1").bind(id).fetch_one(&mut *transaction).await?;
        let stays = matches!(JobState::try_from(was as i32), Ok(JobState::Running | JobState::Done)) && retried == 0;
        if !stays {
            run(&mut transaction, id, retried).await?;
        }
        self.commit(transaction).await
    }

    /// The paused jobs that may be able to go on by themselves now.
    pub(crate) async fn due(&self) -> Result<Vec<String>> {
        const DUE: &str = "SELECT id FROM jobs WHERE state = 2 AND retry <= (SELECT now FROM clock) ORDER BY retry";
        Ok(sqlx::query_scalar(DUE).fetch_all(&self.database.pool).await?)
    }

    /// Lets a job go on that was due, if it is still paused.
    pub(crate) async fn go_on(&self, id: &str) -> Result<()> {
        let mut transaction = self.database.begin().await?;
        if lock(&mut transaction, id, &[JobState::Paused]).await? {
            run(&mut transaction, id, 0).await?;
            self.commit(transaction).await?;
        }
        Ok(())
    }

    /// Says anew why a job is paused, unless it is not any more; it is looked at again later.
    pub(crate) async fn stay_paused(&self, id: &str, why: &Pause) -> Result<()> {
        let mut transaction = self.database.begin().await?;
        let retry = "UPDATE jobs SET retry = (SELECT now FROM clock) + $2, fault = $3 WHERE id = $1 AND state = 2";
        let bytes = why.fault.clone().into_item().encode_to_vec();
        sqlx::query(retry).bind(id).bind(why.by_itself.then_some(RETRY)).bind(bytes).execute(&mut *transaction).await?;
        self.commit(transaction).await
    }
}

/// Why a job pauses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pause {
    pub(crate) fault: Fault,
    /// Whether it goes on by itself once what it waits for is there.
    pub(crate) by_itself: bool,
}

/// Pauses a job that runs; one that is paused stays as it is. Takes its row.
pub(super) async fn pause(transaction: &mut Transaction<'static, Any>, id: &str, why: &Pause) -> Result<()> {
    const PAUSE: &str = "UPDATE jobs SET state = 2, fault = $2, retry = (SELECT now FROM clock) + $3 WHERE id = $1 AND state = 1";
    let Pause { fault, by_itself } = why;
    let bytes = fault.clone().into_item().encode_to_vec();
    let paused = sqlx::query(PAUSE).bind(id).bind(bytes).bind(by_itself.then_some(RETRY)).execute(&mut **transaction).await?;
    if paused.rows_affected() > 0 {
        let paused = JobPaused { reason: fault.reason().to_owned(), message: fault.to_string(), by_itself: *by_itself };
        say(transaction, id, vec![Event::Paused(paused)]).await?;
    }
    Ok(())
}

/// Fails a job. Takes its row.
pub(super) async fn fail(transaction: &mut Transaction<'static, Any>, id: &str, why: &Fault) -> Result<()> {
    const FAIL: &str = "UPDATE jobs SET state = 5, fault = $2, ended = (SELECT now FROM clock) WHERE id = $1 AND state IN (1, 2)";
    sqlx::query(FAIL).bind(id).bind(why.clone().into_item().encode_to_vec()).execute(&mut **transaction).await?;
    Ok(())
}

/// Lets a job whose row is held run.
async fn run(transaction: &mut Transaction<'static, Any>, id: &str, retried: u64) -> Result<()> {
    sqlx::query("UPDATE jobs SET state = 1, ended = NULL, fault = NULL, retry = NULL WHERE id = $1").bind(id).execute(&mut **transaction).await?;
    say(transaction, id, vec![Event::Resumed(JobResumed { retried })]).await
}

/// Takes a job's row, if the job is in one of these states.
async fn lock(transaction: &mut Transaction<'static, Any>, id: &str, states: &[JobState]) -> Result<bool> {
    let lock = format!("UPDATE jobs SET state = state WHERE id = $1 AND state IN ({})", places(2, states.len()));
    let lock = states.iter().fold(sqlx::query(AssertSqlSafe(lock)).bind(id), |lock, state| lock.bind(i64::from(*state as i32)));
    Ok(lock.execute(&mut **transaction).await?.rows_affected() > 0)
}

/// Ends the leases of a job's units.
pub(super) async fn free(transaction: &mut Transaction<'static, Any>, id: &str) -> Result<()> {
    sqlx::query("UPDATE units SET owner = NULL, until = 0 WHERE job = $1 AND owner IS NOT NULL").bind(id).execute(&mut **transaction).await?;
    Ok(())
}

/// Ends a job whose row is held, and tells of it.
pub(super) async fn end(transaction: &mut Transaction<'static, Any>, id: &str, state: JobState) -> Result<()> {
    let row = sqlx::query("SELECT done, labelled, dead, failed FROM jobs WHERE id = $1").bind(id).fetch_one(&mut **transaction).await?;
    let taken = taken(transaction, id).await?;
    let usage = taken.values().filter_map(|taken| taken.usage).reduce(|mut all, more| {
        all.add(&more);
        all
    });
    let done = JobDone {
        labelled: count(&row, 1)? as u32,
        dead: count(&row, 2)? as u32,
        failed: count(&row, 3)? as u32,
        cancelled: state == JobState::Cancelled,
        times: taken.iter().map(|(stage, t)| StageTime { stage: (*stage).into(), seconds: t.seconds, calls: t.calls, reused: t.reused }).collect(),
        usage,
        ..message(&row, 0)?.unwrap_or_default()
    };
    const END: &str = "UPDATE jobs SET state = $2, done = $3, ended = (SELECT now FROM clock), fault = NULL, retry = NULL WHERE id = $1";
    sqlx::query(END).bind(id).bind(i64::from(state as i32)).bind(done.encode_to_vec()).execute(&mut **transaction).await?;
    say(transaction, id, vec![Event::Done(done)]).await
}

/// What a stage took in all.
struct Taken {
    done: u64,
    total: u64,
    seconds: f64,
    calls: u64,
    reused: u64,
    usage: Option<Usage>,
}

async fn taken(connection: &mut sqlx::AnyConnection, id: &str) -> Result<BTreeMap<Stage, Taken>> {
    const TAKEN: &str = "SELECT stage, done, total, seconds, calls, reused, asked, prompt_tokens, answer_tokens, cost FROM stages WHERE job = $1";
    let mut stages = BTreeMap::new();
    for row in sqlx::query(TAKEN).bind(id).fetch_all(connection).await? {
        let asked = count(&row, 6)?;
        let usage = Usage { calls: asked, prompt_tokens: count(&row, 7)?, answer_tokens: count(&row, 8)?, cost: row.try_get(9)? };
        let stage = Stage::try_from(count(&row, 0)? as i32).unwrap_or_default();
        let taken = Taken {
            done: count(&row, 1)?,
            total: count(&row, 2)?,
            seconds: row.try_get(3)?,
            calls: count(&row, 4)?,
            reused: count(&row, 5)?,
            usage: (asked > 0).then_some(usage),
        };
        stages.insert(stage, taken);
    }
    Ok(stages)
}

fn state(row: &AnyRow, column: usize) -> Result<JobState> {
    Ok(JobState::try_from(count(row, column)? as i32).unwrap_or_default())
}

pub(super) fn timestamp(milliseconds: i64) -> pbjson_types::Timestamp {
    pbjson_types::Timestamp { seconds: milliseconds.div_euclid(1000), nanos: (milliseconds.rem_euclid(1000) * 1_000_000) as i32 }
}

fn job(row: &AnyRow) -> Result<Job> {
    let state = state(row, 2)?;
    let request: DissectRequest = message(row, 10)?.unwrap_or_default();
    let fault: Option<tonic_types::Status> = message(row, 13)?;
    let fault = fault.map(|status| Fault::relayed(&fault::item_status(&status)));
    let ended = matches!(state, JobState::Done | JobState::Cancelled);
    Ok(Job {
        job_id: row.try_get(0)?,
        request_id: row.try_get::<Option<String>, _>(1)?.unwrap_or_default(),
        state: state.into(),
        reason: fault.as_ref().map(|fault| fault.reason().to_owned()).unwrap_or_default(),
        message: fault.map(|fault| fault.to_string()).unwrap_or_default(),
        created_at: Some(timestamp(row.try_get(3)?)),
        ended_at: row.try_get::<Option<i64>, _>(4)?.map(timestamp),
        units: Some(UnitCounts { total: count(row, 6)?, labelled: count(row, 7)?, dead: count(row, 8)?, failed: count(row, 9)? }),
        progress: Vec::new(),
        target_name: request.target.as_ref().map(target_name).unwrap_or_default(),
        accepted: message(row, 11)?,
        request: Some(request),
        done: if ended { message(row, 12)? } else { None },
        last_event: count(row, 5)?,
    })
}

/// What a target is called: the last part of its URI, or its digest.
fn target_name(target: &Target) -> String {
    match target.uri.rsplit('/').next() {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => target.digest.clone(),
    }
}
