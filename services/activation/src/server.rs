//! ActivationService over an [`Activation`].

mod crop;
mod probe;
mod shards;

use std::sync::Arc;

use dnd_mesh::{Fault, MAX_MESSAGE_BYTES, Slot, blobs, items, parameters, server::Services};
use dnd_onnx::preprocessing::doubts;
use dnd_proto::v1::{
    self as proto, ActivateRequest, ActivateResponse, ActivationServiceGetModelRequest, ActivationServiceGetModelResponse, CropRequest, CropResponse,
    DescribeTargetRequest, DescribeTargetResponse, LayerUnits, ListShardsRequest, ListShardsResponse, PictureActivations, ProbeRequest, ProbeResponse,
    ReadPicturesRequest, ReadPicturesResponse, activate_request, activate_response,
    activation_service_server::{ActivationService, ActivationServiceServer},
    read_pictures_response,
};
use futures::StreamExt as _;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::{
    Activation,
    engine::{Cut, LayerInfo, Output, ProbingSet, Reading, Source, blocking, resolve},
};

/// Adds the gRPC service of an activation engine. What it reads of uploads needs their service too ([`dnd_mesh::blobs::add_to`]).
pub fn add_to(services: Services, activation: Slot<Activation>) -> Services {
    services.with(ActivationServiceServer::new(Server(activation)).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES))
}

struct Server(Slot<Activation>);

const MOST_PICTURES: usize = 1000;

#[tonic::async_trait]
impl ActivationService for Server {
    async fn get_model(&self, _: Request<ActivationServiceGetModelRequest>) -> Result<Response<ActivationServiceGetModelResponse>, Status> {
        let model = self.0.get()?.model();
        Ok(Response::new(ActivationServiceGetModelResponse { model: Some(model) }))
    }

    async fn describe_target(&self, request: Request<DescribeTargetRequest>) -> Result<Response<DescribeTargetResponse>, Status> {
        let DescribeTargetRequest { target, asked } = request.into_inner();
        let (described, preprocessing_source) = self.0.get()?.describe(target).await?;
        let found = if asked.is_empty() { Vec::new() } else { resolve(&described, &asked)? };
        Ok(Response::new(DescribeTargetResponse {
            digest: described.digest.clone(),
            preprocessing: Some(described.preprocessing.clone()),
            layers: described.layers.iter().map(proto::Layer::from).collect(),
            found: found.into_iter().map(|(layer, units)| LayerUnits { layer: layer.name, units }).collect(),
            preprocessing_source,
            warnings: doubts(&described.preprocessing),
        }))
    }

    type ListShardsStream = items::Responses<ListShardsResponse>;

    async fn list_shards(&self, request: Request<ListShardsRequest>) -> Result<Response<Self::ListShardsStream>, Status> {
        let stream = shards::list(self.0.get()?, request.into_inner()).await?;
        Ok(Response::new(stream))
    }

    type ProbeStream = items::Responses<ProbeResponse>;

    async fn probe(&self, request: Request<ProbeRequest>) -> Result<Response<Self::ProbeStream>, Status> {
        let stream = probe::probe(self.0.get()?, request.into_inner()).await?;
        Ok(Response::new(stream))
    }

    type CropStream = items::Responses<CropResponse>;

    async fn crop(&self, request: Request<CropRequest>) -> Result<Response<Self::CropStream>, Status> {
        let stream = crop::crop(self.0.get()?, request.into_inner()).await?;
        Ok(Response::new(stream))
    }

    type ReadPicturesStream = items::Responses<ReadPicturesResponse>;

    async fn read_pictures(&self, request: Request<ReadPicturesRequest>) -> Result<Response<Self::ReadPicturesStream>, Status> {
        let activation = self.0.get()?;
        let ReadPicturesRequest { probing_set, pictures } = request.into_inner();
        check_count(pictures.len())?;
        let set = activation.set(probing_set).await?;
        let limit = activation.picture_limits().bytes;
        let answers = futures::stream::iter((0..).zip(pictures)).map(move |(place, picture)| {
            let set = Arc::clone(&set);
            async move {
                let result = match read(set, picture, limit).await {
                    Ok(data) => read_pictures_response::Result::Data(data),
                    Err(fault) => read_pictures_response::Result::Status(fault.into_item()),
                };
                Ok(ReadPicturesResponse { picture: place, result: Some(result) })
            }
        });
        Ok(Response::new(Box::pin(answers.buffered(4))))
    }

    type ActivateStream = items::Responses<ActivateResponse>;

    async fn activate(&self, request: Request<Streaming<ActivateRequest>>) -> Result<Response<Self::ActivateStream>, Status> {
        let activation = self.0.get()?;
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|request| request.message);
        let Some(activate_request::Message::Setup(setup)) = first else {
            return Err(Fault::field("setup", "the first message of an Activate call says which target and units").into());
        };
        let reading = reading(setup.summary(), setup.token_summary());
        let Prepared { cut, units, .. } = prepare(&activation, setup.target, &setup.layers, reading).await?;
        let units: Arc<[Vec<u32>]> = units.into();
        let answers = items::answer(requests, activation.concurrency(), move |request: ActivateRequest| {
            let (cut, units) = (Arc::clone(&cut), Arc::clone(&units));
            async move {
                let (item_id, run) = match request.message {
                    Some(activate_request::Message::Picture(picture)) => {
                        (picture.item_id, cut.run(Source::Encoded(picture.picture), Output::Activations).await)
                    }
                    _ => (0, Err(Fault::field("picture", "after its setup, an Activate call takes pictures"))),
                };
                let result = match run {
                    Ok(layers) => activate_response::Result::Activations(PictureActivations { values: pick(&layers, &units) }),
                    Err(fault) => activate_response::Result::Status(fault.into_item()),
                };
                ActivateResponse { item_id, result: Some(result) }
            }
        });
        Ok(Response::new(answers))
    }
}

fn check_count(pictures: usize) -> Result<(), Fault> {
    if (1..=MOST_PICTURES).contains(&pictures) {
        Ok(())
    } else {
        Err(Fault::field("pictures", format!("{pictures} pictures; 1 to {MOST_PICTURES} go in one call")))
    }
}

/// The asked-for units' activations out of those of all.
fn pick(layers: &[Vec<f32>], units: &[Vec<u32>]) -> Vec<f32> {
    layers.iter().zip(units).flat_map(|(layer, units)| units.iter().map(|unit| layer.get(*unit as usize).copied().unwrap_or(f32::NAN))).collect()
}

fn reading(summary: proto::Summary, token_summary: proto::TokenSummary) -> Reading {
    Reading { summary: parameters::summary_from(summary), token_summary: parameters::token_summary_from(token_summary) }
}

/// What a call works on.
struct Prepared {
    /// The loaded target for the asked-for layers.
    cut: Arc<Cut>,
    /// The layers by the names that this call has for them: the target may have been loaded for one that has others.
    layers: Vec<LayerInfo>,
    /// The units of each.
    units: Vec<Vec<u32>>,
}

async fn prepare(activation: &Activation, target: Option<proto::Target>, layers: &[proto::LayerUnits], reading: Reading) -> Result<Prepared, Fault> {
    let (described, _) = activation.describe(target).await?;
    let resolved = resolve(&described, layers)?;
    let (layers, units): (Vec<LayerInfo>, Vec<Vec<u32>>) = resolved.into_iter().unzip();
    let cut = activation.cut(&described, &layers, reading).await?;
    Ok(Prepared { cut, layers, units })
}

/// Reads a picture of a set, if it is still what it was when it was probed.
async fn read(set: Arc<ProbingSet>, said: proto::TopPicture, limit: usize) -> Result<bytes::Bytes, Fault> {
    blocking(move || {
        let gone = |why: &str| Fault::new(Code::NotFound, "PICTURE_GONE", format!("{}: {why}", said.path));
        let picture = set.find(said.index, &said.path).ok_or_else(|| gone("the probing set has no such picture any more"))?;
        let bytes = picture.read(limit).map_err(|e| gone(&e.to_string()))?;
        let digest = blobs::digest(&bytes);
        if digest != said.digest {
            return Err(Fault::new(
                Code::FailedPrecondition,
                "PICTURE_CHANGED",
                format!("{} has changed since it was probed: its digest was {}, and is {digest}", said.path, said.digest),
            ));
        }
        Ok(bytes)
    })
    .await
}
