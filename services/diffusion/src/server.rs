//! DiffusionService over a [`Diffusion`].

use dnd_mesh::{Fault, MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, Slot, fault::check_text, items, server::Services};
use dnd_method::parameters::Parameters;
use dnd_proto::v1::{
    DiffusionServiceGetModelRequest, DiffusionServiceGetModelResponse, GenerateRequest, GenerateResponse,
    diffusion_service_server::{DiffusionService, DiffusionServiceServer},
    generate_response,
};
use tonic::{Response, Status, Streaming};

use crate::{Diffusion, Drawing, Request};

const MOST_STEPS: u32 = 1000;
const STRONGEST_GUIDANCE: f32 = 100.0;

/// Adds the gRPC service of a diffusion model.
pub fn add_to(services: Services, diffusion: Slot<Diffusion>) -> Services {
    let server = DiffusionServiceServer::new(Server(diffusion)).max_decoding_message_size(MAX_REQUEST_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    services.with(server)
}

struct Server(Slot<Diffusion>);

#[tonic::async_trait]
impl DiffusionService for Server {
    async fn get_model(&self, _: tonic::Request<DiffusionServiceGetModelRequest>) -> Result<Response<DiffusionServiceGetModelResponse>, Status> {
        let model = self.0.get()?.model().clone();
        Ok(Response::new(DiffusionServiceGetModelResponse { model: Some(model) }))
    }

    type GenerateStream = items::Responses<GenerateResponse>;

    async fn generate(&self, request: tonic::Request<Streaming<GenerateRequest>>) -> Result<Response<Self::GenerateStream>, Status> {
        let diffusion = self.0.get()?;
        let concurrency = diffusion.concurrency();
        let answers = items::answer(request.into_inner(), concurrency, move |request: GenerateRequest| {
            let diffusion = diffusion.clone();
            async move {
                let item_id = request.item_id;
                let result = match draw(&diffusion, request).await {
                    Ok(Drawing::Png(picture)) => generate_response::Result::Picture(picture),
                    Ok(Drawing::Unusable(reason)) => generate_response::Result::Unusable(reason),
                    Err(fault) => generate_response::Result::Status(fault.into_item()),
                };
                GenerateResponse { item_id, result: Some(result) }
            }
        });
        Ok(Response::new(answers))
    }
}

async fn draw(diffusion: &Diffusion, request: GenerateRequest) -> Result<Drawing, Fault> {
    let defaults = Parameters::default();
    check_text("concept", &request.concept)?;
    let steps = request.num_inference_steps.unwrap_or(defaults.num_inference_steps);
    if !(1..=MOST_STEPS).contains(&steps) {
        return Err(Fault::field("num_inference_steps", format!("{steps}; it is 1 to {MOST_STEPS}")));
    }
    let guidance = request.guidance_scale.unwrap_or(defaults.guidance_scale);
    if !(0.0..=STRONGEST_GUIDANCE).contains(&guidance) {
        return Err(Fault::field("guidance_scale", format!("{guidance}; it is 0 to {STRONGEST_GUIDANCE}")));
    }
    let seed = request.seed.unwrap_or(defaults.seed);
    diffusion.draw(Request { concept: request.concept, index: request.index, seed, steps, guidance }).await
}
