//! Chat templates: the Jinja text beside a tokenizer that turns a conversation into a prompt.

use std::{collections::BTreeMap, fmt::Write as _, io};

use chrono::{
    NaiveDate,
    format::{Item, StrftimeItems},
};
use dnd_method::prompts::{self, Message, Role};
use dnd_onnx::{
    Error,
    folder::{ModelFolder, read_json},
    tokenizer::SpecialToken,
};
use minijinja::{Environment, ErrorKind, Value, syntax::SyntaxConfig, value::Kwargs};
use serde::{Deserialize, Serialize as _};
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

const NAME: &str = "chat_template";
/// The day that templates are told it is. A label must not depend on the day that it was made, so it is always the one that Llama 3's
/// templates take where there is no clock.
const TODAY: Option<NaiveDate> = NaiveDate::from_ymd_opt(2024, 7, 26);

/// A model's chat template, and the special tokens that it may name: rendered as transformers' `apply_chat_template` does.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: BTreeMap<&'static str, String>,
}

#[derive(Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Template>,
    #[serde(flatten)]
    tokens: SpecialTokens,
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

/// What `tokenizer_config.json`, and beside older tokenizers `special_tokens_map.json`, call a tokenizer's special tokens.
#[derive(Default, Deserialize)]
struct SpecialTokens {
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    unk_token: Option<SpecialToken>,
    sep_token: Option<SpecialToken>,
    pad_token: Option<SpecialToken>,
    cls_token: Option<SpecialToken>,
    mask_token: Option<SpecialToken>,
}

impl SpecialTokens {
    fn named(self) -> impl Iterator<Item = (&'static str, String)> {
        let all = [
            ("bos_token", self.bos_token),
            ("eos_token", self.eos_token),
            ("unk_token", self.unk_token),
            ("sep_token", self.sep_token),
            ("pad_token", self.pad_token),
            ("cls_token", self.cls_token),
            ("mask_token", self.mask_token),
        ];
        all.into_iter().filter_map(|(name, token)| Some((name, token?.text().to_owned())))
    }
}

impl ChatTemplate {
    /// The template of a folder: `chat_template.jinja`, else the one in `tokenizer_config.json`. One that can't render a conversation is refused.
    pub fn read(folder: &ModelFolder) -> Result<Self, Error> {
        let config_path = folder.file("tokenizer configuration", &["tokenizer_config.json"])?;
        let config: TokenizerConfig = read_json(&config_path)?;
        let (path, template) = match (folder.optional(&["chat_template.jinja"]), config.chat_template) {
            (Some(file), _) => {
                let template = std::fs::read_to_string(&file).map_err(|e| Error::file(&file, e.to_string()))?;
                (file, template)
            }
            (None, Some(Template::One(template))) => (config_path, template),
            (None, Some(Template::Named(named))) => match named.into_iter().find(|template| template.name == "default") {
                Some(default) => (config_path, default.template),
                None => return Err(Error::file(config_path, "chat_template is a list without one named \"default\"")),
            },
            (None, None) => return Err(Error::file(config_path, "no chat_template: the model is not made for conversations")),
        };
        let older: SpecialTokens = folder.optional(&["special_tokens_map.json"]).map(|path| read_json(&path)).transpose()?.unwrap_or_default();
        let tokens = older.named().chain(config.tokens.named()).collect();
        let environment = environment(&template).map_err(|e| Error::file(&path, format!("chat_template: {e:#}")))?;
        let template = Self { environment, tokens };
        template.render(&prompts::simplify("a picture")).map_err(|e| Error::file(&path, e.to_string()))?;
        Ok(template)
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
        // Tools and documents are none, which is not the same as undefined.
        let others = [("tools", Value::from(())), ("documents", Value::from(())), ("add_generation_prompt", Value::from(true))];
        template.render(Value::from_pairs(tokens.chain(others).chain([("messages", Value::from(turns))]))).map_err(failed)
    }
}

/// What transformers gives to a template.
/// Instructions of a rendering at most; one of a long conversation takes some thousands.
const MOST_WORK: u64 = 10_000_000;

fn environment(template: &str) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    // A template of loops within loops would not end.
    environment.set_fuel(Some(MOST_WORK));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    // Jinja reads every line end as \n.
    let template = template.replace("\r\n", "\n").replace('\r', "\n");
    environment.add_template_owned(NAME, without_generation(&template))?;
    Ok(environment)
}

/// `{% generation %}` marks what a model is trained to say. It changes nothing that is rendered, and is a scope as `{% with %}` is.
fn without_generation(template: &str) -> String {
    let statement = |piece: &str| -> Option<String> {
        let (before, inside) = piece.strip_suffix("%}")?.rsplit_once("{%")?;
        let name = inside.trim_matches(|c: char| c.is_whitespace() || "+-".contains(c));
        let other = match name {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => return None,
        };
        Some(format!("{before}{{%{}%}}", inside.replace(name, other)))
    };
    template.split_inclusive("%}").map(|piece| statement(piece).unwrap_or_else(|| piece.to_owned())).collect()
}

fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let unknown = || minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: the format {format:?} can't be used"));
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    let midnight = TODAY.and_then(|day| day.and_hms_opt(0, 0, 0)).filter(|_| !items.contains(&Item::Error)).ok_or_else(unknown)?;
    let mut text = String::new();
    write!(text, "{}", midnight.format_with_items(items.iter())).map_err(|_| unknown())?;
    Ok(text)
}

/// As Python's `json.dumps`: a space after commas and colons, nothing escaped for HTML.
fn to_json(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let (indent, ascii): (Option<usize>, Option<bool>) = (options.get("indent")?, options.get("ensure_ascii")?);
    options.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        Some(indent) => value.serialize(&mut Serializer::with_formatter(&mut json, PrettyFormatter::with_indent(&vec![b' '; indent]))),
        None => value.serialize(&mut Serializer::with_formatter(&mut json, Spaced)),
    };
    let failed = |e: &dyn std::fmt::Display| minijinja::Error::new(ErrorKind::BadSerialization, format!("tojson: {e}"));
    written.map_err(|e| failed(&e))?;
    let json = String::from_utf8(json).map_err(|e| failed(&e))?;
    Ok(if ascii == Some(true) { json.encode_utf16().map(escaped).collect() } else { json })
}

fn escaped(unit: u16) -> String {
    match u8::try_from(unit) {
        Ok(byte) if byte.is_ascii() => char::from(byte).to_string(),
        _ => format!("\\u{unit:04x}"),
    }
}

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}
