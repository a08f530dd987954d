//! CaptionService over a [`Captioner`].

use std::{fmt::Display, ops::RangeInclusive};

use dnd_mesh::{Fault, MAX_MESSAGE_BYTES, Slot, items, server::Services};
use dnd_proto::v1::{
    Caption, CaptionRequest, CaptionResponse, CaptionServiceGetModelRequest, CaptionServiceGetModelResponse, caption_response,
    caption_service_server::{CaptionService, CaptionServiceServer},
};
use tonic::{Request, Response, Status, Streaming};

use crate::{Captioner, Generation, Picture};

/// Tokens of the longest caption that may be asked for.
const LONGEST: u32 = 512;

/// Adds the gRPC service of a captioner.
pub fn add_to(services: Services, captioner: Slot<Captioner>) -> Services {
    let server = CaptionServiceServer::new(Server(captioner)).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    services.with(server)
}

struct Server(Slot<Captioner>);

#[tonic::async_trait]
impl CaptionService for Server {
    async fn get_model(&self, _: Request<CaptionServiceGetModelRequest>) -> Result<Response<CaptionServiceGetModelResponse>, Status> {
        let model = self.0.get()?.model().clone();
        Ok(Response::new(CaptionServiceGetModelResponse { model: Some(model) }))
    }

    type CaptionStream = items::Responses<CaptionResponse>;

    async fn caption(&self, request: Request<Streaming<CaptionRequest>>) -> Result<Response<Self::CaptionStream>, Status> {
        let captioner = self.0.get()?;
        let concurrency = captioner.concurrency();
        let answers = items::answer(request.into_inner(), concurrency, move |request: CaptionRequest| {
            let captioner = captioner.clone();
            async move {
                let item_id = request.item_id;
                let result = match caption(&captioner, request).await {
                    Ok(caption) => caption_response::Result::Caption(caption),
                    Err(fault) => caption_response::Result::Status(fault.into_item()),
                };
                CaptionResponse { item_id, result: Some(result) }
            }
        });
        Ok(Response::new(answers))
    }
}

async fn caption(captioner: &Captioner, request: CaptionRequest) -> Result<Caption, Fault> {
    let usual = Generation::default();
    let generation = Generation {
        max_new_tokens: request.max_new_tokens.unwrap_or(usual.max_new_tokens),
        min_length: request.min_length.unwrap_or(usual.min_length),
        num_beams: request.num_beams.unwrap_or(usual.num_beams),
        repetition_penalty: request.repetition_penalty.unwrap_or(usual.repetition_penalty),
        length_penalty: request.length_penalty.unwrap_or(usual.length_penalty),
    };
    within("max_new_tokens", generation.max_new_tokens, 1..=LONGEST)?;
    within("min_length", generation.min_length, 0..=LONGEST)?;
    within("num_beams", generation.num_beams, 1..=16)?;
    within("repetition_penalty", generation.repetition_penalty, 0.01..=100.0)?;
    within("length_penalty", generation.length_penalty, -10.0..=10.0)?;
    captioner.caption(Picture { bytes: request.picture, generation }).await
}

/// A NaN is within nothing.
fn within<T: PartialOrd + Display>(field: &'static str, value: T, range: RangeInclusive<T>) -> Result<(), Fault> {
    let (low, high) = (range.start(), range.end());
    if range.contains(&value) { Ok(()) } else { Err(Fault::field(field, format!("{value}; it is {low} to {high}"))) }
}
