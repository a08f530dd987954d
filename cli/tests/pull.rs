//! `dnd models pull` against a hub on this machine, faults included.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::BTreeMap,
    fs, io,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::Path as At,
    http::{HeaderMap, Response, StatusCode, header},
    routing::get,
};
use dnd_testing::HttpServer;
use dnd_tests::{Ran, command};
use futures::{StreamExt as _, stream};

const TOKEN: &str = "hf_very_secret";

/// A file of the hub.
#[derive(Clone)]
struct File {
    bytes: Bytes,
    version: &'static str,
    /// How many answers break off after how many bytes.
    breaks: Arc<Mutex<Vec<usize>>>,
}

fn file(bytes: impl Into<Bytes>) -> File {
    File { bytes: bytes.into(), version: "\"1\"", breaks: Arc::default() }
}

/// A request: its path, its Range, its token, and the bytes that were sent for it.
type Asked = (String, Option<String>, Option<String>, usize);

/// A hub with these files, by `owner/name/resolve/revision/path`, that notes what it is asked.
fn hub(files: BTreeMap<&'static str, File>) -> (HttpServer, Arc<Mutex<Vec<Asked>>>) {
    let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
    let notes = Arc::clone(&asked);
    let answer = move |At(path): At<String>, headers: HeaderMap| {
        let text = |name: header::HeaderName| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
        let (range, token, condition) = (text(header::RANGE), text(header::AUTHORIZATION), text(header::IF_RANGE));
        let found = files.get(path.as_str()).cloned();
        let notes = Arc::clone(&notes);
        async move {
            let note = |sent| notes.lock().unwrap().push((path.clone(), range.clone(), token.clone(), sent));
            let Some(File { bytes, version, breaks }) = found else {
                note(0);
                return Response::builder().status(StatusCode::NOT_FOUND).body(Body::empty()).unwrap();
            };
            let wanted = range.as_ref().map(|range| range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse::<usize>().unwrap());
            let begins = wanted.filter(|_| condition.as_ref().is_none_or(|condition| condition == version)).unwrap_or(0);
            let mut response = Response::builder().header(header::ETAG, version).header(header::CONTENT_LENGTH, bytes.len() - begins);
            if begins > 0 {
                let range = format!("bytes {begins}-{}/{}", bytes.len() - 1, bytes.len());
                response = response.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, range);
            }
            let rest = bytes.slice(begins..);
            let Some(after) = breaks.lock().unwrap().pop() else {
                note(rest.len());
                return response.body(Body::from(rest)).unwrap();
            };
            note(after);
            let cut = stream::iter([Ok(rest.slice(..after))]).chain(stream::once(async {
                tokio::time::sleep(Duration::from_millis(30)).await;
                Err(io::Error::other("cut"))
            }));
            response.body(Body::from_stream(cut)).unwrap()
        }
    };
    (HttpServer::start(Router::new().route("/{*path}", get(answer))), asked)
}

fn pull(folder: &Path, endpoint: &str, name: &str) -> Ran {
    pull_with(folder, endpoint, name, &[])
}

fn pull_with(folder: &Path, endpoint: &str, name: &str, more: &[&str]) -> Ran {
    let output =
        command(folder, &[&["models", "pull", name, "--out", "suite"], more].concat()).env("HF_ENDPOINT", endpoint).env("HF_TOKEN", TOKEN).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let ran = Ran { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) };
    assert!(!ran.out.contains(TOKEN) && !ran.err.contains(TOKEN), "the token is never told");
    ran
}

/// A folder with a manifest of one model of two files, the second with this line for its digest.
fn manifest(digest: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text = format!(
        "name = \"mine\"\nnotice = \"of a test\"\n[models.clip]\nabout = \"CLIP\"\nrepository = \"me/clip\"\nrevision = \"v1\"\n\
         files = [{{ path = \"config.json\" }}, {{ path = \"model.bin\", to = \"onnx/model.bin\"{digest} }}]\n"
    );
    fs::write(folder.path().join("mine.toml"), text).unwrap();
    folder
}

const CONFIG: &str = "me/clip/resolve/v1/config.json";
const MODEL: &str = "me/clip/resolve/v1/model.bin";

fn weights() -> Vec<u8> {
    (0..300_000_u32).map(|i| (i % 251) as u8).collect()
}

/// `sha256sum` of [`weights`].
const WEIGHTS_SHA256: &str = "3c65ea93424a9c362fec0e3a69ea36031e8a358441479dd665cc6110eabe7b08";

fn pinned(digest: &str) -> String {
    format!(", sha256 = \"{digest}\"")
}

#[test]
fn a_suite_is_fetched_whole_and_what_is_there_is_not_fetched_again() {
    let (server, asked) = hub([(CONFIG, file("{}")), (MODEL, file(weights()))].into());
    let folder = manifest(&pinned(WEIGHTS_SHA256));
    let ran = pull(folder.path(), &server.url(), "mine.toml");
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
    let suite = folder.path().join("suite");
    assert_eq!(fs::read(suite.join("clip/onnx/model.bin")).unwrap(), weights());
    assert!(ran.out.contains("clip/config.json") && ran.out.contains("not pinned") && ran.out.contains(WEIGHTS_SHA256), "{}", ran.out);
    let record: serde_json::Value = serde_json::from_str(&fs::read_to_string(suite.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(record["clip/onnx/model.bin"]["sha256"], WEIGHTS_SHA256);
    assert_eq!((&record["clip/onnx/model.bin"]["pinned"], &record["clip/config.json"]["pinned"]), (&true.into(), &false.into()));
    assert_eq!(record["clip/config.json"]["url"], format!("{}/{CONFIG}", server.url()));
    let manifest: serde_json::Value = serde_json::from_str(&fs::read_to_string(suite.join("suite.json")).unwrap()).unwrap();
    assert_eq!((&manifest["notice"], &manifest["models"]["clip"]), (&"of a test".into(), &"clip".into()));
    assert!(asked.lock().unwrap().iter().all(|(_, _, token, _)| *token == Some(format!("Bearer {TOKEN}"))));

    let count = asked.lock().unwrap().len();
    let again = pull(folder.path(), &server.url(), "mine.toml");
    assert_eq!((again.code, asked.lock().unwrap().len()), (0, count), "{}", again.err);
    // A file that is another than the one that was fetched is left alone, and told.
    fs::write(suite.join("clip/config.json"), "mine").unwrap();
    let changed = pull(folder.path(), &server.url(), "mine.toml");
    assert!(changed.code == 2 && changed.err.contains("config.json") && changed.err.contains("move it away"), "{}", changed.err);
    assert_eq!(fs::read_to_string(suite.join("clip/config.json")).unwrap(), "mine");
}

#[test]
fn one_model_is_fetched_alone_and_is_held_against_its_digests_where_nothing_can_be_written_or_fetched() {
    let (server, asked) = hub([(CONFIG, file("{}")), (MODEL, file(weights())), ("me/lm/resolve/main/config.json", file("{}"))].into());
    let folder = manifest(&pinned(WEIGHTS_SHA256));
    let path = folder.path().join("mine.toml");
    let more = "[models.summarizer]\nabout = \"LM\"\nrepository = \"me/lm\"\nfiles = [{ path = \"config.json\" }]\n";
    fs::write(&path, fs::read_to_string(&path).unwrap() + more).unwrap();
    let only = |endpoint: &str, model| pull_with(folder.path(), endpoint, "mine.toml", &["--only", model]);
    assert_eq!(only(&server.url(), "clip").code, 0);
    let suite = folder.path().join("suite");
    assert!(suite.join("clip/onnx/model.bin").is_file() && !suite.join("summarizer").exists());
    let wrong = only(&server.url(), "clipp");
    assert!(wrong.code == 2 && wrong.err.contains("clipp") && wrong.err.contains("clip, summarizer"), "{}", wrong.err);

    // Where the record's new version would be written first, nothing can be.
    fs::create_dir(suite.join("manifest.json.part")).unwrap();
    let count = asked.lock().unwrap().len();
    let again = only(&server.url(), "clip");
    assert_eq!((again.code, asked.lock().unwrap().len()), (0, count), "{}", again.err);
    fs::write(suite.join("clip/onnx/model.bin"), "other").unwrap();
    let changed = only(&server.url(), "clip");
    assert!(changed.code == 2 && changed.err.contains("model.bin") && changed.err.contains(WEIGHTS_SHA256), "{}", changed.err);
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_was() {
    // Once, it goes on by itself.
    let weak = || File { breaks: Arc::new(Mutex::new(vec![100_000])), ..file(weights()) };
    let (server, asked) = hub([(CONFIG, file("{}")), (MODEL, weak())].into());
    let folder = manifest("");
    let ran = pull(folder.path(), &server.url(), "mine.toml");
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
    assert_eq!(fs::read(folder.path().join("suite/clip/onnx/model.bin")).unwrap(), weights());
    let sent: Vec<(Option<String>, usize)> =
        asked.lock().unwrap().iter().filter(|(path, ..)| path == MODEL).map(|(_, range, _, sent)| (range.clone(), *sent)).collect();
    assert_eq!(sent, [(None, 100_000), (Some("bytes=100000-".to_owned()), 200_000)], "no byte comes twice");

    // Again and again, the next run goes on.
    let breaks = Arc::new(Mutex::new(vec![10_000; 5]));
    let (server, asked) = hub([(CONFIG, file("{}")), (MODEL, File { breaks, ..file(weights()) })].into());
    let folder = manifest("");
    let ran = pull(folder.path(), &server.url(), "mine.toml");
    assert!(ran.code == 1 && ran.err.contains("tried 5 times") && ran.err.contains("run the command again"), "{}", ran.err);
    assert!(!folder.path().join("suite/clip/onnx/model.bin").exists(), "what is not whole is not in its place");
    assert_eq!(pull(folder.path(), &server.url(), "mine.toml").code, 0);
    assert_eq!(fs::read(folder.path().join("suite/clip/onnx/model.bin")).unwrap(), weights());
    let sent: usize = asked.lock().unwrap().iter().filter(|(path, ..)| path == MODEL).map(|(.., sent)| sent).sum();
    assert_eq!(sent, 300_000, "no byte comes twice");
    let names: Vec<String> = fs::read_dir(folder.path().join("suite/clip/onnx")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names, ["model.bin"], "and nothing is left behind");
}

#[test]
fn a_file_that_has_changed_in_between_is_fetched_anew() {
    let breaks = Arc::new(Mutex::new(vec![10_000; 5]));
    let old: Vec<u8> = weights().iter().map(|byte| byte ^ 1).collect();
    let (server, _) = hub([(CONFIG, file("{}")), (MODEL, File { breaks, ..file(old) })].into());
    let folder = manifest("");
    assert_eq!(pull(folder.path(), &server.url(), "mine.toml").code, 1);
    let (server, _) = hub([(CONFIG, file("{}")), (MODEL, File { version: "\"2\"", ..file(weights()) })].into());
    fs::remove_file(folder.path().join("suite/manifest.json")).unwrap();
    assert_eq!(pull(folder.path(), &server.url(), "mine.toml").code, 0);
    assert_eq!(fs::read(folder.path().join("suite/clip/onnx/model.bin")).unwrap(), weights());
}

#[test]
fn a_file_with_another_digest_is_removed_and_both_are_named() {
    let wrong = "0".repeat(64);
    let (server, _) = hub([(CONFIG, file("{}")), (MODEL, file(weights()))].into());
    let folder = manifest(&pinned(&wrong));
    let ran = pull(folder.path(), &server.url(), "mine.toml");
    assert!(ran.code == 1 && ran.err.contains(&wrong) && ran.err.contains(WEIGHTS_SHA256) && ran.err.contains(MODEL), "{}", ran.err);
    let folder = folder.path().join("suite/clip/onnx");
    assert_eq!(fs::read_dir(folder).unwrap().count(), 0);
}

#[test]
fn what_is_not_there_is_told_with_its_url() {
    let (server, asked) = hub([(CONFIG, file("{}"))].into());
    let folder = manifest("");
    let ran = pull(folder.path(), &server.url(), "mine.toml");
    assert!(ran.code == 1 && ran.err.contains("404") && ran.err.contains(&format!("{}/{MODEL}", server.url())), "{}", ran.err);
    assert_eq!(asked.lock().unwrap().len(), 2, "not tried again");
    let unknown = pull(folder.path(), &server.url(), "big");
    assert!(unknown.code == 2 && unknown.err.contains("small or paper"), "{}", unknown.err);
}

#[test]
fn without_a_network_it_says_which_files_go_where_and_takes_them_from_there() {
    let folder = manifest(&pinned(WEIGHTS_SHA256));
    let ran = pull(folder.path(), "http://127.0.0.1:9", "mine.toml");
    assert_eq!(ran.code, 1);
    for part in ["http://127.0.0.1:9", "put them there yourself", "suite/clip/onnx/model.bin", WEIGHTS_SHA256, "suite/clip/config.json", "not pinned"] {
        assert!(ran.err.contains(part), "{part:?} is not in {}", ran.err);
    }
    let clip = folder.path().join("suite/clip");
    fs::create_dir_all(clip.join("onnx")).unwrap();
    fs::write(clip.join("config.json"), "{}").unwrap();
    fs::write(clip.join("onnx/model.bin"), weights()).unwrap();
    let ran = pull(folder.path(), "http://127.0.0.1:9", "mine.toml");
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(folder.path().join("suite/suite.json").is_file());
}

#[test]
fn a_manifest_that_would_lead_out_of_the_folder_is_refused() {
    let (server, asked) = hub(BTreeMap::new());
    for (from, to) in
        [("config.json", "../../config.json"), ("onnx/model.bin", "/tmp/model.bin"), ("me/clip", "me/../.."), ("models.clip", "models.\"../clip\"")]
    {
        let folder = manifest("");
        let path = folder.path().join("mine.toml");
        fs::write(&path, fs::read_to_string(&path).unwrap().replace(from, to)).unwrap();
        let ran = pull(folder.path(), &server.url(), "mine.toml");
        assert!(ran.code == 2 && ran.err.contains("out of the folder"), "{to}: {}", ran.err);
    }
    assert!(asked.lock().unwrap().is_empty());
}
