//! `dnd models pull`: fetches the models that a manifest names into a suite.
//!
//! hf-hub (1.0) was looked at for it: it begins a broken file anew, and brings some hundred crates for another protocol.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use dnd_mesh::program::ExitCode;

use backon::{ExponentialBuilder, Retryable as _};
use dnd_onnx::folder;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::{Client, StatusCode, header};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt as _;

use crate::{local::MODELS, problem::Problem};

/// Fetches the models of a manifest into a suite; what is broken off goes on where it was.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// `small`, `paper`, or a file that is made as those are
    name: String,
    /// Folder of the suite; what is there already is held against its digests, for which it need not be writable
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Only the model of this folder, such as clip
    #[arg(long, value_name = "FOLDER")]
    only: Option<String>,
    /// Where to fetch from; a private repository's token is read from the environment variable HF_TOKEN
    #[arg(long, env = "HF_ENDPOINT", value_name = "URL", default_value = "https://huggingface.co")]
    endpoint: String,
}

const MANIFESTS: [(&str, &str); 2] = [("small", include_str!("../../../manifests/small.toml")), ("paper", include_str!("../../../manifests/paper.toml"))];
const RECORD: &str = "manifest.json";
const SUITE: &str = "suite.json";
const TOKEN: &str = "HF_TOKEN";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long nothing may come.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a download that broke off goes on by itself, and how long after the first time.
const RETRIES: usize = 4;
const RETRY_AFTER: Duration = Duration::from_millis(300);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    name: String,
    #[serde(default)]
    notice: String,
    /// By their folders in the suite.
    models: BTreeMap<String, ModelEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelEntry {
    about: String,
    #[serde(default)]
    repository: String,
    #[serde(default = "main_branch")]
    revision: String,
    #[serde(default)]
    files: Vec<FileEntry>,
    /// How one comes by a model that is not fetched.
    by_hand: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEntry {
    path: String,
    /// Its path in the model's folder, if that is another.
    to: Option<String>,
    /// Where it comes from another repository than the model's.
    repository: Option<String>,
    /// Not there: not pinned.
    sha256: Option<String>,
}

fn main_branch() -> String {
    "main".to_owned()
}

/// A file to fetch.
#[derive(Debug)]
struct Wanted {
    url: String,
    /// In the suite.
    path: String,
    sha256: Option<String>,
}

/// What was fetched, by path: `manifest.json`.
type Record = BTreeMap<String, Fetched>;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Fetched {
    url: String,
    sha256: String,
    bytes: u64,
    /// Whether the manifest named the digest; otherwise it is what came.
    pinned: bool,
}

/// Why a try failed.
enum Failed {
    ForNow(String),
    /// Nobody is there.
    NoNetwork(String),
    ForGood(Problem),
}

pub(super) async fn run(args: Args) -> Result<ExitCode, Problem> {
    let mut manifest = Manifest::read(&args.name)?;
    if let Some(only) = &args.only {
        manifest.keep(only)?;
    }
    let wanted = manifest.wanted(args.endpoint.trim_end_matches('/'))?;
    let out = &args.out;
    fs::create_dir_all(out).map_err(|e| Problem::file(out, &e))?;
    println!("{}: {} files into {}", manifest.name, wanted.len(), out.display());
    let hub = Hub::new()?;
    let record_path = out.join(RECORD);
    let mut record: Record = if record_path.is_file() { folder::read_json(&record_path)? } else { Record::new() };
    for file in &wanted {
        let fetched = match hub.get(out, file, record.get(&file.path)).await {
            Ok(fetched) => fetched,
            Err(Failed::NoNetwork(why)) => return Err(Problem::failure(by_yourself(&args.endpoint, &why, out, &wanted))),
            Err(Failed::ForNow(why)) => {
                let message = format!("{}: {why}; tried {} times. What came is kept: run the command again to go on", file.url, RETRIES + 1);
                return Err(Problem::failure(message));
            }
            Err(Failed::ForGood(problem)) => return Err(problem),
        };
        if record.get(&file.path) != Some(&fetched) {
            record.insert(file.path.clone(), fetched);
            write_json(&record_path, &record)?;
        }
    }
    let suite = out.join(SUITE);
    if !suite.exists() {
        let models: BTreeMap<&str, &str> = MODELS.into_iter().map(|name| (name, name)).collect();
        write_json(&suite, &serde_json::json!({"name": manifest.name, "notice": manifest.notice, "models": models}))?;
    }
    for (name, model) in &manifest.models {
        if let Some(how) = &model.by_hand {
            println!("{name} ({}) is not fetched: {how}", model.about);
        }
    }
    println!("`dnd models check {}` says whether they can be used", out.display());
    Ok(ExitCode::SUCCESS)
}

impl Manifest {
    fn read(name: &str) -> Result<Self, Problem> {
        let text = match MANIFESTS.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => (*text).to_owned(),
            None => {
                let path = Path::new(name);
                let names = MANIFESTS.map(|(known, _)| known).join(" or ");
                let missing = || Problem::input(format!("{name}: neither {names} nor a file: a manifest is one of the two, or a file made as they are"));
                if !path.is_file() {
                    return Err(missing());
                }
                fs::read_to_string(path).map_err(|e| Problem::file(path, &e))?
            }
        };
        toml::from_str(&text).map_err(|e| Problem::input(format!("{name}: {}", e.to_string().trim_end())))
    }

    /// Leaves out all models but one.
    fn keep(&mut self, only: &str) -> Result<(), Problem> {
        let all: Vec<String> = self.models.keys().cloned().collect();
        self.models.retain(|name, _| name == only);
        if self.models.is_empty() {
            return Err(Problem::input(format!("{}: it has no model {only:?}; it has {}", self.name, all.join(", "))));
        }
        Ok(())
    }

    /// All files of all models, none of which may lie outside of the suite.
    fn wanted(&self, endpoint: &str) -> Result<Vec<Wanted>, Problem> {
        let mut wanted = Vec::new();
        for (name, model) in &self.models {
            for file in &model.files {
                let repository = file.repository.as_ref().unwrap_or(&model.repository);
                let to = format!("{name}/{}", file.to.as_ref().unwrap_or(&file.path));
                for path in [&to, &file.path, repository, &model.revision] {
                    if !is_inside(path) {
                        return Err(Problem::input(format!(
                            "{}: {path:?} in its manifest would lead out of the folder; paths are like onnx/model.onnx",
                            self.name
                        )));
                    }
                }
                let url = format!("{endpoint}/{repository}/resolve/{}/{}", model.revision, file.path);
                wanted.push(Wanted { url, path: to, sha256: file.sha256.as_ref().map(|digest| digest.to_lowercase()) });
            }
        }
        Ok(wanted)
    }
}

/// Whether a path stays where it is put, and is the same in a URL.
fn is_inside(path: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    !path.is_empty() && path.chars().all(plain) && !path.contains("//") && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Where files are fetched from.
struct Hub {
    client: Client,
    token: Option<SecretString>,
}

impl Hub {
    fn new() -> Result<Self, Problem> {
        // The first provider that a process installs stays.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder().connect_timeout(CONNECT_TIMEOUT).read_timeout(READ_TIMEOUT).build();
        let client = client.map_err(|e| Problem::failure(format!("no HTTPS can be spoken here: {}", innermost(&e))))?;
        let token = std::env::var(TOKEN).ok().map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()).map(SecretString::from);
        Ok(Self { client, token })
    }

    /// A file of the suite: the one that is there, if it is the right one, or fetched.
    async fn get(&self, out: &Path, file: &Wanted, known: Option<&Fetched>) -> Result<Fetched, Failed> {
        let path = out.join(&file.path);
        let expected = file.sha256.as_deref().or(known.filter(|known| known.url == file.url).map(|known| known.sha256.as_str()));
        let pinned = if file.sha256.is_some() { "" } else { ", not pinned" };
        if path.is_file() {
            let (sha256, bytes) = digest(&path).await?;
            if let Some(expected) = expected.filter(|expected| **expected != sha256) {
                let message = format!("{}: there is a file with sha256 {sha256} already, and not {expected}; move it away to fetch this one", path.display());
                return Err(Failed::ForGood(Problem::input(message)));
            }
            println!("  {}: there, sha256 {sha256}{pinned}", file.path);
            return Ok(Fetched { url: file.url.clone(), sha256, bytes, pinned: file.sha256.is_some() });
        }
        let part = Part::beside(&path).map_err(|e| Failed::ForGood(Problem::file(&path, &e)))?;
        let bar = ProgressBar::new(0).with_message(file.path.clone());
        bar.set_style(ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}").unwrap_or_else(|_| ProgressStyle::default_bar()));
        let backoff = ExponentialBuilder::new().with_min_delay(RETRY_AFTER).with_max_times(RETRIES).with_jitter();
        let fetched = (|| self.fetch(file, &part, &bar)).retry(backoff).when(|failed| matches!(failed, Failed::ForNow(_))).await;
        bar.finish_and_clear();
        fetched?;
        let (sha256, bytes) = digest(&part.bytes).await?;
        if let Some(expected) = expected.filter(|expected| **expected != sha256) {
            part.remove();
            let message = format!("{}: what came has sha256 {sha256}, and not {expected}; it was removed", file.url);
            return Err(Failed::ForGood(Problem::failure(message)));
        }
        fs::rename(&part.bytes, &path).map_err(|e| Failed::ForGood(Problem::file(&path, &e)))?;
        part.remove();
        println!("  {}: {:.1} MB, sha256 {sha256}{pinned}", file.path, bytes as f64 / 1e6);
        Ok(Fetched { url: file.url.clone(), sha256, bytes, pinned: file.sha256.is_some() })
    }

    /// Fetches what is missing of a file.
    async fn fetch(&self, file: &Wanted, part: &Part, bar: &ProgressBar) -> Result<(), Failed> {
        let there = part.size(file.sha256.is_some());
        let mut request = self.client.get(&file.url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.expose_secret());
        }
        if there > 0 {
            request = request.header(header::RANGE, format!("bytes={there}-"));
            if let Some(version) = part.version() {
                // Of another version of the file the whole is sent.
                request = request.header(header::IF_RANGE, version);
            }
        }
        let broken = |error: reqwest::Error| {
            let why = innermost(&error);
            if error.is_connect() { Failed::NoNetwork(why) } else { Failed::ForNow(format!("the download broke off: {why}")) }
        };
        let mut response = request.send().await.map_err(broken)?;
        let status = response.status();
        let failed = |hint: &str| Failed::ForGood(Problem::failure(format!("{}: it answered {status}{hint}", file.url)));
        let begins = match status {
            StatusCode::PARTIAL_CONTENT if begins_at(response.headers()) == Some(there) => there,
            StatusCode::OK => 0,
            // What is there is no beginning of what there should be.
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                part.remove();
                return Err(Failed::ForNow(format!("it answered {status} to what was there already")));
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(failed("; a private or gated repository needs its token in HF_TOKEN")),
            StatusCode::NOT_FOUND => return Err(failed("; there is no such repository, revision or file")),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => return Err(Failed::ForNow(format!("it answered {status}"))),
            _ => return Err(failed("")),
        };
        let version = response.headers().get(header::ETAG).and_then(|tag| tag.to_str().ok()).filter(|tag| !tag.starts_with("W/"));
        let on_disk = |e: io::Error| Failed::ForGood(Problem::file(&part.bytes, &e));
        part.keep_version(version).map_err(on_disk)?;
        if let Some(rest) = response.content_length() {
            bar.set_length(begins + rest);
        }
        bar.set_position(begins);
        let mut open = tokio::fs::OpenOptions::new();
        let open = if begins == 0 { open.write(true).create(true).truncate(true) } else { open.append(true) };
        let mut bytes = open.open(&part.bytes).await.map_err(on_disk)?;
        let received = async {
            while let Some(piece) = response.chunk().await.map_err(broken)? {
                bytes.write_all(&piece).await.map_err(on_disk)?;
                bar.inc(piece.len() as u64);
            }
            Ok(())
        };
        let received = received.await;
        // What came is kept, whatever ended it.
        bytes.flush().await.map_err(on_disk)?;
        received
    }
}

/// The beginning of a file, beside its place.
struct Part {
    bytes: PathBuf,
    /// Which version of the file it is of, as its server calls it.
    tag: PathBuf,
}

impl Part {
    fn beside(path: &Path) -> io::Result<Self> {
        let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        Ok(Self { bytes: path.with_file_name(format!(".{name}.part")), tag: path.with_file_name(format!(".{name}.part.tag")) })
    }

    fn version(&self) -> Option<String> {
        fs::read_to_string(&self.tag).ok()
    }

    fn keep_version(&self, version: Option<&str>) -> io::Result<()> {
        match version {
            Some(version) => fs::write(&self.tag, version),
            None if self.tag.exists() => fs::remove_file(&self.tag),
            None => Ok(()),
        }
    }

    /// Bytes that are there and may be gone on from: it must show in the end whether the parts are of one file.
    fn size(&self, pinned: bool) -> u64 {
        if pinned || self.tag.is_file() { fs::metadata(&self.bytes).map_or(0, |meta| meta.len()) } else { 0 }
    }

    fn remove(&self) {
        for path in [&self.bytes, &self.tag] {
            let _ = fs::remove_file(path);
        }
    }
}

/// Where a part of a file begins, by `content-range: bytes 5-9/10`.
fn begins_at(headers: &header::HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

async fn digest(path: &Path) -> Result<(String, u64), Failed> {
    let read = path.to_owned();
    let sum = tokio::task::spawn_blocking(move || Ok::<_, io::Error>((folder::digest(&read)?, fs::metadata(&read)?.len())));
    let sum = sum.await.map_err(|e| Failed::ForGood(Problem::failure(e.to_string())))?;
    sum.map_err(|e| Failed::ForGood(Problem::file(path, &e)))
}

/// What can be done without a network.
fn by_yourself(endpoint: &str, why: &str, out: &Path, wanted: &[Wanted]) -> String {
    let files: Vec<String> = wanted
        .iter()
        .map(|file| {
            let digest = file.sha256.as_ref().map_or_else(|| "not pinned".to_owned(), |digest| format!("sha256 {digest}"));
            format!("  {}\n    from {} ({digest})", out.join(&file.path).display(), file.url)
        })
        .collect();
    format!(
        "nobody can be reached at {endpoint}: {why}\nWithout a network, fetch the files where there is one and put them there yourself:\n{}\nThen run the same command \
         again, which checks and records them, or `dnd models check {}`. A mirror of the hub is named with HF_ENDPOINT.",
        files.join("\n"),
        out.display()
    )
}

/// What is at the bottom of an error.
fn innermost(error: &reqwest::Error) -> String {
    let mut source: &dyn std::error::Error = error;
    while let Some(deeper) = source.source() {
        source = deeper;
    }
    source.to_string()
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Problem> {
    let part = path.with_extension("json.part");
    let text = serde_json::to_string_pretty(value).map_err(|e| Problem::failure(e.to_string()))?;
    fs::write(&part, text + "\n").and_then(|()| fs::rename(&part, path)).map_err(|e| Problem::file(path, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifests_that_come_along_are_of_suites_models_and_stay_in_their_folder() {
        for (name, _) in MANIFESTS {
            let manifest = Manifest::read(name).unwrap();
            assert_eq!(manifest.name, name);
            assert_eq!(manifest.models.keys().collect::<Vec<_>>(), ["captioner", "clip", "diffusion", "summarizer"]);
            for (folder, model) in &manifest.models {
                assert!(model.by_hand.is_some() != (!model.files.is_empty() && !model.repository.is_empty()), "{name} {folder}");
            }
            assert!(manifest.wanted("https://hub").unwrap().iter().all(|file| file.url.starts_with("https://hub/")));
        }
    }

    #[test]
    fn a_path_that_leads_elsewhere_is_none() {
        for wrong in ["", "/etc/passwd", "../up", "a/../../b", "a/./b/..", "a//b", "a?b", "a b", "a\\b", "https://x"] {
            assert!(!is_inside(wrong), "{wrong}");
        }
        assert!(["onnx/model.onnx", "owner/name", "refs/pr/1", ".hidden"].into_iter().all(is_inside));
    }
}
