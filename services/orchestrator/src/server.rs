//! DissectService and PictureService over the store of jobs and the engine that works on them, and where all services of an orchestrator are added.

use std::{
    num::{NonZeroU64, NonZeroUsize},
    sync::{Arc, Mutex, PoisonError},
};

use clap::Args;
use dnd_mesh::{
    Fault, MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES,
    blobs::{self, Blobs},
    items, parameters,
    server::Services,
};
use dnd_proto::v1::{
    CancelJobRequest, CancelJobResponse, CreateJobRequest, CreateJobResponse, DeleteJobRequest, DeleteJobResponse, DissectRequest, DissectResponse,
    DissectServiceDescribeTargetRequest, DissectServiceDescribeTargetResponse, GetJobRequest, GetJobResponse, GetPicturesRequest, GetPicturesResponse,
    GetUnitRequest, GetUnitResponse, Job, ListJobsRequest, ListJobsResponse, ListUnitsRequest, ListUnitsResponse, NearestUnitsRequest, NearestUnitsResponse,
    OnDisconnect, ResumeJobRequest, ResumeJobResponse, SelectConceptRequest, SelectConceptResponse, WatchJobRequest, WatchJobResponse,
    dissect_service_server::{DissectService, DissectServiceServer},
    get_pictures_response,
    picture_service_server::{PictureService, PictureServiceServer},
    study_service_server::StudyServiceServer,
};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Request, Response, Status};

use crate::{
    accept::{accept, describe},
    calls::{Calls, Work},
    data::Data,
    engine::{Engine, WorksOn},
    models::Models,
    nearest::nearest,
    probing::ProbingArgs,
    selection::Selection,
    store::{NewJob, Store, UnitFilter},
    studies::Studies,
    uploads,
    watch::{no_such_job, watch},
};

/// How much is worked on at a time.
#[derive(Debug, Clone, Args)]
pub struct OrchestratorArgs {
    /// Units that are worked on at a time, over all jobs
    #[arg(long, env = "DND_UNITS_IN_FLIGHT", default_value_t = UNITS_IN_FLIGHT)]
    pub units_in_flight: NonZeroUsize,
    /// Seconds after which the work of an orchestrator that was stopped or killed is taken over by another one
    #[arg(long, env = "DND_LEASE", default_value_t = LEASE)]
    pub lease: NonZeroU64,
    /// How probing sets are run.
    #[command(flatten)]
    pub probing: ProbingArgs,
}

const UNITS_IN_FLIGHT: NonZeroUsize = NonZeroUsize::new(8).expect("8 is not 0");
const LEASE: NonZeroU64 = NonZeroU64::new(10).expect("10 is not 0");

impl Default for OrchestratorArgs {
    fn default() -> Self {
        Self { units_in_flight: UNITS_IN_FLIGHT, lease: LEASE, probing: ProbingArgs::default() }
    }
}

const LONGEST_REQUEST_ID: usize = 128;
pub(crate) const MOST_JOBS: u32 = 1_000;
pub(crate) const USUAL_JOBS: u32 = 100;
const MOST_NEAREST: u32 = 1_000;
const USUAL_NEAREST: u32 = 100;
const MOST_UNITS: u32 = 10_000;
const USUAL_UNITS: u32 = 1_000;

/// Adds the gRPC services of an orchestrator, which begins to work on jobs: it reads uploads from the data's blobs, whose service it needs too
/// ([`dnd_mesh::blobs::add_to`]), and keeps its jobs and what they make in the data. Called on a runtime.
pub fn add_to(services: Services, models: Models, data: Data, args: &OrchestratorArgs, works_on: WorksOn) -> Services {
    let engine = Arc::new(Engine::new(models, data, args, works_on));
    let mut tasks = JoinSet::new();
    if works_on != WorksOn::NoJobs {
        tasks.spawn(Arc::clone(&engine).run());
    }
    let orchestrator = Arc::new(Orchestrator { engine, tasks: Mutex::new(tasks) });
    let dissect =
        DissectServiceServer::from_arc(Arc::clone(&orchestrator)).max_decoding_message_size(MAX_REQUEST_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    let studies = StudyServiceServer::new(Studies { store: orchestrator.store().clone() });
    let studies = studies.max_decoding_message_size(MAX_REQUEST_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    let pictures = PictureServiceServer::from_arc(orchestrator).max_encoding_message_size(MAX_MESSAGE_BYTES);
    services.with(dissect).with(pictures).with(studies)
}

struct Orchestrator {
    engine: Arc<Engine>,
    /// The engine, and whoever cancels a job when its caller goes away; they end with this value.
    tasks: Mutex<JoinSet<()>>,
}

impl Orchestrator {
    fn store(&self) -> &Store {
        &self.engine.store
    }

    fn blobs(&self) -> &Arc<Blobs> {
        &self.engine.blobs
    }

    /// The id of the job of a request, which is created unless there is one.
    async fn create(&self, mut request: DissectRequest) -> Result<String, Fault> {
        if request.request_id.len() > LONGEST_REQUEST_ID {
            return Err(Fault::field("request_id", format!("{} characters; at most {LONGEST_REQUEST_ID}", request.request_id.len())));
        }
        request.on_disconnect = OnDisconnect::Unspecified.into();
        if let Some(id) = self.known(&request).await? {
            return Ok(id);
        }
        let parameters = parameters::from_request(request.parameters.as_ref())?;
        let set = request.probing_set.as_ref().ok_or_else(|| Fault::field("probing_set", "not set; say where the pictures are"))?;
        let Engine { models, blobs, results, .. } = &*self.engine;
        let mut accepted = accept(models, blobs, request.target.as_ref(), &request.layers, Some(set), &parameters).await?;
        let work = Work::of(request.clone(), accepted.clone())?;
        Calls::new(models.clone(), Arc::clone(blobs), results, work).check_probing_set().await?;
        let id = uuid::Uuid::now_v7().to_string();
        accepted.job_id.clone_from(&id);
        let new = NewJob { id, request, accepted };
        // Before others could take its work for nobody's.
        self.engine.ask(&new.id);
        if self.store().create(&new).await? {
            return Ok(new.id);
        }
        // Another caller was first.
        self.known(&new.request).await?.ok_or_else(|| Fault::internal("a job was deleted while it was created"))
    }

    /// The id of the job that a request has already.
    async fn known(&self, request: &DissectRequest) -> Result<Option<String>, Fault> {
        if request.request_id.is_empty() {
            return Ok(None);
        }
        match self.store().find(&request.request_id).await? {
            Some((id, of)) if of == *request => {
                self.engine.ask(&id);
                Ok(Some(id))
            }
            Some((id, _)) => {
                let message = format!("the request_id {:?} is of job {id}, which asked for something else", request.request_id);
                Err(Fault::new(Code::AlreadyExists, "REQUEST_ID_TAKEN", message))
            }
            None => Ok(None),
        }
    }

    async fn job(&self, id: &str) -> Result<Job, Fault> {
        self.store().job(id).await?.ok_or_else(|| no_such_job(id))
    }

    /// Cancels a job when the guard is dropped.
    fn cancel_with(&self, job: String) -> DropGuard {
        let gone = CancellationToken::new();
        let (store, waiting) = (self.store().clone(), gone.clone());
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            waiting.cancelled().await;
            if let Err(error) = store.cancel(&job).await {
                tracing::warn!(%error, job, "a job whose caller went away can't be cancelled");
            }
        });
        gone.drop_guard()
    }
}

/// A size of a page, checked.
pub(crate) fn page_size(asked: u32, usual: u32, most: u32) -> Result<u32, Fault> {
    match asked {
        0 => Ok(usual),
        asked if asked > most => Err(Fault::field("page_size", format!("{asked}; at most {most}"))),
        asked => Ok(asked),
    }
}

/// A page of what was found, one more than fits if there is more, and the token of the page after it.
pub(crate) fn page<T>(mut found: Vec<T>, size: u32, token: impl Fn(&T) -> String) -> (Vec<T>, String) {
    let more = found.len() > size as usize;
    found.truncate(size as usize);
    let next = found.last().filter(|_| more).map(token).unwrap_or_default();
    (found, next)
}

#[tonic::async_trait]
impl DissectService for Orchestrator {
    type DissectStream = items::Responses<DissectResponse>;

    async fn dissect(&self, request: Request<DissectRequest>) -> Result<Response<Self::DissectStream>, Status> {
        let request = request.into_inner();
        let on_disconnect = request.on_disconnect();
        let id = self.create(request).await?;
        let guard = (on_disconnect == OnDisconnect::Cancel).then(|| self.cancel_with(id.clone()));
        let events = watch(self.store().clone(), id, 0).map_ok(|event| DissectResponse { event: Some(event) });
        Ok(Response::new(guarded(events, guard)))
    }

    async fn create_job(&self, request: Request<CreateJobRequest>) -> Result<Response<CreateJobResponse>, Status> {
        let request = request.into_inner().request.ok_or_else(|| Fault::field("request", "not set; say what to dissect"))?;
        let id = self.create(request).await?;
        Ok(Response::new(CreateJobResponse { job: Some(self.job(&id).await?) }))
    }

    async fn get_job(&self, request: Request<GetJobRequest>) -> Result<Response<GetJobResponse>, Status> {
        Ok(Response::new(GetJobResponse { job: Some(self.job(&request.into_inner().job_id).await?) }))
    }

    async fn list_jobs(&self, request: Request<ListJobsRequest>) -> Result<Response<ListJobsResponse>, Status> {
        let ListJobsRequest { page_size: size, page_token } = request.into_inner();
        let size = page_size(size, USUAL_JOBS, MOST_JOBS)?;
        let after = Some(page_token.as_str()).filter(|token| !token.is_empty());
        let jobs = self.store().jobs(after, size + 1).await.map_err(Fault::from)?;
        let (jobs, next_page_token) = page(jobs, size, |job| job.job_id.clone());
        Ok(Response::new(ListJobsResponse { jobs, next_page_token }))
    }

    type WatchJobStream = items::Responses<WatchJobResponse>;

    async fn watch_job(&self, request: Request<WatchJobRequest>) -> Result<Response<Self::WatchJobStream>, Status> {
        let WatchJobRequest { job_id, after } = request.into_inner();
        if self.store().standing(&job_id).await.map_err(Fault::from)?.is_none() {
            return Err(no_such_job(&job_id).into());
        }
        let events = watch(self.store().clone(), job_id, after).map_ok(|event| WatchJobResponse { event: Some(event) });
        Ok(Response::new(Box::pin(events)))
    }

    async fn cancel_job(&self, request: Request<CancelJobRequest>) -> Result<Response<CancelJobResponse>, Status> {
        let id = request.into_inner().job_id;
        self.store().cancel(&id).await.map_err(Fault::from)?;
        Ok(Response::new(CancelJobResponse { job: Some(self.job(&id).await?) }))
    }

    async fn resume_job(&self, request: Request<ResumeJobRequest>) -> Result<Response<ResumeJobResponse>, Status> {
        let ResumeJobRequest { job_id, failed } = request.into_inner();
        self.engine.ask(&job_id);
        self.store().resume(&job_id, failed).await.map_err(Fault::from)?;
        Ok(Response::new(ResumeJobResponse { job: Some(self.job(&job_id).await?) }))
    }

    async fn delete_job(&self, request: Request<DeleteJobRequest>) -> Result<Response<DeleteJobResponse>, Status> {
        let id = request.into_inner().job_id;
        if self.store().delete(&id).await.map_err(Fault::from)? { Ok(Response::new(DeleteJobResponse {})) } else { Err(no_such_job(&id).into()) }
    }

    async fn list_units(&self, request: Request<ListUnitsRequest>) -> Result<Response<ListUnitsResponse>, Status> {
        let request = request.into_inner();
        let state = request.state();
        let ListUnitsRequest { job_id, page_size: size, page_token, layer, text, .. } = request;
        let size = page_size(size, USUAL_UNITS, MOST_UNITS)?;
        let after = match page_token.as_str() {
            "" => 0,
            token => token.parse().map_err(|_| Fault::field("page_token", format!("{token:?} is of no page")))?,
        };
        if self.store().standing(&job_id).await.map_err(Fault::from)?.is_none() {
            return Err(no_such_job(&job_id).into());
        }
        let filter = UnitFilter { after, most: size + 1, layer, state, text };
        let units = self.store().units(&job_id, &filter).await.map_err(Fault::from)?;
        let (units, next_page_token) = page(units, size, |(place, _)| place.to_string());
        Ok(Response::new(ListUnitsResponse { units: units.into_iter().map(|(_, unit)| unit).collect(), next_page_token }))
    }

    async fn get_unit(&self, request: Request<GetUnitRequest>) -> Result<Response<GetUnitResponse>, Status> {
        let GetUnitRequest { job_id, layer, unit } = request.into_inner();
        let found = self.store().unit(&job_id, &layer, unit).await.map_err(Fault::from)?;
        let found =
            found.ok_or_else(|| Fault::new(Code::NotFound, "NO_SUCH_UNIT", format!("no job {job_id:?} with a unit {unit} of {layer:?} is kept here")))?;
        Ok(Response::new(GetUnitResponse { unit: Some(found) }))
    }

    async fn nearest_units(&self, request: Request<NearestUnitsRequest>) -> Result<Response<NearestUnitsResponse>, Status> {
        let NearestUnitsRequest { job_id, text, most } = request.into_inner();
        let most = match most {
            0 => USUAL_NEAREST,
            most if most > MOST_NEAREST => return Err(Fault::field("most", format!("{most}; at most {MOST_NEAREST}")).into()),
            most => most,
        };
        let units = nearest(&self.engine, &job_id, &text, most as usize).await?;
        Ok(Response::new(NearestUnitsResponse { units }))
    }

    type SelectConceptStream = items::Responses<SelectConceptResponse>;

    async fn select_concept(&self, request: Request<SelectConceptRequest>) -> Result<Response<Self::SelectConceptStream>, Status> {
        Ok(Response::new(Selection::check(&self.engine, request.into_inner()).await?.run()))
    }

    async fn describe_target(&self, request: Request<DissectServiceDescribeTargetRequest>) -> Result<Response<DissectServiceDescribeTargetResponse>, Status> {
        let target = request.into_inner().target.ok_or_else(|| Fault::field("target", "not set; say which network to describe"))?;
        let Engine { models, blobs, .. } = &*self.engine;
        uploads::pass_on(models, blobs, &target, None).await?;
        let description = describe(models, &target, &[]).await?;
        Ok(Response::new(DissectServiceDescribeTargetResponse { description: Some(description) }))
    }
}

/// A stream that, when it is dropped, drops the guard with it.
fn guarded<T: Send + 'static>(stream: impl Stream<Item = Result<T, Status>> + Send + 'static, guard: Option<DropGuard>) -> items::Responses<T> {
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
        let blobs = Arc::clone(self.blobs());
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
