//! SelectConcept: step 3 alone, which lives as long as its caller watches.

use std::sync::Arc;

use dnd_mesh::{Fault, blobs::storage, call, deadline, fault::check_text, items, parameters};
use dnd_method::answers;
use dnd_proto::v1::{
    DissectRequest, JobAccepted, LayerUnits, ProbeProgress, ProbedUnit, ProbingSet, SelectConceptRequest, SelectConceptResponse, Stage, StageProgress,
    StoredImages, UnitResult, select_concept_request::Images, select_concept_response::Event,
};
use futures::StreamExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status};

use crate::{
    accept::accept,
    calls::{Calls, Work},
    engine::Engine,
    failure::Failure,
    probing::{self, Probed, ProbingArgs},
    progress,
    steps::{self, Course},
    store::Passed,
    uploads::not_uploaded,
};

const MOST_CONCEPTS: usize = 100;
const MOST_IMAGES: usize = 1000;
/// Events that wait for a caller who is slow to take them.
const EVENTS: usize = 16;

type Responses = mpsc::Sender<Result<SelectConceptResponse, Status>>;

/// A selection, looked up and checked.
pub(crate) struct Selection {
    accepted: JobAccepted,
    calls: Calls,
    candidates: Vec<String>,
    /// Of an earlier result; without them the pictures are probed.
    stored: Option<StoredImages>,
    probing: ProbingArgs,
}

impl Selection {
    /// Checks a request.
    pub(crate) async fn check(engine: &Engine, request: SelectConceptRequest) -> Result<Self, Fault> {
        let Engine { models, blobs, results, .. } = engine;
        let parameters = parameters::from_request(request.parameters.as_ref())?;
        if request.concepts.is_empty() || request.concepts.len() > MOST_CONCEPTS {
            return Err(Fault::field("concepts", format!("{} concepts; 1 to {MOST_CONCEPTS} can compete", request.concepts.len())));
        }
        request.concepts.iter().enumerate().try_for_each(|(i, concept)| check_text(format!("concepts[{i}]"), concept))?;
        let candidates = answers::given_candidates(&request.concepts).map_err(|e| Fault::field("concepts", e.to_string()))?;
        let layers = [LayerUnits { layer: request.layer, units: vec![request.unit] }];
        let (probing_set, stored) = match request.images {
            Some(Images::ProbingSet(set)) => (Some(set), None),
            Some(Images::Stored(stored)) => (None, Some(stored)),
            None => return Err(Fault::field("images", "neither probing_set nor stored is set")),
        };
        if let Some(StoredImages { images }) = &stored {
            if images.is_empty() || images.len() > MOST_IMAGES {
                return Err(Fault::field("stored.images", format!("{} images; 1 to {MOST_IMAGES}", images.len())));
            }
            for image in images {
                if !blobs.has(&image.digest).await.map_err(storage)? {
                    return Err(not_uploaded(&format!("the picture {}", image.digest)));
                }
            }
        }
        let mut accepted = accept(models, blobs, request.target.as_ref(), &layers, probing_set.as_ref(), &parameters).await?;
        accepted.job_id = uuid::Uuid::now_v7().to_string();
        let request = DissectRequest { target: request.target, probing_set: Some(probing_set.unwrap_or_else(ProbingSet::default)), ..Default::default() };
        let calls = Calls::new(models.clone(), Arc::clone(blobs), results, Work::of(request, accepted.clone())?);
        if stored.is_none() {
            calls.check_probing_set().await?;
        }
        Ok(Self { accepted, calls, candidates, stored, probing: engine.probing.clone() })
    }

    /// Begins the selection; it ends with the stream.
    pub(crate) fn run(self) -> items::Responses<SelectConceptResponse> {
        let (events, responses) = mpsc::channel(EVENTS);
        let work = AbortOnDropHandle::new(tokio::spawn(call::carried(async move {
            let outcome = self.select(&events).await;
            let _ = match outcome {
                Ok(unit) => say(&events, Event::Unit(unit)).await,
                Err(fault) => events.send(Err(fault.into())).await.map_err(|_| gone()),
            };
        })));
        let mut responses = ReceiverStream::new(responses);
        Box::pin(futures::stream::poll_fn(move |context| {
            let _held = &work;
            responses.poll_next_unpin(context)
        }))
    }

    async fn select(self, events: &Responses) -> Result<UnitResult, Fault> {
        let Self { accepted, calls, candidates, stored, probing } = self;
        let [LayerUnits { layer, units }] = accepted.layers.as_slice() else { return Err(Fault::field("layer", "no such layer")) };
        let named = ProbedUnit { layer: layer.clone(), unit: units.first().copied().unwrap_or_default(), ..Default::default() };
        say(events, Event::Accepted(accepted)).await?;
        let course = Told(events);
        let (mut unit, failure) = match stored {
            Some(images) => steps::select_stored(&calls, &course, &named, &candidates, images).await,
            None => {
                let (probed, warnings) = probe(&calls, &probing, named, events).await?;
                let (mut unit, failure) = steps::select(&calls, &course, &probed, &candidates).await;
                unit.warnings.splice(0..0, warnings);
                (unit, failure)
            }
        };
        match failure {
            Some(Failure { pauses: Some(pause), .. }) => Err(pause.fault),
            // A model service gives up a moment before the caller of this one: the call ends by itself then, and says what it was at.
            Some(Failure { reason, .. }) if reason == "deadline" && deadline::current().is_some() => std::future::pending().await,
            _ => Ok(std::mem::take(&mut unit)),
        }
    }
}

async fn probe(calls: &Calls, args: &ProbingArgs, mut unit: ProbedUnit, events: &Responses) -> Result<(ProbedUnit, Vec<String>), Fault> {
    let listen = async |mut told: probing::Told| {
        let mut passed = Passed::default();
        while let Some(event) = told.recv().await {
            match passed.hear(event, calls.parameters()) {
                Some(Probed::Unit(probed)) => unit = probed,
                Some(Probed::Progress(ProbeProgress { done, pictures })) => {
                    let progress = StageProgress { stage: Stage::Probe.into(), done, total: pictures, usage: None };
                    call::doing(|| progress::told(&progress));
                    say(events, Event::Progress(progress)).await?;
                }
                None => {}
            }
        }
        Ok::<_, Fault>(passed)
    };
    let passed = probing::probe(calls, args, listen).await?;
    for skipped in passed.skipped {
        say(events, Event::Skipped(skipped)).await?;
    }
    Ok((unit, passed.warnings))
}

/// A course that is told to the caller.
struct Told<'e>(&'e Responses);

impl Course for Told<'_> {
    async fn through(&self, stage: Stage) -> Result<(), Failure> {
        let progress = StageProgress { stage: stage.into(), done: 1, total: 1, usage: None };
        say(self.0, Event::Progress(progress)).await.map_err(|fault| Failure::new("cancelled", fault.to_string()))
    }
}

async fn say(events: &Responses, event: Event) -> Result<(), Fault> {
    events.send(Ok(SelectConceptResponse { event: Some(event) })).await.map_err(|_| gone())
}

fn gone() -> Fault {
    Fault::new(Code::Cancelled, "CALLER_GONE", "the caller has gone")
}
