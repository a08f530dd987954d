//! Probing sets: what pictures there are, in which order, and reading them.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use dnd_mesh::{
    Fault,
    blobs::{Blobs, storage},
    uri::Roots,
};
use dnd_onnx::pictures;
use dnd_proto::v1::{self as proto, ListedPicture, PictureList, probing_source::Source};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use prost::Message as _;
use tokio::runtime::Handle;
use tonic::Code;

const MOST_SOURCES: usize = 100;
/// Uploaded pictures that are looked for at a time.
const FETCHED: usize = 16;

/// The pictures of a probing set, in order.
#[derive(Debug)]
pub(crate) struct ProbingSet {
    pictures: Vec<Picture>,
    unreadable: Vec<(String, String)>,
}

/// A picture of a probing set, not read yet.
#[derive(Debug, Clone)]
pub(crate) struct Picture {
    /// Its name in results: relative to its source, `/` between parts.
    pub(crate) path: String,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    File(PathBuf),
    /// An uncompressed entry of a tar file.
    Inside {
        tar: Arc<PathBuf>,
        offset: u64,
        size: u64,
    },
}

impl Picture {
    /// Reads its bytes, at most `limit` of them.
    pub(crate) fn read(&self, limit: usize) -> io::Result<Bytes> {
        let (mut file, size) = match &self.place {
            Place::File(path) => {
                let file = File::open(path)?;
                let size = file.metadata()?.len();
                (file, size)
            }
            Place::Inside { tar, offset, size } => {
                let mut file = File::open(tar.as_path())?;
                file.seek(SeekFrom::Start(*offset))?;
                (file, *size)
            }
        };
        if size > limit as u64 {
            return Err(io::Error::other(format!("{size} bytes; at most {limit} are read")));
        }
        let mut bytes = vec![0; size as usize];
        file.read_exact(&mut bytes)?;
        Ok(bytes.into())
    }
}

impl ProbingSet {
    /// Lists the pictures of a set. Blocking.
    pub(crate) fn open(said: &proto::ProbingSet, blobs: &Blobs, roots: &Roots) -> Result<Self, Fault> {
        let sources = &said.sources;
        if sources.is_empty() || sources.len() > MOST_SOURCES {
            return Err(Fault::field("probing_set.sources", format!("{} sources; a probing set has 1 to {MOST_SOURCES}", sources.len())));
        }
        let (mut all, mut unreadable) = (Vec::new(), Vec::new());
        for (i, source) in sources.iter().enumerate() {
            let field = format!("probing_set.sources[{i}]");
            let mut found = match &source.source {
                Some(Source::Uri(uri)) => from_uri(uri, &field, roots, &mut unreadable)?,
                Some(Source::ListDigest(digest)) => from_list(digest, &field, blobs)?,
                None => return Err(Fault::field(field, "neither uri nor list_digest is set")),
            };
            found.sort_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
            all.extend(found);
        }
        if all.is_empty() {
            return Err(Fault::new(
                Code::InvalidArgument,
                "NO_PICTURES",
                format!("no pictures in the probing set: no file ends in {}", pictures::ENDINGS.join(", ")),
            ));
        }
        Ok(Self { pictures: all, unreadable })
    }

    pub(crate) fn len(&self) -> usize {
        self.pictures.len()
    }

    /// What of the sources could not be listed, and why.
    pub(crate) fn unreadable(&self) -> &[(String, String)] {
        &self.unreadable
    }

    /// The picture that was at a place in the order: what is there now, or if that is another, because files have come or gone, the one with the path.
    pub(crate) fn find(&self, index: u64, path: &str) -> Option<&Picture> {
        self.get(index).filter(|picture| picture.path == path).or_else(|| self.pictures.iter().find(|picture| picture.path == path))
    }

    /// The picture at a place in the order.
    pub(crate) fn get(&self, index: u64) -> Option<&Picture> {
        self.pictures.get(usize::try_from(index).ok()?)
    }
}

fn from_uri(uri: &str, field: &str, roots: &Roots, unreadable: &mut Vec<(String, String)>) -> Result<Vec<Picture>, Fault> {
    let field = format!("{field}.uri");
    let path = roots.find(uri, &field)?;
    let not_readable = |error: &dyn std::fmt::Display| Fault::new(Code::InvalidArgument, "UNREADABLE_SOURCE", format!("{}: {error}", path.display()));
    if path.is_dir() {
        folder(&path, roots, unreadable).map_err(|e| not_readable(&e))
    } else if path.extension().is_some_and(|e| e == "tar") && path.is_file() {
        tar(&path).map_err(|e| not_readable(&e))
    } else if path.exists() {
        Err(Fault::field(field, format!("{} is neither a folder nor a .tar file", path.display())))
    } else {
        Err(Fault::field(field, format!("{}: no such folder", path.display())))
    }
}

fn folder(root: &Path, roots: &Roots, unreadable: &mut Vec<(String, String)>) -> io::Result<Vec<Picture>> {
    let listing = pictures::in_folder(root)?;
    unreadable.extend(listing.unreadable);
    let (inside, outside): (Vec<_>, Vec<_>) = listing.pictures.into_iter().partition(|(_, file)| roots.hold(file));
    unreadable.extend(outside.into_iter().map(|(path, _)| (path, "a link that leads out of the folders that are read".to_owned())));
    Ok(inside.into_iter().map(|(path, file)| Picture { path, place: Place::File(file) }).collect())
}

fn tar(path: &Path) -> io::Result<Vec<Picture>> {
    let tar = Arc::new(path.to_owned());
    let mut archive = tar::Archive::new(File::open(path)?);
    let mut found = Vec::new();
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        let name = entry.path()?.into_owned();
        if entry.header().entry_type().is_file() && pictures::is_picture(&name) {
            let place = Place::Inside { tar: Arc::clone(&tar), offset: entry.raw_file_position(), size: entry.size() };
            found.push(Picture { path: name.to_string_lossy().trim_start_matches("./").to_owned(), place });
        }
    }
    Ok(found)
}

fn from_list(digest: &str, field: &str, blobs: &Blobs) -> Result<Vec<Picture>, Fault> {
    let field = format!("{field}.list_digest");
    // This runs on a thread for work that blocks.
    Handle::current().block_on(async {
        let missing = |what: &str, digest: &str| Fault::new(Code::FailedPrecondition, "NOT_UPLOADED", format!("{what} {digest} was not uploaded"));
        let bytes = blobs.get(digest).await.map_err(storage)?.ok_or_else(|| missing("the picture list", digest))?;
        let list = PictureList::decode(bytes).map_err(|e| Fault::field(field, format!("{digest} is no PictureList: {e}")))?;
        let files = stream::iter(list.pictures).map(|ListedPicture { path, digest }| async move {
            let file = blobs.path(&digest).await.map_err(storage)?.ok_or_else(|| missing(&path, &digest))?;
            Ok(Picture { path, place: Place::File(file) })
        });
        files.buffered(FETCHED).try_collect().await
    })
}
