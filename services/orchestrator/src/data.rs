//! Where an orchestrator keeps what must outlive a call: pictures and uploads as blobs, jobs and results in a database.

use std::{io, path::PathBuf, sync::Arc};

use clap::Args;
use dnd_mesh::blobs::Blobs;

use crate::database::{Database, DatabaseError};

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
}

/// What is kept, open.
#[derive(Debug, Clone)]
pub struct Data {
    /// Uploads and pictures.
    pub blobs: Arc<Blobs>,
    pub(crate) database: Database,
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
        Ok(Self { blobs: Arc::new(blobs), database })
    }
}
