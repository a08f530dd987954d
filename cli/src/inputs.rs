//! The network and the pictures of a command: looked at here first, then named or uploaded to the mesh.

use std::{
    collections::HashMap,
    fs::{self, File},
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use dnd_mesh::{blobs, uri};
use dnd_onnx::{
    graph::{Given, Network},
    pictures::{self, default_preprocessing},
    preprocessing,
};
use dnd_proto::v1::{ListedPicture, PictureList, Preprocessing, ProbingSet, ProbingSource, SkippedPicture, Target, probing_source::Source};
use prost::Message as _;
use tempfile::TempDir;

use crate::{args::TargetFlags, mesh::Mesh, problem::Problem};

/// A target's file, looked at, and what is said of it.
#[derive(Debug, Clone)]
pub(crate) struct TargetFile {
    pub(crate) path: PathBuf,
    flags: TargetFlags,
}

impl TargetFile {
    /// Looks at the file.
    pub(crate) fn open(path: &Path, flags: &TargetFlags) -> Result<Self, Problem> {
        let meta = fs::metadata(path).map_err(|e| Problem::file(path, &e))?;
        if meta.is_dir() {
            return Err(Problem::input(format!("{}: this is a folder; a target is an ONNX file", path.display())));
        }
        Ok(Self { path: absolute(path)?, flags: flags.clone() })
    }

    /// Says which file it is, and tells it from what it was before a change.
    pub(crate) fn stamp(&self) -> Result<String, Problem> {
        stamp(&self.path)
    }

    /// The target as a mesh takes it that reads this machine's files, those beside the network too.
    pub(crate) async fn here(&self) -> Result<Target, Problem> {
        let preprocessing = if self.flags.any_preprocessing() { Some(self.looked_into(|file, network| file.preprocessing(network)).await?) } else { None };
        Ok(Target { uri: uri::of_file(&self.path), digest: String::new(), preprocessing, options: self.flags.options() })
    }

    /// The target as the mesh takes it: by URI if it can read this machine's files, else uploaded.
    pub(crate) async fn give(&self, mesh: &Mesh) -> Result<Target, Problem> {
        if mesh.is_local() {
            return self.here().await;
        }
        // Looked at here, where its name is known.
        let (preprocessing, external) = self.looked_into(|file, network| Ok((file.preprocessing(network)?, !network.external_files()?.is_empty()))).await?;
        let path = self.path.clone();
        if external {
            return Err(Problem::input(format!("{}: the network has external data, which can't be sent to an endpoint; save it as one file", path.display())));
        }
        let digest = blobs::digest_of(&self.path).await.map_err(|e| Problem::file(&self.path, &e))?;
        blobs::upload(mesh.uploads.clone(), vec![digest.clone()], move |_| Some(path.clone())).await?;
        Ok(Target { uri: String::new(), digest, preprocessing: Some(preprocessing), options: self.flags.options() })
    }

    async fn looked_into<T: Send + 'static>(&self, look: impl FnOnce(&Self, &Network) -> Result<T, Problem> + Send + 'static) -> Result<T, Problem> {
        let file = self.clone();
        let looked = tokio::task::spawn_blocking(move || look(&file, &Network::read(&file.path)?));
        looked.await.map_err(|_| Problem::failure("the look at the network panicked"))?
    }

    /// The pre-processing of the file that was named, else of one beside the network, else the usual one; with what the flags say.
    fn preprocessing(&self, network: &Network) -> Result<Preprocessing, Problem> {
        let given = Given::from(&self.flags.options().unwrap_or_default());
        let size = network.input(&given)?.size;
        let base = match &self.flags.preprocessing {
            Some(file) => Some(
                preprocessing::read(file, size)?
                    .ok_or_else(|| Problem::input(format!("{}: neither a preprocessor_config.json nor a configuration of timm's", file.display())))?,
            ),
            None => preprocessing::beside(&self.path, size)?.map(|(found, _)| found),
        };
        let (height, width) = size.unwrap_or(preprocessing::USUAL_SIZE);
        Ok(self.flags.change(base.unwrap_or_else(|| default_preprocessing(height, width))))
    }
}

/// The folders and tar files of a probing set, looked at.
#[derive(Debug, Clone)]
pub(crate) struct Images(Vec<PathBuf>);

impl Images {
    /// Looks at each: a folder with at least one picture, or a .tar file.
    pub(crate) fn open(paths: &[PathBuf]) -> Result<Self, Problem> {
        let mut found = Vec::new();
        for path in paths {
            let meta = fs::metadata(path).map_err(|e| Problem::file(path, &e))?;
            if meta.is_dir() {
                if pictures::in_folder(path).map_err(|e| Problem::file(path, &e))?.pictures.is_empty() {
                    return Err(Problem::input(format!("{}: no pictures in this folder; pictures end in {}", path.display(), pictures::ENDINGS.join(", "))));
                }
            } else if path.extension().is_none_or(|ending| ending != "tar") {
                return Err(Problem::input(format!("{}: --images takes folders and .tar files", path.display())));
            }
            found.push(absolute(path)?);
        }
        Ok(Self(found))
    }

    /// Says which files they are, and tells them from what they were before a change.
    pub(crate) fn stamp(&self) -> Result<String, Problem> {
        let mut stamps = Vec::new();
        for path in &self.0 {
            if path.is_dir() {
                let listed = pictures::in_folder(path).map_err(|e| Problem::file(path, &e))?.pictures;
                stamps.extend(listed.iter().map(|(_, file)| stamp(file)).collect::<Result<Vec<_>, _>>()?);
            } else {
                stamps.push(stamp(path)?);
            }
        }
        Ok(stamps.join("\n"))
    }

    /// The set as the mesh takes it: by URIs if it can read this machine's files, else uploaded. Beside it what could not be read here, and why.
    pub(crate) async fn give(&self, mesh: &Mesh) -> Result<(ProbingSet, Vec<SkippedPicture>), Problem> {
        let mut sources = Vec::with_capacity(self.0.len());
        let mut skipped = Vec::new();
        for path in &self.0 {
            let source = if mesh.is_local() { Source::Uri(uri::of_file(path)) } else { Source::ListDigest(upload(path, mesh, &mut skipped).await?) };
            sources.push(ProbingSource { source: Some(source) });
        }
        Ok((ProbingSet { sources }, skipped))
    }

    /// Copies of every so many pictures of the set, in a folder of their own; and how many the set has.
    pub(crate) fn sample(&self, count: usize) -> Result<(TempDir, usize), Problem> {
        let sample = tempfile::tempdir().map_err(|e| Problem::failure(e.to_string()))?;
        let mut files = Vec::new();
        let unpacked = self.0.iter().map(|path| unpacked(path)).collect::<Result<Vec<_>, _>>()?;
        for (path, unpacked) in self.0.iter().zip(&unpacked) {
            let root = unpacked.as_ref().map_or(path.as_path(), TempDir::path);
            files.extend(pictures::in_folder(root).map_err(|e| Problem::file(path, &e))?.pictures);
        }
        let step = files.len().div_ceil(count.max(1)).max(1);
        for (i, (name, file)) in files.iter().enumerate().step_by(step) {
            let ending = Path::new(name).extension().map(|e| e.to_string_lossy().into_owned()).unwrap_or_default();
            let to = sample.path().join(format!("{i:08}.{ending}"));
            // One that can't be read is skipped in a run, too.
            let _ = fs::copy(file, &to);
        }
        Ok((sample, files.len()))
    }
}

async fn upload(path: &Path, mesh: &Mesh, skipped: &mut Vec<SkippedPicture>) -> Result<String, Problem> {
    let unpacked = unpacked(path)?;
    let root = unpacked.as_ref().map_or(path, TempDir::path);
    let mut list = PictureList::default();
    let mut files: HashMap<String, PathBuf> = HashMap::new();
    let listing = pictures::in_folder(root).map_err(|e| Problem::file(root, &e))?;
    skipped.extend(listing.unreadable.into_iter().map(|(path, reason)| SkippedPicture { path, reason }));
    for (path, file) in listing.pictures {
        match blobs::digest_of(&file).await {
            Ok(digest) => {
                files.insert(digest.clone(), file);
                list.pictures.push(ListedPicture { path, digest });
            }
            Err(error) => skipped.push(SkippedPicture { path, reason: error.to_string() }),
        }
    }
    let encoded = list.encode_to_vec();
    let digest = blobs::digest(&encoded);
    let listed = tempfile::NamedTempFile::new().map_err(|e| Problem::failure(e.to_string()))?;
    fs::write(listed.path(), &encoded).map_err(|e| Problem::file(listed.path(), &e))?;
    let mut digests: Vec<String> = files.keys().cloned().collect();
    digests.push(digest.clone());
    files.insert(digest.clone(), listed.path().to_owned());
    blobs::upload(mesh.uploads.clone(), digests, |digest| files.get(digest).cloned()).await?;
    Ok(digest)
}

/// A tar file's contents, in a folder of their own; none for a folder.
fn unpacked(path: &Path) -> Result<Option<TempDir>, Problem> {
    if path.is_dir() {
        return Ok(None);
    }
    let folder = tempfile::tempdir().map_err(|e| Problem::failure(e.to_string()))?;
    let archive = File::open(path).map_err(|e| Problem::file(path, &e))?;
    tar::Archive::new(archive).unpack(folder.path()).map_err(|e| Problem::file(path, &e))?;
    Ok(Some(folder))
}

fn stamp(path: &Path) -> Result<String, Problem> {
    let meta = fs::metadata(path).map_err(|e| Problem::file(path, &e))?;
    let changed = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    Ok(format!("{} {} {}", path.display(), meta.len(), changed.as_nanos()))
}

pub(crate) fn absolute(path: &Path) -> Result<PathBuf, Problem> {
    std::path::absolute(path).map_err(|e| Problem::file(path, &e))
}
