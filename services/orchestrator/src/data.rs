//! Where an orchestrator keeps what must outlive a call: pictures and uploads as blobs, jobs and results in a database.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytesize::ByteSize;
use clap::Args;
use dnd_mesh::blobs::{Blobs, ObjectArgs};

use crate::{
    database::{Database, DatabaseError},
    results::Results,
    room::Stats,
};

/// Where things are kept.
#[derive(Debug, Clone, Default, Args)]
pub struct DataArgs {
    /// Folder that jobs, uploads, pictures and results of models are kept in, so that no later job or process makes them again; by default
    /// `.dnd` in --out where there is one, else one that goes with the process
    #[arg(long, env = "DND_DATA", value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Database of the jobs and results: postgres://USER:PASSWORD@HOST/DATABASE, which many orchestrators can share; by default a SQLite file in the data folder
    #[arg(long, env = "DND_STORE", value_name = "URL", hide_env_values = true)]
    pub store: Option<String>,
    /// What results and pictures may take together, such as 200GB; beyond it what was used longest ago goes, and is made again when it is needed. By default
    /// there is no limit
    #[arg(long, env = "DND_KEEP_BYTES", value_name = "SIZE")]
    pub keep_bytes: Option<ByteSize>,
    /// Where uploads and pictures lie.
    #[command(flatten)]
    pub objects: ObjectArgs,
}

/// What is kept, open.
#[derive(Debug, Clone)]
pub struct Data {
    /// Uploads and pictures.
    pub blobs: Arc<Blobs>,
    pub(crate) database: Database,
    pub(crate) results: Results,
}

/// Why nothing can be kept.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The folder can't be used.
    #[error("can't keep pictures in {folder}: {error}")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with it.
        error: io::Error,
    },
    /// There is no place for temporary files.
    #[error("no folder for temporary files can be made: {0}")]
    Temporary(io::Error),
    /// The object store can't be used.
    #[error("the object store: {0}")]
    Objects(io::Error),
    /// What is kept can't be looked at.
    #[error("what is kept: {0}")]
    Kept(sqlx::Error),
    /// The database can't be used.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl Data {
    /// Opens the named places, or a folder that goes with the value.
    pub async fn open(args: &DataArgs) -> Result<Self, DataError> {
        let blobs = match &args.data {
            Some(folder) => Blobs::open(folder).map_err(|error| DataError::Folder { folder: folder.clone(), error })?,
            None => Blobs::temporary().map_err(DataError::Temporary)?,
        };
        let database = match &args.store {
            Some(url) => Database::open(url).await?,
            None => Database::in_folder(blobs.folder()).await?,
        };
        let blobs = Arc::new(blobs.sharing(&args.objects).map_err(DataError::Objects)?);
        let results = Results::new(database.clone(), Arc::clone(&blobs), args.keep_bytes.map(|limit| limit.as_u64()));
        Ok(Self { blobs, database, results })
    }

    /// Whether something was kept in a folder before; to open one that holds nothing begins to keep there.
    pub fn is_in(folder: &Path) -> bool {
        Database::is_in(folder)
    }

    /// How much is kept.
    pub async fn stats(&self) -> Result<Stats, DataError> {
        self.results.room().stats().await.map_err(DataError::Kept)
    }

    /// Removes what was used longest ago until no more is left than that; what results of jobs refer to stays. Gives the bytes that are free then.
    pub async fn prune(&self, to: u64) -> Result<u64, DataError> {
        self.results.room().make(to, Duration::ZERO).await.map_err(DataError::Kept)
    }
}
