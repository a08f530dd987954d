//! Rating studies, and what raters said.

use std::collections::HashMap;

use dnd_proto::v1::{Rating, Study};
use prost::Message as _;
use sqlx::{Row as _, any::AnyRow};

use super::{Result, Store, count, jobs::timestamp, message};
use crate::room::{self, key_of};

/// How often a unit of a study was rated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rated {
    /// By anyone.
    pub(crate) times: u64,
    /// By the rater in question.
    pub(crate) by_rater: bool,
}

impl Store {
    /// Creates a study. Its pictures stay for as long as it does.
    pub(crate) async fn create_study(&self, study: Study) -> Result<()> {
        const INSERT: &str = "INSERT INTO studies (id, created, body, shown) SELECT $1, now, $2, $3 FROM clock";
        let pictures = study.shown.iter().flat_map(|unit| &unit.pictures).filter_map(|digest| key_of(digest)).collect();
        let id = study.study_id.clone();
        let shown = Study { shown: study.shown, ..Default::default() };
        let body = Study { shown: Vec::new(), ..study };
        let mut transaction = self.database.begin().await?;
        sqlx::query(INSERT).bind(&id).bind(body.encode_to_vec()).bind(shown.encode_to_vec()).execute(&mut *transaction).await?;
        room::pin_pictures(&mut transaction, &id, pictures).await?;
        self.commit(transaction).await
    }

    /// A study with all that it shows.
    pub(crate) async fn study(&self, id: &str) -> Result<Option<Study>> {
        const FIND: &str = "SELECT created, body, (SELECT COUNT(*) FROM ratings WHERE study = id), shown FROM studies WHERE id = $1";
        let row = sqlx::query(FIND).bind(id).fetch_optional(&self.database.pool).await?;
        row.map(|row| {
            let shown: Study = message(&row, 3)?.unwrap_or_default();
            Ok(Study { shown: shown.shown, ..study(&row)? })
        })
        .transpose()
    }

    /// Studies, the newest first, after the one of this id; without what they show.
    pub(crate) async fn studies(&self, after: Option<&str>, most: u32) -> Result<Vec<Study>> {
        const LIST: &str = "SELECT created, body, (SELECT COUNT(*) FROM ratings WHERE study = id) FROM studies WHERE id < $1 ORDER BY id DESC LIMIT $2";
        // No id begins with a character after these.
        let list = sqlx::query(LIST).bind(after.unwrap_or("~")).bind(i64::from(most));
        list.fetch_all(&self.database.pool).await?.iter().map(study).collect()
    }

    /// Deletes a study and its ratings.
    pub(crate) async fn delete_study(&self, id: &str) -> Result<bool> {
        let mut transaction = self.database.begin().await?;
        let deleted = sqlx::query("DELETE FROM studies WHERE id = $1").bind(id).execute(&mut *transaction).await?.rows_affected() > 0;
        sqlx::query("DELETE FROM ratings WHERE study = $1").bind(id).execute(&mut *transaction).await?;
        room::unpin(&mut transaction, id).await?;
        self.commit(transaction).await?;
        Ok(deleted)
    }

    /// Keeps what a rater said of the unit at a place, in place of what they said of it before. False where there is no such study.
    pub(crate) async fn rate(&self, study: &str, place: usize, rating: &Rating) -> Result<bool> {
        const RATE: &str = "INSERT INTO ratings (study, place, rater, rated, body) SELECT id, $2, $3, now, $4 FROM studies, clock WHERE id = $1 \
            ON CONFLICT (study, place, rater) DO UPDATE SET rated = excluded.rated, body = excluded.body";
        let rate = sqlx::query(RATE).bind(study).bind(place as i64).bind(&rating.rater).bind(rating.encode_to_vec());
        Ok(rate.execute(&self.database.pool).await?.rows_affected() > 0)
    }

    /// How often each unit that was rated was, by its place.
    pub(crate) async fn rated(&self, study: &str, rater: &str) -> Result<HashMap<usize, Rated>> {
        const RATED: &str = "SELECT place, COUNT(*), SUM(CASE WHEN rater = $2 THEN 1 ELSE 0 END) FROM ratings WHERE study = $1 GROUP BY place";
        let rows = sqlx::query(RATED).bind(study).bind(rater).fetch_all(&self.database.pool).await?;
        rows.iter().map(|row| Ok((count(row, 0)? as usize, Rated { times: count(row, 1)?, by_rater: count(row, 2)? > 0 }))).collect()
    }

    /// All ratings, each with its unit's place, in the order of units and raters.
    pub(crate) async fn ratings(&self, study: &str) -> Result<Vec<(usize, Rating)>> {
        const LIST: &str = "SELECT place, rated, body FROM ratings WHERE study = $1 ORDER BY place, rater";
        let rows = sqlx::query(LIST).bind(study).fetch_all(&self.database.pool).await?;
        let rating = |row: &AnyRow| {
            let rating: Rating = message(row, 2)?.unwrap_or_default();
            Ok((count(row, 0)? as usize, Rating { rated_at: Some(timestamp(row.try_get(1)?)), ..rating }))
        };
        rows.iter().map(rating).collect()
    }
}

fn study(row: &AnyRow) -> Result<Study> {
    Ok(Study { created_at: Some(timestamp(row.try_get(0)?)), responses: count(row, 2)? as u32, ..message(row, 1)?.unwrap_or_default() })
}
