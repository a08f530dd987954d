//! CaptionService over a [`Captioner`].

use dnd_mesh::{Fault, MAX_MESSAGE_BYTES, Slot, items, server::Services};
use dnd_proto::v1::{
    Caption, CaptionRequest, CaptionResponse, CaptionServiceGetModelRequest, CaptionServiceGetModelResponse, caption_response,
    caption_service_server::{CaptionService, CaptionServiceServer},
};
use tonic::{Request, Response, Status, Streaming};

use crate::{Captioner, Picture};

/// algorithm's defaults: BLIP base, greedy, 32 new tokens, at least 5 with the start token.
const MAX_NEW_TOKENS: u32 = 32;
const MIN_LENGTH: u32 = 5;
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
    let max_new_tokens = request.max_new_tokens.unwrap_or(MAX_NEW_TOKENS);
    if !(1..=LONGEST).contains(&max_new_tokens) {
        return Err(Fault::field("max_new_tokens", format!("{max_new_tokens}; it is 1 to {LONGEST}")));
    }
    let min_length = request.min_length.unwrap_or(MIN_LENGTH);
    if min_length > LONGEST {
        return Err(Fault::field("min_length", format!("{min_length}; it is 0 to {LONGEST}")));
    }
    captioner.caption(Picture { bytes: request.picture, max_new_tokens, min_length }).await
}
