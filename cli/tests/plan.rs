//! `dnd plan` on runs of the sketch suite.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path};

use dnd_testing::{pictures, sketch, write_pictures};
use dnd_tests::{Ran, dnd};

/// Labels units of the ResNet on the pictures of a folder.
fn dissect(folder: &Path, units: &str, images: &str, out: &str) -> Ran {
    let (suite, target) = (sketch(""), sketch("targets/resnet/resnet.onnx"));
    let models = ["--models", suite.to_str().unwrap(), "--target", target.to_str().unwrap(), "--layer", "layer2", "--units", units];
    dnd(folder, &[&["dissect"], &models[..], &["--images", images, "--out", out, "--num-inference-steps", "10", "--fresh"]].concat())
}

fn plan(folder: &Path, from: &str, units: &str, images: &str) -> Ran {
    dnd(folder, &["plan", "--from", from, "--units", units, "--images", images])
}

/// The seconds of a plan's line `time`.
fn seconds(ran: &Ran) -> f64 {
    let line = ran.out.lines().find_map(|line| line.strip_prefix("time ")).unwrap_or_else(|| panic!("{}{}", ran.out, ran.err));
    let mut words = line.trim().trim_start_matches("about ").split([' ', ':']);
    let number: f64 = words.next().unwrap().parse().unwrap();
    match words.next().unwrap() {
        "s" => number,
        "min" => 60.0 * number,
        unit => panic!("{unit}"),
    }
}

#[test]
fn what_is_no_measured_run_is_refused_with_what_would_be_one() {
    let folder = tempfile::tempdir().unwrap();
    let write = |text: &str| fs::write(folder.path().join("run.json"), text).unwrap();
    let stages = r#""stages": {"probe": {"seconds": 1, "calls": 9, "reused": 0}, "generate": {"seconds": 0, "calls": 0, "reused": 100}}"#;
    for (interrupted, units, says) in [(true, 1, "broken off"), (false, 0, "labelled no unit"), (false, 1, "--fresh")] {
        write(&format!(r#"{{"interrupted": {interrupted}, "seconds": 2.5, "units": {{"labelled": {units}}}, "pictures": 9, {stages}}}"#));
        let refused = plan(folder.path(), "run.json", "10", "100");
        assert!(refused.code == 2 && refused.err.contains("run.json") && refused.err.contains(says), "{}", refused.err);
    }
    let nothing = plan(folder.path(), "nowhere", "10", "100");
    assert!(nothing.code == 2 && nothing.err.contains("nowhere"), "{}", nothing.err);
    assert_eq!(plan(folder.path(), "run.json", "0", "100").code, 2);
}

#[test]
#[ignore = "takes a minute, and needs a machine that does nothing else"]
fn a_plan_from_a_small_run_is_near_what_the_large_run_takes() {
    let folder = tempfile::tempdir().unwrap();
    write_pictures(&folder.path().join("few"), &pictures(500, 4));
    write_pictures(&folder.path().join("many"), &pictures(2000, 1));
    let mut predicted = Vec::new();
    for out in ["before", "after"] {
        assert_eq!(dissect(folder.path(), "0-11", "few", out).code, 0);
        predicted.push(seconds(&plan(folder.path(), out, "32", "2000")));
        if out == "before" {
            assert_eq!(dissect(folder.path(), "0-31", "many", "large").code, 0);
        }
    }
    let measured: serde_json::Value = serde_json::from_str(&fs::read_to_string(folder.path().join("large/run.json")).unwrap()).unwrap();
    let (measured, predicted) = (measured["seconds"].as_f64().unwrap(), predicted.iter().sum::<f64>() / 2.0);
    println!("predicted {predicted:.1} s, measured {measured:.1} s: {:+.0} %", 100.0 * (predicted / measured - 1.0));
    assert!((predicted / measured - 1.0).abs() < 0.25, "predicted {predicted:.1} s, measured {measured:.1} s");
}
