//! What happens in a job, numbered.

use dnd_proto::v1::{JobEvent, UnitResult, job_event::Event};
use prost::Message as _;
use sqlx::{Any, AssertSqlSafe, Row as _, Transaction};

use super::{Result, Store, count, decoded};
use crate::database::places;

/// Events of one query at most: their results are in memory together.
pub(crate) const EVENTS: i64 = 64;
/// Rows of one statement; databases take some thousands of values.
const ROWS: usize = 500;

impl Store {
    /// The events of a job after the one of this number, in order; at most [`EVENTS`].
    pub(crate) async fn events(&self, job: &str, after: u64) -> Result<Vec<JobEvent>> {
        const READ: &str = "SELECT e.number, e.place, COALESCE(e.body, u.result) FROM events e LEFT JOIN units u ON u.job = e.job AND u.place = e.place \
            WHERE e.job = $1 AND e.number > $2 ORDER BY e.number LIMIT $3";
        let rows = sqlx::query(READ).bind(job).bind(after as i64).bind(EVENTS).fetch_all(&self.database.pool).await?;
        let event = |row: &sqlx::any::AnyRow| {
            let (number, place, body) = (count(row, 0)?, row.try_get::<Option<i64>, _>(1)?, row.try_get::<Vec<u8>, _>(2)?);
            let event = match place {
                Some(_) => Some(Event::Unit(decoded::<UnitResult>(&body)?)),
                None => decoded::<JobEvent>(&body)?.event,
            };
            Ok(JobEvent { number, event })
        };
        rows.iter().map(event).collect()
    }
}

/// Tells of events, in order. Takes the job's row.
pub(super) async fn say(transaction: &mut Transaction<'static, Any>, job: &str, events: Vec<Event>) -> Result<()> {
    const NUMBER: &str = "UPDATE jobs SET last_event = last_event + $2 WHERE id = $1 RETURNING last_event";
    let last: i64 = sqlx::query_scalar(NUMBER).bind(job).bind(events.len() as i64).fetch_one(&mut **transaction).await?;
    let numbered: Vec<(i64, Event)> = (last - events.len() as i64 + 1..).zip(events).collect();
    for rows in numbered.chunks(ROWS) {
        let values: Vec<String> = (0..rows.len()).map(|row| format!("($1, {})", places(2 + 2 * row, 2))).collect();
        let mut insert = sqlx::query(AssertSqlSafe(format!("INSERT INTO events (job, number, body) VALUES {}", values.join(", ")))).bind(job);
        for (number, event) in rows {
            let event = JobEvent { number: 0, event: Some(event.clone()) };
            insert = insert.bind(*number).bind(event.encode_to_vec());
        }
        insert.execute(&mut **transaction).await?;
    }
    Ok(())
}

/// Tells of the end of a unit, with a number that the job's row has been given for it.
pub(super) async fn say_unit(transaction: &mut Transaction<'static, Any>, job: &str, number: i64, place: i64) -> Result<()> {
    let insert = sqlx::query("INSERT INTO events (job, number, place) VALUES ($1, $2, $3)").bind(job).bind(number).bind(place);
    insert.execute(&mut **transaction).await?;
    Ok(())
}
