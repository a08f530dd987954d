//! DissectService and PictureService over the model services.

use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use clap::Args;
use dnd_mesh::{
    Fault, MAX_MESSAGE_BYTES,
    blobs::{self, Blobs},
    deadline, items, parameters,
    server::Services,
};
use dnd_method::{answers, parameters::Parameters};
use dnd_proto::v1::{
    ActivationServiceGetModelRequest, CaptionServiceGetModelRequest, DescribeTargetRequest, DescribeTargetResponse, DiffusionServiceGetModelRequest,
    DissectRequest, DissectResponse, EmbeddingServiceGetModelRequest, GetPicturesRequest, GetPicturesResponse, JobAccepted, JobDone, LayerUnits, OnDisconnect,
    ProbeRequest, ProbeResponse, ProbedUnit, ProbingSet, Provenance, SelectConceptRequest, SelectConceptResponse, Stage, SummaryServiceGetModelRequest, Target,
    dissect_response::Event,
    dissect_service_server::{DissectService, DissectServiceServer},
    get_pictures_response,
    picture_service_server::{PictureService, PictureServiceServer},
    probe_response, select_concept_request, select_concept_response,
};
use futures::{StreamExt as _, stream::FuturesUnordered};
use tokio::task::JoinSet;
use tokio_util::{sync::DropGuard, task::AbortOnDropHandle};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::{
    calls::{Calls, Work, once_loaded},
    jobs::{Job, Jobs},
    models::{Models, passed_on},
    results::Results,
    steps::{self, STAGES, STAGES_OF_SELECTION, STAGES_OF_STORED_SELECTION},
    uploads::{self, not_uploaded},
};

/// How much is worked on at a time.
#[derive(Debug, Clone, Args)]
pub struct OrchestratorArgs {
    /// Units of a job that are worked on at a time
    #[arg(long, env = "DND_UNITS_IN_FLIGHT", default_value_t = UNITS_IN_FLIGHT)]
    pub units_in_flight: NonZeroUsize,
}

const UNITS_IN_FLIGHT: NonZeroUsize = NonZeroUsize::new(8).expect("8 is not 0");

impl Default for OrchestratorArgs {
    fn default() -> Self {
        Self { units_in_flight: UNITS_IN_FLIGHT }
    }
}

const LONGEST_REQUEST_ID: usize = 128;
const MOST_CONCEPTS: usize = 100;
const MOST_IMAGES: usize = 1000;

/// Adds the gRPC services of an orchestrator: it reads uploads from `blobs`, whose service it needs too ([`dnd_mesh::blobs::add_to`]), and keeps the
/// pictures that its jobs make there. Where there are `results`, it looks there first for what its jobs need of the models, and keeps what they make.
pub fn add_to(services: Services, models: Models, blobs: Arc<Blobs>, results: Option<Results>, args: OrchestratorArgs) -> Services {
    let results = results.map(Arc::new);
    let orchestrator = Arc::new(Orchestrator { models, blobs, results, args, jobs: Jobs::default(), tasks: Mutex::default() });
    let dissect =
        DissectServiceServer::from_arc(Arc::clone(&orchestrator)).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    let pictures = PictureServiceServer::from_arc(orchestrator).max_encoding_message_size(MAX_MESSAGE_BYTES);
    services.with(dissect).with(pictures)
}

struct Orchestrator {
    models: Models,
    blobs: Arc<Blobs>,
    results: Option<Arc<Results>>,
    args: OrchestratorArgs,
    jobs: Jobs,
    /// The jobs' tasks; they end with this value.
    tasks: Mutex<JoinSet<()>>,
}

#[tonic::async_trait]
impl DissectService for Orchestrator {
    type DissectStream = items::Responses<DissectResponse>;

    async fn dissect(&self, request: Request<DissectRequest>) -> Result<Response<Self::DissectStream>, Status> {
        let request = request.into_inner();
        if request.request_id.len() > LONGEST_REQUEST_ID {
            return Err(Fault::field("request_id", format!("{} characters; at most {LONGEST_REQUEST_ID}", request.request_id.len())).into());
        }
        let on_disconnect = request.on_disconnect();
        let request_id = request.request_id.clone();
        // Where the caller may come back, its deadline is that of its call, not of the job.
        let job = self.jobs.find_or_start(&request_id, || deadline::outliving(self.start(request))).await?;
        let guard = (on_disconnect == OnDisconnect::Cancel).then(|| job.cancelled.clone().drop_guard());
        Ok(Response::new(guarded(job.watch(), guard)))
    }

    type SelectConceptStream = items::Responses<SelectConceptResponse>;

    async fn select_concept(&self, request: Request<SelectConceptRequest>) -> Result<Response<Self::SelectConceptStream>, Status> {
        let job = self.start_selection(request.into_inner()).await?;
        let guard = job.cancelled.clone().drop_guard();
        let events = guarded(job.watch(), Some(guard)).filter_map(|response| async {
            let event = match response {
                Ok(DissectResponse { event }) => match event? {
                    Event::Accepted(accepted) => select_concept_response::Event::Accepted(accepted),
                    Event::Progress(progress) => select_concept_response::Event::Progress(progress),
                    Event::Skipped(skipped) => select_concept_response::Event::Skipped(skipped),
                    Event::Unit(unit) => select_concept_response::Event::Unit(unit),
                    Event::Done(_) => return None,
                },
                Err(status) => return Some(Err(status)),
            };
            Some(Ok(SelectConceptResponse { event: Some(event) }))
        });
        Ok(Response::new(Box::pin(events)))
    }
}

/// A stream that, when it is dropped before its end, drops the guard with it.
fn guarded<T: Send + 'static>(stream: impl futures::Stream<Item = Result<T, Status>> + Send + 'static, guard: Option<DropGuard>) -> items::Responses<T> {
    let mut stream = Box::pin(stream);
    Box::pin(futures::stream::poll_fn(move |context| {
        let _held = &guard;
        stream.poll_next_unpin(context)
    }))
}

#[tonic::async_trait]
impl PictureService for Orchestrator {
    type GetPicturesStream = items::Responses<GetPicturesResponse>;

    async fn get_pictures(&self, request: Request<GetPicturesRequest>) -> Result<Response<Self::GetPicturesStream>, Status> {
        let digests = request.into_inner().digests;
        blobs::check_digests(&digests)?;
        let blobs = Arc::clone(&self.blobs);
        let answers = futures::stream::iter(digests).then(move |digest| {
            let blobs = Arc::clone(&blobs);
            async move {
                let result = match blobs.get(&digest).await {
                    Ok(Some(picture)) => get_pictures_response::Result::Picture(picture),
                    Ok(None) => get_pictures_response::Result::Status(
                        Fault::new(Code::NotFound, "NO_SUCH_PICTURE", format!("no picture {digest} is kept here")).into_item(),
                    ),
                    Err(error) => get_pictures_response::Result::Status(blobs::storage(error).into_item()),
                };
                Ok(GetPicturesResponse { digest, result: Some(result) })
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

/// What a job works on, looked up and checked.
struct Prepared {
    job: Arc<Job>,
    calls: Calls,
    layers: Vec<LayerUnits>,
    target: Target,
}

impl Orchestrator {
    /// Checks a request, begins its probing pass, and starts its job.
    async fn start(&self, request: DissectRequest) -> Result<Arc<Job>, Fault> {
        let parameters = parameters::from_request(request.parameters.as_ref())?;
        let set = request.probing_set.ok_or_else(|| Fault::field("probing_set", "not set; say where the pictures are"))?;
        let prepared = self.prepare(request.target, &request.layers, Some(&set), parameters).await?;
        let probe = self.probe(&prepared, set).await?;
        let Prepared { job, calls, layers, .. } = prepared;
        job.units_to_do(&STAGES, layers.iter().map(|layer| layer.units.len() as u64).sum());
        let in_flight = self.args.units_in_flight.get();
        self.spawn(&job, |job| async move { run(&job, &calls, probe, in_flight).await });
        Ok(job)
    }

    /// As [`Self::start`], for a selection.
    async fn start_selection(&self, request: SelectConceptRequest) -> Result<Arc<Job>, Fault> {
        let parameters = parameters::from_request(request.parameters.as_ref())?;
        if request.concepts.is_empty() || request.concepts.len() > MOST_CONCEPTS {
            return Err(Fault::field("concepts", format!("{} concepts; 1 to {MOST_CONCEPTS} can compete", request.concepts.len())));
        }
        if let Some(i) = request.concepts.iter().position(|concept| concept.trim().is_empty()) {
            return Err(Fault::field(format!("concepts[{i}]"), "empty; a concept has words"));
        }
        let candidates = answers::given_candidates(&request.concepts).map_err(|e| Fault::field("concepts", e.to_string()))?;
        let layers = [LayerUnits { layer: request.layer, units: vec![request.unit] }];
        match request.images {
            Some(select_concept_request::Images::ProbingSet(set)) => {
                let prepared = self.prepare(request.target, &layers, Some(&set), parameters).await?;
                let probe = self.probe(&prepared, set).await?;
                let Prepared { job, calls, .. } = prepared;
                job.units_to_do(&STAGES_OF_SELECTION, 1);
                self.spawn(&job, |job| async move { select_probed(&job, &calls, probe, candidates).await });
                Ok(job)
            }
            Some(select_concept_request::Images::Stored(stored)) => {
                if stored.images.is_empty() || stored.images.len() > MOST_IMAGES {
                    return Err(Fault::field("stored.images", format!("{} images; 1 to {MOST_IMAGES}", stored.images.len())));
                }
                if let Some(image) = stored.images.iter().find(|image| self.blobs.path(&image.digest).is_none()) {
                    return Err(not_uploaded(&format!("the picture {}", image.digest)));
                }
                let Prepared { job, calls, mut layers, .. } = self.prepare(request.target, &layers, None, parameters).await?;
                let Some(LayerUnits { layer, units }) = layers.pop() else { return Err(Fault::field("layer", "no such layer")) };
                let probed = ProbedUnit { layer, unit: units.first().copied().unwrap_or_default(), ..Default::default() };
                job.units_to_do(&STAGES_OF_STORED_SELECTION, 1);
                self.spawn(&job, |job| async move {
                    let result = steps::select_stored(&calls, &job, &probed, &candidates, stored).await?;
                    job.finish_unit(result);
                    Ok(JobDone::default())
                });
                Ok(job)
            }
            None => Err(Fault::field("images", "neither probing_set nor stored is set")),
        }
    }

    fn spawn<F>(&self, job: &Arc<Job>, work: impl FnOnce(Arc<Job>) -> F)
    where
        F: Future<Output = Result<JobDone, Fault>> + Send + 'static,
    {
        let work = work(Arc::clone(job));
        let job = Arc::clone(job);
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            // The work is a task of its own, so that a panic in it ends its job and nothing else.
            let cancelled = job.cancelled.clone();
            let mut working = AbortOnDropHandle::new(tokio::spawn(work));
            let ended = tokio::select! {
                ended = &mut working => ended.unwrap_or_else(|_| Err(Fault::internal("the job panicked; the orchestrator's log has the details"))),
                () = cancelled.cancelled() => {
                    working.abort();
                    // Until it has ended it may still tell of units.
                    let _ = (&mut working).await;
                    Ok(JobDone { cancelled: true, ..Default::default() })
                }
            };
            let ended = ended.map(|done| {
                let (labelled, dead, failed) = job.counts();
                job.say(Event::Done(JobDone { labelled, dead, failed, times: job.progress.times(), usage: job.progress.usage(), ..done }));
            });
            job.end(ended);
        });
    }

    async fn prepare(&self, target: Option<Target>, layers: &[LayerUnits], set: Option<&ProbingSet>, parameters: Parameters) -> Result<Prepared, Fault> {
        let target = target.ok_or_else(|| Fault::field("target", "not set; say which network to dissect"))?;
        if layers.is_empty() {
            return Err(Fault::field("layers", "empty; say which layers to dissect"));
        }
        uploads::pass_on(&self.models, &self.blobs, &target, set).await?;
        let described = self.describe(&target, layers).await?;
        let provenance = self.provenance(&target, &described, &parameters).await?;
        // From here on the target is what it was when it was described, its pre-processing spelt out.
        let target = Target { digest: described.digest, preprocessing: described.preprocessing, ..target };
        let job = Arc::new(Job::new());
        job.say(Event::Accepted(JobAccepted {
            job_id: job.id.clone(),
            provenance: Some(provenance.clone()),
            layers: described.found.clone(),
            warnings: described.warnings,
        }));
        let probing_set = set.cloned().unwrap_or_default();
        let work = Work { parameters, target: target.clone(), probing_set, layers: described.found.clone(), provenance };
        let calls = Calls::new(self.models.clone(), Arc::clone(&self.blobs), self.results.as_ref(), Arc::clone(&job.progress), work);
        Ok(Prepared { job, calls, layers: described.found, target })
    }

    async fn describe(&self, target: &Target, layers: &[LayerUnits]) -> Result<DescribeTargetResponse, Fault> {
        let request = DescribeTargetRequest { target: Some(target.clone()), asked: layers.to_vec() };
        let described = once_loaded(|| {
            let (mut client, request) = (self.models.activation.clone(), request.clone());
            async move { client.describe_target(request).await }
        })
        .await;
        described.map(Response::into_inner).map_err(|status| passed_on("activation", &status))
    }

    async fn provenance(&self, target: &Target, described: &DescribeTargetResponse, parameters: &Parameters) -> Result<Provenance, Fault> {
        // A mesh that was just started is waited for; one that is not there is told at once.
        macro_rules! model_of {
            ($service:ident, $request:ident) => {
                once_loaded(|| {
                    let mut client = self.models.$service.clone();
                    async move { client.get_model($request {}).await }
                })
            };
        }
        let (activation, captioner, summarizer, diffusion, clip) = tokio::join!(
            model_of!(activation, ActivationServiceGetModelRequest),
            model_of!(captioner, CaptionServiceGetModelRequest),
            model_of!(summarizer, SummaryServiceGetModelRequest),
            model_of!(diffusion, DiffusionServiceGetModelRequest),
            model_of!(clip, EmbeddingServiceGetModelRequest),
        );
        Ok(Provenance {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            target_digest: described.digest.clone(),
            preprocessing: described.preprocessing.clone(),
            activation: activation.map_err(|status| passed_on("activation", &status))?.into_inner().model,
            captioner: captioner.map_err(|status| passed_on("captioner", &status))?.into_inner().model,
            summarizer: summarizer.map_err(|status| passed_on("summarizer", &status))?.into_inner().model,
            diffusion: diffusion.map_err(|status| passed_on("diffusion", &status))?.into_inner().model,
            clip: clip.map_err(|status| passed_on("clip", &status))?.into_inner().model,
            parameters: Some(parameters::to_message(parameters)),
            preprocessing_source: described.preprocessing_source.clone(),
            target_options: target.options.clone(),
        })
    }

    async fn probe(&self, prepared: &Prepared, set: ProbingSet) -> Result<Streaming<ProbeResponse>, Fault> {
        let parameters = prepared.calls.parameters();
        let request = ProbeRequest {
            target: Some(prepared.target.clone()),
            probing_set: Some(set),
            layers: prepared.layers.clone(),
            summary: parameters::summary(parameters).into(),
            token_summary: parameters::token_summary(parameters).into(),
            top: Some(steps::looked_at(parameters)),
        };
        let probe = self.models.activation.clone().probe(request).await;
        probe.map(Response::into_inner).map_err(|status| passed_on("activation", &status))
    }
}

/// The job of a Dissect call: the probing pass, then each unit through the three steps, a few side by side. Where a unit meets what ends the job, no other
/// is begun, and those that get to their end without it are finished.
async fn run(job: &Arc<Job>, calls: &Calls, mut probe: Streaming<ProbeResponse>, in_flight: usize) -> Result<JobDone, Fault> {
    let mut done = JobDone::default();
    let mut units = FuturesUnordered::new();
    let mut probing = true;
    let since = Instant::now();
    let mut timed = false;
    let mut stopped = None;
    loop {
        tokio::select! {
            message = probe.message(), if probing && units.len() < in_flight => {
                match next(job, calls, message, &mut done)? {
                    Some(Probed::Unit(unit)) => {
                        // Units come when all pictures have been run.
                        if !std::mem::replace(&mut timed, true) {
                            job.progress.time(Stage::Probe, since);
                        }
                        units.push(steps::dissect(calls, job, unit));
                    }
                    Some(Probed::Other) => {}
                    None => probing = false,
                }
            }
            Some(unit) = units.next(), if !units.is_empty() => match unit {
                Ok(unit) => job.finish_unit(unit),
                Err(fault) => {
                    probing = false;
                    stopped.get_or_insert(fault);
                }
            },
            else => return stopped.map_or(Ok(done), Err),
        }
    }
}

/// The job of a SelectConcept call over a probing set.
async fn select_probed(job: &Arc<Job>, calls: &Calls, mut probe: Streaming<ProbeResponse>, candidates: Vec<String>) -> Result<JobDone, Fault> {
    let mut done = JobDone::default();
    let mut result = None;
    let since = Instant::now();
    while let Some(probed) = next(job, calls, probe.message().await, &mut done)? {
        if let Probed::Unit(probed) = probed {
            job.progress.time(Stage::Probe, since);
            result = Some(steps::select(calls, job, probed, &candidates).await?);
        }
    }
    if let Some(mut unit) = result {
        unit.warnings.splice(0..0, done.warnings.clone());
        job.finish_unit(unit);
    }
    Ok(done)
}

enum Probed {
    Unit(ProbedUnit),
    Other,
}

/// The next message of a probing pass, told to the job; none at its end.
fn next(job: &Job, calls: &Calls, message: Result<Option<ProbeResponse>, Status>, done: &mut JobDone) -> Result<Option<Probed>, Fault> {
    let Some(message) = message.map_err(|status| passed_on("activation", &status))? else { return Ok(None) };
    match message.event {
        Some(probe_response::Event::Unit(unit)) => return Ok(Some(Probed::Unit(unit))),
        Some(probe_response::Event::Progress(progress)) => job.stage(job.progress.set(Stage::Probe, progress.done, progress.pictures)),
        Some(probe_response::Event::Skipped(skipped)) => job.say(Event::Skipped(skipped)),
        Some(probe_response::Event::Total(total)) => {
            done.pictures = total.pictures;
            job.progress.calls(Stage::Probe, total.pictures + total.rerun, 0);
            let wanted = u64::from(steps::looked_at(calls.parameters()));
            if total.pictures < wanted {
                done.warnings.push(format!(
                    "the probing set has {} good pictures, fewer than the {wanted} that are looked at for each unit: all are used",
                    total.pictures
                ));
            }
            if total.duplicates > 0 {
                done.warnings.push(format!("{} pictures were left out because a byte-equal one comes before them", total.duplicates));
            }
        }
        None => {}
    }
    Ok(Some(Probed::Other))
}
