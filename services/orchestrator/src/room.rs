//! How much is kept, and what goes when it is too much: the results and pictures that were used longest ago, since they can be made again. What the results
//! of jobs refer to stays until those jobs are deleted.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use dnd_mesh::blobs::{Blobs, hex};
use dnd_proto::v1::UnitResult;
use sqlx::{AnyConnection, AssertSqlSafe, Row as _};

use crate::database::{Database, places};

pub(crate) type Key = [u8; 32];

/// Keys of one statement; databases take some thousands of values.
pub(crate) const KEYS: usize = 500;
/// A use is noted only if the last one that was noted is older, and many are noted together: to note one has SQLite read all of the result.
const USES: Duration = Duration::from_secs(600);
const USES_TOGETHER: usize = 4096;
/// What was used since then is worked with, and stays whatever the limit.
const IN_WORK: Duration = Duration::from_secs(3600);
/// Each time that so much of the limit was written, or so many bytes if that is more, it is looked whether it is reached; then so much of it is made free.
const LOOKS: u64 = 64;
const LOOK_BYTES: u64 = 1 << 20;
const FREED: u64 = 10;

/// What takes room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Result,
    Picture,
}

impl Kind {
    /// Its table, and the name of the key there.
    fn table(self) -> (&'static str, &'static str) {
        match self {
            Self::Result => ("results", "key"),
            Self::Picture => ("pictures", "digest"),
        }
    }
}

/// What is kept, by what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptOf {
    /// The function that made it, such as "caption 1", or "pictures".
    pub what: String,
    /// How many.
    pub count: u64,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// How much is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    /// By function, then the pictures.
    pub kept: Vec<KeptOf>,
    /// Pictures that results of jobs refer to, and their bytes.
    pub pinned: (u64, u64),
    /// What may be kept.
    pub limit: Option<u64>,
}

impl Stats {
    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.kept.iter().map(|kept| kept.bytes).sum()
    }
}

/// The room for results and pictures.
#[derive(Debug)]
pub(crate) struct Room {
    database: Database,
    blobs: Arc<Blobs>,
    limit: Option<u64>,
    uses: Mutex<Uses>,
    /// Bytes written since it was looked whether the limit is reached.
    written: AtomicU64,
    making: tokio::sync::Mutex<()>,
    full: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Uses {
    keys: HashSet<(Kind, Key)>,
    since: Instant,
}

impl Room {
    pub(crate) fn new(database: Database, blobs: Arc<Blobs>, limit: Option<u64>) -> Self {
        let uses = Uses { keys: HashSet::new(), since: Instant::now() };
        Self { database, blobs, limit, uses: Mutex::new(uses), written: AtomicU64::new(0), making: tokio::sync::Mutex::default(), full: Mutex::default() }
    }

    /// Why nothing more is to be made: what is pinned alone is more than may be kept.
    pub(crate) async fn full(&self) -> Result<Option<String>, sqlx::Error> {
        let full = || self.full.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (Some(limit), Some(_)) = (self.limit, full()) else { return Ok(None) };
        // Jobs may have been deleted since it was found.
        self.make(limit, IN_WORK).await?;
        Ok(full())
    }

    /// Notes that something was used whose last use had been noted then.
    pub(crate) async fn used(&self, kind: Kind, keys: impl IntoIterator<Item = (Key, i64)>) -> Result<(), sqlx::Error> {
        let old = now() - USES.as_secs() as i64;
        let due = {
            let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
            uses.keys.extend(keys.into_iter().filter(|(_, used)| *used < old).map(|(key, _)| (kind, key)));
            uses.keys.len() >= USES_TOGETHER || (!uses.keys.is_empty() && uses.since.elapsed() >= USES)
        };
        if due { self.note_uses().await } else { Ok(()) }
    }

    async fn note_uses(&self) -> Result<(), sqlx::Error> {
        let keys = {
            let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
            uses.since = Instant::now();
            std::mem::take(&mut uses.keys)
        };
        for kind in [Kind::Result, Kind::Picture] {
            let keys: Vec<&Key> = keys.iter().filter(|(of, _)| *of == kind).map(|(_, key)| key).collect();
            for keys in keys.chunks(KEYS) {
                let (table, name) = kind.table();
                let note = format!("UPDATE {table} SET used = $1 WHERE {name} IN ({})", places(2, keys.len()));
                let note = sqlx::query(AssertSqlSafe(note)).bind(now());
                keys.iter().fold(note, |note, key| note.bind(key.as_slice())).execute(&self.database.writes).await?;
            }
        }
        Ok(())
    }

    /// Counts in what was written, and makes room if there is too much.
    pub(crate) async fn wrote(&self, bytes: u64) -> Result<(), sqlx::Error> {
        let Some(limit) = self.limit else { return Ok(()) };
        let written = self.written.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if written < (limit / LOOKS).max(LOOK_BYTES) {
            return Ok(());
        }
        // One who makes room is enough.
        let Ok(_alone) = self.making.try_lock() else { return Ok(()) };
        self.written.store(0, Ordering::Relaxed);
        self.make(limit, IN_WORK).await.map(drop)
    }

    /// Makes room if more is kept than that, of what was not used for so long; gives the bytes that are free then.
    pub(crate) async fn make(&self, limit: u64, unused_for: Duration) -> Result<u64, sqlx::Error> {
        self.note_uses().await?;
        let stats = self.stats().await?;
        let mut bytes = stats.bytes();
        let before = bytes;
        let cutoff = now() - unused_for.as_secs() as i64;
        while bytes > limit - limit / FREED && before > limit {
            let oldest = "SELECT 0 AS kind, key, bytes, used FROM results WHERE used <= $1 UNION ALL \
                 SELECT 1, digest, bytes, used FROM pictures WHERE used <= $1 AND NOT EXISTS (SELECT 1 FROM pins WHERE pins.digest = pictures.digest) \
                 ORDER BY used LIMIT 500";
            let rows = sqlx::query(oldest).bind(cutoff).fetch_all(&self.database.pool).await?;
            if rows.is_empty() {
                break;
            }
            let (mut results, mut pictures) = (Vec::new(), Vec::new());
            for row in rows {
                if bytes <= limit - limit / FREED {
                    break;
                }
                let (kind, key, size): (i32, Vec<u8>, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
                bytes = bytes.saturating_sub(size.unsigned_abs());
                let Ok(key) = Key::try_from(key) else { continue };
                if kind == 0 { results.push(key) } else { pictures.push(key) }
            }
            for picture in &pictures {
                // The file first: a row without its file is found out, and goes the next time; a file without its row would stay for ever.
                self.blobs.remove(&hex(picture)).await.map_err(sqlx::Error::Io)?;
            }
            for (kind, keys) in [(Kind::Result, &results), (Kind::Picture, &pictures)].into_iter().filter(|(_, keys)| !keys.is_empty()) {
                let (table, name) = kind.table();
                let delete = format!("DELETE FROM {table} WHERE {name} IN ({})", places(1, keys.len()));
                let delete = sqlx::query(AssertSqlSafe(delete));
                keys.iter().fold(delete, |delete, key| delete.bind(key.as_slice())).execute(&self.database.writes).await?;
            }
        }
        let (_, pinned) = stats.pinned;
        let full = (pinned > limit).then(|| {
            format!(
                "the pictures of jobs take {pinned} bytes, and {limit} may be kept (--keep-bytes): delete jobs that are not needed any more, or allow for more"
            )
        });
        *self.full.lock().unwrap_or_else(PoisonError::into_inner) = full;
        Ok(before - bytes)
    }

    pub(crate) async fn stats(&self) -> Result<Stats, sqlx::Error> {
        let by_function = "SELECT function, COUNT(*), CAST(SUM(bytes) AS BIGINT) FROM results GROUP BY function ORDER BY function";
        let mut kept = Vec::new();
        for row in sqlx::query(by_function).fetch_all(&self.database.pool).await? {
            let (what, count, bytes): (String, i64, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            kept.push(KeptOf { what, count: count.unsigned_abs(), bytes: bytes.unsigned_abs() });
        }
        let two = async |sql: &'static str| {
            let row = sqlx::query(sql).fetch_one(&self.database.pool).await?;
            let (count, bytes): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
            Ok::<_, sqlx::Error>((count.unsigned_abs(), bytes.unsigned_abs()))
        };
        let (count, bytes) = two("SELECT COUNT(*), CAST(COALESCE(SUM(bytes), 0) AS BIGINT) FROM pictures").await?;
        kept.push(KeptOf { what: "pictures".to_owned(), count, bytes });
        let pinned =
            "SELECT COUNT(*), CAST(COALESCE(SUM(bytes), 0) AS BIGINT) FROM pictures WHERE EXISTS (SELECT 1 FROM pins WHERE pins.digest = pictures.digest)";
        Ok(Stats { kept, pinned: two(pinned).await?, limit: self.limit })
    }
}

/// Pins the pictures that a unit's result refers to: they stay until its job is unpinned. To be called in the transaction that writes the result.
pub(crate) async fn pin(connection: &mut AnyConnection, job: &str, result: &UnitResult) -> Result<(), sqlx::Error> {
    pin_pictures(connection, job, pictures_of(result)).await
}

/// As [`pin`], for whatever else refers to pictures by its id.
pub(crate) async fn pin_pictures(connection: &mut AnyConnection, id: &str, pictures: HashSet<Key>) -> Result<(), sqlx::Error> {
    let pictures: Vec<Key> = pictures.into_iter().collect();
    for pictures in pictures.chunks(KEYS) {
        let rows: Vec<String> = (2..2 + pictures.len()).map(|place| format!("(${place}, $1)")).collect();
        let insert = format!("INSERT INTO pins (digest, job) VALUES {} ON CONFLICT DO NOTHING", rows.join(", "));
        let insert = sqlx::query(AssertSqlSafe(insert)).bind(id.to_owned());
        pictures.iter().fold(insert, |insert, picture| insert.bind(picture.as_slice())).execute(&mut *connection).await?;
    }
    Ok(())
}

/// Lets go of what a job had pinned, as it is deleted.
pub(crate) async fn unpin(connection: &mut AnyConnection, job: &str) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM pins WHERE job = $1").bind(job.to_owned()).execute(connection).await.map(drop)
}

/// The pictures that a result names.
fn pictures_of(result: &UnitResult) -> HashSet<Key> {
    let probed = result.probed.iter().flat_map(|picture| [&picture.digest, &picture.map_digest]);
    let images = result.images.iter().flat_map(|image| [&image.digest, &image.parent_digest]);
    let crops = result.crops.iter().flat_map(|crop| [&crop.digest, &crop.parent_digest]);
    let drawn = result.concepts.iter().flat_map(|concept| &concept.pictures).map(|picture| &picture.digest);
    probed.chain(images).chain(crops).chain(drawn).filter_map(|digest| key_of(digest)).collect()
}

/// The bytes that a hex digest stands for.
pub(crate) fn key_of(digest: &str) -> Option<Key> {
    let byte = |at: usize| u8::from_str_radix(digest.get(at..at + 2)?, 16).ok();
    let bytes: Vec<u8> = (0..digest.len()).step_by(2).map(byte).collect::<Option<_>>()?;
    bytes.try_into().ok()
}

/// Seconds since 1970.
pub(crate) fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

#[cfg(test)]
mod tests {
    use dnd_proto::v1::ProbedPicture;

    use super::*;
    use crate::results::Results;

    const NOW: Duration = Duration::ZERO;

    async fn results(folder: &std::path::Path, limit: u64) -> Results {
        Results::new(Database::in_folder(folder).await.unwrap(), Arc::new(Blobs::open(folder).unwrap()), Some(limit))
    }

    /// Ten pictures of 200 bytes, each used a quarter of an hour before the next.
    async fn ten_pictures(results: &Results) -> Vec<String> {
        let mut pictures = Vec::new();
        for place in 0..10_u8 {
            let digest = results.put(vec![place; 200].into()).await.unwrap();
            age(results, &digest, 900 * i64::from(10 - place)).await;
            pictures.push(digest);
        }
        pictures
    }

    async fn age(results: &Results, digest: &str, seconds: i64) {
        let age = sqlx::query("UPDATE pictures SET used = used - $1 WHERE digest = $2").bind(seconds).bind(key_of(digest).unwrap().to_vec());
        assert_eq!(age.execute(&results.room().database.pool).await.unwrap().rows_affected(), 1);
    }

    async fn there(results: &Results, pictures: &[String]) -> Vec<usize> {
        let mut there = Vec::new();
        for (place, digest) in pictures.iter().enumerate() {
            if results.room().blobs.has(digest).await.unwrap() {
                there.push(place);
            }
        }
        there
    }

    async fn pin(results: &Results, job: &str, pictures: &[String]) {
        let probed = pictures.iter().map(|digest| ProbedPicture { digest: digest.clone(), ..Default::default() }).collect();
        let result = UnitResult { probed, ..Default::default() };
        let mut connection = results.room().database.pool.acquire().await.unwrap();
        for _ in 0..2 {
            super::pin(&mut connection, job, &result).await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_was_used_longest_ago_goes_first_and_what_jobs_refer_to_stays() {
        let folder = tempfile::tempdir().unwrap();
        check_room(results(folder.path(), 500).await).await;
        if let Some(database) = Database::of_a_test().await {
            let folder = tempfile::tempdir().unwrap();
            check_room(Results::new(database, Arc::new(Blobs::open(folder.path()).unwrap()), Some(500))).await;
        }
    }

    async fn check_room(results: Results) {
        let pictures = ten_pictures(&results).await;
        pin(&results, "job", &pictures[..1]).await;
        // Read again, so that it was used last.
        results.picture(&pictures[1]).await.unwrap();
        assert_eq!(results.room().make(1000, NOW).await.unwrap(), 1200);
        assert_eq!(there(&results, &pictures).await, [0, 1, 8, 9]);
        let stats = results.room().stats().await.unwrap();
        assert_eq!((stats.bytes(), stats.pinned, stats.limit), (800, (1, 200), Some(500)));
        assert_eq!(results.room().make(1000, NOW).await.unwrap(), 0, "there is room");
        assert_eq!(results.room().make(0, IN_WORK).await.unwrap(), 0, "all of it was used within the hour, or is pinned");

        pin(&results, "job", &pictures[8..]).await;
        assert_eq!(results.room().make(500, NOW).await.unwrap(), 200);
        assert_eq!(there(&results, &pictures).await, [0, 8, 9]);
        let full = results.room().full().await.unwrap().unwrap();
        assert!(full.contains("600 bytes") && full.contains("--keep-bytes"), "{full}");
        let mut connection = results.room().database.pool.acquire().await.unwrap();
        unpin(&mut connection, "another").await.unwrap();
        assert_eq!(results.room().make(0, NOW).await.unwrap(), 0);
        unpin(&mut connection, "job").await.unwrap();
        assert_eq!(results.room().make(0, NOW).await.unwrap(), 600);
        assert_eq!((there(&results, &pictures).await, results.room().full().await.unwrap()), (Vec::new(), None));
    }

    #[tokio::test]
    async fn room_is_made_as_more_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let results = results(folder.path(), 1_500_000).await;
        let mut pictures = Vec::new();
        for place in 0..6_u8 {
            let digest = results.put(vec![place; 600_000].into()).await.unwrap();
            if place < 3 {
                age(&results, &digest, 7200).await;
            }
            pictures.push(digest);
        }
        let there = there(&results, &pictures).await;
        assert!(there.ends_with(&[3, 4, 5]) && there.len() < 6, "what was made within the hour stays: {there:?}");
    }

    #[test]
    fn all_pictures_of_a_result_are_pinned() {
        use dnd_proto::v1::{ActivatingImage, CroppedPicture, GeneratedPicture, RankedConcept};
        let name = |place: u8| hex(&[place; 32]);
        let result = UnitResult {
            probed: vec![ProbedPicture { digest: name(1), map_digest: name(2), ..Default::default() }],
            images: vec![ActivatingImage { digest: name(3), ..Default::default() }],
            crops: vec![CroppedPicture { digest: name(4), parent_digest: name(1), ..Default::default() }],
            concepts: vec![RankedConcept {
                pictures: vec![GeneratedPicture { digest: name(5), ..Default::default() }, GeneratedPicture::default()],
                ..Default::default()
            }],
            ..Default::default()
        };
        assert_eq!(pictures_of(&result), (1..=5).map(|place| [place; 32]).collect());
    }
}
