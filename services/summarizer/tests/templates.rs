//! Public chat templates, rendered as transformers renders them.
//!
//! The goldens are made by tests/parity/language_small.py; fixtures/templates/templates.json says whose the templates are.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeMap, fs, path::Path};

use dnd_method::prompts::{self, Message, Role};
use dnd_onnx::{Error, folder::ModelFolder};
use dnd_summarizer::ChatTemplate;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Template {
    file: String,
    tokens: Value,
}

#[derive(Deserialize)]
struct Conversation {
    conversation: String,
    messages: Vec<Turn>,
}

#[derive(Deserialize)]
struct Turn {
    role: String,
    content: String,
}

#[derive(Deserialize)]
struct Golden {
    file: String,
    conversation: String,
    prompt: Option<String>,
    refused: Option<String>,
}

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(path)).unwrap()
}

fn list<T: DeserializeOwned>(path: &str) -> Vec<T> {
    serde_json::from_str(&read(path)).unwrap()
}

/// The template of a folder with these files.
fn template(files: &[(&str, &str)]) -> Result<ChatTemplate, Error> {
    let folder = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        fs::write(folder.path().join(name), contents).unwrap();
    }
    ChatTemplate::read(&ModelFolder::open(folder.path()).unwrap())
}

fn conversations() -> BTreeMap<String, Vec<Message>> {
    let message = |turn: Turn| Message { role: if turn.role == "user" { Role::User } else { Role::Assistant }, content: turn.content };
    let all = list::<Conversation>("goldens/conversations.json").into_iter();
    all.map(|conversation| (conversation.conversation, conversation.messages.into_iter().map(message).collect())).collect()
}

#[test]
fn the_prompts_of_the_method_are_the_turns_that_python_writes() {
    let conversations = conversations();
    let captions = ["a large red circle on a blue background", "two dogs, one of them asleep.", "a sign that says \"stop\""];
    assert_eq!(conversations["prompt 1"], prompts::simplify(captions[0]));
    assert_eq!(conversations["prompt 2"], prompts::summarize(&captions));
    assert_eq!(conversations["prompt 2, asked again"], prompts::summarize_again(&captions));
}

#[test]
fn public_templates_are_rendered_byte_for_byte_as_transformers_renders_them() {
    let conversations = conversations();
    let goldens: Vec<Golden> = list("goldens/templates.json");
    let mut different = Vec::new();
    for Template { file, tokens } in list::<Template>("fixtures/templates/templates.json") {
        let text = read(&format!("fixtures/templates/{file}"));
        let template = template(&[("tokenizer_config.json", &tokens.to_string()), ("chat_template.jinja", &text)]).expect(&file);
        let mut compared = 0;
        for golden in goldens.iter().filter(|golden| golden.file == file) {
            let rendered = template.render(&conversations[&golden.conversation]);
            match (&golden.prompt, &golden.refused, rendered) {
                (Some(prompt), _, Ok(rendered)) if *prompt == rendered => {}
                (_, Some(why), Err(error)) if error.to_string().contains(why) => {}
                (prompt, why, Ok(rendered)) => {
                    different.push(format!("{file}, {}: {}", golden.conversation, where_they_part(&rendered, prompt.as_ref().or(why.as_ref()).unwrap())))
                }
                (_, _, Err(error)) => different.push(format!("{file}, {}: {error}", golden.conversation)),
            }
            compared += 1;
        }
        assert!(compared >= 4, "{file}: {compared} conversations");
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
}

fn where_they_part(ours: &str, theirs: &str) -> String {
    let same = ours.chars().zip(theirs.chars()).take_while(|(a, b)| a == b).count();
    let rest = |text: &str| text.chars().skip(same.saturating_sub(20)).take(60).collect::<String>();
    format!("{:?} instead of {:?}", rest(ours), rest(theirs))
}

#[test]
fn a_template_stands_in_a_file_of_its_own_or_in_the_tokenizers_configuration() {
    let messages = prompts::simplify("a red circle");
    let config = |template: Value| json!({"chat_template": template, "eos_token": {"content": "</s>", "lstrip": false}}).to_string();
    let rendered = |files: &[(&str, &str)]| template(files).unwrap().render(&messages).unwrap();
    let (own, named) = (config(json!("one {{ eos_token }}")), config(json!([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}])));
    assert_eq!(rendered(&[("tokenizer_config.json", &own)]), "one </s>");
    assert_eq!(rendered(&[("tokenizer_config.json", &named)]), "two");
    let beside = [
        ("tokenizer_config.json", own.as_str()),
        ("chat_template.jinja", "three {{ unk_token }}\r\n"),
        ("special_tokens_map.json", r#"{"unk_token": "<unk>", "eos_token": "other"}"#),
    ];
    assert_eq!(rendered(&beside), "three <unk>");
    assert_eq!(rendered(&[beside[0], beside[2]]), "one </s>", "the tokenizer's configuration goes first");
}

#[test]
fn a_template_that_cannot_be_used_is_refused_with_why() {
    for (config, part) in [
        (json!({}), "no chat_template"),
        (json!({"chat_template": [{"name": "rag", "template": "x"}]}), "without one named \"default\""),
        (json!({"chat_template": "{% for m in messages %}"}), "syntax error"),
        (json!({"chat_template": "{{ raise_exception('Only tools may speak') }}"}), "Only tools may speak"),
        (json!({"chat_template": "{{ messages[0].content.swapcase() }}"}), "swapcase"),
        (json!({"chat_template": "{{ strftime_now('%Q') }}"}), "%Q"),
    ] {
        let error = template(&[("tokenizer_config.json", &config.to_string())]).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("tokenizer_config.json"), "{part}: {error}");
    }
}
