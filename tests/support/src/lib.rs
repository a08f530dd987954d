//! What the tests of several packages share: the sketch suite's models and pictures, networks by hand, what was made to hurt, HTTP servers, and a network that
//! fails.
#![allow(clippy::unwrap_used, clippy::panic)]

pub mod by_hand;
pub mod hostile;
mod http;
mod proxy;

use std::{
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
};

use bytes::Bytes;

pub use http::HttpServer;
pub use proxy::Proxy;

/// A file or folder of the sketch suite.
pub fn sketch(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/sketch").join(name);
    assert!(path.exists(), "{} is not there", path.display());
    path.canonicalize().unwrap()
}

/// Every `step`-th picture of the sketch suite's probing set, `count` of them: names and PNGs.
pub fn pictures(count: usize, step: usize) -> Vec<(String, Bytes)> {
    let mut archive = tar::Archive::new(File::open(sketch("probing.tar")).unwrap());
    let entries = archive.entries().unwrap().step_by(step.max(1)).take(count);
    let pictures: Vec<_> = entries
        .map(|entry| {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_string_lossy().into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            (name, bytes.into())
        })
        .collect();
    assert_eq!(pictures.len(), count);
    pictures
}

/// Writes pictures into a folder.
pub fn write_pictures(folder: &Path, pictures: &[(String, Bytes)]) {
    for (name, bytes) in pictures {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// A copy of a folder, without some of its files.
pub fn copy_without(from: &Path, to: &Path, without: &[&str]) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() {
            let inside: Vec<&str> = without.iter().filter_map(|path| path.strip_prefix(&format!("{name}/"))).collect();
            copy_without(&entry.path(), &to.join(&name), &inside);
        } else if !without.contains(&name.as_str()) {
            fs::copy(entry.path(), to.join(&name)).unwrap();
        }
    }
}
