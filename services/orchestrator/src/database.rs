//! The database that jobs and kept results live in: a SQLite file, which needs no server (one machine), or PostgreSQL (many orchestrators).
//!
//! Both are spoken to in the same SQL, with `$1` for values; what differs is said here, and in the two folders of migrations.

use std::{path::Path, sync::Once, time::Duration};

use sqlx::{
    Any, AnyConnection, AnyPool, Connection as _, Transaction,
    any::{AnyPoolOptions, install_default_drivers},
    migrate::{MigrateError, Migrator},
};

/// The SQLite file of a data folder.
const FILE: &str = "store.sqlite";
const CONNECTIONS: u32 = 8;
/// How long a process waits for another one that writes.
const PATIENCE: Duration = Duration::from_secs(30);

static SQLITE: Migrator = sqlx::migrate!("migrations/sqlite");
static POSTGRES: Migrator = sqlx::migrate!("migrations/postgres");

/// A database with the tables of this version.
#[derive(Debug, Clone)]
pub struct Database {
    pub(crate) pool: AnyPool,
    /// For what writes. SQLite has one writer at a time, so this has one connection then, which those who wait get in turn: its own way is to have each look
    /// again after ever longer sleeps.
    pub(crate) writes: AnyPool,
    dialect: Dialect,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    Sqlite,
    Postgres,
}

/// Why a database can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// Its tables are another version's.
    #[error("{place} was written by a newer version of this program (migration {migration}): use that version, or name another place")]
    Newer {
        /// Where it is, without its password.
        place: String,
        /// The first migration that this version does not know.
        migration: i64,
    },
    /// It is of no known kind.
    #[error("{place} names no database: it is postgres://USER:PASSWORD@HOST/DATABASE, or sqlite:FILE")]
    Unknown {
        /// What was named.
        place: String,
    },
    /// It can't be opened.
    #[error("the database {place}: {error}")]
    Broken {
        /// Where it is, without its password.
        place: String,
        /// What it says.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Database {
    /// The SQLite database of a data folder, which is there; the file is made if it is not. Several processes may share it.
    pub async fn in_folder(folder: &Path) -> Result<Self, DatabaseError> {
        Self::open(&format!("sqlite:{}", folder.join(FILE).display())).await
    }

    /// Whether a data folder has one.
    pub(crate) fn is_in(folder: &Path) -> bool {
        folder.join(FILE).is_file()
    }

    /// A database by its URL, `postgres://...` or `sqlite:FILE`, brought to this version's tables.
    pub async fn open(url: &str) -> Result<Self, DatabaseError> {
        install_drivers();
        let place = without_password(url);
        let (dialect, url) = match url.split_once(':') {
            Some(("postgres" | "postgresql", _)) => (Dialect::Postgres, url.to_owned()),
            Some(("sqlite", file)) => (Dialect::Sqlite, format!("sqlite:{}?mode=rwc", percent_encoding::utf8_percent_encode(file, PATH))),
            _ => return Err(DatabaseError::Unknown { place }),
        };
        let broken = |error: Box<dyn std::error::Error + Send + Sync>| DatabaseError::Broken { place: place.clone(), error };
        let setting = |sql: String| sqlx::raw_sql(sqlx::AssertSqlSafe(sql));
        // One connection first: a pool would try long where there is no server, or a file that is none, and then not say why.
        let mut first = AnyConnection::connect(&url).await.map_err(|e| broken(e.into()))?;
        if dialect == Dialect::Sqlite {
            // Readers don't wait for a writer. Stays with the file.
            setting("PRAGMA journal_mode = WAL".to_owned()).execute(&mut first).await.map_err(|e| broken(e.into()))?;
        }
        let options = AnyPoolOptions::new()
            .acquire_timeout(PATIENCE)
            .after_connect(move |connection, _| {
                Box::pin(async move {
                    if dialect == Dialect::Sqlite {
                        // After a crash of the machine the last results may be made once more, and none is half there.
                        setting(format!("PRAGMA busy_timeout = {}; PRAGMA synchronous = NORMAL", PATIENCE.as_millis())).execute(connection).await?;
                    }
                    Ok(())
                })
            })
            // SQLite undoes a transaction by itself that met a full disk, which leaves sqlx counting on one that is not there: nothing could be begun again.
            .before_acquire(|connection, _| Box::pin(async move { Ok(!connection.is_in_transaction()) }));
        let pool = options.clone().max_connections(CONNECTIONS).connect(&url).await.map_err(|e| broken(e.into()))?;
        let writes = match dialect {
            Dialect::Sqlite => options.max_connections(1).connect(&url).await.map_err(|e| broken(e.into()))?,
            Dialect::Postgres => pool.clone(),
        };
        let migrations = match dialect {
            Dialect::Sqlite => &SQLITE,
            Dialect::Postgres => &POSTGRES,
        };
        match migrations.run(&pool).await {
            Ok(()) => Ok(Self { pool, writes, dialect }),
            Err(MigrateError::VersionMissing(migration)) => Err(DatabaseError::Newer { place, migration }),
            Err(error) => Err(broken(error.into())),
        }
    }

    /// Begins a transaction that will write. SQLite has one writer at a time: it is taken at once, since one that has read can't become it later.
    pub(crate) async fn begin(&self) -> Result<Transaction<'static, Any>, sqlx::Error> {
        match self.dialect {
            Dialect::Sqlite => self.writes.begin_with("BEGIN IMMEDIATE").await,
            Dialect::Postgres => self.writes.begin().await,
        }
    }

    /// The end of a query for rows that are to be changed, and that no other transaction is changing.
    pub(crate) fn for_update_of_free_rows(&self) -> &'static str {
        match self.dialect {
            // Its one writer has all rows for itself.
            Dialect::Sqlite => "",
            Dialect::Postgres => " FOR UPDATE SKIP LOCKED",
        }
    }
}

/// `$4, $5, $6`: places of so many values of a statement, from this one on. (sqlx's own builder writes `?` here, which PostgreSQL does not read.)
pub(crate) fn places(first: usize, count: usize) -> String {
    (first..first + count).map(|place| format!("${place}")).collect::<Vec<_>>().join(", ")
}

/// What stands for itself in the path of a `sqlite:` URL.
const PATH: &percent_encoding::AsciiSet = &percent_encoding::CONTROLS.add(b' ').add(b'%').add(b'?').add(b'#');

fn install_drivers() {
    static DRIVERS: Once = Once::new();
    DRIVERS.call_once(install_default_drivers);
}

/// A URL as it may be shown.
fn without_password(url: &str) -> String {
    match url::Url::parse(url) {
        Ok(mut parsed) if parsed.password().is_some() => {
            let _ = parsed.set_password(Some("..."));
            parsed.to_string()
        }
        _ => url.to_owned(),
    }
}

#[cfg(test)]
impl Database {
    /// An empty PostgreSQL database, where `DND_TEST_POSTGRES` is the URL of a server to make databases in (scripts/postgres.sh starts one).
    pub(crate) async fn of_a_test() -> Option<Self> {
        let server = std::env::var("DND_TEST_POSTGRES").ok()?;
        install_drivers();
        let name = format!("test_{}", uuid::Uuid::new_v4().simple());
        let mut there = AnyConnection::connect(&server).await.unwrap();
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut there).await.unwrap();
        Some(Self::open(&format!("{}/{name}", server.rsplit_once('/').unwrap().0)).await.unwrap())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_database_of_a_newer_version_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::in_folder(folder.path()).await.unwrap();
        sqlx::query("INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (9999, 'later', TRUE, $1, 0)")
            .bind(vec![0_u8; 48])
            .execute(&database.pool)
            .await
            .unwrap();
        drop(database);
        let error = Database::in_folder(folder.path()).await.unwrap_err().to_string();
        assert!(error.contains("store.sqlite") && error.contains("newer version") && error.contains("9999"), "{error}");
    }

    #[tokio::test]
    async fn a_transaction_that_met_a_full_disk_spoils_no_later_one() {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::in_folder(folder.path()).await.unwrap();
        let pages = async |most: u32| {
            let limit = sqlx::raw_sql(sqlx::AssertSqlSafe(format!("PRAGMA max_page_count = {most}")));
            limit.execute(&database.writes).await.unwrap();
        };
        let write = async || {
            let mut transaction = database.begin().await?;
            let insert = sqlx::query("INSERT INTO pictures (digest, bytes, used) VALUES ($1, 0, 0)").bind(vec![0_u8; 1 << 20]);
            insert.execute(&mut *transaction).await?;
            transaction.commit().await
        };
        // As if the disk had no more than what is used.
        pages(1).await;
        let error = write().await.unwrap_err().to_string();
        assert!(error.contains("full"), "{error}");
        pages(1_000_000).await;
        write().await.unwrap();
    }

    #[tokio::test]
    async fn folders_of_any_name_hold_a_database_and_a_file_that_is_none_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let odd = folder.path().join("100% a?b#c Ω");
        std::fs::create_dir(&odd).unwrap();
        Database::in_folder(&odd).await.unwrap();
        assert!(odd.join(FILE).is_file());
        let other = folder.path().join("other");
        std::fs::create_dir(&other).unwrap();
        std::fs::write(other.join(FILE), "this is no database, though it is long enough to be looked at as one. ".repeat(20)).unwrap();
        let error = Database::in_folder(&other).await.unwrap_err().to_string();
        assert!(error.contains("store.sqlite") && error.contains("not a database"), "{error}");
    }

    #[tokio::test]
    async fn passwords_are_not_shown_and_other_kinds_are_refused() {
        assert_eq!(without_password("postgres://me:secret@host/dnd"), "postgres://me:...@host/dnd");
        let error = Database::open("postgres://me:secret@127.0.0.1:1/dnd").await.unwrap_err().to_string();
        assert!(error.contains("127.0.0.1:1/dnd") && error.contains("refused") && !error.contains("secret"), "{error}");
        let error = Database::open("mysql://me:secret@host/dnd").await.unwrap_err().to_string();
        assert!(error.contains("postgres://") && !error.contains("secret"), "{error}");
    }
}
