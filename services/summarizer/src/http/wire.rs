//! Messages of OpenAI's chat completions, as far as compatible endpoints agree on them.

use dnd_method::prompts::Message;
use serde::{Deserialize, Deserializer, Serialize};

use crate::Question;

#[derive(Debug, Serialize)]
pub(super) struct Request<'q> {
    model: &'q str,
    messages: &'q [Message],
    temperature: f32,
    seed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_completion_tokens: Option<u32>,
}

/// What an endpoint calls the bound of an answer's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bound {
    /// As all but OpenAI's own newer models take it.
    MaxTokens,
    /// As those want it, which refuse the other.
    MaxCompletionTokens,
}

impl Bound {
    /// What a newer model names when it refuses the other.
    pub(super) const NEWER: &'static str = "max_completion_tokens";
}

impl<'q> Request<'q> {
    pub(super) fn new(model: &'q str, question: &'q Question, bound: Bound) -> Self {
        // Attempts are to differ, and endpoints take seeds that a signed number holds.
        let seed = question.seed.wrapping_add(question.attempt.into()) & i64::MAX as u64;
        let bounded_by = |this| (bound == this).then_some(question.max_new_tokens);
        Self {
            model,
            messages: &question.messages,
            temperature: question.temperature,
            seed,
            max_tokens: bounded_by(Bound::MaxTokens),
            max_completion_tokens: bounded_by(Bound::MaxCompletionTokens),
        }
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Completion {
    pub(super) choices: Vec<Choice>,
    pub(super) usage: Option<Tokens>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Choice {
    pub(super) message: Said,
    /// Endpoints have words of their own for it beside OpenAI's.
    pub(super) finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Said {
    pub(super) content: Option<String>,
    pub(super) refusal: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub(super) struct Tokens {
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
}

/// What is in the body of an answer that is none.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Problem {
    #[serde(default, deserialize_with = "error")]
    pub(super) error: Option<Detail>,
    /// Where endpoints have it that don't follow OpenAI in this.
    #[serde(alias = "detail")]
    pub(super) message: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Detail {
    pub(super) message: Option<String>,
    /// A word, or a number.
    pub(super) code: serde_json::Value,
}

/// An error is an object, or for some endpoints just a sentence.
fn error<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Detail>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Detail(Detail),
        Message(String),
    }
    Ok(Option::<Either>::deserialize(deserializer)?.map(|either| match either {
        Either::Detail(detail) => detail,
        Either::Message(message) => Detail { message: Some(message), ..Detail::default() },
    }))
}

/// The models of an endpoint.
#[derive(Debug, Deserialize)]
pub(super) struct Models {
    pub(super) data: Vec<Named>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Named {
    pub(super) id: String,
}
