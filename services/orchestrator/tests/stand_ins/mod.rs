//! Model services that answer at once, and as each test wants.
#![allow(dead_code)]

use std::{
    io::Cursor,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use dnd_mesh::{
    Fault, blobs, items,
    server::{InProcess, Services},
};
use dnd_orchestrator::{Data, DataArgs, Models, OrchestratorArgs, WorksOn, add_to};
use dnd_proto::v1::{
    self as proto, ActivateRequest, ActivateResponse, ActivationMap, Answer, AttentionCrop, Caption, CaptionRequest, CaptionResponse, CropRequest,
    CropResponse, DescribeTargetRequest, DescribeTargetResponse, DissectRequest, EmbedImagesRequest, EmbedImagesResponse, EmbedTextsRequest,
    EmbedTextsResponse, Embedding, GenerateRequest, GenerateResponse, LayerUnits, ListShardsRequest, ListShardsResponse, Model, Parameters, PictureActivations,
    ProbeProgress, ProbeRequest, ProbeResponse, ProbeTotal, ProbedUnit, ProbingSet, ProbingShard, ReadPicturesRequest, ReadPicturesResponse, SimplifyRequest,
    SimplifyResponse, SummarizeRequest, SummarizeResponse, Target, TopPicture, activate_request, activation_service_server as activation,
    caption_service_server as captioner, crop_response, diffusion_service_server as diffusion, embedding_service_server as clip, probe_response,
    read_pictures_response, summary_service_server as summarizer,
};
use futures::{StreamExt as _, stream};
use tonic::{Code, Request, Response, Status, Streaming};

pub(crate) type Captions = fn(&[u8]) -> Result<String, Fault>;
pub(crate) type Answers = fn(&SummarizeRequest) -> Result<Answer, Fault>;

/// How the stand-ins answer.
#[derive(Default)]
pub(crate) struct Behaviour {
    /// By the picture's bytes.
    pub(crate) caption: Option<Captions>,
    /// Whether each unit has top pictures of its own.
    pub(crate) own_pictures: bool,
    /// Units that are alive, the first ones; all but 99 unless it is said.
    pub(crate) live: Option<u32>,
    /// Whether the probing set is one of [`PICTURES`] pictures, of which each unit has other top ones, in place of three.
    pub(crate) large_set: bool,
    /// Pictures of the small set that a shard of it has; all three unless it is said.
    pub(crate) shard_pictures: Option<u64>,
    /// Whether top pictures have activation maps, and with them a crop each.
    pub(crate) crops: bool,
    /// By the request.
    pub(crate) summary: Option<fn(&SummarizeRequest) -> String>,
    pub(crate) simplified: Option<fn(&str) -> String>,
    /// By the request, in place of `summary`.
    pub(crate) answer: Option<Answers>,
    /// By concept and index; none is unusable.
    pub(crate) drawing: Option<fn(&str, u32) -> Option<Bytes>>,
    /// How long a picture takes to be drawn.
    pub(crate) drawing_takes: Duration,
    /// By the picture's bytes.
    pub(crate) activation: Option<fn(&[u8]) -> f32>,
    /// Calls that the captioner refuses before it answers.
    pub(crate) away: AtomicUsize,
    /// Times that the captioner says that its model is being loaded.
    pub(crate) loading: AtomicUsize,
    pub(crate) probes: AtomicUsize,
    pub(crate) cropped: AtomicUsize,
    pub(crate) read: AtomicUsize,
    pub(crate) captions: AtomicUsize,
    pub(crate) drawings: AtomicUsize,
    pub(crate) runs: AtomicUsize,
    /// Texts embedded.
    pub(crate) texts: AtomicUsize,
}

#[derive(Clone)]
pub(crate) struct Fakes(pub(crate) Arc<Behaviour>);

fn model() -> Option<Model> {
    Some(Model { name: "stand-in".into(), ..Default::default() })
}

/// A PNG of one colour but for a corner.
pub(crate) fn png(shade: u8) -> Bytes {
    let mut picture = image::RgbImage::from_pixel(4, 4, image::Rgb([shade, shade, shade]));
    picture.put_pixel(0, 0, image::Rgb([255 - shade, 0, shade]));
    let mut bytes = Vec::new();
    picture.write_to(&mut Cursor::new(&mut bytes), image::ImageFormat::Png).unwrap();
    bytes.into()
}

/// The stand-in probing set: picture i is `png(i)`.
fn top(index: u64) -> TopPicture {
    let picture = png(index as u8);
    TopPicture { path: format!("{index}.png"), digest: blobs::digest(&picture), index, activation: 10.0 - index as f32, map: None, seen: None }
}

/// Pictures of the large probing set, which are texts.
pub(crate) const PICTURES: u64 = 100_000;

fn large(index: u64) -> Bytes {
    format!("picture {index}").into()
}

/// A unit's highest activating pictures in a shard of the large set, any of it.
fn top_of_large(unit: u32, shard: &ProbingShard, count: u32) -> Vec<TopPicture> {
    static DIGESTS: LazyLock<Vec<String>> = LazyLock::new(|| (0..PICTURES).map(|index| blobs::digest(&large(index))).collect());
    let begin = (u64::from(unit) + shard.first).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
    let picture = |place: u64| {
        let index = shard.first + (begin + 7 * place) % shard.pictures;
        let activation = 1000.0 - (begin % 97) as f32 - place as f32;
        TopPicture { path: format!("{index}.png"), digest: DIGESTS[index as usize].clone(), index, activation, map: None, seen: None }
    };
    (0..u64::from(count)).map(picture).collect()
}

#[tonic::async_trait]
impl activation::ActivationService for Fakes {
    async fn get_model(&self, _: Request<proto::ActivationServiceGetModelRequest>) -> Result<Response<proto::ActivationServiceGetModelResponse>, Status> {
        Ok(Response::new(proto::ActivationServiceGetModelResponse { model: model() }))
    }

    async fn describe_target(&self, request: Request<DescribeTargetRequest>) -> Result<Response<DescribeTargetResponse>, Status> {
        Ok(Response::new(DescribeTargetResponse { digest: "d".repeat(64), found: request.into_inner().asked, ..Default::default() }))
    }

    type ListShardsStream = items::Responses<ListShardsResponse>;

    async fn list_shards(&self, request: Request<ListShardsRequest>) -> Result<Response<Self::ListShardsStream>, Status> {
        let pictures = if self.0.large_set { PICTURES } else { 3 };
        let most = self.0.shard_pictures.or(request.into_inner().pictures_per_shard.map(u64::from)).unwrap_or(pictures);
        let shard = move |first| ProbingShard { first, pictures: most.min(pictures - first), digest: "5".repeat(64), ..Default::default() };
        let listed =
            (0..pictures).step_by(most as usize).map(move |first| Ok(ListShardsResponse { shard: Some(shard(first)), pictures, unreadable: Vec::new() }));
        Ok(Response::new(Box::pin(stream::iter(listed))))
    }

    type ProbeStream = items::Responses<ProbeResponse>;

    async fn probe(&self, request: Request<ProbeRequest>) -> Result<Response<Self::ProbeStream>, Status> {
        let request = request.into_inner();
        self.0.probes.fetch_add(1, Ordering::Relaxed);
        let Behaviour { own_pictures, large_set, crops, live, .. } = *self.0;
        let (shard, count) = (request.shard.unwrap(), request.top.unwrap());
        let pictures = shard.pictures;
        let units = request.layers.into_iter().flat_map(|layer| layer.units.into_iter().map(move |unit| (layer.layer.clone(), unit)));
        let tops = move |unit: u32| {
            if large_set {
                return top_of_large(unit, &shard, count);
            }
            let first = if own_pictures { u64::from(count.min(3)) * u64::from(unit) } else { 0 };
            let map = crops.then(|| ActivationMap { height: 1, width: 1, values: vec![1.0] });
            let indices = shard.first..shard.first + shard.pictures.min(u64::from(count));
            indices.map(|index| TopPicture { map: map.clone(), ..top(first + index) }).collect()
        };
        let probed = units.map(move |(layer, unit)| {
            let mut top: Vec<TopPicture> = tops(unit);
            let dead = live.map_or(unit == 99 && !large_set, |live| unit >= live);
            if dead {
                top.iter_mut().for_each(|picture| picture.activation = 10.0);
            }
            let highest = top.first().map_or(10.0, |picture| picture.activation);
            ProbedUnit { layer, unit, dead, lowest: if dead { highest } else { -1000.0 }, highest, top, ..Default::default() }
        });
        let progress = probe_response::Event::Progress(ProbeProgress { done: pictures, pictures });
        let total = probe_response::Event::Total(ProbeTotal { pictures, ..Default::default() });
        let events = [progress].into_iter().chain(probed.map(probe_response::Event::Unit)).chain([total]).map(|event| Ok(ProbeResponse { event: Some(event) }));
        Ok(Response::new(Box::pin(stream::iter(events))))
    }

    type CropStream = items::Responses<CropResponse>;

    async fn crop(&self, request: Request<CropRequest>) -> Result<Response<Self::CropStream>, Status> {
        let crops = (0..).zip(request.into_inner().pictures).map(|(place, picture)| {
            self.0.cropped.fetch_add(1, Ordering::Relaxed);
            let cut_out = png(150 + picture.index as u8);
            let crop = AttentionCrop { digest: blobs::digest(&cut_out), picture: cut_out, activation: 0.5, ..Default::default() };
            Ok(CropResponse { picture: place, result: Some(crop_response::Result::Crop(crop)) })
        });
        Ok(Response::new(Box::pin(stream::iter(crops.collect::<Vec<_>>()))))
    }

    type ReadPicturesStream = items::Responses<ReadPicturesResponse>;

    async fn read_pictures(&self, request: Request<ReadPicturesRequest>) -> Result<Response<Self::ReadPicturesStream>, Status> {
        let read = (0..).zip(request.into_inner().pictures).map(|(place, picture)| {
            self.0.read.fetch_add(1, Ordering::Relaxed);
            let data = if self.0.large_set { large(picture.index) } else { png(picture.index as u8) };
            Ok(ReadPicturesResponse { picture: place, result: Some(read_pictures_response::Result::Data(data)) })
        });
        Ok(Response::new(Box::pin(stream::iter(read.collect::<Vec<_>>()))))
    }

    type ActivateStream = items::Responses<ActivateResponse>;

    async fn activate(&self, request: Request<Streaming<ActivateRequest>>) -> Result<Response<Self::ActivateStream>, Status> {
        let fakes = self.clone();
        let mut units = 0;
        let answers = request.into_inner().filter_map(move |request| {
            let answer = match request.unwrap().message.unwrap() {
                activate_request::Message::Setup(setup) => {
                    units = setup.layers.iter().map(|layer| layer.units.len()).sum();
                    None
                }
                activate_request::Message::Picture(picture) => {
                    fakes.0.runs.fetch_add(1, Ordering::Relaxed);
                    let value = fakes.0.activation.map_or(1.0, |activation| activation(&picture.picture));
                    let activations = PictureActivations { values: vec![value; units] };
                    Some(Ok(ActivateResponse { item_id: picture.item_id, result: Some(proto::activate_response::Result::Activations(activations)) }))
                }
            };
            std::future::ready(answer)
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

#[tonic::async_trait]
impl captioner::CaptionService for Fakes {
    async fn get_model(&self, _: Request<proto::CaptionServiceGetModelRequest>) -> Result<Response<proto::CaptionServiceGetModelResponse>, Status> {
        if self.0.loading.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |loading| loading.checked_sub(1)).is_ok() {
            return Err(Fault::new(Code::Unavailable, "MODEL_LOADING", "the model is still being loaded").into());
        }
        Ok(Response::new(proto::CaptionServiceGetModelResponse { model: model() }))
    }

    type CaptionStream = items::Responses<CaptionResponse>;

    async fn caption(&self, request: Request<Streaming<CaptionRequest>>) -> Result<Response<Self::CaptionStream>, Status> {
        if self.0.away.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |away| away.checked_sub(1)).is_ok() {
            return Err(Status::unavailable("not now"));
        }
        let fakes = self.clone();
        let answers = items::answer(request.into_inner(), 4, move |request: CaptionRequest| {
            let fakes = fakes.clone();
            async move {
                fakes.0.captions.fetch_add(1, Ordering::Relaxed);
                let caption = fakes.0.caption.map_or(Ok("a red circle".to_owned()), |caption| caption(&request.picture));
                let result = match caption {
                    Ok(text) => proto::caption_response::Result::Caption(Caption { text, token_ids: Vec::new() }),
                    Err(fault) => proto::caption_response::Result::Status(fault.into_item()),
                };
                CaptionResponse { item_id: request.item_id, result: Some(result) }
            }
        });
        Ok(Response::new(answers))
    }
}

pub(crate) fn said(text: String) -> Answer {
    Answer { text, ..Default::default() }
}

#[tonic::async_trait]
impl summarizer::SummaryService for Fakes {
    async fn get_model(&self, _: Request<proto::SummaryServiceGetModelRequest>) -> Result<Response<proto::SummaryServiceGetModelResponse>, Status> {
        Ok(Response::new(proto::SummaryServiceGetModelResponse { model: model() }))
    }

    type SimplifyStream = items::Responses<SimplifyResponse>;

    async fn simplify(&self, request: Request<Streaming<SimplifyRequest>>) -> Result<Response<Self::SimplifyStream>, Status> {
        let fakes = self.clone();
        let answers = items::answer(request.into_inner(), 4, move |request: SimplifyRequest| {
            let text = fakes.0.simplified.map_or(request.caption.clone(), |simplified| simplified(&request.caption));
            async move { SimplifyResponse { item_id: request.item_id, result: Some(proto::simplify_response::Result::Answer(said(text))) } }
        });
        Ok(Response::new(answers))
    }

    type SummarizeStream = items::Responses<SummarizeResponse>;

    async fn summarize(&self, request: Request<Streaming<SummarizeRequest>>) -> Result<Response<Self::SummarizeStream>, Status> {
        let fakes = self.clone();
        let answers = items::answer(request.into_inner(), 4, move |request: SummarizeRequest| {
            assert!(request.descriptions.iter().all(|description| !description.is_empty()), "no empty description is ever asked about");
            let text = fakes.0.summary.map_or("red circles".to_owned(), |summary| summary(&request));
            let answer = fakes.0.answer.map_or_else(|| Ok(said(text)), |answer| answer(&request));
            async move {
                let result = match answer {
                    Ok(answer) => proto::summarize_response::Result::Answer(answer),
                    Err(fault) => proto::summarize_response::Result::Status(fault.into_item()),
                };
                SummarizeResponse { item_id: request.item_id, result: Some(result) }
            }
        });
        Ok(Response::new(answers))
    }
}

#[tonic::async_trait]
impl diffusion::DiffusionService for Fakes {
    async fn get_model(&self, _: Request<proto::DiffusionServiceGetModelRequest>) -> Result<Response<proto::DiffusionServiceGetModelResponse>, Status> {
        Ok(Response::new(proto::DiffusionServiceGetModelResponse { model: model() }))
    }

    type GenerateStream = items::Responses<GenerateResponse>;

    async fn generate(&self, request: Request<Streaming<GenerateRequest>>) -> Result<Response<Self::GenerateStream>, Status> {
        let fakes = self.clone();
        let answers = items::answer(request.into_inner(), 4, move |request: GenerateRequest| {
            fakes.0.drawings.fetch_add(1, Ordering::Relaxed);
            let drawn = fakes.0.drawing.map_or_else(|| Some(png(100 + request.index as u8)), |drawing| drawing(&request.concept, request.index));
            let takes = fakes.0.drawing_takes;
            async move {
                tokio::time::sleep(takes).await;
                let result = match drawn {
                    Some(picture) => proto::generate_response::Result::Picture(picture),
                    None => proto::generate_response::Result::Unusable("all one value".into()),
                };
                GenerateResponse { item_id: request.item_id, result: Some(result) }
            }
        });
        Ok(Response::new(answers))
    }
}

#[tonic::async_trait]
impl clip::EmbeddingService for Fakes {
    async fn get_model(&self, _: Request<proto::EmbeddingServiceGetModelRequest>) -> Result<Response<proto::EmbeddingServiceGetModelResponse>, Status> {
        Ok(Response::new(proto::EmbeddingServiceGetModelResponse { model: model() }))
    }

    type EmbedImagesStream = items::Responses<EmbedImagesResponse>;

    async fn embed_images(&self, request: Request<Streaming<EmbedImagesRequest>>) -> Result<Response<Self::EmbedImagesStream>, Status> {
        let answers = items::answer(request.into_inner(), 4, |request: EmbedImagesRequest| async move {
            let embedding = Embedding { values: vec![1.0, f32::from(request.picture[request.picture.len() / 2])] };
            EmbedImagesResponse { item_id: request.item_id, result: Some(proto::embed_images_response::Result::Embedding(embedding)) }
        });
        Ok(Response::new(answers))
    }

    type EmbedTextsStream = items::Responses<EmbedTextsResponse>;

    async fn embed_texts(&self, request: Request<Streaming<EmbedTextsRequest>>) -> Result<Response<Self::EmbedTextsStream>, Status> {
        let fakes = self.clone();
        let answers = items::answer(request.into_inner(), 4, move |request: EmbedTextsRequest| {
            fakes.0.texts.fetch_add(1, Ordering::Relaxed);
            async move {
                let embedding = Embedding { values: vec![1.0, request.text.len() as f32] };
                EmbedTextsResponse { item_id: request.item_id, result: Some(proto::embed_texts_response::Result::Embedding(embedding)) }
            }
        });
        Ok(Response::new(answers))
    }
}

/// What is asked of a job on these units.
pub(crate) fn request(units: Vec<u32>, parameters: Parameters) -> DissectRequest {
    DissectRequest {
        target: Some(Target { uri: "file:/somewhere/net.onnx".into(), ..Default::default() }),
        layers: vec![LayerUnits { layer: "layer".into(), units }],
        probing_set: Some(ProbingSet::default()),
        parameters: Some(parameters),
        ..Default::default()
    }
}

/// An orchestrator over a network of stand-ins, which keeps what it makes there.
pub(crate) async fn orchestrator(models: &InProcess, data: &DataArgs, args: &OrchestratorArgs) -> InProcess {
    let channel = || models.channel().into();
    let models = Models::over(channel(), channel(), channel(), channel(), channel());
    InProcess::start(add_to(Services::default(), models, Data::open(data).await.unwrap(), args, WorksOn::AllJobs))
}

impl Fakes {
    /// A network of the stand-ins.
    pub(crate) fn start(&self) -> InProcess {
        let services = Services::default()
            .with(activation::ActivationServiceServer::new(self.clone()))
            .with(captioner::CaptionServiceServer::new(self.clone()))
            .with(summarizer::SummaryServiceServer::new(self.clone()))
            .with(diffusion::DiffusionServiceServer::new(self.clone()))
            .with(clip::EmbeddingServiceServer::new(self.clone()));
        InProcess::start(services)
    }
}
