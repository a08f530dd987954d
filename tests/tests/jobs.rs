//! Jobs that survive: orchestrators that are killed, stopped, or share a store; services that go away. The results are those of an undisturbed run.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use dnd_testing::{pictures, sketch, write_pictures};
use dnd_tests::{Mesh, Service, command, dnd, postgres};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);
const UNITS: usize = 12;

/// What to dissect: twelve units, of which some share pictures and concepts.
fn what(folder: &Path) -> Vec<String> {
    let target = sketch("targets/planted/planted.onnx");
    let images = folder.join("pictures");
    let fixed = ["--num-inference-steps", "3", "--images-per-concept", "3", "--candidates", "2", "--layer", "colour,mixture", "--units", "0-5"];
    let paths = ["--target", target.to_str().unwrap(), "--images", images.to_str().unwrap()];
    fixed.iter().chain(&paths).map(|arg| (*arg).to_owned()).collect()
}

/// Runs `dnd` to its end, which is a good one.
fn done(folder: &Path, args: &[&str]) -> String {
    let ran = dnd(folder, args);
    assert_eq!(ran.code, 0, "{args:?}: {}{}", ran.out, ran.err);
    ran.out
}

fn args<'a>(first: &[&'a str], what: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    first.iter().copied().chain(what.iter().map(String::as_str)).chain(more.iter().copied()).collect()
}

fn results(folder: &Path, out: &str) -> String {
    fs::read_to_string(folder.join(out).join("results.jsonl")).unwrap()
}

/// Pictures, a mesh, and the results of an undisturbed run in `whole`.
fn begin() -> (tempfile::TempDir, Mesh, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    write_pictures(&folder.path().join("pictures"), &pictures(80, 4));
    let (mesh, what) = (Mesh::start(&sketch("")), what(folder.path()));
    done(folder.path(), &args(&["dissect"], &what, &["--out", "whole", "--endpoint", &mesh.orchestrator.url()]));
    assert_eq!(results(folder.path(), "whole").lines().count(), UNITS);
    (folder, mesh, what)
}

fn job(folder: &Path, endpoint: &str, id: &str) -> Value {
    serde_json::from_str(&done(folder, &["jobs", "show", id, "--json", "--endpoint", endpoint])).unwrap()
}

/// Waits until a job looks so.
fn wait_for(folder: &Path, endpoint: &str, id: &str, so: impl Fn(&Value) -> bool) -> Value {
    let since = Instant::now();
    loop {
        let job = job(folder, endpoint, id);
        if so(&job) {
            return job;
        }
        assert!(since.elapsed() < PATIENCE, "{job}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn ended(job: &Value) -> u64 {
    ["labelled", "dead", "failed"].iter().map(|state| job["units"][state].as_str().unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
fn a_job_goes_on_when_its_orchestrator_is_killed_and_is_there_to_be_looked_at_afterwards() {
    let (folder, mesh, what) = begin();
    let folder = folder.path();
    let data = folder.join("data");
    let mut orchestrator = mesh.another_orchestrator(&["--data", data.to_str().unwrap(), "--lease", "2", "--units-in-flight", "2"]);
    let endpoint = orchestrator.url();
    let run = args(&["dissect"], &what, &["--out", "killed", "--endpoint", &endpoint]);
    let mut child = command(folder, &run).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = || fs::read_to_string(folder.join("killed/results.jsonl")).unwrap_or_default().lines().count();
    let since = Instant::now();
    while lines() < 1 {
        assert!(child.try_wait().unwrap().is_none() && since.elapsed() < PATIENCE, "it ended early");
        thread::sleep(Duration::from_millis(5));
    }
    orchestrator.kill_and_restart();
    thread::sleep(Duration::from_millis(300));
    orchestrator.kill_and_restart();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8(output.stderr).unwrap());
    assert_eq!(results(folder, "whole"), results(folder, "killed"));

    // Without an orchestrator, the data folder is enough to look at what was done.
    drop(orchestrator);
    let data = data.to_str().unwrap();
    let jobs = done(folder, &["jobs", "list", "--json", "--data", data]);
    let jobs: Vec<Value> = jobs.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((jobs.len(), jobs[0]["state"].as_str()), (1, Some("JOB_STATE_DONE")));
    let id = jobs[0]["job_id"].as_str().unwrap();
    let shown = done(folder, &["jobs", "show", id, "--data", data]);
    assert!(shown.contains("done") && shown.contains("12 labelled") && shown.contains("score 12/12"), "{shown}");
    done(folder, &["jobs", "export", id, "--out", "exported", "--data", data]);
    assert_eq!(results(folder, "whole"), results(folder, "exported"));
    done(folder, &["jobs", "delete", id, "--data", data]);
    let gone = dnd(folder, &["jobs", "show", id, "--data", data]);
    assert!(gone.code == 2 && gone.err.contains(id), "{}", gone.err);
}

/// Two orchestrators on one store share a job; one of them is stopped past its leases and wakes again.
fn shared(folder: &Path, mesh: &Mesh, what: &[String], store: &[&str]) {
    let start = || mesh.another_orchestrator(&[store, &["--lease", "2", "--units-in-flight", "2"]].concat());
    let [one, other]: [Service; 2] = [start(), start()];
    let (here, there) = (one.url(), other.url());
    let id = done(folder, &args(&["jobs", "create"], what, &["--endpoint", &here]));
    let id = id.trim();
    assert_eq!(done(folder, &args(&["jobs", "create"], what, &["--endpoint", &there])).trim(), id, "the same again is the same job");
    wait_for(folder, &there, id, |job| ended(job) > 0);
    one.signal("STOP");
    thread::sleep(Duration::from_secs(3));
    one.signal("CONT");
    let told = done(folder, &["jobs", "watch", id, "--json", "--endpoint", &here]);
    assert_eq!(job(folder, &there, id)["state"], "JOB_STATE_DONE");
    let events: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers: Vec<u64> = events.iter().map(|event| event["number"].as_str().unwrap().parse().unwrap()).filter(|number| *number > 0).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    let units: Vec<String> = events.iter().filter_map(|event| event.get("unit")).map(|unit| format!("{} {}", unit["layer"], unit["unit"])).collect();
    assert_eq!((units.len(), units.iter().collect::<BTreeSet<_>>().len()), (UNITS, UNITS), "each unit ends once");
    done(folder, &["jobs", "export", id, "--out", "shared", "--fresh", "--endpoint", &there]);
    assert_eq!(results(folder, "whole"), results(folder, "shared"));
}

#[test]
fn two_orchestrators_share_a_job_though_one_is_stopped_past_its_leases() {
    let (folder, mesh, what) = begin();
    let folder = folder.path();
    let file = folder.join("file");
    shared(folder, &mesh, &what, &["--data", file.to_str().unwrap()]);
    if let Some(url) = postgres("shared") {
        let blobs = folder.join("blobs");
        shared(folder, &mesh, &what, &["--data", blobs.to_str().unwrap(), "--store", &url]);
    }
}

#[test]
fn a_job_whose_service_is_away_pauses_and_goes_on_by_itself_and_one_that_was_cancelled_when_it_is_resumed() {
    let (folder, mut mesh, what) = begin();
    let folder = folder.path();
    let data = folder.join("data");
    let orchestrator = mesh.another_orchestrator(&["--data", data.to_str().unwrap()]);
    let endpoint = orchestrator.url();
    let id = done(folder, &args(&["jobs", "create"], &what, &["--endpoint", &endpoint]));
    let id = id.trim();
    mesh.models[3].kill();
    let paused = wait_for(folder, &endpoint, id, |job| job["state"] == "JOB_STATE_PAUSED");
    assert_eq!((paused["reason"].as_str(), ended(&paused)), (Some("SERVICE_AWAY"), 0), "no unit fails for it");
    assert!(paused["message"].as_str().unwrap().contains("diffusion"), "{paused}");
    mesh.models[3].restart();
    wait_for(folder, &endpoint, id, |job| job["state"] == "JOB_STATE_RUNNING");

    done(folder, &["jobs", "cancel", id, "--endpoint", &endpoint]);
    let cancelled = job(folder, &endpoint, id);
    assert_eq!(cancelled["state"], "JOB_STATE_CANCELLED");
    thread::sleep(Duration::from_millis(500));
    assert_eq!(ended(&job(folder, &endpoint, id)), ended(&cancelled));
    done(folder, &["jobs", "resume", id, "--endpoint", &endpoint]);
    done(folder, &["jobs", "watch", id, "--endpoint", &endpoint]);
    done(folder, &["jobs", "export", id, "--out", "resumed", "--endpoint", &endpoint]);
    assert_eq!(results(folder, "whole"), results(folder, "resumed"));
}
