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

/// Seconds of the processor that programs which have been run took.
fn spent() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    // cutime and cstime of proc_pid_stat(5), in hundredths.
    fields[13..15].iter().map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
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
#[ignore = "takes a minute"]
fn a_plan_from_a_small_run_is_near_what_the_large_run_takes() {
    let folder = tempfile::tempdir().unwrap();
    write_pictures(&folder.path().join("few"), &pictures(500, 4));
    write_pictures(&folder.path().join("many"), &pictures(2000, 1));
    let before = spent();
    assert_eq!(dissect(folder.path(), "0-11", "few", "small").code, 0);
    let between = spent();
    assert_eq!(dissect(folder.path(), "0-31", "many", "large").code, 0);
    // Both ran with all that the machine gives. What else it does meanwhile changes the time that passes, and not the processor's.
    let took = (spent() - between) / (between - before);
    let planned = seconds(&plan(folder.path(), "small", "32", "2000")) / seconds(&plan(folder.path(), "small", "12", "500"));
    println!("planned {planned:.2} times the small run, took {took:.2} times: {:+.0} %", 100.0 * (planned / took - 1.0));
    assert!((planned / took - 1.0).abs() < 0.25, "planned {planned:.2}, took {took:.2}");
}
