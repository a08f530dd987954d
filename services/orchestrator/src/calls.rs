//! What the steps ask of the models. Every pure call is made once, whichever units, jobs and processes need it: results are kept.

mod exchange;
mod network;

use std::{
    future::ready,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use dnd_mesh::{Fault, blobs::Blobs, parameters};
use dnd_method::{embedding::Embedding, parameters::Parameters};
use dnd_proto::v1::{
    self as proto, Answer, CaptionRequest, DissectRequest, EmbedImagesRequest, EmbedTextsRequest, GenerateRequest, JobAccepted, LayerUnits, Model, ProbingSet,
    Provenance, Sampling, SimplifyRequest, Stage, SummarizeRequest, Target, Usage, caption_response, embed_images_response, embed_texts_response,
    generate_response, simplify_response, summarize_response,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use self::{
    exchange::{Results, answered, each},
    network::{Crop, Cropped},
};
use crate::{
    failure::Failure,
    memo::{Found, Memo},
    models::Models,
    probing::ProbedShard,
    progress::Progress,
    results::{Results as Kept, Shelf},
    steps::looked_at,
};

pub(crate) use exchange::{TRIES, TRIES_AT_FIRST, once_loaded};

/// Results that are in memory for units that need them, too: texts and digests, embeddings, and activations by their number. All others are in the database.
const KEPT: usize = 10_000;
const KEPT_EMBEDDINGS: usize = 5_000;
/// Crops are no two units', and no picture is cropped for a unit twice.
const KEPT_CROPS: usize = 1_000;
const KEPT_ACTIVATIONS: usize = 1 << 24;

/// The calls of one job.
pub(crate) struct Calls {
    models: Models,
    blobs: Arc<Blobs>,
    results: Kept,
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
        Some(Shelf::new(results.clone(), function, &[digest, engine, with.as_bytes()]))
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
        let shards = Work::shelf(results, "probe 1", activation, &probed)
            .map(|shelf| shelf.with_pictures(|shard: &ProbedShard| Some(shard.chunks.iter().map(String::as_str).collect())));
        let crops = Work::shelf(results, "crop 1", activation, &cropped)
            .map(|shelf| shelf.with_pictures(|crops: &Arc<[Crop]>| Some(crops.iter().map(|crop| crop.digest.as_str()).collect())));
        let drawings = Work::shelf(results, "draw 1", diffusion, &drawn).map(|shelf| {
            shelf.with_pictures(|drawing| match drawing {
                Drawing::Picture(digest) => Some(vec![digest.as_str()]),
                Drawing::Unusable(_) => Some(Vec::new()),
            })
        });
        // What gave no answer that can be used is asked for again by a later run.
        let answers = |function: &str| {
            let shelf = Work::shelf(results, function, summarizer, &sampling);
            shelf.map(|shelf| shelf.with_pictures(|said: &Said| matches!(said, Said::Text(_)).then(Vec::new)))
        };
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
            results: results.clone(),
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

    /// Has the language model asked anew about what it gave no usable answer to, and pictures made again that are gone.
    pub(crate) fn ask_anew(&self) {
        self.crops.forget();
        self.drawings.forget();
        self.simplified.forget_unusable();
        self.summaries.forget_unusable();
    }

    /// What the calls took so far.
    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Keeps a picture that was made here.
    pub(crate) async fn keep(&self, picture: Bytes) -> Result<String, Failure> {
        self.results.put(picture).await
    }

    async fn picture(&self, digest: &str) -> Result<Bytes, Failure> {
        let missing = || Failure::new("storage", format!("the picture {digest} is not there any more, or was damaged")).worth_another_try();
        self.results.picture(digest).await?.ok_or_else(missing)
    }

    fn note<V>(&self, stage: Stage, found: Found<V>) -> Results<V> {
        self.progress.calls(stage, found.made, found.reused);
        found.values
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
