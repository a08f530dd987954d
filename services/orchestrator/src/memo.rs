//! Results of pure calls, each made once: whoever asks for what another is making waits for it, and what an earlier process made is taken from
//! where that kept it.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, MutexGuard, PoisonError},
};

use lru::LruCache;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::watch;

use crate::{failure::Failure, results::Shelf};

/// Values by what they were made of, the most recently used ones.
#[derive(Debug)]
pub(crate) struct Memo<K: Hash + Eq, V> {
    /// Empty until it is made; the sender is with who makes it, and gone if that failed.
    cells: Mutex<LruCache<K, watch::Receiver<Option<V>>>>,
    /// Values that are kept in memory.
    size: usize,
    /// Where they are kept on disk.
    shelf: Option<Shelf<V>>,
}

/// What was asked for, and how it came about.
#[derive(Debug)]
pub(crate) struct Found<V> {
    /// One a key, in their order.
    pub(crate) values: Vec<Result<V, Failure>>,
    /// Keys whose values were made for this call.
    pub(crate) made: u64,
    /// Keys whose values were there, or were being made.
    pub(crate) reused: u64,
}

impl<K: Hash + Eq + Clone + Serialize, V: Clone + Serialize + DeserializeOwned> Memo<K, V> {
    /// Keeps so many values in memory, and all on the shelf if there is one; one that is in neither is made again when it is asked for.
    pub(crate) fn new(size: usize, shelf: Option<Shelf<V>>) -> Self {
        // With a bound of its own it would take all the memory for it at once.
        Self { cells: Mutex::new(LruCache::unbounded()), size: size.max(1), shelf }
    }

    /// The values of the keys. `make` gets those (each once) that nobody has made or is making, and gives a result for each, in their order.
    /// Failures are not kept: the next who asks tries again.
    pub(crate) async fn get<F>(&self, keys: &[K], make: impl Fn(Vec<K>) -> F) -> Found<V>
    where
        F: Future<Output = Vec<Result<V, Failure>>>,
    {
        let mut found: HashMap<K, Result<V, Failure>> = HashMap::new();
        let mut made = 0;
        while found.len() < keys.len() {
            let Claimed { mine, theirs } = self.claim(keys, &found);
            if mine.is_empty() && theirs.is_empty() {
                break;
            }
            let (claimed, senders): (Vec<K>, Vec<_>) = mine.into_iter().unzip();
            if !claimed.is_empty() {
                // If this future is dropped here, so are the senders, and those who wait claim the keys.
                let results = self.kept_or_made(&claimed, &make, &mut made).await;
                for ((key, sender), result) in claimed.into_iter().zip(senders).zip(results) {
                    match &result {
                        Ok(value) => drop(sender.send(Some(value.clone()))),
                        Err(_) => drop(self.lock().pop(&key)),
                    }
                    found.insert(key, result);
                }
            }
            for (key, mut cell) in theirs {
                if let Ok(value) = cell.wait_for(Option::is_some).await
                    && let Some(value) = value.clone()
                {
                    found.insert(key, Ok(value));
                }
            }
        }
        let values = keys.iter().map(|key| found.get(key).cloned().unwrap_or_else(|| Err(missing_result()))).collect();
        Found { values, made, reused: (keys.len() as u64).saturating_sub(made) }
    }

    /// The values of keys that this call has claimed: off the shelf, or made.
    async fn kept_or_made<F>(&self, keys: &[K], make: &impl Fn(Vec<K>) -> F, made: &mut u64) -> Vec<Result<V, Failure>>
    where
        F: Future<Output = Vec<Result<V, Failure>>>,
    {
        let Some(shelf) = &self.shelf else {
            *made += keys.len() as u64;
            return make(keys.to_vec()).await;
        };
        let mut kept = match shelf.find(keys).await {
            Ok(kept) => kept,
            Err(failure) => return keys.iter().map(|_| Err(failure.clone())).collect(),
        };
        let missing: Vec<K> = keys.iter().filter(|key| !kept.contains_key(*key)).cloned().collect();
        let mut new = HashMap::new();
        if !missing.is_empty() {
            *made += missing.len() as u64;
            new = missing.iter().cloned().zip(make(missing.clone()).await).collect();
        }
        keys.iter().map(|key| kept.remove(key).map(Ok).or_else(|| new.remove(key)).unwrap_or_else(|| Err(missing_result()))).collect()
    }

    /// Puts what was made of a key on the shelf, if there is one, and gives what lies there then. `make` calls it as soon as it has a value.
    pub(crate) async fn keep(&self, key: &K, value: V) -> Result<V, Failure> {
        match &self.shelf {
            Some(shelf) => shelf.keep(key, value).await,
            None => Ok(value),
        }
    }

    /// Forgets all values: each is looked for on the shelf again.
    pub(crate) fn forget(&self) {
        let mut cells = self.lock();
        let keys: Vec<K> = cells.iter().filter(|(_, cell)| cell.borrow().is_some()).map(|(key, _)| key.clone()).collect();
        keys.iter().for_each(|key| drop(cells.pop(key)));
    }

    /// Forgets the values that the shelf would not give again: they are made anew.
    pub(crate) fn forget_unusable(&self) {
        let Some(shelf) = &self.shelf else { return };
        let mut cells = self.lock();
        let unusable = |cell: &watch::Receiver<Option<V>>| cell.borrow().as_ref().is_some_and(|value| !shelf.is_usable(value));
        let keys: Vec<K> = cells.iter().filter(|(_, cell)| unusable(cell)).map(|(key, _)| key.clone()).collect();
        keys.iter().for_each(|key| drop(cells.pop(key)));
    }

    fn claim(&self, keys: &[K], found: &HashMap<K, Result<V, Failure>>) -> Claimed<K, V> {
        let mut claimed = Claimed { mine: Vec::new(), theirs: Vec::new() };
        let mut cells = self.lock();
        for key in keys.iter().filter(|key| !found.contains_key(*key)) {
            match cells.get(key) {
                // A cell whose maker went away without a value is free again.
                Some(cell) if cell.borrow().is_some() || cell.has_changed().is_ok() => {
                    if !claimed.mine.iter().any(|(mine, _)| mine == key) {
                        claimed.theirs.push((key.clone(), cell.clone()));
                    }
                }
                _ => {
                    let (sender, cell) = watch::channel(None);
                    cells.put(key.clone(), cell);
                    if cells.len() > self.size {
                        cells.pop_lru();
                    }
                    claimed.mine.push((key.clone(), sender));
                }
            }
        }
        claimed
    }

    /// The map is changed in single steps under the lock, so it is whole even after a panic.
    fn lock(&self) -> MutexGuard<'_, LruCache<K, watch::Receiver<Option<V>>>> {
        self.cells.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn missing_result() -> Failure {
    Failure::new("internal", "a model service gave fewer results than it was asked for")
}

/// Keys to make, with who waits for them, and keys that others make or made.
struct Claimed<K, V> {
    mine: Vec<(K, watch::Sender<Option<V>>)>,
    theirs: Vec<(K, watch::Receiver<Option<V>>)>,
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use dnd_mesh::blobs::Blobs;

    use super::*;
    use crate::{database::Database, results::Results};

    #[tokio::test]
    async fn each_key_is_made_once_and_repeated_keys_share_their_value() {
        let memo: Memo<u32, u32> = Memo::new(10, None);
        let calls = AtomicU32::new(0);
        let make = |keys: Vec<u32>| {
            calls.fetch_add(keys.len() as u32, Ordering::Relaxed);
            async move { keys.into_iter().map(|k| Ok(k * 10)).collect() }
        };
        let (first, second) = tokio::join!(memo.get(&[1, 2, 1], make), memo.get(&[2, 3], make));
        let values = |found: Found<u32>| found.values.into_iter().map(Result::unwrap).collect::<Vec<_>>();
        assert_eq!((first.made + second.made, first.reused + second.reused), (3, 2));
        assert_eq!((values(first), values(second)), (vec![10, 20, 10], vec![20, 30]));
        assert_eq!(calls.into_inner(), 3);
    }

    #[tokio::test]
    async fn what_no_longer_fits_is_made_again() {
        let memo: Memo<u32, u32> = Memo::new(2, None);
        let make = |keys: Vec<u32>| async move { keys.into_iter().map(|k| Ok(k * 10)).collect() };
        assert_eq!(memo.get(&[1, 2, 3], make).await.values, [Ok(10), Ok(20), Ok(30)]);
        let again = memo.get(&[3, 1], make).await;
        assert_eq!((again.values, again.made, again.reused), (vec![Ok(30), Ok(10)], 1, 1));
    }

    #[tokio::test]
    async fn a_failure_is_not_kept_and_a_maker_that_goes_away_is_replaced() {
        let memo: Memo<u32, u32> = Memo::new(10, None);
        let failed = memo.get(&[1], |_| async { vec![Err(Failure::new("down", "not now"))] }).await;
        assert_eq!(failed.values[0].as_ref().unwrap_err().reason, "down");
        {
            let gone = memo.get(&[1], |_| std::future::pending());
            tokio::select! { biased; _ = gone => unreachable!(), () = tokio::task::yield_now() => () }
        }
        let found = memo.get(&[1], |_| async { vec![Ok(7)] }).await;
        assert_eq!(found.values[0], Ok(7));
    }

    #[tokio::test]
    async fn what_an_earlier_memo_kept_is_not_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let memo = async || {
            let (database, blobs) = (Database::in_folder(folder.path()).await.unwrap(), Arc::new(Blobs::open(folder.path()).unwrap()));
            Memo::<u32, u32>::new(10, Some(Shelf::new(Results::new(database, blobs, None), "f", &[])))
        };
        let first = memo().await;
        // The second value was made, and its maker died before it was kept.
        let make = |keys: Vec<u32>| async {
            first.keep(&1, 10).await.unwrap();
            keys.into_iter().map(|k| Ok(k * 10)).collect()
        };
        assert_eq!(first.get(&[1, 2], make).await.made, 2);
        let again = memo().await.get(&[1, 2], |keys| async move { keys.into_iter().map(|k| Ok(k * 100)).collect() }).await;
        assert_eq!((again.values, again.made, again.reused), (vec![Ok(10), Ok(200)], 1, 1));
    }
}
