//! SmolLM2-135M-Instruct with its real weights, beside what transformers makes of it (tests/parity/language.py).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use dnd_method::prompts::{Message, Role};
use dnd_onnx::{
    decoder::{Decoder, Names},
    folder::ModelFolder,
    runtime::EngineArgs,
    tokenizer::Tokenizer,
};
use dnd_summarizer::{ChatTemplate, Question, Summarizer};
use serde::Deserialize;
use serde_json::json;

/// Of the logits, as a share of the largest.
const LIMIT: f32 = 1e-4;
/// Two choices of a token that are nearer than this may be taken either way, and the answer parts there.
const NEAR: f64 = 1e-4;
const SEED: u64 = 7;
const LONGEST: u32 = 12;

#[derive(Deserialize)]
struct Golden {
    messages: Vec<Turn>,
    prompt: String,
    ids: Vec<u32>,
    greedy: Said,
    drawn: Option<Said>,
    hot: Option<Said>,
}

#[derive(Deserialize)]
struct Turn {
    role: String,
    content: String,
}

#[derive(Deserialize)]
struct Said {
    ids: Vec<u32>,
    text: String,
    margins: Vec<f64>,
}

fn folder() -> PathBuf {
    Path::new(&env::var("DND_PARITY").expect("DND_PARITY")).join("language")
}

fn messages(golden: &Golden) -> Vec<Message> {
    let message = |turn: &Turn| Message { role: if turn.role == "user" { Role::User } else { Role::Assistant }, content: turn.content.clone() };
    golden.messages.iter().map(message).collect()
}

/// The largest difference, as a share of the largest value.
fn apart(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let size = theirs.iter().fold(0.0_f32, |size, value| size.max(value.abs()));
    ours.iter().zip(theirs).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs())) / size
}

#[tokio::test]
#[ignore = "needs what tests/parity/language.py writes, in the folder DND_PARITY/language"]
async fn a_public_language_model_answers_as_in_transformers() {
    let (model, args) = (folder().join("smollm2"), EngineArgs::one_session());
    let goldens: Vec<Golden> = serde_json::from_str(&fs::read_to_string(folder().join("expected.json")).unwrap()).unwrap();
    assert!(goldens.len() >= 16);
    let mut rows = Vec::new();
    let mut row = |what: &str, measured: String, limit: &str, control: String| {
        println!("{what}: {measured}; {control}");
        rows.push(json!({"what": what, "reference": "transformers 5.24.0", "measured": measured, "limit": limit, "control": control}));
    };

    let opened = ModelFolder::open(&model).unwrap();
    let (chat, tokenizer) = (ChatTemplate::read(&opened).unwrap(), Tokenizer::of(&opened, "").unwrap());
    for golden in &goldens {
        let prompt = chat.render(&messages(golden)).unwrap();
        assert_eq!(prompt, golden.prompt);
        assert_eq!(tokenizer.encode(&prompt, false).unwrap(), golden.ids);
    }
    let others = goldens.iter().filter(|golden| tokenizer.encode(golden.prompt.trim_end(), false).unwrap() != golden.ids).count();
    let measured = format!("{0} of {0} equal, byte for byte and id for id", goldens.len());
    row("SmolLM2-135M-Instruct, prompts rendered and tokenised", measured, "all", format!("without the last line end {others} differ"));

    let bytes = fs::read(folder().join("logits.f32")).unwrap();
    let expected: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let vocabulary = expected.len() / goldens.len();
    let mut decoder = Decoder::load(&model.join("onnx/model.onnx"), None, &Names::default(), &args).unwrap();
    let mut logits = Vec::new();
    for golden in &goldens {
        let mut sequences = decoder.begin(1).unwrap();
        logits.extend(decoder.append(&mut sequences, &golden.ids, None).unwrap());
    }
    let theirs: Vec<&[f32]> = expected.chunks_exact(vocabulary).collect();
    let worst = logits.iter().zip(&theirs).fold(0.0_f32, |worst, (ours, theirs)| worst.max(apart(ours, theirs)));
    let others = logits.iter().zip(theirs.iter().cycle().skip(1)).fold(f32::INFINITY, |least, (ours, theirs)| least.min(apart(ours, theirs)));
    row(
        "SmolLM2-135M-Instruct, logits after a prompt, of the largest",
        format!("at most {worst:.1e}"),
        "1e-4",
        format!("another prompt's: at least {others:.1e}"),
    );
    assert!(worst <= LIMIT && others > LIMIT, "{worst} {others}");

    let (mut stepped, mut skipped) = (0.0_f32, f32::INFINITY);
    for (golden, whole) in goldens.iter().zip(&logits).filter(|(golden, _)| golden.ids.len() < 60) {
        let mut token_by_token = |ids: &[u32]| {
            let mut sequences = decoder.begin(1).unwrap();
            ids.iter().map(|id| decoder.append(&mut sequences, &[*id], None).unwrap().remove(0)).last().unwrap()
        };
        stepped = stepped.max(apart(&token_by_token(&golden.ids), whole));
        skipped = skipped.min(apart(&token_by_token(&golden.ids[1..]), whole));
    }
    row(
        "SmolLM2-135M-Instruct, a prompt token by token and at once",
        format!("at most {stepped:.1e}"),
        "1e-4",
        format!("without the first token: at least {skipped:.1e}"),
    );
    assert!(stepped <= LIMIT && skipped > LIMIT, "{stepped} {skipped}");

    let summarizer = Summarizer::load(&model, &args).unwrap();
    for (kind, temperature) in [("greedy", 0.0), ("temperature 0.3", 0.3), ("temperature 1", 1.0)] {
        let (mut asked, mut near, mut control) = (0, 0, 0);
        for (attempt, golden) in (0..).zip(&goldens) {
            let said = if temperature == 0.0 {
                Some(&golden.greedy)
            } else if temperature < 1.0 {
                golden.drawn.as_ref()
            } else {
                golden.hot.as_ref()
            };
            let Some(said) = said else { continue };
            asked += 1;
            let ask = |attempt, temperature| Question { messages: messages(golden), seed: SEED, attempt, temperature, max_new_tokens: LONGEST };
            let answer = summarizer.ask(ask(attempt, temperature)).await.unwrap();
            if (answer.text.as_str(), answer.answer_tokens as usize) != (said.text.as_str(), said.ids.len()) {
                let closest = said.margins.iter().copied().fold(f64::INFINITY, f64::min);
                assert!(closest < NEAR, "{kind}: {:?}, not {:?}; the closest choice is by {closest}", answer.text, said.text);
                near += 1;
            }
            let other = if temperature == 0.0 { ask(attempt, 2.0) } else { ask(attempt + 1, temperature) };
            control += usize::from(summarizer.ask(other).await.unwrap().text != said.text);
        }
        let name = format!("SmolLM2-135M-Instruct, answers, {kind}");
        let other = if temperature == 0.0 { "at temperature 2" } else { "drawn with another key" };
        row(&name, format!("{} of {asked} equal; {near} part at a near-tie", asked - near), "all but near-ties", format!("{other} {control} differ"));
        assert!(control > 0, "{kind}");
    }
    fs::write(folder().join("measured.json"), serde_json::to_string_pretty(&rows).unwrap()).unwrap();
}
