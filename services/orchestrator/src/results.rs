//! Results of pure calls, kept on disk under everything that they depend on: what was made once is made by no later job, and by no later process.
//!
//! A key is a SHA-256 over the function and its version, the model's digest and engine, the parameters, and the input. Whatever of these changes, the key
//! changes with it, so that nothing stale can be found. Of several who write one key the first wins, and the others go on with what it wrote.

use std::{collections::HashMap, hash::Hash, sync::Arc};

use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};
use sqlx::{AssertSqlSafe, Row as _};

use crate::{
    database::{Database, places},
    steps::Failure,
};

/// Keys of one statement; databases take some thousands of values.
const KEYS: usize = 500;

type Key = [u8; 32];

/// The results that a database holds. Several processes may share it.
#[derive(Debug, Clone)]
pub(crate) struct Results(Database);

impl Results {
    pub(crate) fn new(database: Database) -> Self {
        Self(database)
    }

    async fn find(&self, keys: &[Key]) -> Result<HashMap<Key, Vec<u8>>, sqlx::Error> {
        let mut found = HashMap::new();
        for keys in keys.chunks(KEYS) {
            let find = format!("SELECT key, value FROM results WHERE key IN ({})", places(1, keys.len()));
            let find = keys.iter().fold(sqlx::query(AssertSqlSafe(find)), |find, key| find.bind(key.as_slice()));
            for row in find.fetch_all(&self.0.pool).await? {
                if let Ok(key) = row.try_get::<Vec<u8>, _>(0)?.try_into() {
                    found.insert(key, row.try_get(1)?);
                }
            }
        }
        Ok(found)
    }

    /// Keeps a value unless there is one, and gives the one that is there then.
    async fn keep(&self, key: &Key, value: &[u8]) -> Result<Vec<u8>, sqlx::Error> {
        let keep = "INSERT INTO results (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = results.value RETURNING value";
        sqlx::query_scalar(keep).bind(key.as_slice()).bind(value).fetch_one(&self.0.pool).await
    }

    async fn replace(&self, key: &Key, value: &[u8]) -> Result<(), sqlx::Error> {
        sqlx::query("UPDATE results SET value = $2 WHERE key = $1").bind(key.as_slice()).bind(value).execute(&self.0.pool).await.map(drop)
    }
}

/// The kept results of one function, given everything but its inputs.
#[derive(Clone)]
pub(crate) struct Shelf<V> {
    results: Results,
    /// Over the function and all that it depends on beside its input.
    of: Sha256,
    /// Whether what a kept value refers to is there, too.
    is_whole: Arc<dyn Fn(&V) -> bool + Send + Sync>,
}

impl<V> std::fmt::Debug for Shelf<V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shelf").finish_non_exhaustive()
    }
}

impl<V: Serialize + DeserializeOwned + Clone> Shelf<V> {
    /// The results of a function by the parts that name it and all that it depends on beside its input.
    pub(crate) fn new(results: Results, parts: &[&[u8]]) -> Self {
        let of = parts.iter().fold(Sha256::new(), |of, part| of.chain_update((part.len() as u64).to_le_bytes()).chain_update(part));
        Self { results, of, is_whole: Arc::new(|_| true) }
    }

    /// As this, but a value whose `is_whole` is false counts as not there.
    pub(crate) fn where_whole(self, is_whole: impl Fn(&V) -> bool + Send + Sync + 'static) -> Self {
        Self { is_whole: Arc::new(is_whole), ..self }
    }

    /// Whether a value is one that would be found again.
    pub(crate) fn is_whole(&self, value: &V) -> bool {
        (self.is_whole)(value)
    }

    fn key<K: Serialize>(&self, input: &K) -> Result<Key, Failure> {
        let input = postcard::to_allocvec(input).map_err(|e| storage(&e))?;
        Ok(self.of.clone().chain_update(input).finalize().into())
    }

    /// The values that are kept of these inputs.
    pub(crate) async fn find<K: Serialize + Hash + Eq + Clone>(&self, inputs: &[K]) -> Result<HashMap<K, V>, Failure> {
        let keys = inputs.iter().map(|input| self.key(input)).collect::<Result<Vec<_>, _>>()?;
        let kept = self.results.find(&keys).await.map_err(|e| storage(&e))?;
        let value = |key: &Key| postcard::from_bytes(kept.get(key)?).ok().filter(|value| (self.is_whole)(value));
        Ok(inputs.iter().zip(&keys).filter_map(|(input, key)| Some((input.clone(), value(key)?))).collect())
    }

    /// Keeps what was made of an input, and gives what is kept of it now: another's value, where another was first.
    pub(crate) async fn keep<K: Serialize>(&self, input: &K, value: V) -> Result<V, Failure> {
        let (key, bytes) = (self.key(input)?, postcard::to_allocvec(&value).map_err(|e| storage(&e))?);
        let kept = self.results.keep(&key, &bytes).await.map_err(|e| storage(&e))?;
        if kept == bytes {
            return Ok(value);
        }
        match postcard::from_bytes(&kept).ok().filter(|kept| (self.is_whole)(kept)) {
            Some(kept) => Ok(kept),
            // What is there and can't be used, since a picture was removed by hand, gives way.
            None => self.results.replace(&key, &bytes).await.map(|()| value).map_err(|e| storage(&e)),
        }
    }
}

fn storage(error: &dyn std::fmt::Display) -> Failure {
    Failure::storage(format!("kept results: {error}"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    async fn shelf(folder: &Path, parts: &[&[u8]]) -> Shelf<String> {
        Shelf::new(Results::new(Database::in_folder(folder).await.unwrap()), parts)
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
    async fn a_value_that_is_not_whole_any_more_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let shelf = shelf(folder.path(), &[b"draw"]).await.where_whole(|value| value != "gone");
        shelf.keep(&A, "gone".to_owned()).await.unwrap();
        assert_eq!(found(&shelf, A).await, None);
        assert_eq!(shelf.keep(&A, "again".to_owned()).await.unwrap(), "again");
        assert_eq!(found(&shelf, A).await.as_deref(), Some("again"));
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
