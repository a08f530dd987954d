//! What models have made is not made again: not by a second run, and not by one that goes on after a first was killed.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{fs, path::Path, process::Stdio, thread, time::Duration};

use dnd_testing::{pictures, sketch, write_pictures};
use dnd_tests::{Ran, command, dnd};
use serde_json::Value;

const STAGES: [&str; 6] = ["probe", "crop", "caption", "summarize", "generate", "score"];

fn arguments(folder: &Path, more: &[&str]) -> Vec<String> {
    let target = sketch("targets/planted/planted.onnx");
    let (models, images) = (sketch(""), folder.join("pictures"));
    let fixed = ["dissect", "--num-inference-steps", "3", "--images-per-concept", "3", "--layer", "colour,mixture", "--units", "0-4"];
    let paths = ["--target", target.to_str().unwrap(), "--models", models.to_str().unwrap(), "--images", images.to_str().unwrap()];
    fixed.iter().chain(&paths).chain(more).map(|arg| (*arg).to_owned()).collect()
}

fn run(folder: &Path, more: &[&str]) -> Ran {
    let args = arguments(folder, more);
    dnd(folder, &args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn done(folder: &Path, more: &[&str]) -> Ran {
    let ran = run(folder, more);
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
    ran
}

/// How often a run called a model in each stage.
fn calls(folder: &Path, out: &str) -> [u64; 6] {
    let run: Value = serde_json::from_slice(&fs::read(folder.join(out).join("run.json")).unwrap()).unwrap();
    STAGES.map(|stage| run["stages"][stage]["calls"].as_u64().unwrap())
}

fn results(folder: &Path, out: &str) -> String {
    fs::read_to_string(folder.join(out).join("results.jsonl")).unwrap()
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_pictures(&folder.path().join("pictures"), &pictures(80, 4));
    folder
}

#[test]
fn a_second_run_calls_no_model_and_a_changed_parameter_only_those_that_it_concerns() {
    let folder = folder();
    let folder = folder.path();
    done(folder, &["--out", "first", "--data", "made"]);
    let first = calls(folder, "first");
    assert!(first.iter().all(|calls| *calls > 0), "{first:?}");

    done(folder, &["--out", "second", "--data", "made"]);
    assert_eq!(calls(folder, "second"), [0; 6]);
    assert_eq!(results(folder, "first"), results(folder, "second"));

    done(folder, &["--out", "warmer", "--data", "made", "--temperature", "0.9"]);
    let [probe, crop, caption, summarize, generate, _] = calls(folder, "warmer");
    assert_eq!([probe, crop, caption], [0; 3], "what comes before the language model does not depend on its temperature");
    assert_eq!(summarize, first[3], "answers do");
    assert!(generate < first[4], "concepts that were drawn before are not drawn again");

    // What is said of the network beside its file is a part of what its activations depend on.
    done(folder, &["--out", "told", "--data", "made", "--data-format", "channels_first"]);
    let [probe, crop, caption, summarize, generate, score] = calls(folder, "told");
    assert_eq!([caption, summarize, generate], [0; 3]);
    assert!(probe == first[0] && crop == first[1] && score > 0, "{probe} {crop} {score}");

    // A picture that went missing is drawn again, and nothing else.
    let unit: Value = serde_json::from_str(results(folder, "first").lines().next().unwrap()).unwrap();
    fs::remove_file(folder.join("made").join(unit["concepts"][0]["pictures"][0]["digest"].as_str().unwrap())).unwrap();
    done(folder, &["--out", "third", "--data", "made"]);
    assert_eq!(calls(folder, "third"), [0, 0, 0, 0, 1, 0]);
    assert_eq!(results(folder, "first"), results(folder, "third"));

    // In shards the probing pass finds the same; of a set with a picture more only the shards that it changes are run.
    done(folder, &["--out", "sharded", "--data", "made", "--shard-pictures", "30", "--shards-in-flight", "3"]);
    assert_eq!(calls(folder, "sharded"), [80, 0, 0, 0, 0, 0]);
    assert_eq!(results(folder, "first"), results(folder, "sharded"));
    fs::write(folder.join("pictures/zzz.png"), "no picture").unwrap();
    let more = done(folder, &["--out", "more", "--data", "made", "--shard-pictures", "30"]);
    assert!(more.err.contains("zzz.png"), "{}", more.err);
    assert_eq!(calls(folder, "more"), [20, 0, 0, 0, 0, 0]);
    assert_eq!(results(folder, "first"), results(folder, "more"));
}

#[test]
fn a_run_that_was_killed_goes_on_with_what_it_had_made() {
    let folder = folder();
    let folder = folder.path();
    done(folder, &["--out", "whole"]);

    let args = arguments(folder, &["--out", "killed", "--units-in-flight", "1"]);
    let mut child = command(folder, &args.iter().map(String::as_str).collect::<Vec<_>>()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let lines = || fs::read_to_string(folder.join("killed/results.jsonl")).unwrap_or_default().lines().count();
    while lines() < 3 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
        thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();

    let again = done(folder, &["--out", "killed", "--units-in-flight", "1"]);
    assert!(again.err.contains("broken off"), "{}", again.err);
    assert_eq!(results(folder, "whole"), results(folder, "killed"));
    let (whole, both) = (calls(folder, "whole"), calls(folder, "killed"));
    assert!(both.iter().zip(&whole).all(|(both, whole)| both <= whole), "{both:?} of {whole:?}: what the first had made, the second did not make again");

    // A run that is whole is left alone, unless all is to be made anew.
    let refused = run(folder, &["--out", "killed"]);
    assert!(refused.code != 0 && refused.err.contains("--fresh"), "{}", refused.err);
    done(folder, &["--out", "killed", "--fresh"]);
    assert_eq!(calls(folder, "killed"), whole);
}
