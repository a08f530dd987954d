//! A job whose language model is behind an HTTP endpoint: labels, what they took, and the budget that stops it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    http::{HeaderMap, header},
    routing::post,
};
use dnd_testing::{HttpServer, pictures, sketch, write_pictures};
use dnd_tests::{Ran, command};
use serde_json::{Value, json};

const KEY: &str = "sk-very-secret-0123456789";

/// Words that captions share whatever they show.
const EMPTY_WORDS: [&str; 10] = ["a", "an", "and", "background", "in", "of", "on", "picture", "the", "with"];

/// A language model by rule: it leaves a caption as it is, and names the words that more than half of the descriptions have.
fn answer(prompt: &str) -> String {
    let (question, texts) = prompt.split_once(": ").unwrap();
    if question.contains("simplifies") {
        return texts.to_owned();
    }
    let texts: Vec<BTreeSet<&str>> = texts.split(", ").map(|text| text.split(' ').collect()).collect();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for word in texts.iter().flatten().filter(|word| !EMPTY_WORDS.contains(*word)) {
        *counts.entry(word).or_default() += 1;
    }
    let shared: Vec<&str> = counts.into_iter().filter(|(_, count)| 2 * count > texts.len()).map(|(word, _)| word).collect();
    shared.join(" ")
}

/// An endpoint with that model, which counts 100 tokens for a prompt and 10 for an answer; beside it the keys that it was asked with.
fn endpoint() -> (HttpServer, Arc<Mutex<Vec<String>>>) {
    let keys: Arc<Mutex<Vec<String>>> = Arc::default();
    let seen = Arc::clone(&keys);
    let complete = move |headers: HeaderMap, Json(question): Json<Value>| {
        let key = headers[header::AUTHORIZATION].to_str().unwrap().to_owned();
        seen.lock().unwrap().push(key);
        let said = answer(question["messages"].as_array().unwrap().last().unwrap()["content"].as_str().unwrap());
        let answer = json!({
            "choices": [{"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10},
        });
        async move { Json(answer) }
    };
    (HttpServer::start(Router::new().route("/v1/chat/completions", post(complete))), keys)
}

/// Dissects two units of the planted network, one after the other.
fn dissect(folder: &Path, server: &HttpServer, out: &str, more: &[&str]) -> Ran {
    let (suite, target, url) = (sketch(""), sketch("targets/planted/planted.onnx"), format!("{}/v1", server.url()));
    let models = ["--models", suite.to_str().unwrap(), "--target", target.to_str().unwrap(), "--images", "pictures", "--out", out];
    let short = ["--layer", "colour", "--units", "0,3", "--num-inference-steps", "3", "--images-per-concept", "2", "--candidates", "2"];
    let llm = ["--units-in-flight", "1", "--llm-url", &url, "--llm-model", "rule", "--llm-price-in", "1", "--llm-price-out", "2"];
    let output = command(folder, &[&["dissect"], &models[..], &short, &llm, more].concat()).env("DND_LLM_KEY", KEY).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

fn results(folder: &Path, out: &str) -> Vec<String> {
    fs::read_to_string(folder.join(out).join("results.jsonl")).unwrap().lines().map(str::to_owned).collect()
}

fn run_of(folder: &Path, out: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(folder.join(out).join("run.json")).unwrap()).unwrap()
}

fn number(value: &Value) -> u64 {
    value.as_str().unwrap().parse().unwrap()
}

#[test]
fn units_are_labelled_by_a_model_over_http_and_a_budget_stops_the_job_with_what_is_finished() {
    let folder = tempfile::tempdir().unwrap();
    write_pictures(&folder.path().join("pictures"), &pictures(80, 4));
    let (server, keys) = endpoint();
    let ran = dissect(folder.path(), &server, "whole", &[]);
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
    assert!(ran.err.contains("not promised to repeat"), "the notice is shown: {}", ran.err);
    let lines = results(folder.path(), "whole");
    let units: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let labels: Vec<&str> = units.iter().map(|unit| unit["label"].as_str().unwrap()).collect();
    assert!(labels[0].split(' ').any(|word| word == "red") && labels[1].split(' ').any(|word| word == "green"), "{labels:?}");

    // What the units took adds up to what the job took, which the endpoint has counted, too.
    let calls: Vec<u64> = units.iter().map(|unit| number(&unit["usage"]["calls"])).collect();
    let run = run_of(folder.path(), "whole");
    let asked = keys.lock().unwrap().len() as u64;
    assert_eq!((calls.iter().sum::<u64>(), run["usage"]["calls"].as_u64()), (asked, Some(asked)));
    assert!(calls.iter().all(|calls| (3..=12).contains(calls)), "a question for each caption and two summaries: {calls:?}");
    assert_eq!((run["usage"]["prompt_tokens"].as_u64(), run["usage"]["answer_tokens"].as_u64()), (Some(100 * asked), Some(10 * asked)));
    let cost = run["usage"]["cost"].as_f64().unwrap();
    assert!((cost - 120e-6 * asked as f64).abs() < 1e-9, "{cost}");
    let model = &run["provenance"]["summarizer"];
    assert_eq!((model["name"].as_str(), model["layout"].as_str(), model["engine"].as_str()), (Some("rule"), Some("openai"), Some("http")));
    let told = format!("{asked} answers, {} tokens of prompts, {} of answers", 100 * asked, 10 * asked);
    assert!(ran.out.contains(&told) && fs::read_to_string(folder.path().join("whole/report.html")).unwrap().contains(&told), "{}", ran.out);

    // Enough for the first unit, and not for the second.
    let budget = (110 * calls[0] + 1).to_string();
    let stopped = dissect(folder.path(), &server, "stopped", &["--llm-budget", &budget]);
    assert_eq!(stopped.code, 1, "{}{}", stopped.out, stopped.err);
    assert!(
        stopped.err.contains(&format!("the budget of {budget} tokens is reached")) && stopped.err.contains("what was finished is in stopped"),
        "{}",
        stopped.err
    );
    assert!(stopped.out.contains(labels[0]) && stopped.out.contains("1 labelled"), "what is finished is told: {}", stopped.out);
    assert_eq!(results(folder.path(), "stopped"), lines[..1]);
    let run = run_of(folder.path(), "stopped");
    assert!(run["interrupted"].as_bool().unwrap() && run["warnings"].to_string().contains("budget"), "{run}");
    let spent = run["usage"]["prompt_tokens"].as_u64().unwrap() + run["usage"]["answer_tokens"].as_u64().unwrap();
    assert!(spent >= budget.parse().unwrap(), "what the unfinished unit took is counted, too: {run}");

    // With a new budget the same command goes on: what was answered before is not asked again.
    let before = keys.lock().unwrap().len() as u64;
    let again = dissect(folder.path(), &server, "stopped", &[]);
    assert_eq!(again.code, 0, "{}{}", again.out, again.err);
    assert!(again.out.contains("2 labelled") && labels.iter().all(|label| again.out.contains(label)), "{}", again.out);
    let more = keys.lock().unwrap().len() as u64 - before;
    assert!(more < calls[1], "{more} questions, of {} that the second unit has in all", calls[1]);

    // The key went to the endpoint, and nowhere else.
    assert!(keys.lock().unwrap().iter().all(|key| *key == format!("Bearer {KEY}")));
    for out in ["whole", "stopped"] {
        for file in ["results.jsonl", "results.csv", "report.html", "skipped.csv", "run.json"] {
            assert!(!fs::read_to_string(folder.path().join(out).join(file)).unwrap().contains(KEY), "{out}/{file}");
        }
    }
    for ran in [&ran, &stopped, &again] {
        assert!(!ran.out.contains(KEY) && !ran.err.contains(KEY));
    }
}
