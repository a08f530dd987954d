use std::sync::{Arc, OnceLock};

use tonic::Code;

use crate::Fault;

/// Where a service's model goes once it has loaded. Until then calls are answered with UNAVAILABLE.
#[derive(Debug)]
pub struct Slot<T>(Arc<OnceLock<Arc<T>>>);

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Slot<T> {
    /// A slot whose model is there already.
    pub fn filled(model: T) -> Self {
        let slot = Self::default();
        slot.fill(model);
        slot
    }

    /// Puts the model in; the first one stays.
    pub fn fill(&self, model: T) {
        let _ = self.0.set(Arc::new(model));
    }

    /// The model, or the fault that says that it is still loading.
    pub fn get(&self) -> Result<Arc<T>, Fault> {
        self.0.get().cloned().ok_or_else(|| Fault::new(Code::Unavailable, "MODEL_LOADING", "the model is still being loaded; try again in a moment"))
    }
}
