//! Values that are made once and kept while there is room.

use std::{
    hash::Hash,
    num::NonZeroUsize,
    sync::{Arc, Mutex, PoisonError},
};

use dnd_mesh::Fault;
use lru::LruCache;
use tokio::sync::OnceCell;

/// The most recently used values by their keys. Who asks for one that is being made waits for it; others are not held up.
pub(crate) struct Cache<K: Hash + Eq, V>(Mutex<LruCache<K, Arc<OnceCell<Arc<V>>>>>);

impl<K: Hash + Eq + Clone, V: Send + Sync + 'static> Cache<K, V> {
    pub(crate) fn new(size: NonZeroUsize) -> Self {
        Self(Mutex::new(LruCache::new(size)))
    }

    /// The value of a key, made if it is not there. A failure is not kept.
    pub(crate) async fn get<F>(&self, key: K, make: impl FnOnce() -> F) -> Result<Arc<V>, Fault>
    where
        F: Future<Output = Result<V, Fault>>,
    {
        let cell = {
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match kept.get(&key) {
                Some(cell) => Arc::clone(cell),
                None => {
                    let cell = Arc::default();
                    kept.put(key.clone(), Arc::clone(&cell));
                    cell
                }
            }
        };
        let made = cell.get_or_try_init(|| async { make().await.map(Arc::new) }).await.cloned();
        if made.is_err() {
            // Nothing takes the place of something that is there.
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.peek(&key).is_some_and(|other| Arc::ptr_eq(other, &cell) && !cell.initialized()) {
                kept.pop(&key);
            }
        }
        made
    }

    /// Forgets a key: the next who asks has its value made anew.
    pub(crate) fn forget(&self, key: &K) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop(key);
    }
}
