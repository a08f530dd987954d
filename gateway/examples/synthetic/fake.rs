//! An orchestrator without models: jobs whose units, labels and pictures are made up of their numbers.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use dnd_mesh::{
    Fault,
    blobs::{self, Blobs},
    items::Responses,
    server::{InProcess, Services},
};
use dnd_proto::v1::{
    self as v1, CancelJobRequest, CancelJobResponse, CreateJobRequest, CreateJobResponse, DeleteJobRequest, DeleteJobResponse, DescribeTargetResponse,
    DissectRequest, DissectResponse, DissectServiceDescribeTargetRequest, DissectServiceDescribeTargetResponse, GetJobRequest, GetJobResponse,
    GetPicturesRequest, GetPicturesResponse, GetUnitRequest, GetUnitResponse, Job, JobAccepted, JobDone, JobEvent, JobResumed, JobState, LayerUnits,
    ListJobsRequest, ListJobsResponse, ListUnitsRequest, ListUnitsResponse, NearUnit, NearestUnitsRequest, NearestUnitsResponse, ResumeJobRequest,
    ResumeJobResponse, SelectConceptRequest, SelectConceptResponse, Stage, StageProgress, UnitCounts, UnitResult, UnitState, UnitSummary, WatchJobRequest,
    WatchJobResponse,
    dissect_service_server::{DissectService, DissectServiceServer},
    get_pictures_response, job_event,
    picture_service_server::{PictureService, PictureServiceServer},
    select_concept_response,
};
use futures::{StreamExt as _, stream};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use tokio::{sync::watch, task::JoinSet};
use tonic::{Code, Request, Response, Status};

const LAYERS: [(&str, u32); 6] = [("conv1", 64), ("layer1.2", 256), ("layer2.3", 512), ("layer3.5", 1024), ("layer4.2", 2048), ("fc", 1000)];
const COLOURS: [&str; 8] = ["red", "orange", "yellow", "green", "teal", "blue", "purple", "grey"];
const THINGS: [&str; 12] = [
    "stripes",
    "dots",
    "checked cloth",
    "circles",
    "brick walls",
    "feathers",
    "window blinds",
    "tree bark",
    "written text",
    "round fruit",
    "water ripples",
    "wheels",
];
const MODELS: &str = "made up: no model was asked";

/// Starts it with one job of `units` units that is done.
pub(crate) fn start(units: u32) -> anyhow::Result<InProcess> {
    let fake = Shared(Arc::new(Fake { jobs: Mutex::default(), changed: watch::channel(()).0, tasks: Mutex::default() }));
    fake.0.add("synthetic", request(spread(units)), true);
    let blobs = Arc::new(Blobs::temporary()?);
    let pictures = Pictures(Arc::clone(&blobs));
    let dissect = DissectServiceServer::new(fake).max_encoding_message_size(dnd_mesh::MAX_MESSAGE_BYTES);
    let services = blobs::add_to(Services::default().with(dissect).with(PictureServiceServer::new(pictures)), blobs);
    Ok(InProcess::start(services))
}

/// So many units over the layers of a ResNet, and over more of them if those do not do.
fn spread(units: u32) -> Vec<LayerUnits> {
    let mut left = units;
    let mut layers = Vec::new();
    for i in 0.. {
        let (name, size) = LAYERS[i % LAYERS.len()];
        let name = if i < LAYERS.len() { name.to_owned() } else { format!("branch{}.{name}", i / LAYERS.len()) };
        layers.push(LayerUnits { layer: name, units: (0..size.min(left)).collect() });
        left -= size.min(left);
        if left == 0 {
            break;
        }
    }
    layers
}

fn request(layers: Vec<LayerUnits>) -> DissectRequest {
    let source = v1::ProbingSource { source: Some(v1::probing_source::Source::Uri("file:///data/broden".to_owned())) };
    DissectRequest {
        target: Some(v1::Target { uri: "file:///models/resnet50.onnx".to_owned(), ..Default::default() }),
        layers,
        probing_set: Some(v1::ProbingSet { sources: vec![source] }),
        ..Default::default()
    }
}

struct Fake {
    jobs: Mutex<BTreeMap<String, Known>>,
    changed: watch::Sender<()>,
    /// What works on its jobs; ends with this value.
    tasks: Mutex<JoinSet<()>>,
}

struct Known {
    job: Job,
    /// Layer and unit of all its units, in order; the first `finished` of them have ended.
    units: Vec<(String, u32)>,
    finished: usize,
    events: Vec<JobEvent>,
}

impl Known {
    fn say(&mut self, event: job_event::Event) {
        self.job.last_event += 1;
        self.events.push(JobEvent { number: self.job.last_event, event: Some(event) });
    }

    fn finish(&mut self, count: usize, told: bool) {
        for _ in 0..count.min(self.units.len() - self.finished) {
            let (layer, unit) = self.units[self.finished].clone();
            self.finished += 1;
            let result = result(&layer, unit);
            let counts = self.job.units.get_or_insert_default();
            match result.state() {
                UnitState::Dead => counts.dead += 1,
                UnitState::Failed => counts.failed += 1,
                _ => counts.labelled += 1,
            }
            if told {
                self.say(job_event::Event::Unit(result));
            } else {
                self.job.last_event += 1;
            }
        }
        let (done, total) = (self.finished as u64, self.units.len() as u64);
        let ahead = [(Stage::Probe, 4000, 4000), (Stage::Crop, done + 6, total), (Stage::Caption, done + 4, total), (Stage::Summarize, done + 3, total)];
        let behind = [(Stage::Generate, done + 1, total), (Stage::Score, done, total)];
        let stage = |(stage, done, total): (Stage, u64, u64)| StageProgress { stage: stage.into(), done: done.min(total), total, usage: None };
        self.job.progress = ahead.into_iter().chain(behind).map(stage).collect();
        if self.finished == self.units.len() {
            self.end(JobState::Done);
        }
    }

    fn end(&mut self, state: JobState) {
        let counts = self.job.units.unwrap_or_default();
        let time = |(i, stage): (usize, Stage)| v1::StageTime { stage: stage.into(), seconds: 12.5 * (i + 1) as f64, calls: 400, reused: 80 };
        let done = JobDone {
            labelled: counts.labelled as u32,
            dead: counts.dead as u32,
            failed: counts.failed as u32,
            cancelled: state == JobState::Cancelled,
            times: [Stage::Probe, Stage::Crop, Stage::Caption, Stage::Summarize, Stage::Generate, Stage::Score].into_iter().enumerate().map(time).collect(),
            pictures: 4000,
            ..Default::default()
        };
        self.job.set_state(state);
        self.job.ended_at = Some(now());
        self.job.done = Some(done.clone());
        self.say(job_event::Event::Done(done));
    }
}

fn now() -> pbjson_types::Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    pbjson_types::Timestamp { seconds: since.as_secs() as i64, nanos: 0 }
}

impl Fake {
    fn jobs(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tasks(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, id: &str, request: DissectRequest, done: bool) -> Job {
        let layers: Vec<LayerUnits> = request
            .layers
            .iter()
            .map(|asked| {
                let all = LAYERS.iter().find(|(name, _)| *name == asked.layer).map_or(8, |(_, units)| *units);
                LayerUnits { units: if asked.units.is_empty() { (0..all).collect() } else { asked.units.clone() }, ..asked.clone() }
            })
            .collect();
        let units: Vec<(String, u32)> = layers.iter().flat_map(|layer| layer.units.iter().map(|unit| (layer.layer.clone(), *unit))).collect();
        let model = |name: &str| Some(v1::Model { name: name.to_owned(), digest: "5e".repeat(32), notice: MODELS.to_owned(), ..Default::default() });
        let provenance = v1::Provenance {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            target_digest: "7a".repeat(32),
            captioner: model("captioner"),
            summarizer: model("language model"),
            diffusion: model("diffusion"),
            clip: model("clip"),
            parameters: request.parameters,
            ..Default::default()
        };
        let accepted = JobAccepted { job_id: id.to_owned(), provenance: Some(provenance), layers, warnings: Vec::new() };
        let mut job = Job { job_id: id.to_owned(), created_at: Some(now()), accepted: Some(accepted.clone()), ..Default::default() };
        job.set_state(JobState::Running);
        job.units = Some(UnitCounts { total: units.len() as u64, ..Default::default() });
        job.target_name = request.target.as_ref().and_then(|target| target.uri.rsplit('/').next()).unwrap_or_default().to_owned();
        job.request = Some(request);
        let mut known = Known { job, units, finished: 0, events: Vec::new() };
        known.say(job_event::Event::Accepted(accepted));
        if done {
            known.finish(usize::MAX, false);
        }
        let job = known.job.clone();
        self.jobs().insert(id.to_owned(), known);
        job
    }

    fn with<T>(&self, id: &str, look: impl FnOnce(&mut Known) -> T) -> Result<T, Status> {
        let mut jobs = self.jobs();
        let known = jobs.get_mut(id).ok_or_else(|| Fault::new(Code::NotFound, "NO_SUCH_JOB", format!("there is no job {id}")))?;
        let seen = look(known);
        self.changed.send_replace(());
        Ok(seen)
    }
}

#[derive(Clone)]
struct Shared(Arc<Fake>);

/// Finishes a unit of a job now and then, until all are.
async fn work(fake: Shared, id: String) {
    loop {
        tokio::time::sleep(Duration::from_millis(150)).await;
        let goes_on = fake.0.with(&id, |known| {
            if known.job.state() == JobState::Running {
                known.finish(1, true);
            }
            known.job.state() == JobState::Running
        });
        if !goes_on.unwrap_or(false) {
            return;
        }
    }
}

/// A number that looks like any other.
fn mix(layer: &str, unit: u32, salt: u32) -> u32 {
    let bytes = layer.bytes().chain(unit.to_le_bytes()).chain(salt.to_le_bytes());
    bytes.fold(2_166_136_261_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(16_777_619)).rotate_left(13).wrapping_mul(2_654_435_761)
}

fn digest(kind: u8, number: u32) -> String {
    format!("{kind:02x}{}{number:08x}", "0".repeat(54))
}

fn concept(layer: &str, unit: u32, place: u32) -> String {
    let hash = mix(layer, unit % 977, place);
    format!("{} {}", COLOURS[(hash >> 8) as usize % COLOURS.len()], THINGS[(hash >> 16) as usize % THINGS.len()])
}

fn activation(place: u32, hash: u32) -> f32 {
    8.0 / (1.0 + place as f32) + (hash % 97) as f32 / 100.0
}

fn result(layer: &str, unit: u32) -> UnitResult {
    let base = UnitResult { layer: layer.to_owned(), unit, lowest: -0.4, highest: activation(0, mix(layer, unit, 1)), ..Default::default() };
    match unit % 40 {
        17 => return UnitResult { state: UnitState::Dead.into(), lowest: 0.0, highest: 0.0, ..base },
        29 => {
            let message = "the language model found nothing that the captions share, five times".to_owned();
            return UnitResult { state: UnitState::Failed.into(), reason: "no_concept".to_owned(), message, ..base };
        }
        _ => {}
    }
    let concepts: Vec<String> = (0..5).map(|place| concept(layer, unit, place)).collect();
    ranked(base, concepts)
}

fn ranked(base: UnitResult, mut names: Vec<String>) -> UnitResult {
    names.dedup();
    let (layer, unit) = (base.layer.clone(), base.unit);
    let mut drawn: Vec<(usize, u32, f32)> = (0..names.len())
        .flat_map(|c| (0..10).map(move |i| (c, i)))
        .map(|(c, i)| (c, i, (mix(&names[c], unit, i) % 1000) as f32 / 140.0 + (names.len() - c) as f32 * 0.8))
        .collect();
    drawn.sort_by(|a, b| b.2.total_cmp(&a.2));
    let concepts = names.iter().enumerate().map(|(c, name)| {
        let pictures = drawn.iter().enumerate().filter(|(_, drawn)| drawn.0 == c).map(|(place, (_, index, activation))| v1::GeneratedPicture {
            index: *index,
            digest: digest(2, mix(name, 0, *index)),
            activation: Some(*activation),
            rank: place as u32 + 1,
            unusable: String::new(),
        });
        let mut pictures: Vec<_> = pictures.collect();
        let ranks: Vec<f64> = pictures.iter().map(|picture| f64::from(picture.rank)).collect();
        let mean = -ranks.iter().sum::<f64>() / ranks.len() as f64;
        let topk = -ranks.iter().take(5).map(|rank| rank * rank).sum::<f64>() / 5.0;
        let products = 0.8 - 0.06 * c as f64;
        pictures.sort_by_key(|picture| picture.index);
        v1::RankedConcept {
            concept: name.clone(),
            score: Some((names.len() - c) as f64 * products),
            scores: Some(v1::ConceptScores {
                mean,
                topk_squared: topk,
                image_products: products,
                topk_squared_image_products: (names.len() - c) as f64 * products,
            }),
            candidate: c as u32,
            pictures,
        }
    });
    let concepts: Vec<_> = concepts.collect();
    let place = |i: u32| mix(&layer, unit, 100 + i);
    let probed = (0..10).map(|i| v1::ProbedPicture {
        digest: digest(1, place(i)),
        path: format!("n0{}/picture-{:05}.png", place(i) % 1000, place(i) % 50_000),
        activation: activation(i, place(i)),
        map_digest: digest(0, place(i)),
        seen: Some(v1::Box { left: 8, top: 0, right: 120, bottom: 96 }),
    });
    let probed: Vec<_> = probed.collect();
    let cut = v1::Box { left: 30, top: 20, right: 90, bottom: 76 };
    let crops = probed.iter().enumerate().map(|(i, picture)| v1::CroppedPicture {
        digest: digest(3, place(i as u32)),
        path: picture.path.clone(),
        r#box: Some(cut),
        activation: Some(picture.activation * 0.9),
        threshold: 96 + 8 * i as u32,
        parent_digest: picture.digest.clone(),
    });
    let crops: Vec<_> = crops.collect();
    let images = (0..10).map(|i| {
        let (parent, crop) = (&probed[i / 2], &crops[i / 2]);
        let is_crop = i % 2 == 1;
        v1::ActivatingImage {
            digest: if is_crop { crop.digest.clone() } else { parent.digest.clone() },
            path: parent.path.clone(),
            r#box: is_crop.then_some(cut),
            activation: parent.activation * if is_crop { 0.9 } else { 1.0 },
            caption: format!("there is a picture of {} and a picture of {}", names[0], names[i % names.len()]),
            simplified: format!("{} and {}", names[0], names[i % names.len()]),
            parent_digest: if is_crop { parent.digest.clone() } else { String::new() },
        }
    });
    UnitResult {
        state: UnitState::Labelled.into(),
        label: names[0].clone(),
        labels: names.iter().take(1 + (unit % 3) as usize).cloned().collect(),
        images: images.collect(),
        answers: names.iter().map(|name| format!("The images share: {name}.")).collect(),
        concepts,
        probed,
        crops,
        ..base
    }
}

fn summary(layer: &str, unit: u32, ended: bool) -> UnitSummary {
    if !ended {
        return UnitSummary { layer: layer.to_owned(), unit, stage: Stage::Probe.into(), ..Default::default() };
    }
    let summary = UnitSummary { layer: layer.to_owned(), unit, stage: Stage::Score.into(), attempts: 1, ..Default::default() };
    if unit % 40 == 17 || unit % 40 == 29 {
        let UnitResult { state, reason, message, .. } = result(layer, unit);
        return UnitSummary { state, reason, message, ..summary };
    }
    let mut labels: Vec<String> = (0..5).map(|place| concept(layer, unit, place)).collect();
    labels.dedup();
    let score = Some(labels.len() as f64 * 0.8);
    labels.truncate(1 + (unit % 3) as usize);
    let picture = |i: u32| mix(layer, unit, 100 + i);
    UnitSummary {
        state: UnitState::Labelled.into(),
        label: labels[0].clone(),
        labels,
        score,
        images: (0..4).map(|i| digest(if i % 2 == 0 { 1 } else { 3 }, picture(i / 2))).collect(),
        highest: activation(0, mix(layer, unit, 1)),
        ..summary
    }
}

fn page_start(token: &str) -> Result<usize, Fault> {
    if token.is_empty() { Ok(0) } else { token.parse().map_err(|_| Fault::field("page_token", "not from a page before")) }
}

#[tonic::async_trait]
impl DissectService for Shared {
    type DissectStream = Responses<DissectResponse>;

    async fn dissect(&self, _: Request<DissectRequest>) -> Result<Response<Self::DissectStream>, Status> {
        Err(Status::unimplemented("the gateway creates and watches jobs"))
    }

    async fn create_job(&self, request: Request<CreateJobRequest>) -> Result<Response<CreateJobResponse>, Status> {
        let request = request.into_inner().request.unwrap_or_default();
        if request.target.is_none() {
            return Err(Fault::field("target", "not set; say which network to dissect").into());
        }
        let id = format!("job-{}", self.0.jobs().len());
        let job = self.0.add(&id, request, false);
        self.0.tasks().spawn(work(self.clone(), id));
        Ok(Response::new(CreateJobResponse { job: Some(job) }))
    }

    async fn get_job(&self, request: Request<GetJobRequest>) -> Result<Response<GetJobResponse>, Status> {
        let job = self.0.with(&request.into_inner().job_id, |known| known.job.clone())?;
        Ok(Response::new(GetJobResponse { job: Some(job) }))
    }

    async fn list_jobs(&self, _: Request<ListJobsRequest>) -> Result<Response<ListJobsResponse>, Status> {
        let jobs = self.0.jobs().values().rev().map(|known| Job { accepted: None, request: None, ..known.job.clone() }).collect();
        Ok(Response::new(ListJobsResponse { jobs, next_page_token: String::new() }))
    }

    type WatchJobStream = Responses<WatchJobResponse>;

    async fn watch_job(&self, request: Request<WatchJobRequest>) -> Result<Response<Self::WatchJobStream>, Status> {
        let WatchJobRequest { job_id, after } = request.into_inner();
        self.0.with(&job_id, |_| ())?;
        let changed = self.0.changed.subscribe();
        let batches = stream::unfold((self.clone(), changed, after, true), move |(fake, mut changed, after, goes_on)| {
            let job_id = job_id.clone();
            async move {
                if !goes_on {
                    return None;
                }
                let mut jobs = fake.0.jobs().get(&job_id).map(|known| told(known, after));
                while jobs.as_ref().is_some_and(|(events, ended)| events.is_empty() && !ended) {
                    changed.changed().await.ok()?;
                    jobs = fake.0.jobs().get(&job_id).map(|known| told(known, after));
                }
                let (mut events, ended) = jobs?;
                let after = events.last().map_or(after, |event| event.number);
                let progress = fake.0.jobs().get(&job_id).map(|known| known.job.progress.clone()).unwrap_or_default();
                events.extend(progress.into_iter().map(|progress| JobEvent { number: 0, event: Some(job_event::Event::Progress(progress)) }));
                Some((stream::iter(events), (fake, changed, after, !ended)))
            }
        });
        Ok(Response::new(Box::pin(batches.flatten().map(|event| Ok(WatchJobResponse { event: Some(event) })))))
    }

    async fn cancel_job(&self, request: Request<CancelJobRequest>) -> Result<Response<CancelJobResponse>, Status> {
        let job = self.0.with(&request.into_inner().job_id, |known| {
            if known.job.state() == JobState::Running {
                known.end(JobState::Cancelled);
            }
            known.job.clone()
        })?;
        Ok(Response::new(CancelJobResponse { job: Some(job) }))
    }

    async fn resume_job(&self, request: Request<ResumeJobRequest>) -> Result<Response<ResumeJobResponse>, Status> {
        let id = request.into_inner().job_id;
        let job = self.0.with(&id, |known| {
            known.job.set_state(JobState::Running);
            (known.job.ended_at, known.job.done) = (None, None);
            known.say(job_event::Event::Resumed(JobResumed { retried: 0 }));
            known.job.clone()
        })?;
        self.0.tasks().spawn(work(self.clone(), id));
        Ok(Response::new(ResumeJobResponse { job: Some(job) }))
    }

    async fn delete_job(&self, request: Request<DeleteJobRequest>) -> Result<Response<DeleteJobResponse>, Status> {
        let id = request.into_inner().job_id;
        self.0.with(&id, |_| ())?;
        self.0.jobs().remove(&id);
        Ok(Response::new(DeleteJobResponse {}))
    }

    async fn list_units(&self, request: Request<ListUnitsRequest>) -> Result<Response<ListUnitsResponse>, Status> {
        let ListUnitsRequest { job_id, page_size, page_token, layer, state, text } = request.into_inner();
        let start = page_start(&page_token)?;
        let size = if page_size == 0 { 1000 } else { page_size as usize };
        let (units, finished) = self.0.with(&job_id, |known| (known.units.clone(), known.finished))?;
        let wanted = |unit: &UnitSummary| (state == 0 || unit.state == state) && unit.labels.iter().chain([&unit.label]).any(|label| label.contains(&text));
        // Pages of all units must not take longer the later they are.
        let before = if state == 0 && text.is_empty() && layer.is_empty() { start } else { 0 };
        let all = units.iter().enumerate().skip(before).filter(|(_, (of, _))| layer.is_empty() || *of == layer);
        let mut found = all.map(|(i, (layer, unit))| summary(layer, *unit, i < finished)).filter(wanted).skip(start - before);
        let page: Vec<UnitSummary> = found.by_ref().take(size).collect();
        let next_page_token = if found.next().is_some() { (start + size).to_string() } else { String::new() };
        Ok(Response::new(ListUnitsResponse { units: page, next_page_token }))
    }

    async fn get_unit(&self, request: Request<GetUnitRequest>) -> Result<Response<GetUnitResponse>, Status> {
        let GetUnitRequest { job_id, layer, unit } = request.into_inner();
        let place = self.0.with(&job_id, |known| known.units.iter().position(|known| *known == (layer.clone(), unit)))?;
        place.ok_or_else(|| Fault::new(Code::NotFound, "NO_SUCH_UNIT", format!("the job has no unit {unit} of {layer}")))?;
        Ok(Response::new(GetUnitResponse { unit: Some(result(&layer, unit)) }))
    }

    async fn nearest_units(&self, request: Request<NearestUnitsRequest>) -> Result<Response<NearestUnitsResponse>, Status> {
        let NearestUnitsRequest { job_id, text, most } = request.into_inner();
        let units = self.0.with(&job_id, |known| known.units[..known.finished].to_vec())?;
        // Words that they share, in place of what a model would say.
        let words: Vec<&str> = text.split_whitespace().collect();
        let near = |(layer, unit): (String, u32)| {
            let unit = summary(&layer, unit, true);
            let shared = unit.labels.iter().map(|label| words.iter().filter(|word| label.contains(**word)).count()).max()?;
            Some(NearUnit { unit: Some(unit), similarity: shared as f64 / words.len().max(1) as f64 })
        };
        let mut units: Vec<NearUnit> = units.into_iter().filter_map(near).collect();
        units.sort_by(|a, b| b.similarity.total_cmp(&a.similarity));
        units.truncate(if most == 0 { 100 } else { most as usize });
        Ok(Response::new(NearestUnitsResponse { units }))
    }

    type SelectConceptStream = Responses<SelectConceptResponse>;

    async fn select_concept(&self, request: Request<SelectConceptRequest>) -> Result<Response<Self::SelectConceptStream>, Status> {
        let SelectConceptRequest { layer, unit, concepts, .. } = request.into_inner();
        if concepts.is_empty() {
            return Err(Fault::field("concepts", "0 concepts; 1 to 100 can compete").into());
        }
        let progress = (0..=4).map(|done| {
            let progress = StageProgress { stage: Stage::Generate.into(), done, total: 4, usage: None };
            select_concept_response::Event::Progress(progress)
        });
        let base = UnitResult { layer, unit, ..Default::default() };
        let events = progress.chain([select_concept_response::Event::Unit(ranked(base, concepts))]).collect::<Vec<_>>();
        let events = stream::iter(events).then(|event| async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            Ok(SelectConceptResponse { event: Some(event) })
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn describe_target(&self, request: Request<DissectServiceDescribeTargetRequest>) -> Result<Response<DissectServiceDescribeTargetResponse>, Status> {
        let uri = request.into_inner().target.unwrap_or_default().uri;
        if !uri.ends_with(".onnx") {
            return Err(Fault::field("target.uri", format!("{uri:?} names no ONNX file")).into());
        }
        let layer = |(name, units): (&str, u32)| v1::Layer {
            name: name.to_owned(),
            value: format!("/{}/Relu_output_0", name.replace('.', "/")),
            operator: "Relu".to_owned(),
            kind: if name == "fc" { v1::LayerKind::Units } else { v1::LayerKind::Channels }.into(),
            units,
            map: if name == "fc" { Vec::new() } else { vec![14, 14] },
            ..Default::default()
        };
        let description = DescribeTargetResponse { digest: "7a".repeat(32), layers: LAYERS.map(layer).into(), ..Default::default() };
        Ok(Response::new(DissectServiceDescribeTargetResponse { description: Some(description) }))
    }
}

/// A job's events after one, and whether it has ended.
fn told(known: &Known, after: u64) -> (Vec<JobEvent>, bool) {
    let events = known.events.iter().filter(|event| event.number > after).cloned().collect();
    (events, known.job.state() != JobState::Running)
}

struct Pictures(Arc<Blobs>);

#[tonic::async_trait]
impl PictureService for Pictures {
    type GetPicturesStream = Responses<GetPicturesResponse>;

    async fn get_pictures(&self, request: Request<GetPicturesRequest>) -> Result<Response<Self::GetPicturesStream>, Status> {
        let digests = request.into_inner().digests;
        blobs::check_digests(&digests)?;
        let blobs = Arc::clone(&self.0);
        let answers = stream::iter(digests).then(move |digest| {
            let blobs = Arc::clone(&blobs);
            async move {
                let kept = blobs.get(&digest).await.ok().flatten();
                let made_up = || (digest.starts_with('0') && digest.contains("0000")).then(|| picture(&digest).into());
                let result = match kept.or_else(made_up) {
                    Some(picture) => get_pictures_response::Result::Picture(picture),
                    None => {
                        let fault = Fault::new(Code::NotFound, "NO_SUCH_PICTURE", format!("no picture {digest} is kept here"));
                        get_pictures_response::Result::Status(fault.into_item())
                    }
                };
                Ok(GetPicturesResponse { digest, result: Some(result) })
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

/// The picture of a made-up digest: a map's is a grey blob, any other a pattern in colours.
fn picture(digest: &str) -> Vec<u8> {
    let number = u32::from_str_radix(&digest[56..], 16).unwrap_or_default();
    let byte = |i: u32| number.rotate_left(i * 7) as u8;
    let image = if digest.starts_with("00") {
        let (x, y) = (f32::from(byte(1)) / 255.0 * 8.0 + 3.0, f32::from(byte(2)) / 255.0 * 8.0 + 3.0);
        let value = |c: u32, r: u32| (255.0 * (-((c as f32 - x).powi(2) + (r as f32 - y).powi(2)) / 14.0).exp()) as u8;
        DynamicImage::ImageLuma8(image::GrayImage::from_fn(14, 14, |c, r| image::Luma([value(c, r)])))
    } else {
        let (fore, back) = ([byte(0), byte(1), byte(2)], [byte(3) / 2 + 100, byte(4) / 2 + 100, byte(5) / 2 + 100]);
        let size = 4 + u32::from(byte(6) % 12);
        let on = |c: u32, r: u32| match byte(7) % 4 {
            0 => (c / size).is_multiple_of(2),
            1 => (r / size).is_multiple_of(2),
            2 => (c / size + r / size).is_multiple_of(2),
            _ => (c % (3 * size)).abs_diff(size).pow(2) + (r % (3 * size)).abs_diff(size).pow(2) < size * size,
        };
        DynamicImage::ImageRgb8(RgbImage::from_fn(128, 96, |c, r| Rgb(if on(c, r) { fore } else { back })))
    };
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png).map_or_else(|_| Vec::new(), |()| bytes.into_inner())
}
