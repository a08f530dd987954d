//! The same job in one process and over real ports, with other batches and another number of units in flight: the same bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::Stdio,
};

use dnd_testing::{pictures, sketch, write_pictures};
use dnd_tests::{Mesh, Ran, command, dnd};

/// A small job, on what only the client sees.
const JOB: [&str; 15] = [
    "dissect",
    "--target",
    "client/planted.onnx",
    "--layer",
    "colour,mixture",
    "--units",
    "0,3,11",
    "--images",
    "client/pictures",
    "--num-inference-steps",
    "3",
    "--images-per-concept",
    "3",
    "--candidates",
    "2",
];

fn job(folder: &Path, out: &str, more: &[&str]) -> Ran {
    let ran = dnd(folder, &[&JOB[..], &["--out", out], more].concat());
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
    ran
}

fn client(folder: &Path) {
    write_pictures(&folder.join("client/pictures"), &pictures(80, 4));
    for file in ["planted.onnx", "preprocessor_config.json"] {
        fs::copy(sketch("targets/planted").join(file), folder.join("client").join(file)).unwrap();
    }
}

fn results(folder: &Path, out: &str) -> String {
    fs::read_to_string(folder.join(out).join("results.jsonl")).unwrap()
}

#[test]
fn services_over_ports_give_the_same_bytes_as_one_process() {
    let folder = tempfile::tempdir().unwrap();
    client(folder.path());
    let suite = sketch("");
    let suite = suite.to_str().unwrap();
    let inside = job(folder.path(), "inside", &["--models", suite]);
    assert!(inside.err.contains("drawn pictures only"), "the suite's notice is shown: {}", inside.err);
    let mut mesh = Mesh::start(suite.as_ref());
    job(folder.path(), "ports", &["--endpoint", &mesh.orchestrator.url()]);
    assert_eq!(results(folder.path(), "inside"), results(folder.path(), "ports"));
    assert_eq!(results(folder.path(), "inside").lines().count(), 6);

    // What the results refer to is there, under its digest.
    for line in results(folder.path(), "ports").lines() {
        let unit: serde_json::Value = serde_json::from_str(line).unwrap();
        for image in unit["images"].as_array().unwrap() {
            let digest = image["digest"].as_str().unwrap();
            assert!(folder.path().join("ports/pictures").join(digest).is_file());
        }
    }
    for file in ["results.csv", "report.html", "skipped.csv", "run.json"] {
        assert!(folder.path().join("ports").join(file).is_file(), "{file}");
    }
    let run: serde_json::Value = serde_json::from_str(&fs::read_to_string(folder.path().join("ports/run.json")).unwrap()).unwrap();
    assert_eq!(run["provenance"]["captioner"]["digest"].as_str().unwrap().len(), 64);
    assert!(run["notices"][0].as_str().unwrap().contains("drawn pictures only"));
    assert!(fs::read_to_string(folder.path().join("ports/report.html")).unwrap().contains("drawn pictures only"));

    // A model service that dies in the middle of a job, and comes back, changes nothing.
    let endpoint = mesh.orchestrator.url();
    let mut dnd = command(folder.path(), &[&JOB[..], &["--out", "killed", "--endpoint", &endpoint]].concat()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(dnd.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("probe 80/80")));
    let [activation, captioner, _, diffusion, _] = &mut mesh.models;
    captioner.kill_and_restart();
    diffusion.kill_and_restart();
    assert!(lines.any(|line| line.contains("crop 6/6")));
    // With its uploads.
    activation.kill_and_restart();
    let rest: Vec<String> = lines.collect();
    assert!(dnd.wait().unwrap().success(), "{rest:?}");
    assert_eq!(results(folder.path(), "inside"), results(folder.path(), "killed"));
}

#[test]
fn the_same_seed_gives_the_same_bytes_however_much_is_in_flight_and_another_seed_gives_other_pictures() {
    let folder = tempfile::tempdir().unwrap();
    client(folder.path());
    let suite = sketch("");
    let models = ["--models", suite.to_str().unwrap()];
    job(folder.path(), "first", &models);
    job(folder.path(), "second", &[&models[..], &["--units-in-flight", "1", "--batch", "1", "--sessions", "1"]].concat());
    job(folder.path(), "third", &[&models[..], &["--units-in-flight", "6", "--batch", "5", "--sessions", "3"]].concat());
    assert_eq!(results(folder.path(), "first"), results(folder.path(), "second"));
    assert_eq!(results(folder.path(), "first"), results(folder.path(), "third"));
    job(folder.path(), "other", &[&models[..], &["--seed", "1"]].concat());
    // Of a background alone two seeds may well draw the same picture; of anything with an outline or a pattern they do not.
    let drawn = |out: &str| -> Vec<String> {
        let units = results(folder.path(), out).lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()).collect::<Vec<_>>();
        let concepts = units.iter().filter(|unit| unit["layer"] == "mixture").flat_map(|unit| unit["concepts"].as_array().unwrap());
        let pictures = concepts.flat_map(|concept| concept["pictures"].as_array().unwrap());
        pictures.map(|picture| picture["digest"].as_str().unwrap().to_owned()).collect()
    };
    let (first, other) = (drawn("first"), drawn("other"));
    assert!(!first.is_empty() && other.iter().all(|digest| !first.contains(digest)));
}
