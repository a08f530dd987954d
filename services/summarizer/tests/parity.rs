//! The sketch suite's language model answers as the same weights do in transformers, greedily and drawn with the keyed draws, token by token.
//!
//! The goldens are made by tests/parity/language_small.py, which writes prompts and draws once more in Python.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path};

use dnd_method::prompts::{Message, Role};
use dnd_onnx::runtime::EngineArgs;
use dnd_summarizer::{Question, Summarizer};
use dnd_testing::sketch;
use serde::Deserialize;

const SEED: u64 = 5;
const LONGEST: u32 = 16;

#[derive(Deserialize)]
struct Golden {
    messages: Vec<Turn>,
    attempt: u32,
    temperature: f32,
    text: String,
    tokens: u32,
}

#[derive(Deserialize)]
struct Turn {
    role: String,
    content: String,
}

#[tokio::test]
async fn answers_are_those_of_transformers_whether_the_likeliest_token_is_taken_or_one_is_drawn() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/answers.json");
    let goldens: Vec<Golden> = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(goldens.len(), 42);
    let summarizer = Summarizer::load(&sketch("summarizer"), &EngineArgs::sized(1, 1)).unwrap();
    for Golden { messages, attempt, temperature, text, tokens } in goldens {
        let message = |turn: Turn| Message { role: if turn.role == "user" { Role::User } else { Role::Assistant }, content: turn.content };
        let messages: Vec<Message> = messages.into_iter().map(message).collect();
        let answer = summarizer.ask(Question { messages, seed: SEED, attempt, temperature, max_new_tokens: LONGEST }).await.unwrap();
        assert_eq!((answer.text, answer.answer_tokens), (text, tokens), "question {attempt} at temperature {temperature}");
    }
}
