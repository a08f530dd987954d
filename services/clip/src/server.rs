//! EmbeddingService over a [`Clip`].

use dnd_mesh::{MAX_MESSAGE_BYTES, Slot, items, server::Services};
use dnd_proto::v1::{
    EmbedImagesRequest, EmbedImagesResponse, EmbedTextsRequest, EmbedTextsResponse, EmbeddingServiceGetModelRequest, EmbeddingServiceGetModelResponse,
    embed_images_response, embed_texts_response,
    embedding_service_server::{EmbeddingService, EmbeddingServiceServer},
};
use tonic::{Request, Response, Status, Streaming};

use crate::Clip;

/// Adds the gRPC service of a CLIP model.
pub fn add_to(services: Services, clip: Slot<Clip>) -> Services {
    let server = EmbeddingServiceServer::new(Server(clip)).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    services.with(server)
}

struct Server(Slot<Clip>);

#[tonic::async_trait]
impl EmbeddingService for Server {
    async fn get_model(&self, _: Request<EmbeddingServiceGetModelRequest>) -> Result<Response<EmbeddingServiceGetModelResponse>, Status> {
        let model = self.0.get()?.model().clone();
        Ok(Response::new(EmbeddingServiceGetModelResponse { model: Some(model) }))
    }

    type EmbedImagesStream = items::Responses<EmbedImagesResponse>;

    async fn embed_images(&self, request: Request<Streaming<EmbedImagesRequest>>) -> Result<Response<Self::EmbedImagesStream>, Status> {
        let clip = self.0.get()?;
        let concurrency = clip.concurrency();
        let answers = items::answer(request.into_inner(), concurrency, move |request: EmbedImagesRequest| {
            let clip = clip.clone();
            async move {
                let result = match clip.image(request.picture).await {
                    Ok(embedding) => embed_images_response::Result::Embedding(embedding),
                    Err(fault) => embed_images_response::Result::Status(fault.into_item()),
                };
                EmbedImagesResponse { item_id: request.item_id, result: Some(result) }
            }
        });
        Ok(Response::new(answers))
    }

    type EmbedTextsStream = items::Responses<EmbedTextsResponse>;

    async fn embed_texts(&self, request: Request<Streaming<EmbedTextsRequest>>) -> Result<Response<Self::EmbedTextsStream>, Status> {
        let clip = self.0.get()?;
        let concurrency = clip.concurrency();
        let answers = items::answer(request.into_inner(), concurrency, move |request: EmbedTextsRequest| {
            let clip = clip.clone();
            async move {
                let result = match clip.text(request.text).await {
                    Ok(embedding) => embed_texts_response::Result::Embedding(embedding),
                    Err(fault) => embed_texts_response::Result::Status(fault.into_item()),
                };
                EmbedTextsResponse { item_id: request.item_id, result: Some(result) }
            }
        });
        Ok(Response::new(answers))
    }
}
