//! What a running mesh measures: the names and labels that the documentation lists, and `dnd top` over all its admin ports.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use dnd_testing::{pictures, sketch, write_pictures};
use dnd_tests::{Mesh, Service, dnd, get};

/// Metrics by name, with their labels.
type Table = BTreeMap<String, BTreeSet<String>>;

/// What docs/metrics.md lists, with the series that a histogram has.
fn listed() -> Table {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md")).unwrap();
    let mut table = Table::new();
    for row in page.lines().filter_map(|line| line.strip_prefix("| `")) {
        let [name, kind, labels, _] = row.trim_end_matches(" |").splitn(4, " | ").collect::<Vec<_>>()[..] else { panic!("{row}") };
        let labels: BTreeSet<String> = labels.split(", ").filter(|label| !label.is_empty()).map(str::to_owned).collect();
        let endings: &[&str] = if kind == "Histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
        for ending in endings {
            let labels = labels.iter().cloned().chain((*ending == "_bucket").then(|| "le".to_owned())).collect();
            table.insert(format!("{}{ending}", name.trim_end_matches('`')), labels);
        }
    }
    table
}

/// The series of a text of metrics, as they are exposed.
fn exposed(text: &str) -> Table {
    let mut table = Table::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let series = line.rsplit_once(' ').unwrap().0;
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let labels = labels.split("\",").filter_map(|label| label.split_once('=')).map(|(label, _)| label.to_owned()).collect();
        let before = table.insert(name.to_owned(), labels);
        assert!(before.is_none_or(|before| before == table[name]), "{name} has other labels at times");
    }
    table
}

#[test]
fn what_is_measured_is_what_the_documentation_lists_and_top_shows_it_of_every_service() {
    let folder = tempfile::tempdir().unwrap();
    write_pictures(&folder.path().join("pictures"), &pictures(80, 4));
    let mesh = Mesh::start_with(&sketch(""), &["--admin", "127.0.0.1:0"]);
    fs::write(folder.path().join("tokens.toml"), "").unwrap();
    // Of one that wants tokens, so that somebody is refused.
    let guarded = mesh.another_orchestrator(&["--admin", "127.0.0.1:0", "--tokens", folder.path().join("tokens.toml").to_str().unwrap()]);
    assert_eq!(dnd(folder.path(), &["jobs", "list", "--endpoint", &guarded.url()]).code, 1);
    let target = sketch("targets/planted/planted.onnx");
    let what = ["dissect", "--layer", "mixture", "--units", "0-1", "--images", "pictures", "--out", "out", "--target", target.to_str().unwrap()];
    let small = ["--num-inference-steps", "2", "--images-per-concept", "2", "--candidates", "2", "--endpoint", &mesh.orchestrator.url()];
    let ran = dnd(folder.path(), &[&what[..], &small].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);

    let admins: Vec<String> = mesh.models.iter().chain([&mesh.orchestrator, &guarded]).map(Service::admin).collect();
    let mut all = Table::new();
    for admin in &admins {
        for (name, labels) in exposed(&get(admin, "/metrics").1) {
            assert_eq!(all.entry(name.clone()).or_insert_with(|| labels.clone()), &labels, "{name}");
        }
    }
    assert_eq!(all, listed(), "docs/metrics.md lists what is exposed, and all of it");

    let admins: Vec<&str> = admins.iter().map(String::as_str).collect();
    let ran = dnd(folder.path(), &[&["top", "--once"], &admins[..]].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    let row = |name: &str| -> Vec<String> {
        let line = ran.out.lines().find(|line| line.split_whitespace().next() == Some(name)).unwrap_or_else(|| panic!("no {name}: {}", ran.out));
        line.split_whitespace().map(str::to_owned).collect()
    };
    for name in ["activation", "captioner", "summarizer", "diffusion", "clip"] {
        assert_eq!(row(&format!("dnd-{name}"))[1], "1");
    }
    assert_eq!(row("dnd-orchestrator")[1], "2", "replicas are counted together");
    for model in ["target", "captioner", "summarizer", "diffusion", "clip-images"] {
        let work: u64 = row(model).iter().rev().nth(1).unwrap().parse().unwrap();
        assert!(work > 0, "{model} has worked: {}", ran.out);
    }
    // Two units, each through every stage, and the pass before them.
    assert_eq!(row("probe")[1], "1");
    for stage in ["crop", "caption", "summarize", "generate", "score"] {
        assert_eq!(row(stage)[1], "2", "{}", ran.out);
    }
    assert!(ran.out.contains("2 labelled, 0 dead, 0 failed") && ran.out.contains("slowest stage: "), "{}", ran.out);

    let ran = dnd(folder.path(), &["top", "--once", "127.0.0.1:9"]);
    assert_eq!((ran.code, ran.out.contains("127.0.0.1:9: nobody answers")), (1, true), "{}{}", ran.out, ran.err);
}
