//! What is made of files, and made anew when they change.

use std::{
    fs, io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use sha2::{Digest as _, Sha256};
use tokio::sync::Mutex;
use tracing::{info, warn};

/// Between two looks at the files.
const LOOK: Duration = Duration::from_secs(5);

type Make<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync>;

/// A value made of the contents of files. Who asks for it has the files looked at again from time to time; ones that no value can be made of are logged, and
/// the value stays what it was.
pub(crate) struct Reloaded<T> {
    files: Vec<PathBuf>,
    make: Make<T>,
    every: Duration,
    state: Mutex<State<T>>,
}

struct State<T> {
    value: Arc<T>,
    /// Of the files as they were last looked at. Files are told apart by their contents: those that Kubernetes mounts change by a link above them.
    digest: [u8; 32],
    looked: Instant,
}

impl<T> Reloaded<T> {
    /// Reads the files, which are small. Blocking.
    ///
    /// # Errors
    ///
    /// If a file can't be read, or `make` does not take what is in it.
    pub(crate) fn open(files: Vec<PathBuf>, make: impl Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync + 'static) -> Result<Self, String> {
        let contents = files.iter().map(|file| fs::read(file).map_err(|e| format!("{}: {e}", file.display()))).collect::<Result<Vec<_>, _>>()?;
        let state = State { value: Arc::new(make(&contents)?), digest: digest(&contents), looked: Instant::now() };
        Ok(Self { files, make: Box::new(make), every: LOOK, state: Mutex::new(state) })
    }

    /// Looks at the files at each use.
    #[cfg(test)]
    pub(crate) fn always(self) -> Self {
        Self { every: Duration::ZERO, ..self }
    }

    /// The value as the files have it.
    pub(crate) async fn current(&self) -> Arc<T> {
        let mut state = self.state.lock().await;
        if state.looked.elapsed() >= self.every {
            state.looked = Instant::now();
            self.look(&mut state).await;
        }
        Arc::clone(&state.value)
    }

    async fn look(&self, state: &mut State<T>) {
        let mut contents = Vec::with_capacity(self.files.len());
        for file in &self.files {
            match tokio::fs::read(file).await {
                Ok(bytes) => contents.push(bytes),
                Err(error) => return warn!("{}: {error}; what was read before is still used", file.display()),
            }
        }
        let digest = digest(&contents);
        if digest == state.digest {
            return;
        }
        state.digest = digest;
        match (self.make)(&contents) {
            Ok(value) => {
                state.value = Arc::new(value);
                info!("read anew: {}", self.names());
            }
            Err(problem) => warn!("{problem}; what was read before is still used"),
        }
    }

    fn names(&self) -> String {
        self.files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ")
    }
}

fn digest(contents: &[Vec<u8>]) -> [u8; 32] {
    let mut all = Sha256::new();
    for bytes in contents {
        all.update(bytes.len().to_le_bytes());
        all.update(bytes);
    }
    all.finalize().into()
}

/// The text of a file's contents.
pub(crate) fn text(bytes: &[u8]) -> io::Result<&str> {
    std::str::from_utf8(bytes).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_changed_file_is_read_anew_and_a_bad_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("number");
        fs::write(&file, "1").unwrap();
        let number = |contents: &[Vec<u8>]| text(&contents[0]).unwrap().parse::<u32>().map_err(|e| e.to_string());
        let reloaded = Reloaded::open(vec![file.clone()], number).unwrap().always();
        assert_eq!(*reloaded.current().await, 1);
        for (contents, value) in [("2", 2), ("two", 2), ("3", 3)] {
            fs::write(&file, contents).unwrap();
            assert_eq!(*reloaded.current().await, value, "{contents}");
        }
        fs::remove_file(&file).unwrap();
        assert_eq!(*reloaded.current().await, 3);
        assert!(Reloaded::open(vec![file.clone()], number).err().unwrap().contains("number"));
    }
}
