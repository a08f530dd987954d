//! Chat templates: the Jinja text beside a tokenizer that turns a conversation into a prompt.

use std::collections::BTreeMap;

use dnd_method::prompts::{Message, Role};
use dnd_onnx::{
    Error,
    folder::{ModelFolder, read_json},
    tokenizer::SpecialToken,
};
use minijinja::{Environment, ErrorKind, Value, syntax::SyntaxConfig};
use serde::Deserialize;

const NAME: &str = "chat_template";

/// A model's chat template, and the special tokens that it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: BTreeMap<&'static str, String>,
}

#[derive(Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Template>,
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Template {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl ChatTemplate {
    /// The template of a folder: `chat_template.jinja`, else the one in `tokenizer_config.json`.
    pub fn read(folder: &ModelFolder) -> Result<Self, Error> {
        let path = folder.file("tokenizer configuration", &["tokenizer_config.json"])?;
        let config: TokenizerConfig = read_json(&path)?;
        let template = match (folder.optional(&["chat_template.jinja"]), config.chat_template) {
            (Some(file), _) => std::fs::read_to_string(&file).map_err(|e| Error::file(&file, e.to_string()))?,
            (None, Some(Template::One(template))) => template,
            (None, Some(Template::Named(named))) => named
                .into_iter()
                .find(|template| template.name == "default")
                .map(|template| template.template)
                .ok_or_else(|| Error::file(&path, "chat_template is a list without one named \"default\""))?,
            (None, None) => return Err(Error::file(&path, "no chat_template: the model is not made for conversations")),
        };
        let mut environment = Environment::new();
        // What the transformers library gives to templates.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| Error::Run(e.to_string()))?;
        environment.set_syntax(syntax);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, template).map_err(|e| Error::file(&path, format!("chat_template: {e}")))?;
        let token = |token: Option<SpecialToken>| token.map(|token| token.text().to_owned()).unwrap_or_default();
        Ok(Self { environment, tokens: BTreeMap::from([("bos_token", token(config.bos_token)), ("eos_token", token(config.eos_token))]) })
    }

    /// The prompt that asks for the next answer of the conversation.
    pub fn render(&self, messages: &[Message]) -> Result<String, Error> {
        let failed = |e: minijinja::Error| Error::Run(format!("the chat template: {e:#}"));
        let template = self.environment.get_template(NAME).map_err(failed)?;
        let turn = |message: &Message| {
            let role = match message.role {
                Role::User => "user",
                Role::Assistant => "assistant",
            };
            Value::from_pairs([("role", role), ("content", message.content.as_str())])
        };
        let turns: Vec<Value> = messages.iter().map(turn).collect();
        let tokens = self.tokens.iter().map(|(name, token)| (*name, Value::from(token.as_str())));
        let context = Value::from_pairs(tokens.chain([("messages", Value::from(turns)), ("add_generation_prompt", Value::from(true))]));
        template.render(context).map_err(failed)
    }
}
