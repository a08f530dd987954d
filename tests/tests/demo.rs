//! What `make demo` shows: neurons whose concepts are known get the right labels.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use dnd_testing::sketch;
use dnd_tests::dnd;

/// Count and total of a line such as `live units   40 of 46  (87 %)`.
fn share(out: &str, line: &str) -> (u32, u32) {
    let figures = out.lines().find_map(|l| l.trim().strip_prefix(line)).unwrap_or_else(|| panic!("{line:?} is not in: {out}"));
    let words: Vec<&str> = figures.split_whitespace().collect();
    let shares = words.windows(3).filter(|words| words[1] == "of").find_map(|words| Some((words[0].parse().ok()?, words[2].parse().ok()?)));
    shares.unwrap_or_else(|| panic!("no figures in {figures:?}"))
}

#[test]
fn the_demo_labels_most_units_right_and_reports_the_dead() {
    let folder = tempfile::tempdir().unwrap();
    let suite = sketch("");
    let ran = dnd(folder.path(), &["demo", "--models", suite.to_str().unwrap(), "--out", "demo"]);
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
    let (right, live) = share(&ran.out, "live units");
    assert!(live >= 40 && 100 * right >= 85 * live, "{}", ran.out);
    let (by_chance, _) = share(&ran.out, "the labels shuffled over the units");
    assert!(4 * by_chance < live, "labels of other units are not right: {}", ran.out);
    assert!(share(&ran.out, "of these: combinations").1 >= 10, "{}", ran.out);
    assert_eq!(share(&ran.out, "reported as dead"), (2, 2));
    for file in ["planted/report.html", "planted/results.csv", "resnet/report.html", "resnet/results.jsonl"] {
        assert!(folder.path().join("demo").join(file).is_file(), "{file}");
    }
}

#[test]
#[ignore = "takes some minutes: the whole demo, twice"]
fn the_whole_demo_gives_the_same_bytes_whatever_is_run_together() {
    let folder = tempfile::tempdir().unwrap();
    let suite = sketch("");
    let demo = |out: &str, more: &[&str]| {
        let ran = dnd(folder.path(), &[&["demo", "--models", suite.to_str().unwrap(), "--out", out], more].concat());
        assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
        ["planted", "resnet"].map(|network| std::fs::read_to_string(folder.path().join(out).join(network).join("results.jsonl")).unwrap())
    };
    let once = demo("once", &[]);
    assert_eq!(once.iter().map(|results| results.lines().count()).sum::<usize>(), 68);
    assert!(once == demo("again", &["--units-in-flight", "3", "--batch", "5", "--sessions", "1"]));
}
