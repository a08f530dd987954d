//! Every step of the method against the same steps in Python, on transformers, diffusers, OpenCV and Pillow: goldens of tests/parity/reference.py.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path, sync::LazyLock};

use dnd_captioner::{Captioner, CaptionerArgs, Generation, Picture};
use dnd_method::{draw, prompts};
use dnd_onnx::{folder::ModelFolder, runtime::EngineArgs};
use dnd_summarizer::ChatTemplate;
use dnd_testing::sketch;
use dnd_tests::dnd;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// PyTorch and ONNX Runtime add up in another order.
const ACTIVATION: f64 = 1e-5;
/// Drawn pictures may differ by a level here and there, which moves what is seen of them.
const DRAWN: f64 = 1e-3;
const SIMILARITY: f64 = 1e-4;
/// Unequal activations that are this near each other, as a part of the largest, may change places.
const TIE: f64 = 1e-6;

#[derive(Deserialize)]
struct Job {
    name: String,
    target: String,
    layers: Vec<String>,
    units: Vec<u32>,
    arguments: std::collections::BTreeMap<String, String>,
    preprocessor: Option<Value>,
    scoring: String,
    results: Vec<Value>,
}

static JOBS: LazyLock<Vec<Job>> =
    LazyLock::new(|| serde_json::from_slice(&fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("parity/goldens/method.json")).unwrap()).unwrap());

/// Runs the job number `job` with the mesh, and holds it against the golden.
fn compare(job: usize) {
    compare_with(job, &[]);
}

/// As that, with some arguments changed.
fn compare_with(job: usize, changes: &[(&str, &str)]) {
    let job = &JOBS[job];
    let folder = tempfile::tempdir().unwrap();
    let target = sketch("targets").join(&job.target).join(format!("{}.onnx", job.target));
    let (models, images) = (sketch(""), sketch("probing.tar"));
    let units = job.units.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let layers = job.layers.join(",");
    let mut args = vec!["dissect", "--out", "out", "--models", models.to_str().unwrap(), "--images", images.to_str().unwrap()];
    args.extend(["--target", target.to_str().unwrap(), "--layer", &layers, "--units", &units]);
    let changed = |flag: &str| changes.iter().any(|(changed, _)| *changed == flag);
    args.extend(job.arguments.iter().filter(|(flag, _)| !changed(flag)).flat_map(|(flag, value)| [flag.as_str(), value]));
    args.extend(changes.iter().flat_map(|(flag, value)| [*flag, *value]));
    if let Some(preprocessor) = &job.preprocessor {
        fs::write(folder.path().join("preprocessor_config.json"), preprocessor.to_string()).unwrap();
        args.extend(["--preprocessing", "preprocessor_config.json"]);
    }
    let ran = dnd(folder.path(), &args);
    assert_eq!(ran.code, 0, "{}: {}{}", job.name, ran.out, ran.err);
    let results = fs::read_to_string(folder.path().join("out/results.jsonl")).unwrap();
    let results: Vec<Value> = results.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let unit_of = |layer: &Value, unit: &Value| results.iter().find(|ours| ours["layer"] == *layer && ours["unit"] == *unit).unwrap();
    for theirs in &job.results {
        let ours = unit_of(&theirs["layer"], &theirs["unit"]);
        Unit { what: format!("{}, {} {}", job.name, theirs["layer"], theirs["unit"]), ours, theirs }.compare(job, folder.path());
    }
}

struct Unit<'a> {
    what: String,
    ours: &'a Value,
    theirs: &'a Value,
}

impl Unit<'_> {
    fn compare(&self, job: &Job, folder: &Path) {
        let Self { what, ours, theirs } = self;
        let state = theirs["state"].as_str().unwrap();
        assert_eq!(ours["state"], format!("UNIT_STATE_{}", state.to_uppercase()), "{what}: {}", ours["message"]);
        if state == "dead" {
            return;
        }
        // Step 1.
        self.same("probed", "path");
        for list in ["crops", "images"] {
            self.same(list, "path");
            self.same(list, "box");
        }
        self.same("crops", "threshold");
        for list in ["probed", "crops", "images"] {
            self.near(&ours[list], &theirs[list], "activation", ACTIVATION, list);
        }
        // Step 2.
        self.same("images", "caption");
        self.same("images", "simplified");
        self.tokens(folder);
        self.prompts(job);
        assert_eq!(ours["answers"], theirs["answers"], "{what}");
        // Step 3.
        let mut candidates: Vec<&Value> = ours["concepts"].as_array().unwrap().iter().collect();
        candidates.sort_by_key(|concept| concept["candidate"].as_u64().unwrap());
        let candidates: Vec<&Value> = candidates.into_iter().map(|concept| &concept["concept"]).collect();
        assert_eq!(candidates, theirs["candidates"].as_array().unwrap().iter().collect::<Vec<_>>(), "{what}");
        self.same("concepts", "concept");
        assert_eq!((&ours["label"], &ours["labels"]), (&theirs["label"], &theirs["labels"]), "{what}");
        for (ours, theirs) in pairs(&ours["concepts"], &theirs["concepts"]) {
            let concept = format!("{what}, {}", ours["concept"]);
            let tied = self.tied(theirs);
            for (ours, theirs) in pairs(&ours["pictures"], &theirs["pictures"]) {
                if theirs.is_null() {
                    assert_ne!(ours["unusable"], "", "{concept}");
                } else if !tied {
                    assert_eq!(ours["rank"], theirs["rank"], "{concept}: {ours} {theirs}");
                }
            }
            self.near(&ours["pictures"], &theirs["pictures"], "activation", DRAWN, &concept);
            for (name, by_rank) in [("mean", true), ("topk_squared", true), ("image_products", false), ("topk_squared_image_products", false)] {
                let (ours, theirs) = (ours["scores"][name].as_f64().unwrap(), theirs["scores"][name].as_f64().unwrap());
                let allowed = if by_rank { 1e-6 } else { SIMILARITY } * theirs.abs().max(1.0);
                assert!(by_rank && tied || (ours - theirs).abs() <= allowed, "{concept}: {name} {ours}, not {theirs}");
            }
            assert_eq!(ours["score"], ours["scores"][&job.scoring], "{concept}");
        }
    }

    /// Whether a concept's pictures have activations so near to others of the unit that rounding decides their ranks.
    fn tied(&self, concept: &Value) -> bool {
        let activations = |concept: &Value| -> Vec<f64> { concept["pictures"].as_array().unwrap().iter().filter_map(|p| p["activation"].as_f64()).collect() };
        let all: Vec<f64> = self.theirs["concepts"].as_array().unwrap().iter().flat_map(activations).collect();
        let largest = all.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
        activations(concept).iter().any(|own| all.iter().any(|other| own != other && (own - other).abs() <= TIE * largest))
    }

    /// A field of each entry of a list is the same.
    fn same(&self, list: &str, field: &str) {
        let read = |unit: &Value| -> Vec<Value> { unit[list].as_array().unwrap().iter().map(|entry| plain(&entry[field])).collect() };
        assert_eq!(read(self.ours), read(self.theirs), "{}: {field} of {list}", self.what);
    }

    /// A number of each entry of a list is within a tolerance of the list's largest.
    fn near(&self, ours: &Value, theirs: &Value, field: &str, tolerance: f64, list: &str) {
        let largest = theirs.as_array().unwrap().iter().filter_map(|entry| entry[field].as_f64()).fold(0.0, |a: f64, b| a.max(b.abs()));
        for (ours, theirs) in pairs(ours, theirs) {
            let (ours, theirs) = (ours[field].as_f64(), theirs[field].as_f64());
            let off = (ours.unwrap_or_default() - theirs.unwrap_or_default()).abs();
            assert!(ours.is_some() == theirs.is_some() && off <= tolerance * largest, "{}: {field} of {list} is {ours:?}, not {theirs:?}", self.what);
        }
    }

    /// The captioner's tokens of the kept pictures are the library's.
    fn tokens(&self, folder: &Path) {
        static CAPTIONER: LazyLock<Captioner> =
            LazyLock::new(|| Captioner::load(&sketch("captioner"), &CaptionerArgs::default(), &EngineArgs::one_session()).unwrap());
        let runtime = tokio::runtime::Runtime::new().unwrap();
        for (ours, theirs) in pairs(&self.ours["images"], &self.theirs["images"]) {
            let bytes = fs::read(folder.join("out/pictures").join(ours["digest"].as_str().unwrap())).unwrap().into();
            let caption = runtime.block_on(CAPTIONER.caption(Picture { bytes, generation: Generation::default() })).unwrap();
            let tokens: Vec<u64> = theirs["tokens"].as_array().unwrap().iter().map(|token| token.as_u64().unwrap()).collect();
            assert_eq!(caption.token_ids.iter().map(|id| u64::from(*id)).collect::<Vec<_>>(), tokens, "{}: {}", self.what, ours["path"]);
        }
    }

    /// Prompts 1 and 2, rendered by the model's chat template, are the library's, byte by byte.
    fn prompts(&self, job: &Job) {
        let template = ChatTemplate::read(&ModelFolder::open(&sketch("summarizer")).unwrap()).unwrap();
        let digest = |messages: &[prompts::Message]| -> String {
            Sha256::digest(template.render(messages).unwrap()).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
        };
        let images = self.ours["images"].as_array().unwrap();
        let text = |image: &Value, field: &str| image[field].as_str().unwrap().to_owned();
        for (ours, theirs) in pairs(&self.ours["images"], &self.theirs["images"]) {
            assert_eq!(digest(&prompts::simplify(&text(ours, "caption"))), theirs["prompt"], "{}", self.what);
        }
        for (n, theirs) in (0..).zip(self.theirs["prompts"].as_array().unwrap()) {
            let mut descriptions: Vec<String> = images.iter().map(|image| text(image, "simplified")).collect();
            let (layer, unit) = (self.ours["layer"].as_str().unwrap(), self.ours["unit"].as_u64().unwrap() as u32);
            draw::shuffle(&mut descriptions, job.arguments["--seed"].parse().unwrap(), layer, unit, n);
            assert_eq!(digest(&prompts::summarize(&descriptions)), *theirs, "{}: summary {n}", self.what);
        }
    }
}

/// A value as the goldens have it: a box as its four edges.
fn plain(value: &Value) -> Value {
    match value.as_object() {
        Some(edges) => ["left", "top", "right", "bottom"].iter().map(|edge| edges.get(*edge).cloned().unwrap_or_default()).collect(),
        None => value.clone(),
    }
}

fn pairs<'a>(ours: &'a Value, theirs: &'a Value) -> Vec<(&'a Value, &'a Value)> {
    let (ours, theirs) = (ours.as_array().unwrap(), theirs.as_array().unwrap());
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).collect()
}

#[test]
fn planted_units_by_their_mean_and_greedily() {
    compare(0);
}

#[test]
fn planted_units_by_their_maximum_and_sampled() {
    compare(1);
}

#[test]
fn a_classifier_by_its_mean_through_a_centre_crop() {
    compare(2);
}

#[test]
fn a_classifier_by_its_maximum_and_greedily() {
    compare(3);
}

#[test]
fn a_classifier_by_its_maximum_sampled_and_less_guided() {
    compare(4);
}

/// Each change is of a constant that one step has.
#[test]
fn a_changed_constant_would_be_seen() {
    for (flag, value, step) in
        [("--crops-per-image", "1", "path of crops"), ("--caption-min-length", "16", "caption of images"), ("--overall-top", "4", "image_products")]
    {
        let seen = std::panic::catch_unwind(|| compare_with(3, &[(flag, value)])).unwrap_err();
        let message = seen.downcast_ref::<String>().unwrap();
        assert!(message.contains(step), "{flag} {value}: {message}");
    }
}

#[test]
fn there_are_many_units_many_candidates_and_every_scoring_function() {
    let units: Vec<&Value> = JOBS.iter().flat_map(|job| &job.results).collect();
    assert!(units.len() >= 24, "{}", units.len());
    let competing = units.iter().filter(|unit| unit["candidates"].as_array().is_some_and(|candidates| candidates.len() > 1)).count();
    assert!(competing >= 8, "{competing}");
    let scorings: std::collections::BTreeSet<&str> = JOBS.iter().map(|job| job.scoring.as_str()).collect();
    assert_eq!(scorings.len(), 4, "{scorings:?}");
    let (mut concepts, mut tied) = (0, 0);
    for unit in &units {
        let unit = Unit { what: String::new(), ours: unit, theirs: unit };
        for concept in unit.theirs["concepts"].as_array().into_iter().flatten() {
            concepts += 1;
            tied += u32::from(unit.tied(concept));
        }
    }
    assert!(tied * 10 <= concepts, "rounding decides the ranks of {tied} of {concepts} concepts");
}
