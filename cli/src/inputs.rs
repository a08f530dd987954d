//! The network and the pictures of a command: looked at here first, then named or uploaded to the mesh.

use std::{
    collections::HashMap,
    fs::{self, File},
    path::{Path, PathBuf},
};

use dnd_mesh::{blobs, uri};
use dnd_onnx::{
    folder,
    graph::Network,
    pictures::{self, PreprocessorConfig},
};
use dnd_proto::v1::{ListedPicture, PictureList, Preprocessing, ProbingSet, ProbingSource, SkippedPicture, Target, probing_source::Source};
use prost::Message as _;
use tempfile::TempDir;

use crate::{args::TargetArgs, mesh::Mesh, problem::Problem};

/// A target's file and its pre-processing, looked at.
#[derive(Debug, Clone)]
pub(crate) struct TargetFile {
    pub(crate) path: PathBuf,
    pub(crate) preprocessing: Option<Preprocessing>,
}

impl TargetFile {
    /// Looks at the file, and for a `preprocessor_config.json` beside it.
    pub(crate) fn open(args: &TargetArgs) -> Result<Self, Problem> {
        let path = &args.target;
        let meta = fs::metadata(path).map_err(|e| Problem::file(path, &e))?;
        if meta.is_dir() {
            return Err(Problem::input(format!("{}: this is a folder; a target is an ONNX file", path.display())));
        }
        let beside = path.parent().unwrap_or(Path::new("")).join("preprocessor_config.json");
        let config = args.preprocessing.clone().or_else(|| beside.is_file().then_some(beside));
        let preprocessing = match config {
            Some(file) => {
                let config: PreprocessorConfig = folder::read_json(&file)?;
                Some(config.preprocessing().map_err(|problem| Problem::input(format!("{}: {problem}", file.display())))?)
            }
            None => None,
        };
        Ok(Self { path: absolute(path)?, preprocessing })
    }

    /// The target as the mesh takes it: by URI if it can read this machine's files, else uploaded.
    pub(crate) async fn give(&self, mesh: &Mesh) -> Result<Target, Problem> {
        if mesh.is_local() {
            return Ok(Target { uri: uri::of_file(&self.path), digest: String::new(), preprocessing: self.preprocessing.clone() });
        }
        // Looked at here, where its name is known.
        let (network, path) = (self.path.clone(), self.path.clone());
        let external = tokio::task::spawn_blocking(move || Network::read(&network)?.external_files())
            .await
            .map_err(|_| Problem::failure("the look at the network panicked"))??;
        if !external.is_empty() {
            return Err(Problem::input(format!("{}: the network has external data, which can't be sent to an endpoint; save it as one file", path.display())));
        }
        let digest = blobs::digest_of(&self.path).await.map_err(|e| Problem::file(&self.path, &e))?;
        blobs::upload(mesh.uploads.clone(), vec![digest.clone()], move |_| Some(path.clone())).await?;
        Ok(Target { uri: String::new(), digest, preprocessing: self.preprocessing.clone() })
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

fn absolute(path: &Path) -> Result<PathBuf, Problem> {
    std::path::absolute(path).map_err(|e| Problem::file(path, &e))
}
