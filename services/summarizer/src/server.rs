//! SummaryService over a [`Summarizer`].

use dnd_mesh::{Fault, MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, Slot, fault::check_text, items, server::Services};
use dnd_method::{parameters::Parameters, prompts};
use dnd_proto::v1::{
    Answer, Sampling, SimplifyRequest, SimplifyResponse, SummarizeRequest, SummarizeResponse, SummaryServiceGetModelRequest, SummaryServiceGetModelResponse,
    Usage, simplify_response, summarize_response,
    summary_service_server::{SummaryService, SummaryServiceServer},
};
use tonic::{Request, Response, Status, Streaming};

use crate::{Question, Summarizer};

const LONGEST_ANSWER: u32 = 512;
const HOTTEST: f32 = 10.0;
const MOST_DESCRIPTIONS: usize = 1000;
/// How often an answer that can't be used is asked for again, and how far apart the numbers of those attempts are: farther than callers count.
const ASKED_AGAIN: u32 = 2;
const APART: u32 = 1000;

/// Adds the gRPC service of a language model.
pub fn add_to(services: Services, summarizer: Slot<Summarizer>) -> Services {
    let server = SummaryServiceServer::new(Server(summarizer)).max_decoding_message_size(MAX_REQUEST_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    services.with(server)
}

struct Server(Slot<Summarizer>);

#[tonic::async_trait]
impl SummaryService for Server {
    async fn get_model(&self, _: Request<SummaryServiceGetModelRequest>) -> Result<Response<SummaryServiceGetModelResponse>, Status> {
        let model = self.0.get()?.model().clone();
        Ok(Response::new(SummaryServiceGetModelResponse { model: Some(model) }))
    }

    type SimplifyStream = items::Responses<SimplifyResponse>;

    async fn simplify(&self, request: Request<Streaming<SimplifyRequest>>) -> Result<Response<Self::SimplifyStream>, Status> {
        let summarizer = self.0.get()?;
        let concurrency = summarizer.concurrency();
        let answers = items::answer(request.into_inner(), concurrency, move |request: SimplifyRequest| {
            let summarizer = summarizer.clone();
            async move {
                let item_id = request.item_id;
                let result = match simplify(&summarizer, request).await {
                    Ok(answer) => simplify_response::Result::Answer(answer),
                    Err(fault) => simplify_response::Result::Status(fault.into_item()),
                };
                SimplifyResponse { item_id, result: Some(result) }
            }
        });
        Ok(Response::new(answers))
    }

    type SummarizeStream = items::Responses<SummarizeResponse>;

    async fn summarize(&self, request: Request<Streaming<SummarizeRequest>>) -> Result<Response<Self::SummarizeStream>, Status> {
        let summarizer = self.0.get()?;
        let concurrency = summarizer.concurrency();
        let answers = items::answer(request.into_inner(), concurrency, move |request: SummarizeRequest| {
            let summarizer = summarizer.clone();
            async move {
                let item_id = request.item_id;
                let result = match summarize(&summarizer, request).await {
                    Ok(answer) => summarize_response::Result::Answer(answer),
                    Err(fault) => summarize_response::Result::Status(fault.into_item()),
                };
                SummarizeResponse { item_id, result: Some(result) }
            }
        });
        Ok(Response::new(answers))
    }
}

async fn simplify(summarizer: &Summarizer, request: SimplifyRequest) -> Result<Answer, Fault> {
    check_text("caption", &request.caption)?;
    ask(summarizer, prompts::simplify(&request.caption), 0, request.sampling).await
}

async fn summarize(summarizer: &Summarizer, request: SummarizeRequest) -> Result<Answer, Fault> {
    let descriptions = &request.descriptions;
    if descriptions.is_empty() || descriptions.len() > MOST_DESCRIPTIONS {
        return Err(Fault::field("descriptions", format!("{} of them; 1 to {MOST_DESCRIPTIONS} can be summarised", descriptions.len())));
    }
    descriptions.iter().enumerate().try_for_each(|(i, description)| check_text(format!("descriptions[{i}]"), description))?;
    let messages = if request.without_examples { prompts::summarize_again(descriptions) } else { prompts::summarize(descriptions) };
    ask(summarizer, messages, request.attempt, request.sampling).await
}

async fn ask(summarizer: &Summarizer, messages: Vec<prompts::Message>, attempt: u32, sampling: Option<Sampling>) -> Result<Answer, Fault> {
    let defaults = Parameters::default();
    let sampling = sampling.unwrap_or_default();
    let temperature = sampling.temperature.unwrap_or(defaults.temperature);
    if !(0.0..=HOTTEST).contains(&temperature) {
        return Err(Fault::field("sampling.temperature", format!("{temperature}; it is 0 to {HOTTEST}")));
    }
    let max_new_tokens = sampling.max_new_tokens.unwrap_or(defaults.answer_max_new_tokens);
    if !(1..=LONGEST_ANSWER).contains(&max_new_tokens) {
        return Err(Fault::field("sampling.max_new_tokens", format!("{max_new_tokens}; it is 1 to {LONGEST_ANSWER}")));
    }
    let seed = sampling.seed.unwrap_or(defaults.seed);
    let mut usage = None;
    let mut again = 0;
    loop {
        let attempt = attempt.wrapping_add(again * APART);
        let answer = summarizer.ask(Question { messages: messages.clone(), seed, attempt, temperature, max_new_tokens }).await?;
        if let Some(more) = &answer.usage {
            usage.get_or_insert_with(Usage::default).add(more);
        }
        let usable = !answer.text.is_empty() && !answer.refused && !answer.cut_off;
        if usable || again == ASKED_AGAIN || !summarizer.answers_vary(temperature) {
            return Ok(Answer { usage, ..answer });
        }
        again += 1;
    }
}
