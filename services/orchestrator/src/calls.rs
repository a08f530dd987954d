//! What the steps ask of the models. Every pure call is made once, whichever units, jobs and processes need it: results are kept.

use std::{
    collections::HashMap,
    future::ready,
    hash::Hash,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use dnd_mesh::{
    Fault,
    blobs::{self, Blobs},
    fault, parameters,
    retry::{Patience, is_away},
};
use dnd_method::{embedding::Embedding, parameters::Parameters};
use dnd_proto::v1::{
    self as proto, ActivatePicture, ActivateRequest, ActivateSetup, Answer, CaptionRequest, CropRequest, DissectRequest, EmbedImagesRequest, EmbedTextsRequest,
    GenerateRequest, JobAccepted, LayerUnits, ListShardsRequest, ListShardsResponse, Model, ProbeRequest, ProbeResponse, ProbingSet, ProbingShard, Provenance,
    ReadPicturesRequest, Sampling, SimplifyRequest, Stage, SummarizeRequest, Target, TopPicture, Usage, activate_request, activate_response, caption_response,
    crop_response, embed_images_response, embed_texts_response, generate_response, read_pictures_response, simplify_response, summarize_response,
};
use futures::{StreamExt as _, stream};
use prost::Message as _;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tonic::{Code, Response, Status, Streaming};

use crate::{
    memo::{Found, Memo},
    models::{Models, passed_on},
    probing::{ProbedShard, kept},
    progress::Progress,
    results::{Results as Kept, Shelf},
    steps::{Failure, looked_at},
    store::Pause,
    uploads::{self, NOT_UPLOADED},
};

/// Items of one stream at most, so that load can move between replicas.
const ITEMS: usize = 64;
/// How often a call whose service is away is tried again: some seconds, enough for a service that is started anew at once. Then the job pauses until it is there.
pub(crate) const TRIES: u32 = 5;
/// As [`TRIES`], where a mesh that was just started is waited for: about a minute, in which a service loads its model.
pub(crate) const TRIES_AT_FIRST: u32 = 12;
/// Results that are in memory for units that need them, too: texts and digests, embeddings, and activations by their number. All others are in the database.
const KEPT: usize = 10_000;
const KEPT_EMBEDDINGS: usize = 5_000;
/// Crops are no two units', and no picture is cropped for a unit twice.
const KEPT_CROPS: usize = 1_000;
const KEPT_ACTIVATIONS: usize = 1 << 24;
/// Reasons of the summarizer's that every further question would be answered with, too: the job waits for whoever can change that.
const PAUSES_THE_JOB: [&str; 4] = ["LLM_BUDGET", "LLM_KEY", "LLM_NOT_FOUND", "LLM_QUOTA"];

/// The calls of one job.
pub(crate) struct Calls {
    models: Models,
    blobs: Arc<Blobs>,
    progress: Progress,
    parameters: Parameters,
    target: Target,
    probing_set: ProbingSet,
    layers: Vec<LayerUnits>,
    shards: Option<Shelf<ProbedShard>>,
    crops: Memo<Cropped, Arc<[Crop]>>,
    captions: Memo<String, String>,
    simplified: Memo<String, Said>,
    summaries: Memo<Summary, Said>,
    drawings: Memo<(String, u32), Drawing>,
    activations: Memo<String, Arc<[f32]>>,
    images: Memo<String, Arc<Embedding>>,
    texts: Memo<String, Arc<Embedding>>,
}

/// Of which unit's picture crops are: the layer, the unit, and the picture's digest.
type Cropped = (String, u32, String);

/// What a summary is asked of: which attempt it is, whether without the examples, and the descriptions.
type Summary = (u32, bool, Vec<String>);

/// What a job works on and with.
pub(crate) struct Work {
    pub(crate) parameters: Parameters,
    pub(crate) target: Target,
    pub(crate) probing_set: ProbingSet,
    pub(crate) layers: Vec<LayerUnits>,
    pub(crate) provenance: Provenance,
}

impl Work {
    /// The work of a job.
    pub(crate) fn of(request: DissectRequest, accepted: JobAccepted) -> Result<Self, Fault> {
        let provenance = accepted.provenance.unwrap_or_default();
        // The target is what it was when it was described, its pre-processing spelt out.
        let Provenance { target_digest, preprocessing, parameters, .. } = provenance.clone();
        Ok(Self {
            parameters: parameters::from_request(parameters.as_ref())?,
            target: Target { digest: target_digest, preprocessing, ..request.target.unwrap_or_default() },
            probing_set: request.probing_set.unwrap_or_default(),
            layers: accepted.layers,
            provenance,
        })
    }

    /// Where results of a function are kept, that depend on a model and on what `with` says. The number in the function's name is raised when its results
    /// become others.
    fn shelf<V: Serialize + DeserializeOwned + Clone>(results: &Kept, function: &str, model: Option<&Model>, with: &str) -> Option<Shelf<V>> {
        let (digest, engine) = model.map(|model| (model.digest.as_bytes(), model.engine.as_bytes()))?;
        Some(Shelf::new(results.clone(), &[function.as_bytes(), digest, engine, with.as_bytes()]))
    }
}

/// A drawn picture: its digest, or why it can't be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Drawing {
    Picture(String),
    Unusable(String),
}

/// What the language model said: a text, or, in a sentence, why what it said can't be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Said {
    Text(String),
    Unusable(String),
}

impl Said {
    fn of(answer: Answer) -> Self {
        let Answer { text, cut_off, refused, .. } = answer;
        match (refused, cut_off) {
            (true, _) => Self::Unusable(format!("the model refused to answer: {text:?}")),
            (_, true) => Self::Unusable(format!("the answer was cut off: {text:?}")),
            _ if text.trim().is_empty() => Self::Unusable("the answer was empty".to_owned()),
            _ => Self::Text(text),
        }
    }
}

/// An attention crop, kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Crop {
    pub(crate) digest: String,
    /// Left, top, right and bottom in the original.
    area: [u32; 4],
    pub(crate) threshold: u32,
    /// Its place among the picture's crops.
    pub(crate) index: u32,
    pub(crate) activation: f32,
}

impl Crop {
    fn of(crop: &proto::AttentionCrop) -> Self {
        let proto::Box { left, top, right, bottom } = crop.r#box.unwrap_or_default();
        let proto::AttentionCrop { threshold, index, activation, .. } = *crop;
        Self { digest: crop.digest.clone(), area: [left, top, right, bottom], threshold, index, activation }
    }

    /// Where in the original it was cut out.
    pub(crate) fn area(&self) -> proto::Box {
        let [left, top, right, bottom] = self.area;
        proto::Box { left, top, right, bottom }
    }
}

type Results<V> = Vec<Result<V, Failure>>;

/// What an answer of a stream of items holds: one of the named results, the failure of its status, or nothing, which is a failure too.
macro_rules! answered {
    ($result:expr, $module:ident, $($variant:ident($value:pat) => $made:expr),+) => {
        match $result {
            $(Some($module::Result::$variant($value)) => $made,)+
            Some($module::Result::Status(status)) => Err(Failure::item(&status)),
            None => Err(Failure::empty()),
        }
    };
}

impl Calls {
    /// The calls of a job; their results are kept where `results` keeps them.
    pub(crate) fn new(models: Models, blobs: Arc<Blobs>, results: &Kept, work: Work) -> Self {
        let Work { parameters, target, probing_set, layers, provenance } = work;
        let units: usize = layers.iter().map(|layer| layer.units.len()).sum();
        let Parameters { seed, temperature, answer_max_new_tokens, num_inference_steps, guidance_scale, .. } = parameters;
        let Parameters { crops_per_image, crop_iou, canvas_iou, canvas_side, .. } = parameters;
        let Parameters { caption_max_new_tokens, caption_min_length, summary, token_summary, .. } = parameters;
        let sampling = format!("seed {seed} temperature {temperature} max_new_tokens {answer_max_new_tokens}");
        let captioned = format!("max_new_tokens {caption_max_new_tokens} min_length {caption_min_length}");
        let drawn = format!("seed {seed} num_inference_steps {num_inference_steps} guidance_scale {guidance_scale}");
        let Provenance { target_digest, preprocessing, .. } = &provenance;
        let seen = format!("{target_digest} {preprocessing:?} {:?} {layers:?} {summary:?} {token_summary:?}", target.options);
        // A network is cut and optimized for all the layers that are asked for together.
        let names: Vec<&String> = layers.iter().map(|layer| &layer.layer).collect();
        let cropped = format!(
            "{target_digest} {preprocessing:?} {:?} {names:?} {summary:?} {token_summary:?} {crops_per_image} {crop_iou} {canvas_iou} {canvas_side}",
            target.options
        );
        let (summarizer, clip) = (provenance.summarizer.as_ref(), provenance.clip.as_ref());
        let (captioner, diffusion, activation) = (provenance.captioner.as_ref(), provenance.diffusion.as_ref(), provenance.activation.as_ref());
        // A service skips pictures that are over its limits.
        let limits = activation.and_then(|model| model.limits.as_ref()).map(|limits| (limits.picture_bytes, limits.picture_pixels));
        let probed = format!("{seen} {limits:?} top {}", looked_at(&parameters));
        let chunks = Arc::clone(&blobs);
        let shards = Work::shelf(results, "probe 1", activation, &probed)
            .map(|shelf| shelf.where_whole(move |shard: &ProbedShard| shard.chunks.iter().all(|chunk| chunks.path(chunk).is_some())));
        let pictures = Arc::clone(&blobs);
        let crops = Work::shelf(results, "crop 1", activation, &cropped)
            .map(|shelf| shelf.where_whole(move |crops: &Arc<[Crop]>| crops.iter().all(|crop| pictures.path(&crop.digest).is_some())));
        let pictures = Arc::clone(&blobs);
        let drawings = Work::shelf(results, "draw 1", diffusion, &drawn).map(|shelf| {
            shelf.where_whole(move |drawing| match drawing {
                Drawing::Picture(digest) => pictures.path(digest).is_some(),
                Drawing::Unusable(_) => true,
            })
        });
        // What gave no answer that can be used is asked for again by a later run.
        let answers =
            |function: &str| Work::shelf(results, function, summarizer, &sampling).map(|shelf| shelf.where_whole(|said: &Said| matches!(said, Said::Text(_))));
        Self {
            shards,
            crops: Memo::new(KEPT_CROPS, crops),
            captions: Memo::new(KEPT, Work::shelf(results, "caption 1", captioner, &captioned)),
            simplified: Memo::new(KEPT, answers("simplify 1")),
            summaries: Memo::new(KEPT, answers("summarize 1")),
            drawings: Memo::new(KEPT, drawings),
            activations: Memo::new(KEPT_ACTIVATIONS / units.max(1), Work::shelf(results, "activate 1", activation, &seen)),
            images: Memo::new(KEPT_EMBEDDINGS, Work::shelf(results, "embed image 1", clip, "")),
            texts: Memo::new(KEPT_EMBEDDINGS, Work::shelf(results, "embed text 1", clip, "")),
            models,
            blobs,
            progress: Progress::default(),
            parameters,
            target,
            probing_set,
            layers,
        }
    }

    pub(crate) fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    pub(crate) fn layers(&self) -> &[LayerUnits] {
        &self.layers
    }

    /// Has the language model asked anew about what it gave no usable answer to.
    pub(crate) fn ask_anew(&self) {
        self.simplified.forget_unusable();
        self.summaries.forget_unusable();
    }

    /// What the calls took so far.
    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Keeps a picture that was made here.
    pub(crate) async fn keep(&self, picture: Bytes) -> Result<String, Failure> {
        self.blobs.put(picture).await.map_err(|e| Failure::storage(format!("kept pictures: {e}")))
    }

    async fn picture(&self, digest: &str) -> Result<Bytes, Failure> {
        let missing = || Failure::new("storage", format!("the picture {digest} is not there any more")).worth_another_try();
        self.blobs.get(digest).await.map_err(|e| Failure::storage(format!("kept pictures: {e}")))?.ok_or_else(missing)
    }

    fn note<V>(&self, stage: Stage, found: Found<V>) -> Results<V> {
        self.progress.calls(stage, found.made, found.reused);
        found.values
    }

    /// Lists the probing set in shards of so many pictures.
    pub(crate) async fn shards(&self, pictures: u32) -> Result<Vec<ListShardsResponse>, Fault> {
        let call = || async { self.list_shards(Some(pictures)).await };
        self.listed(call, ready).await.map_err(|status| passed_on("activation", &status))
    }

    /// Checks that there is a probing set to list.
    pub(crate) async fn check_probing_set(&self) -> Result<(), Fault> {
        self.list_shards(None).await.map(drop).map_err(|status| passed_on("activation", &status))
    }

    async fn list_shards(&self, pictures_per_shard: Option<u32>) -> Result<Response<Streaming<ListShardsResponse>>, Status> {
        let request = ListShardsRequest { probing_set: Some(self.probing_set.clone()), pictures_per_shard };
        self.with_uploads(self.models.activation.clone().list_shards(request).await).await
    }

    /// Begins the pass over a shard.
    pub(crate) async fn probe(&self, shard: ProbingShard) -> Result<Streaming<ProbeResponse>, Status> {
        let request = ProbeRequest {
            target: Some(self.target.clone()),
            probing_set: Some(self.probing_set.clone()),
            layers: self.layers.clone(),
            summary: parameters::summary(&self.parameters).into(),
            token_summary: parameters::token_summary(&self.parameters).into(),
            top: Some(looked_at(&self.parameters)),
            shard: Some(shard),
        };
        self.with_uploads(self.models.activation.clone().probe(request).await).await.map(Response::into_inner)
    }

    /// What an earlier pass over a shard found, if it is kept.
    pub(crate) async fn kept_shard(&self, shard: &ProbingShard) -> Result<Option<ProbedShard>, Fault> {
        let Some(shelf) = &self.shards else { return Ok(None) };
        let key = shard.encode_to_vec();
        Ok(shelf.find(&[&key]).await.map_err(|failure| kept(&failure))?.remove(&key))
    }

    /// Keeps what a pass over a shard found, and gives what is kept of it.
    pub(crate) async fn keep_shard(&self, shard: &ProbingShard, probed: ProbedShard) -> Result<ProbedShard, Fault> {
        let Some(shelf) = &self.shards else { return Ok(probed) };
        shelf.keep(&shard.encode_to_vec(), probed).await.map_err(|failure| kept(&failure))
    }

    /// Keeps a chunk of what a pass found.
    pub(crate) async fn keep_chunk(&self, chunk: Bytes) -> Result<String, Fault> {
        self.blobs.put(chunk).await.map_err(blobs::storage)
    }

    /// A kept chunk, if it is there.
    pub(crate) async fn chunk(&self, digest: &str) -> Result<Option<Bytes>, Fault> {
        self.blobs.get(digest).await.map_err(blobs::storage)
    }

    /// Keeps whole pictures of the probing set; those that are not there yet are read.
    pub(crate) async fn originals(&self, pictures: &[TopPicture]) -> Results<()> {
        let missing: Vec<&TopPicture> = pictures.iter().filter(|picture| self.blobs.path(&picture.digest).is_none()).collect();
        let mut failures = if missing.is_empty() { HashMap::new() } else { self.read(&missing).await };
        pictures.iter().map(|picture| failures.remove(&picture.digest).map_or(Ok(()), Err)).collect()
    }

    /// Reads pictures and keeps them; gives what became of those that are not there then.
    async fn read(&self, pictures: &[&TopPicture]) -> HashMap<String, Failure> {
        let asked = pictures.iter().map(|picture| TopPicture { map: None, ..(*picture).clone() }).collect();
        let request = ReadPicturesRequest { probing_set: Some(self.probing_set.clone()), pictures: asked };
        let call = || {
            let (mut client, request) = (self.models.activation.clone(), request.clone());
            async move { self.with_uploads(client.read_pictures(request).await).await }
        };
        let keep = |answer: proto::ReadPicturesResponse| async move {
            (answer.picture as usize, answered!(answer.result, read_pictures_response, Data(data) => self.keep(data).await.map(drop)))
        };
        let mut read: HashMap<usize, Result<(), Failure>> = match self.listed(call, keep).await {
            Ok(read) => read.into_iter().collect(),
            Err(status) => (0..pictures.len()).map(|place| (place, Err(Failure::of("activation", &status)))).collect(),
        };
        let failure =
            |(place, picture): (usize, &&TopPicture)| Some((picture.digest.clone(), read.remove(&place).unwrap_or_else(|| Err(Failure::empty())).err()?));
        pictures.iter().enumerate().filter_map(failure).collect()
    }

    /// The attention crops of a unit's pictures, kept, larger regions first. Only pictures with a map have some.
    pub(crate) async fn crops(&self, layer: &str, unit: u32, pictures: &[TopPicture]) -> Results<Arc<[Crop]>> {
        let Parameters { crops_per_image, crop_iou, canvas_iou, canvas_side, .. } = self.parameters;
        if crops_per_image == 0 || pictures.iter().all(|picture| picture.map.is_none()) {
            return pictures.iter().map(|_| Ok(Arc::default())).collect();
        }
        let made = &AtomicU64::new(0);
        let make = |wanted: Vec<Cropped>| async move {
            let asked = wanted.iter().filter_map(|(.., digest)| pictures.iter().find(|picture| picture.digest == *digest)).cloned().collect();
            let request = CropRequest {
                target: Some(self.target.clone()),
                probing_set: Some(self.probing_set.clone()),
                layers: self.layers.clone(),
                layer: layer.to_owned(),
                unit,
                summary: parameters::summary(&self.parameters).into(),
                token_summary: parameters::token_summary(&self.parameters).into(),
                pictures: asked,
                crops_per_image: Some(crops_per_image),
                crop_iou: Some(crop_iou),
                canvas_iou: Some(canvas_iou),
                canvas_side: Some(canvas_side),
            };
            let call = || {
                let (mut client, request) = (self.models.activation.clone(), request.clone());
                async move { self.with_uploads(client.crop(request).await).await }
            };
            // Each crop is kept as it comes, and its picture let go.
            let keep = |answer: proto::CropResponse| async move {
                let crop = answered!(answer.result, crop_response, Crop(crop) => self.keep(crop.picture.clone()).await.map(|_| Crop::of(&crop)));
                (answer.picture as usize, crop)
            };
            let answers = match self.listed(call, keep).await {
                Ok(answers) => answers,
                Err(status) => return wanted.iter().map(|_| Err(Failure::of("activation", &status))).collect(),
            };
            made.fetch_add(answers.len() as u64, Ordering::Relaxed);
            // A picture that is not mentioned has no salient region.
            let mut crops: Vec<Result<Vec<Crop>, Failure>> = wanted.iter().map(|_| Ok(Vec::new())).collect();
            for (place, answer) in answers {
                let Some(place) = crops.get_mut(place) else { continue };
                match (place.as_mut(), answer) {
                    (Ok(crops), Ok(crop)) => crops.push(crop),
                    (Ok(_), Err(failure)) => *place = Err(failure),
                    (Err(_), _) => {}
                }
            }
            let mut results = Vec::with_capacity(wanted.len());
            for (cropped, crops) in wanted.iter().zip(crops) {
                results.push(match crops {
                    Ok(mut crops) => {
                        crops.sort_by_key(|crop| crop.index);
                        self.crops.keep(cropped, crops.into()).await
                    }
                    Err(failure) => Err(failure),
                });
            }
            results
        };
        let keys: Vec<Cropped> = pictures.iter().map(|picture| (layer.to_owned(), unit, picture.digest.clone())).collect();
        let crops = self.crops.get(&keys, make).await.values;
        let (made, all) = (made.load(Ordering::Relaxed), crops.iter().flatten().map(|crops| crops.len() as u64).sum::<u64>());
        self.progress.calls(Stage::Crop, made, all.saturating_sub(made));
        crops
    }

    /// Captions of kept pictures.
    pub(crate) async fn captions(&self, digests: &[String]) -> Results<String> {
        let make = |wanted: Vec<String>| async move {
            let request = |item_id: u64, digest: String| async move {
                Ok(CaptionRequest {
                    item_id,
                    picture: self.picture(&digest).await?,
                    max_new_tokens: Some(self.parameters.caption_max_new_tokens),
                    min_length: Some(self.parameters.caption_min_length),
                    ..Default::default()
                })
            };
            let call = |requests| {
                let mut client = self.models.captioner.clone();
                async move { client.caption(requests).await }
            };
            let read =
                |answer: proto::CaptionResponse| ready((answer.item_id, answered!(answer.result, caption_response, Caption(caption) => Ok(caption.text))));
            each("captioner", &wanted, request, call, read, &self.captions).await
        };
        let found = self.captions.get(digests, make).await;
        self.note(Stage::Caption, found)
    }

    fn sampling(&self) -> Sampling {
        let Parameters { seed, temperature, answer_max_new_tokens, .. } = self.parameters;
        Sampling { seed: Some(seed), temperature: Some(temperature), max_new_tokens: Some(answer_max_new_tokens) }
    }

    /// Captions simplified by prompt 1, and what it took to ask about those that nobody had asked about.
    pub(crate) async fn simplified(&self, captions: &[String]) -> (Results<Said>, Option<Usage>) {
        let meter = &Meter::default();
        let make = |wanted: Vec<String>| async move {
            let request = |item_id: u64, caption: String| ready(Ok(SimplifyRequest { item_id, caption, sampling: Some(self.sampling()) }));
            let call = |requests| {
                let mut client = self.models.summarizer.clone();
                async move { client.simplify(requests).await }
            };
            let read = |answer: proto::SimplifyResponse| {
                ready((answer.item_id, answered!(answer.result, simplify_response, Answer(answer) => Ok(meter.read(answer)))))
            };
            each("summarizer", &wanted, request, call, read, &self.simplified).await
        };
        let found = self.simplified.get(captions, make).await;
        (self.note(Stage::Summarize, found), meter.usage())
    }

    /// Summaries by prompt 2 of lists of descriptions, each with the number of its attempt, and what they took.
    pub(crate) async fn summaries(&self, asked: Vec<(u32, Vec<String>)>, without_examples: bool) -> (Results<Said>, Option<Usage>) {
        let meter = &Meter::default();
        let asked: Vec<Summary> = asked.into_iter().map(|(attempt, descriptions)| (attempt, without_examples, descriptions)).collect();
        let make = |wanted: Vec<Summary>| async move {
            let request = |item_id: u64, (attempt, without_examples, descriptions): Summary| {
                ready(Ok(SummarizeRequest { item_id, descriptions, attempt, without_examples, sampling: Some(self.sampling()) }))
            };
            let call = |requests| {
                let mut client = self.models.summarizer.clone();
                async move { client.summarize(requests).await }
            };
            let read = |answer: proto::SummarizeResponse| {
                ready((answer.item_id, answered!(answer.result, summarize_response, Answer(answer) => Ok(meter.read(answer)))))
            };
            each("summarizer", &wanted, request, call, read, &self.summaries).await
        };
        let found = self.summaries.get(&asked, make).await;
        (self.note(Stage::Summarize, found), meter.usage())
    }

    /// Pictures drawn of concepts: picture `index` of each, kept.
    pub(crate) async fn drawings(&self, wanted: &[(String, u32)]) -> Results<Drawing> {
        let make = |wanted: Vec<(String, u32)>| async move {
            let request = |item_id: u64, (concept, index): (String, u32)| {
                ready(Ok(GenerateRequest {
                    item_id,
                    concept,
                    index,
                    seed: Some(self.parameters.seed),
                    num_inference_steps: Some(self.parameters.num_inference_steps),
                    guidance_scale: Some(self.parameters.guidance_scale),
                }))
            };
            let call = |requests| {
                let mut client = self.models.diffusion.clone();
                async move { client.generate(requests).await }
            };
            // Each picture is kept as it comes.
            let read = |answer: proto::GenerateResponse| async move {
                let drawing = answered!(answer.result, generate_response,
                    Picture(picture) => self.keep(picture).await.map(Drawing::Picture),
                    Unusable(reason) => Ok(Drawing::Unusable(reason)));
                (answer.item_id, drawing)
            };
            each("diffusion", &wanted, request, call, read, &self.drawings).await
        };
        let found = self.drawings.get(wanted, make).await;
        self.note(Stage::Generate, found)
    }

    /// A unit's activations on kept pictures. Each picture is run once for all the units of the job.
    pub(crate) async fn activations(&self, layer: &str, unit: u32, digests: &[String]) -> Results<f32> {
        let place = self.place(layer, unit);
        let make = |wanted: Vec<String>| async move {
            let request = |item_id: u64, digest: String| async move {
                let picture = ActivatePicture { item_id, picture: self.picture(&digest).await? };
                Ok(ActivateRequest { message: Some(activate_request::Message::Picture(picture)) })
            };
            let setup = ActivateSetup {
                target: Some(self.target.clone()),
                layers: self.layers.clone(),
                summary: parameters::summary(&self.parameters).into(),
                token_summary: parameters::token_summary(&self.parameters).into(),
            };
            let call = |requests: stream::Iter<std::vec::IntoIter<ActivateRequest>>| {
                let mut client = self.models.activation.clone();
                let setup = ActivateRequest { message: Some(activate_request::Message::Setup(setup.clone())) };
                async move { self.with_uploads(client.activate(stream::iter([setup]).chain(requests)).await).await }
            };
            let read = |answer: proto::ActivateResponse| {
                ready((answer.item_id, answered!(answer.result, activate_response, Activations(activations) => Ok(Arc::from(activations.values)))))
            };
            each("activation", &wanted, request, call, read, &self.activations).await
        };
        let found = self.activations.get(digests, make).await;
        let all = self.note(Stage::Score, found);
        let own = |all: Arc<[f32]>| place.and_then(|place| all.get(place).copied()).unwrap_or(f32::NAN);
        all.into_iter().map(|all| all.map(own)).collect()
    }

    /// Where a unit's activation stands among those of all the job's units.
    fn place(&self, layer: &str, unit: u32) -> Option<usize> {
        let mut before = 0;
        for units in &self.layers {
            if units.layer == layer {
                return units.units.iter().position(|u| *u == unit).map(|place| before + place);
            }
            before += units.units.len();
        }
        None
    }

    /// CLIP's embeddings of kept pictures.
    pub(crate) async fn image_embeddings(&self, digests: &[String]) -> Results<Arc<Embedding>> {
        let make = |wanted: Vec<String>| async move {
            let request = |item_id: u64, digest: String| async move { Ok(EmbedImagesRequest { item_id, picture: self.picture(&digest).await? }) };
            let call = |requests| {
                let mut client = self.models.clip.clone();
                async move { client.embed_images(requests).await }
            };
            let read = |answer: proto::EmbedImagesResponse| {
                ready((answer.item_id, answered!(answer.result, embed_images_response, Embedding(embedding) => embedding_of(&embedding))))
            };
            each("clip", &wanted, request, call, read, &self.images).await
        };
        let found = self.images.get(digests, make).await;
        self.note(Stage::Score, found)
    }

    /// CLIP's embeddings of texts.
    pub(crate) async fn text_embeddings(&self, texts: &[String]) -> Results<Arc<Embedding>> {
        let make = |wanted: Vec<String>| async move {
            let request = |item_id: u64, text: String| ready(Ok(EmbedTextsRequest { item_id, text }));
            let call = |requests| {
                let mut client = self.models.clip.clone();
                async move { client.embed_texts(requests).await }
            };
            let read = |answer: proto::EmbedTextsResponse| {
                ready((answer.item_id, answered!(answer.result, embed_texts_response, Embedding(embedding) => embedding_of(&embedding))))
            };
            each("clip", &wanted, request, call, read, &self.texts).await
        };
        let found = self.texts.get(texts, make).await;
        self.note(Stage::Score, found)
    }

    /// An answer of the activation service; if what was uploaded is not with it any more, as after it was started anew, that is passed on again, and the
    /// call is worth another try.
    async fn with_uploads<T>(&self, answered: Result<T, Status>) -> Result<T, Status> {
        match answered {
            Err(status) if fault::reason_of(&status).as_deref() == Some(NOT_UPLOADED) => {
                uploads::pass_on(&self.models, &self.blobs, &self.target, Some(&self.probing_set)).await?;
                Err(Status::unavailable("uploads were passed on again"))
            }
            answered => answered,
        }
    }

    /// What is made of all messages of a call that streams answers to one request.
    async fn listed<A, B, F, K>(&self, call: impl Fn() -> F, keep: impl Fn(A) -> K) -> Result<Vec<B>, Status>
    where
        F: Future<Output = Result<Response<Streaming<A>>, Status>>,
        K: Future<Output = B>,
    {
        let mut patience = Patience::of(TRIES);
        loop {
            let mut kept = Vec::new();
            let attempt = async {
                let mut messages = call().await?.into_inner();
                while let Some(message) = messages.message().await? {
                    kept.push(keep(message).await);
                }
                Ok::<_, Status>(())
            };
            match attempt.await {
                Ok(()) => return Ok(kept),
                Err(status) if patience.wait_after(&status).await => {}
                Err(status) => return Err(status),
            }
        }
    }
}

/// Adds up what answers took.
#[derive(Debug, Default)]
struct Meter(Mutex<Option<Usage>>);

impl Meter {
    fn read(&self, answer: Answer) -> Said {
        if let Some(usage) = &answer.usage {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(Usage::default).add(usage);
        }
        Said::of(answer)
    }

    fn usage(&self) -> Option<Usage> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn embedding_of(embedding: &proto::Embedding) -> Result<Arc<Embedding>, Failure> {
    Embedding::new(&embedding.values).map(Arc::new).map_err(|e| Failure::new("embedding", e.to_string()).worth_another_try())
}

/// Makes a call again while its service is still loading its model, so often.
pub(crate) async fn once_loaded<T, F: Future<Output = Result<T, Status>>>(tries: u32, call: impl Fn() -> F) -> Result<T, Status> {
    let mut patience = Patience::of(tries);
    loop {
        match call().await {
            Err(status) if fault::reason_of(&status).as_deref() == Some("MODEL_LOADING") && patience.wait_after(&status).await => {}
            answered => return answered,
        }
    }
}

/// Sends items to a service over streams of a few, and gives each one's result in its place. `request` makes an item's message, when its turn comes;
/// an item for which it can't is not sent. Each value is kept as soon as it has come. Items that a broken stream left open are sent again.
async fn each<I, Q, A, V, M, F, R>(
    service: &str,
    items: &[I],
    request: impl Fn(u64, I) -> M,
    call: impl Fn(stream::Iter<std::vec::IntoIter<Q>>) -> F,
    read: impl Fn(A) -> R,
    memo: &Memo<I, V>,
) -> Results<V>
where
    I: Clone + Hash + Eq + Serialize,
    V: Clone + Serialize + DeserializeOwned,
    M: Future<Output = Result<Q, Failure>>,
    F: Future<Output = Result<Response<Streaming<A>>, Status>>,
    R: Future<Output = (u64, Result<V, Failure>)>,
{
    let mut results: Vec<Option<Result<V, Failure>>> = items.iter().map(|_| None).collect();
    for (first, items) in (0..items.len()).step_by(ITEMS).zip(items.chunks(ITEMS)) {
        let mut patience = Patience::of(TRIES);
        loop {
            let mut requests: Vec<Q> = Vec::new();
            for (id, item) in (first..).zip(items) {
                let Some(place @ None) = results.get_mut(id) else { continue };
                match request(id as u64, item.clone()).await {
                    Ok(request) => requests.push(request),
                    Err(failure) => *place = Some(Err(failure)),
                }
            }
            if requests.is_empty() {
                break;
            }
            let mut went_on = false;
            let exchange = async {
                let mut answers = call(stream::iter(requests)).await?.into_inner();
                while let Some(answer) = answers.message().await? {
                    went_on = true;
                    let (id, result) = read(answer).await;
                    if let (Some(place), Some(item)) = (results.get_mut(id as usize), items.get((id as usize).wrapping_sub(first))) {
                        *place = Some(match result {
                            Ok(value) => memo.keep(item, value).await,
                            failed => failed,
                        });
                    }
                }
                Ok::<_, Status>(())
            };
            let Err(status) = exchange.await else { break };
            if went_on {
                patience = Patience::of(TRIES);
            }
            if !patience.wait_after(&status).await {
                let failure = Failure::of(service, &status);
                results.iter_mut().skip(first).take(items.len()).filter(|place| place.is_none()).for_each(|place| *place = Some(Err(failure.clone())));
                break;
            }
        }
    }
    results.into_iter().map(|result| result.unwrap_or_else(|| Err(Failure::empty()))).collect()
}

impl Failure {
    /// Of a whole call of a service. One that is away holds up the whole job.
    pub(crate) fn of(service: &str, status: &Status) -> Self {
        let Self { reason, message, .. } = Self::status(status);
        let away = is_away(status).then(|| Pause { fault: passed_on(service, status), by_itself: true });
        Self { pauses: away, ..Self::new(&reason, format!("the {service} service: {message}")).worth_another_try() }
    }

    /// Of what is kept here.
    pub(crate) fn storage(message: impl Into<String>) -> Self {
        let message = message.into();
        let pause = Pause { fault: Fault::new(Code::Internal, "STORAGE", message.clone()), by_itself: true };
        Self { pauses: Some(pause), ..Self::new("storage", message) }
    }

    fn status(status: &Status) -> Self {
        let reason = fault::reason_of(status).unwrap_or_else(|| format!("{:?}", status.code()));
        Self::new(&reason.to_lowercase(), status.message())
    }

    /// Of one item of a stream.
    fn item(status: &tonic_types::Status) -> Self {
        let status = fault::item_status(status);
        let pauses = fault::reason_of(&status).filter(|reason| PAUSES_THE_JOB.contains(&reason.as_str()));
        let pauses = pauses.map(|_| Pause { fault: Fault::relayed(&status), by_itself: false });
        // The codes that say that asking again would be answered alike.
        let is_the_items = matches!(status.code(), Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition | Code::OutOfRange | Code::DataLoss);
        Self { is_the_items: is_the_items && pauses.is_none(), retry: !is_the_items, pauses, ..Self::status(&status) }
    }

    /// Of an answer that holds nothing.
    fn empty() -> Self {
        Self::new("internal", "a model service did not answer this item").worth_another_try()
    }
}
