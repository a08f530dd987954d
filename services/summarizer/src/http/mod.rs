//! A language model behind an OpenAI-compatible endpoint.
//!
//! The client is reqwest with messages of our own. async-openai (0.43) was tried for it: it logs an answer that it can't read, in which a key may have been
//! sent back, reads answers of any length, knows no `finish_reason` but OpenAI's own, and does not take a date for Retry-After.

mod args;
mod endpoint;
mod spending;
mod wire;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use dnd_mesh::{Fault, blobs};
use dnd_proto::v1::{Answer, Model, ModelLimits, Usage};
use tokio::sync::Semaphore;
use tonic::Code;

use self::{
    endpoint::Endpoint,
    spending::Spending,
    wire::{Bound, Completion, Request},
};
use crate::Question;

pub use args::{BaseUrl, LlmArgs};

const NOTICE: &str = "The language model was asked over HTTP: its answers, and with them the labels, are not promised to repeat.";

/// A language model that is asked over HTTP.
pub struct HttpModel {
    model: Model,
    endpoint: Endpoint,
    /// One for each call that may be in flight.
    slots: Semaphore,
    concurrency: usize,
    spending: Spending,
    /// Whether it has refused the usual name of an answer's bound.
    newer: AtomicBool,
}

impl HttpModel {
    /// A model at an endpoint, which is asked once for what it has, and must take the key. Blocking.
    pub(crate) fn open(url: BaseUrl, name: &str, args: &LlmArgs) -> Result<Self, Fault> {
        let digest = blobs::digest(format!("{url}\0{name}").as_bytes());
        let endpoint = Endpoint::new(url, args.key()?, Duration::from_secs(args.llm_timeout))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| Fault::internal(e.to_string()))?;
        runtime.block_on(endpoint.check(name))?;
        let model = Model {
            name: name.to_owned(),
            digest,
            layout: "openai".to_owned(),
            engine: "http".to_owned(),
            notice: NOTICE.to_owned(),
            limits: Some(ModelLimits { picture_bytes: 0, picture_pixels: 0, text_tokens: 0, batch: 1 }),
        };
        let concurrency = args.llm_concurrency.get();
        Ok(Self { model, endpoint, slots: Semaphore::new(concurrency), concurrency, spending: Spending::new(args), newer: AtomicBool::new(false) })
    }

    /// Which model it is.
    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    /// Questions of one call that are worked on at a time.
    pub(crate) fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Asks the model.
    pub(crate) async fn ask(&self, question: &Question) -> Result<Answer, Fault> {
        let _slot = self.slots.acquire().await.map_err(|e| Fault::internal(e.to_string()))?;
        self.spending.check()?;
        let completion = self.complete(question).await?;
        let usage = self.spending.add(completion.usage)?;
        let choice = completion.choices.into_iter().next();
        let choice = choice.ok_or_else(|| Fault::new(Code::Internal, "LLM_ANSWER", "the endpoint's answer has no choices"))?;
        let refusal = choice.message.refusal.filter(|refusal| !refusal.trim().is_empty());
        let ended = choice.finish_reason.unwrap_or_default();
        let refused = refusal.is_some() || ended == "content_filter";
        let text = refusal.or(choice.message.content).unwrap_or_default();
        let Usage { prompt_tokens, answer_tokens, .. } = usage;
        let tokens = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        Ok(Answer {
            text: self.endpoint.without_key(&text).trim().to_owned(),
            prompt_tokens: tokens(prompt_tokens),
            answer_tokens: tokens(answer_tokens),
            cut_off: ended == "length",
            refused,
            usage: Some(usage),
        })
    }

    /// The endpoint's answer. OpenAI's newer models refuse `max_tokens`, and say what they want instead: they are asked once more, and so from then on.
    async fn complete(&self, question: &Question) -> Result<Completion, Fault> {
        let post = async |bound| self.endpoint.post(&["chat", "completions"], &Request::new(&self.model.name, question, bound)).await;
        if self.newer.load(Ordering::Relaxed) {
            return post(Bound::MaxCompletionTokens).await;
        }
        match post(Bound::MaxTokens).await {
            Err(fault) if fault.code() == Code::InvalidArgument && fault.to_string().contains(Bound::NEWER) => {
                self.newer.store(true, Ordering::Relaxed);
                post(Bound::MaxCompletionTokens).await
            }
            answered => answered,
        }
    }
}
