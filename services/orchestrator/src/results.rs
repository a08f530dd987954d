//! Results of pure calls, kept on disk under everything that they depend on: what was made once is made by no later job, and by no later process.
//!
//! A key is a SHA-256 over the function and its version, the model's digest and engine, the parameters, and the input. Whatever of these changes, the key
//! changes with it, so that nothing stale can be found. Of several who write one key the first wins, and the others go on with what it wrote.
//! Pictures lie in blobs, by their own digests; results refer to them.

use std::{collections::HashMap, hash::Hash, sync::Arc};

use bytes::Bytes;
use dnd_mesh::blobs::Blobs;
use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};
use sqlx::{AssertSqlSafe, Row as _};

use crate::{
    database::{Database, places},
    failure::Failure,
    room::{KEYS, Key, Kind, Room, key_of, now},
};

/// The results and pictures that are kept. Several processes may share them.
#[derive(Debug, Clone)]
pub(crate) struct Results {
    database: Database,
    blobs: Arc<Blobs>,
    room: Arc<Room>,
}

impl Results {
    /// Results in a database and pictures in blobs, of `limit` bytes together at most.
    pub(crate) fn new(database: Database, blobs: Arc<Blobs>, limit: Option<u64>) -> Self {
        let room = Arc::new(Room::new(database.clone(), Arc::clone(&blobs), limit));
        Self { database, blobs, room }
    }

    /// How much there is, and may be.
    pub(crate) fn room(&self) -> &Room {
        &self.room
    }

    async fn find(&self, keys: &[Key]) -> Result<HashMap<Key, Vec<u8>>, sqlx::Error> {
        let mut found = HashMap::new();
        let mut uses = Vec::new();
        for keys in keys.chunks(KEYS) {
            let find = format!("SELECT key, value, used FROM results WHERE key IN ({})", places(1, keys.len()));
            let find = keys.iter().fold(sqlx::query(AssertSqlSafe(find)), |find, key| find.bind(key.as_slice()));
            for row in find.fetch_all(&self.database.pool).await? {
                if let Ok(key) = row.try_get::<Vec<u8>, _>(0)?.try_into() {
                    found.insert(key, row.try_get(1)?);
                    uses.push((key, row.try_get(2)?));
                }
            }
        }
        self.room.used(Kind::Result, uses).await?;
        Ok(found)
    }

    /// Keeps a value unless there is one, and gives the one that is there then.
    async fn keep(&self, function: &str, key: &Key, value: &[u8]) -> Result<Vec<u8>, sqlx::Error> {
        let keep = "INSERT INTO results (key, value, function, bytes, used) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (key) DO UPDATE SET used = excluded.used RETURNING value";
        let bytes = (key.len() + value.len()) as i64;
        let kept = sqlx::query_scalar(keep).bind(key.as_slice()).bind(value).bind(function.to_owned()).bind(bytes).bind(now());
        let kept = kept.fetch_one(&self.database.writes).await?;
        self.room.wrote(bytes as u64).await?;
        Ok(kept)
    }

    async fn replace(&self, key: &Key, value: &[u8]) -> Result<(), sqlx::Error> {
        let replace = sqlx::query("UPDATE results SET value = $2, bytes = $3 WHERE key = $1");
        let bytes = (key.len() + value.len()) as i64;
        replace.bind(key.as_slice()).bind(value).bind(bytes).execute(&self.database.writes).await.map(drop)
    }

    /// Keeps a picture that can be made again, and gives its digest.
    pub(crate) async fn put(&self, picture: Bytes) -> Result<String, Failure> {
        let bytes = picture.len() as i64;
        let digest = self.blobs.put(picture).await.map_err(|e| storage(&e))?;
        if let Some(key) = key_of(&digest) {
            let keep = "INSERT INTO pictures (digest, bytes, used) VALUES ($1, $2, $3) ON CONFLICT (digest) DO UPDATE SET used = excluded.used";
            let kept = sqlx::query(keep).bind(key.as_slice()).bind(bytes).bind(now()).execute(&self.database.writes).await;
            kept.map_err(|e| storage(&e))?;
            self.room.wrote(bytes as u64).await.map_err(|e| storage(&e))?;
        }
        Ok(digest)
    }

    /// A picture, if it is there.
    pub(crate) async fn picture(&self, digest: &str) -> Result<Option<Bytes>, Failure> {
        let found = self.blobs.get(digest).await.map_err(|e| storage(&e))?;
        self.note_pictures(&[digest]).await?;
        Ok(found)
    }

    /// Whether all of these pictures are there.
    pub(crate) async fn has(&self, digests: &[&str]) -> Result<bool, Failure> {
        for digest in digests {
            if !self.blobs.has(digest).await.map_err(|e| storage(&e))? {
                return Ok(false);
            }
        }
        self.note_pictures(digests).await?;
        Ok(true)
    }

    async fn note_pictures(&self, digests: &[&str]) -> Result<(), Failure> {
        // When they were used last is not known here, and not worth a question.
        let keys = digests.iter().filter_map(|digest| key_of(digest)).map(|key| (key, 0));
        self.room.used(Kind::Picture, keys).await.map_err(|e| storage(&e))
    }
}

/// The kept results of one function, given everything but its inputs.
#[derive(Debug, Clone)]
pub(crate) struct Shelf<V> {
    results: Results,
    function: String,
    /// Over the function and all that it depends on beside its input.
    of: Sha256,
    /// Digests of the pictures that a value refers to; none if the value itself counts as not there.
    pictures: fn(&V) -> Option<Vec<&str>>,
}

impl<V: Serialize + DeserializeOwned + Clone> Shelf<V> {
    /// The results of a function by its name and the parts that tell all that it depends on beside its input.
    pub(crate) fn new(results: Results, function: &str, parts: &[&[u8]]) -> Self {
        let parts = [function.as_bytes()].into_iter().chain(parts.iter().copied());
        let of = parts.fold(Sha256::new(), |of, part| of.chain_update((part.len() as u64).to_le_bytes()).chain_update(part));
        Self { results, function: function.to_owned(), of, pictures: |_| Some(Vec::new()) }
    }

    /// As this, but a value counts as there only with the pictures that it refers to, which `pictures` says; one of which it gives none counts as not there.
    pub(crate) fn with_pictures(self, pictures: fn(&V) -> Option<Vec<&str>>) -> Self {
        Self { pictures, ..self }
    }

    async fn is_whole(&self, value: &V) -> Result<bool, Failure> {
        match (self.pictures)(value) {
            Some(pictures) => self.results.has(&pictures).await,
            None => Ok(false),
        }
    }

    /// Whether a value is one that would be found again, with its pictures.
    pub(crate) fn is_usable(&self, value: &V) -> bool {
        (self.pictures)(value).is_some()
    }

    fn key<K: Serialize>(&self, input: &K) -> Result<Key, Failure> {
        let input = postcard::to_allocvec(input).map_err(|e| storage(&e))?;
        Ok(self.of.clone().chain_update(input).finalize().into())
    }

    /// The values that are kept of these inputs.
    pub(crate) async fn find<K: Serialize + Hash + Eq + Clone>(&self, inputs: &[K]) -> Result<HashMap<K, V>, Failure> {
        let keys = inputs.iter().map(|input| self.key(input)).collect::<Result<Vec<_>, _>>()?;
        let kept = self.results.find(&keys).await.map_err(|e| storage(&e))?;
        let mut found = HashMap::new();
        for (input, key) in inputs.iter().zip(&keys) {
            // What can't be read counts as not there, and is written anew.
            let Some(value) = kept.get(key).and_then(|value| postcard::from_bytes(value).ok()) else { continue };
            if self.is_whole(&value).await? {
                found.insert(input.clone(), value);
            }
        }
        Ok(found)
    }

    /// Keeps what was made of an input, and gives what is kept of it now: another's value, where another was first.
    pub(crate) async fn keep<K: Serialize>(&self, input: &K, value: V) -> Result<V, Failure> {
        let (key, bytes) = (self.key(input)?, postcard::to_allocvec(&value).map_err(|e| storage(&e))?);
        let kept = self.results.keep(&self.function, &key, &bytes).await.map_err(|e| storage(&e))?;
        if kept == bytes {
            return Ok(value);
        }
        if let Ok(kept) = postcard::from_bytes(&kept)
            && self.is_whole(&kept).await?
        {
            return Ok(kept);
        }
        // What is there and can't be used, since a picture is gone, gives way.
        self.results.replace(&key, &bytes).await.map(|()| value).map_err(|e| storage(&e))
    }
}

fn storage(error: &dyn std::fmt::Display) -> Failure {
    Failure::storage(format!("what is kept: {error}"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use dnd_mesh::blobs::ObjectArgs;
    use url::Url;

    use super::*;

    async fn shelf(folder: &Path, parts: &[&[u8]]) -> Shelf<String> {
        let blobs = Arc::new(Blobs::open(folder).unwrap());
        let [function, rest @ ..] = parts else { panic!("no function") };
        Shelf::new(Results::new(Database::in_folder(folder).await.unwrap(), blobs, None), std::str::from_utf8(function).unwrap(), rest)
    }

    const A: &str = "a";

    async fn found(shelf: &Shelf<String>, input: &str) -> Option<String> {
        shelf.find(&[input]).await.unwrap().remove(input)
    }

    #[tokio::test]
    async fn what_was_kept_is_found_by_a_later_process_and_the_first_value_stays() {
        let folder = tempfile::tempdir().unwrap();
        {
            let shelf = shelf(folder.path(), &[b"caption", b"model"]).await;
            assert_eq!(found(&shelf, A).await, None);
            assert_eq!(shelf.keep(&A, "first".to_owned()).await.unwrap(), "first");
        }
        let shelf = shelf(folder.path(), &[b"caption", b"model"]).await;
        assert_eq!((found(&shelf, A).await, found(&shelf, "b").await), (Some("first".to_owned()), None));
        assert_eq!(shelf.keep(&A, "second".to_owned()).await.unwrap(), "first");
    }

    #[tokio::test]
    async fn another_function_model_or_parameter_finds_nothing() {
        let folder = tempfile::tempdir().unwrap();
        shelf(folder.path(), &[b"caption", b"model", b"5"]).await.keep(&A, "x".to_owned()).await.unwrap();
        for parts in [[b"simplify".as_slice(), b"model", b"5"], [b"caption", b"other", b"5"], [b"caption", b"model", b"6"], [b"captionm", b"odel", b"5"]] {
            assert_eq!(found(&shelf(folder.path(), &parts).await, A).await, None);
        }
    }

    #[tokio::test]
    async fn a_value_whose_picture_is_gone_or_damaged_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let shelf = shelf(folder.path(), &[b"draw"]).await.with_pictures(|digest| Some(vec![digest.as_str()]));
        let results = &shelf.results;
        let lost = results.put("lost".into()).await.unwrap();
        assert_eq!(shelf.keep(&A, lost.clone()).await.unwrap(), lost);
        assert_eq!(found(&shelf, A).await.as_ref(), Some(&lost));
        std::fs::write(folder.path().join(&lost), "something else").unwrap();
        assert_eq!(results.picture(&lost).await.unwrap(), None, "it is not what it says, and thrown away");
        assert_eq!(found(&shelf, A).await, None);
        let again = results.put("again".into()).await.unwrap();
        assert_eq!(shelf.keep(&A, again.clone()).await.unwrap(), again);
        assert_eq!(found(&shelf, A).await, Some(again));
    }

    #[tokio::test]
    async fn a_value_that_cannot_be_read_counts_as_not_there_and_is_written_anew() {
        let folder = tempfile::tempdir().unwrap();
        let shelf = shelf(folder.path(), &[b"caption"]).await;
        shelf.keep(&A, "first".to_owned()).await.unwrap();
        sqlx::query("UPDATE results SET value = $1").bind(vec![0xFF_u8; 3]).execute(&shelf.results.database.pool).await.unwrap();
        assert_eq!(found(&shelf, A).await, None);
        shelf.keep(&A, "second".to_owned()).await.unwrap();
        assert_eq!(found(&shelf, A).await.as_deref(), Some("second"));
    }

    #[tokio::test]
    async fn a_full_disk_is_said_and_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let shelf = shelf(folder.path(), &[b"f"]).await;
        shelf.keep(&A, "first".to_owned()).await.unwrap();
        // As if the disk had no more than what is used.
        let pages = async |count: u32| {
            let limit = sqlx::raw_sql(sqlx::AssertSqlSafe(format!("PRAGMA max_page_count = {count}")));
            limit.execute(&shelf.results.database.writes).await.unwrap();
        };
        pages(1).await;
        let failure = shelf.keep(&"large", "x".repeat(1 << 20)).await.unwrap_err();
        assert!(failure.reason == "storage" && failure.message.contains("full"), "{failure:?}");
        pages(1_000_000).await;
        assert_eq!((found(&shelf, A).await.as_deref(), found(&shelf, "large").await), (Some("first"), None));
        shelf.keep(&"large", "x".repeat(1 << 20)).await.unwrap();
    }

    #[tokio::test]
    async fn a_place_for_pictures_that_cannot_be_written_is_said_and_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (data, objects) = (folder.path().join("data"), folder.path().join("objects"));
        let place = ObjectArgs { objects: Some(Url::from_file_path(&objects).unwrap()) };
        let blobs = Blobs::open(&data).unwrap().sharing(&place).unwrap();
        let results = Results::new(Database::in_folder(&data).await.unwrap(), Arc::new(blobs), None);
        let first = results.put("first".into()).await.unwrap();
        let aside = folder.path().join("aside");
        std::fs::rename(&objects, &aside).unwrap();
        std::fs::write(&objects, "no folder").unwrap();
        let failure = results.put("second".into()).await.unwrap_err();
        assert!(failure.reason == "storage" && failure.message.contains("objects"), "{failure:?}");
        std::fs::remove_file(&objects).unwrap();
        std::fs::rename(&aside, &objects).unwrap();
        assert_eq!(results.picture(&first).await.unwrap().unwrap(), "first");
        results.put("second".into()).await.unwrap();
    }

    #[tokio::test]
    async fn many_inputs_at_once_and_writers_side_by_side() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (shelf(folder.path(), &[b"f"]).await, shelf(folder.path(), &[b"f"]).await);
        let inputs: Vec<u32> = (0..1200).collect();
        let (one, other) = (&one, &other);
        for input in &inputs {
            let (a, b) = tokio::join!(one.keep(input, "one".to_owned()), other.keep(input, "other".to_owned()));
            assert_eq!(a.unwrap(), b.unwrap());
        }
        assert_eq!(one.find(&inputs).await.unwrap().len(), 1200);
    }
}
