//! Model folders: finding and reading their files, and the digest of what was read.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use dnd_proto::v1::{Model, ModelLimits};
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use crate::{Error, graph::Network, runtime::EngineArgs};

/// A folder that holds a model. It remembers which of its files were used: those, and no others, make its digest.
#[derive(Debug)]
pub struct ModelFolder {
    root: PathBuf,
    used: Mutex<BTreeSet<PathBuf>>,
}

impl ModelFolder {
    /// A folder that is there.
    pub fn open(root: &Path) -> Result<Self, Error> {
        if !root.is_dir() {
            return Err(Error::file(root, if root.exists() { "this is a file; a model is a folder" } else { "no such folder" }));
        }
        Ok(Self { root: root.to_owned(), used: Mutex::default() })
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The first of the named files that is there; a `what` that is not there at all is an error that names where it was looked for.
    pub fn file(&self, what: &str, names: &[&str]) -> Result<PathBuf, Error> {
        self.optional(names).ok_or_else(|| Error::file(&self.root, format!("no {what}: looked for {}", names.join(", "))))
    }

    /// The first of the named files that is there, if any is.
    pub fn optional(&self, names: &[&str]) -> Option<PathBuf> {
        let name = names.iter().find(|name| self.root.join(name).is_file())?;
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(PathBuf::from(name));
        Some(self.root.join(name))
    }

    /// A JSON file's contents.
    pub fn json<T: DeserializeOwned>(&self, what: &str, name: &str) -> Result<T, Error> {
        let path = self.file(what, &[name])?;
        read_json(&path)
    }

    /// The digest of all files used so far: of their names and contents, in order of their names.
    pub fn digest(&self) -> Result<String, Error> {
        let mut all = Sha256::new();
        for name in self.files()? {
            let path = self.root.join(&name);
            let contents = sha256(&path).map_err(|e| Error::file(&path, e.to_string()))?;
            all.update(name.as_os_str().as_encoded_bytes());
            all.update([0]);
            all.update(contents);
        }
        Ok(dnd_mesh::blobs::hex(&all.finalize()))
    }

    /// Bytes of all files used so far: mostly the model's weights.
    pub fn bytes(&self) -> Result<u64, Error> {
        let size = |name: &PathBuf| fs::metadata(self.root.join(name)).map(|meta| meta.len()).map_err(|e| Error::file(self.root.join(name), e.to_string()));
        self.files()?.iter().map(size).sum()
    }

    /// The files used so far, and those of external data that they name.
    fn files(&self) -> Result<BTreeSet<PathBuf>, Error> {
        let mut files = self.used.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for name in files.clone().iter().filter(|name| name.extension().is_some_and(|ending| ending == "onnx")) {
            let beside = name.parent().unwrap_or(Path::new(""));
            for external in Network::read(&self.root.join(name))?.external_files()? {
                let external = beside.join(external);
                if !self.root.join(&external).is_file() {
                    return Err(Error::file(self.root.join(external), format!("not there, and weights of {} are in it", name.display())));
                }
                files.insert(external);
            }
        }
        Ok(files)
    }

    /// What a service says of the model; the notice is that of the suite, `suite.json` in the folder above.
    pub fn model(&self, layout: &str, args: &EngineArgs, limits: ModelLimits) -> Result<Model, Error> {
        let name = self.root.canonicalize().ok().and_then(|path| path.file_name().map(|n| n.to_string_lossy().into_owned())).unwrap_or_default();
        Ok(Model { name, digest: self.digest()?, layout: layout.to_owned(), engine: args.engine(), notice: notice(&self.root), limits: Some(limits) })
    }
}

/// A suite's notice stands in its manifest, `suite.json`, in the folder above its models.
fn notice(root: &Path) -> String {
    #[derive(serde::Deserialize)]
    struct Suite {
        #[serde(default)]
        notice: String,
    }
    let suite = root.canonicalize().ok().and_then(|path| Some(path.parent()?.join("suite.json")));
    suite.filter(|path| path.is_file()).and_then(|path| read_json::<Suite>(&path).ok()).map(|suite| suite.notice).unwrap_or_default()
}

/// A JSON file's contents; an error names the file, and the place in it. Python's `NaN` and `Infinity`, which are no JSON, are read as null.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let text = fs::read_to_string(path).map_err(|e| Error::file(path, e.to_string()))?;
    serde_json::from_str(&without_pythons_numbers(&text)).map_err(|e| Error::file(path, e.to_string()))
}

fn without_pythons_numbers(text: &str) -> String {
    let mut json = String::with_capacity(text.len());
    let (mut in_string, mut escaped, mut rest) = (false, false, text);
    while let Some(c) = rest.chars().next() {
        let number = ["-Infinity", "Infinity", "NaN"].into_iter().find(|number| !in_string && rest.starts_with(number));
        if let Some(number) = number {
            json.push_str("null");
            rest = &rest[number.len()..];
            continue;
        }
        if !escaped && c == '"' {
            in_string = !in_string;
        }
        escaped = in_string && !escaped && c == '\\';
        json.push(c);
        rest = &rest[c.len_utf8()..];
    }
    json
}

fn sha256(path: &Path) -> io::Result<[u8; 32]> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hasher.finalize().into()),
            read => hasher.update(&piece[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pythons_numbers_are_null_outside_of_strings() {
        let text = r#"{"a": -Infinity, "b": NaN, "c": "NaN and \" Infinity", "d": [Infinity, 1]}"#;
        let json: serde_json::Value = serde_json::from_str(&without_pythons_numbers(text)).unwrap();
        assert_eq!(json, serde_json::json!({"a": null, "b": null, "c": "NaN and \" Infinity", "d": [null, 1]}));
    }

    #[test]
    fn the_digest_is_of_the_files_that_were_used_and_of_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(root.path().join(name), text).unwrap();
        write("config.json", "{}");
        write("README.md", "read me");
        let digest = || {
            let folder = ModelFolder::open(root.path()).unwrap();
            folder.file("configuration", &["config.json"]).unwrap();
            folder.digest().unwrap()
        };
        let before = digest();
        write("README.md", "changed");
        assert_eq!(before, digest());
        write("config.json", "{ }");
        assert_ne!(before, digest());
    }
}
