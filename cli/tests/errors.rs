//! What `dnd` says, and its exit code, when something can't be right. No panic, nothing written over.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path};

use dnd_testing::{copy_without, pictures, sketch, write_pictures};
use dnd_tests::{Ran, dnd};

const SHORT: [&str; 6] = ["--num-inference-steps", "6", "--images-per-concept", "3", "--candidates", "1"];

/// Runs `dnd dissect` on the planted network with the sketch suite, some flags changed.
fn dissect(folder: &Path, target: &str, layer: &str, images: &str, more: &[&str]) -> Ran {
    let suite = sketch("");
    let args = ["dissect", "--target", target, "--layer", layer, "--images", images, "--out", "out", "--models", suite.to_str().unwrap()];
    dnd(folder, &[&args, &SHORT[..], more].concat())
}

fn planted() -> String {
    sketch("targets/planted/planted.onnx").display().to_string()
}

/// A folder with good pictures in `pictures`.
fn folder(count: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_pictures(&folder.path().join("pictures"), &pictures(count, 5));
    folder
}

fn refused(ran: &Ran, code: i32, parts: &[&str]) {
    assert_eq!(ran.code, code, "{}{}", ran.out, ran.err);
    for part in parts {
        assert!(ran.err.contains(part), "{part:?} is not in: {}", ran.err);
    }
    assert!(!ran.err.contains("panicked") && !ran.err.contains("RUST_BACKTRACE"), "{}", ran.err);
}

#[test]
fn files_and_folders_that_are_not_there_or_are_something_else() {
    let folder = folder(2);
    refused(&dissect(folder.path(), "nowhere.onnx", "colour", "pictures", &[]), 2, &["nowhere.onnx", "no such file"]);
    refused(&dissect(folder.path(), &planted(), "colour", "nowhere", &[]), 2, &["nowhere", "no such file or folder"]);
    refused(&dissect(folder.path(), "pictures", "colour", "pictures", &[]), 2, &["pictures", "is a folder", "ONNX file"]);
    fs::create_dir(folder.path().join("empty")).unwrap();
    refused(&dissect(folder.path(), &planted(), "colour", "empty", &[]), 2, &["empty", "no pictures", "png"]);
    fs::write(folder.path().join("text.onnx"), "this is no network").unwrap();
    refused(&dissect(folder.path(), "text.onnx", "colour", "pictures", &[]), 2, &["text.onnx", "not an ONNX file"]);
    refused(&dnd(folder.path(), &["layers", "text.onnx"]), 2, &["not an ONNX file"]);
    refused(&dnd(folder.path(), &["layers", "nowhere.onnx"]), 2, &["no such file"]);
}

#[test]
fn layers_and_units_that_the_network_does_not_have() {
    let folder = folder(2);
    refused(&dissect(folder.path(), &planted(), "color", "pictures", &[]), 2, &["\"color\"", "nearest", "colour"]);
    refused(&dissect(folder.path(), &planted(), "colour", "pictures", &["--units", "3,12"]), 2, &["unit 12", "colour", "0 to 11"]);
    refused(&dissect(folder.path(), &planted(), "colour", "pictures", &["--units", "9-3"]), 2, &["9-3"]);
    assert!(!folder.path().join("out").exists(), "a run that never began leaves nothing");
}

#[test]
fn a_folder_without_jobs_is_looked_at_and_left_as_it_was() {
    let folder = folder(1);
    let data = folder.path().join("pictures");
    for command in [&["jobs", "list"][..], &["jobs", "show", "any"], &["cache", "stats"], &["cache", "prune"]] {
        let of = |data: &Path| dnd(folder.path(), &[command, &["--data", data.to_str().unwrap()]].concat());
        refused(&of(&data), 2, &["pictures", "nothing is kept in it"]);
        refused(&of(&folder.path().join("nowhere")), 2, &["nowhere", "no such folder"]);
    }
    assert!(!data.join("store.sqlite").exists() && !folder.path().join("nowhere").exists());
}

#[test]
fn constants_out_of_range_are_named() {
    let folder = folder(2);
    refused(&dissect(folder.path(), &planted(), "colour", "pictures", &["--crop-iou", "1.5"]), 2, &["crop_iou", "0 to 1"]);
    fs::write(folder.path().join("dnd.toml"), "sede = 1\n").unwrap();
    refused(&dissect(folder.path(), &planted(), "colour", "pictures", &["--config", "dnd.toml"]), 2, &["dnd.toml", "sede"]);
}

#[test]
fn an_endpoint_with_nobody_there_and_no_suite_at_all() {
    let folder = folder(2);
    let args = ["dissect", "--target", &planted(), "--layer", "colour", "--images", "pictures", "--out", "out"];
    refused(&dnd(folder.path(), &[&args[..], &["--endpoint", "http://127.0.0.1:9"]].concat()), 1, &["http://127.0.0.1:9", "nobody answers"]);
    refused(&dnd(folder.path(), &[&args[..], &["--endpoint", "not a url"]].concat()), 2, &["not a url", "http://localhost:50051"]);
    refused(&dnd(folder.path(), &args), 2, &["--models", "--endpoint", "models/sketch", "drawn pictures only", "Stable Diffusion"]);
}

#[test]
fn a_suite_with_a_file_missing() {
    let folder = folder(2);
    copy_without(&sketch(""), &folder.path().join("suite"), &["diffusion/unet/model.onnx", "probing.tar"]);
    let args = ["dissect", "--target", &planted(), "--layer", "colour", "--images", "pictures", "--out", "out", "--models", "suite"];
    refused(&dnd(folder.path(), &args), 2, &["suite/diffusion", "unet/model.onnx"]);
    let checked = dnd(folder.path(), &["models", "check", "suite"]);
    refused(&checked, 2, &["1 of 4 models"]);
    assert!(checked.out.contains("captioner  ok") && checked.out.contains("unet/model.onnx"), "{}", checked.out);
}

#[test]
fn clip_as_the_captioner_wants_its_concepts() {
    let folder = folder(2);
    let suite = folder.path().join("suite");
    copy_without(&sketch(""), &suite, &["probing.tar"]);
    fs::remove_dir_all(suite.join("captioner")).unwrap();
    copy_without(&sketch("clip"), &suite.join("captioner"), &[]);
    let args = ["dissect", "--target", &planted(), "--layer", "colour", "--images", "pictures", "--out", "out", "--models", "suite"];
    refused(&dnd(folder.path(), &args), 2, &["suite/captioner/config.json", "--concepts"]);
    fs::write(folder.path().join("concepts.txt"), "red\na blue circle\n").unwrap();
    let checked = dnd(folder.path(), &["models", "check", "suite", "--concepts", "concepts.txt"]);
    assert!(checked.code == 0 && checked.out.contains("captioner  ok     clip"), "{}{}", checked.out, checked.err);
}

#[test]
fn bad_pictures_among_good_ones_are_skipped_and_said_and_few_pictures_are_all_used() {
    let folder = folder(8);
    let at = |name: &str| folder.path().join("pictures").join(name);
    fs::write(at("empty.png"), "").unwrap();
    fs::write(at("text.jpg"), "text in disguise").unwrap();
    let whole = fs::read(at(&pictures(1, 1)[0].0)).unwrap();
    fs::write(at("truncated.png"), &whole[..whole.len() / 2]).unwrap();
    image::GrayImage::new(12_000, 12_000).save(at("huge.png")).unwrap();
    image::GrayImage::new(1, 1).save(at("one.png")).unwrap();
    std::os::unix::fs::symlink("nowhere.png", at("unreadable.png")).unwrap();
    let ran = dissect(folder.path(), &planted(), "colour", "pictures", &["--units", "4,11"]);
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
    assert!(ran.err.contains("has 9 good pictures, fewer than the 10"), "{}", ran.err);
    assert!(ran.out.contains("dead") && ran.out.contains("1 labelled, 1 dead, 0 failed; 5 pictures skipped"), "{}", ran.out);
    let skipped = fs::read_to_string(folder.path().join("out/skipped.csv")).unwrap();
    let lines: Vec<(&str, &str)> = skipped.lines().map(|line| line.split_once(',').unwrap()).collect();
    let [header, (empty, no_bytes), (huge, too_large), (text, no_picture), (truncated, _), (unreadable, gone)] = lines[..] else { panic!("{skipped}") };
    assert_eq!(header, ("path", "reason"));
    assert_eq!([empty, huge, text, truncated, unreadable], ["empty.png", "huge.png", "text.jpg", "truncated.png", "unreadable.png"]);
    assert!(
        no_bytes.contains("empty") && too_large.contains("12000 x 12000") && no_picture.contains("not a picture") && gone.contains("No such file"),
        "{skipped}"
    );

    // The results are there to stay.
    let before = fs::read_to_string(folder.path().join("out/results.jsonl")).unwrap();
    refused(&dissect(folder.path(), &planted(), "colour", "pictures", &["--units", "1"]), 2, &["out", "is there already", "--fresh"]);
    assert_eq!(fs::read_to_string(folder.path().join("out/results.jsonl")).unwrap(), before);
}

#[test]
fn a_dry_run_says_what_there_is_to_do_and_leaves_nothing() {
    let folder = folder(40);
    let ran = dissect(folder.path(), &planted(), "colour,pattern", "pictures", &["--units", "0-3", "--dry-run"]);
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
    for line in ["2 layers, 8 units, 40 pictures", "  colour: 4 units", "  pattern: 4 units", "time    about", "space   at most"] {
        assert!(ran.out.contains(line), "{line:?} is not in: {}", ran.out);
    }
    assert!(!folder.path().join("out").exists());
    refused(&dissect(folder.path(), &planted(), "colour", "pictures", &["--units", "40", "--dry-run"]), 2, &["unit 40", "0 to 11"]);
}

#[test]
fn layers_are_listed_for_people_and_for_programs() {
    let folder = tempfile::tempdir().unwrap();
    let listed = dnd(folder.path(), &["layers", &planted()]);
    let line = listed.out.lines().find(|line| line.starts_with("colour ")).unwrap();
    assert_eq!(line.split_whitespace().collect::<Vec<_>>()[1..5], ["12", "32", "x", "32"]);
    let json = dnd(folder.path(), &["layers", &planted(), "--json"]);
    let described: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    let colour = described["layers"].as_array().unwrap().iter().find(|layer| layer["name"] == "colour").unwrap();
    assert_eq!((&colour["units"], &colour["map"]), (&serde_json::json!(12), &serde_json::json!([32, 32])));
}

#[test]
fn the_networks_pre_processing_is_shown_and_doubted_and_flags_change_it() {
    let folder = folder(4);
    let listed = dnd(folder.path(), &["layers", &planted()]);
    assert!(listed.out.contains("input 64 x 64; pre-processing: preprocessor_config.json beside the network"), "{}", listed.out);
    assert!(!listed.err.contains("warning"), "{}", listed.err);
    let bytes = ["--mean", "124,117,104"];
    let doubted = dnd(folder.path(), &[&["layers", &planted()], &bytes[..]].concat());
    assert!(doubted.code == 0 && doubted.out.contains("pre-processing: the request"), "{}{}", doubted.out, doubted.err);
    assert!(doubted.err.contains("warning: preprocessing: a mean of [124.0, 117.0, 104.0] can hardly be right"), "{}", doubted.err);

    let units = ["--units", "0"];
    let ran = dissect(folder.path(), &planted(), "colour", "pictures", &[&units[..], &bytes].concat());
    assert!(ran.err.contains("warning: preprocessing: a mean of"), "{}", ran.err);
    let run: serde_json::Value = serde_json::from_slice(&fs::read(folder.path().join("out/run.json")).unwrap()).unwrap();
    let text = run.to_string();
    assert!(text.contains("\"preprocessing_source\":\"the request\"") && text.contains("can hardly be right"), "{text}");

    for (flags, said) in [
        (&["--input-size", "32x32"][..], "32 x 32 (the request), but the network takes pictures of 64 x 64"),
        (&["--std", "1,1"], "std: [1.0, 1.0]; three finite numbers"),
        (&["--fixed-input", "training"], "such as training=0"),
        (&["--fixed-input", "training=0"], "no input \"training\""),
        (&["--preprocessing", "pictures.json"], "pictures.json"),
    ] {
        refused(&dnd(folder.path(), &[&["layers", &planted()], flags].concat()), 2, &[said]);
    }
}

#[test]
fn the_doctor_says_what_is_here_and_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let suite = sketch("");
    let well = dnd(folder.path(), &["doctor", "--models", suite.to_str().unwrap()]);
    assert_eq!(well.code, 0, "{}{}", well.out, well.err);
    assert!(well.out.contains("provider cpu        works") && well.out.contains("models              sketch"), "{}", well.out);
    let output = dnd_tests::command(folder.path(), &["doctor"]).env("ORT_DYLIB_PATH", "/nowhere/libonnxruntime.so").output().unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(out.contains("MISSING") && out.contains("/nowhere/libonnxruntime.so") && out.contains("models              none"), "{out}");
}

#[test]
fn a_selection_takes_pictures_or_an_earlier_result() {
    let folder = folder(40);
    let suite = sketch("");
    let models = ["--models", suite.to_str().unwrap()];
    let target = planted();
    let select = [
        "select",
        "--target",
        &target,
        "--layer",
        "colour",
        "--unit",
        "0",
        "--concept",
        "red backgrounds",
        "--concept",
        "blue stars",
        "--concept",
        "red backgrounds",
    ];
    let short = ["--num-inference-steps", "4", "--images-per-concept", "3"];
    let over_pictures = dnd(folder.path(), &[&select[..], &["--images", "pictures"], &models, &short].concat());
    assert_eq!(over_pictures.code, 0, "{}", over_pictures.err);
    assert_eq!(over_pictures.out.matches("red backgrounds").count(), 1, "repeated ones count once: {}", over_pictures.out);

    let same = ["--num-inference-steps", "4", "--images-per-concept", "3", "--candidates", "1"];
    let args = ["dissect", "--target", &target, "--layer", "colour", "--units", "0", "--images", "pictures", "--out", "out"];
    assert_eq!(dnd(folder.path(), &[&args[..], &models, &same].concat()).code, 0);
    let over_result = dnd(folder.path(), &[&select[..], &["--from", "out"], &models, &short].concat());
    assert_eq!(over_result.code, 0, "{}", over_result.err);
    assert_eq!(over_pictures.out, over_result.out, "the same images, the same scores");

    let missing =
        dnd(folder.path(), &["select", "--target", &target, "--layer", "colour", "--unit", "5", "--concept", "red", "--from", "out", models[0], models[1]]);
    refused(&missing, 2, &["results.jsonl", "colour unit 5"]);
}
