//! What is done with labels once they are there: people rate them, and units are found by them.
#![allow(clippy::unwrap_used, clippy::panic)]

mod stand_ins;

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use dnd_mesh::{
    fault,
    server::{InProcess, Services},
};
use dnd_orchestrator::{Data, DataArgs, Models, OrchestratorArgs, WorksOn, add_to};
use dnd_proto::v1::{
    CreateStudyRequest, DeleteJobRequest, DeleteStudyRequest, DissectRequest, GetPicturesRequest, GetStudyRequest, LayerUnits, ListRatingsRequest,
    ListStudiesRequest, MethodResult, NearestUnitsRequest, NextTaskRequest, NextTaskResponse, Parameters, ProbingSet, RateRequest, RatingTask, StudyMethod,
    Target, UnitLabel, UnitLabels, dissect_service_client::DissectServiceClient, get_pictures_response, job_event::Event,
    picture_service_client::PictureServiceClient, study_method::Source, study_service_client::StudyServiceClient,
};
use tonic::{Code, Status};

use stand_ins::{Behaviour, Fakes, png};

/// What its three live units are called.
const LABELS: [&str; 3] = ["red", "red circles", "many red circles on blue"];

struct Mesh {
    fakes: Fakes,
    orchestrator: InProcess,
    _models: InProcess,
}

impl Mesh {
    async fn start(folder: &Path) -> Self {
        // Each unit has three pictures of its own, and is called what they are.
        let caption = |picture: &[u8]| Ok((0..9).find(|i| png(*i) == picture).map_or("?", |i| LABELS[usize::from(i / 3)]).to_owned());
        let behaviour = Behaviour { own_pictures: true, caption: Some(caption), summary: Some(|asked| asked.descriptions[0].clone()), ..Default::default() };
        let fakes = Fakes(Arc::new(behaviour));
        let models = fakes.start();
        let channel = || models.channel().into();
        let data = Data::open(&DataArgs { data: Some(folder.to_owned()), ..Default::default() }).await.unwrap();
        let clients = Models::over(channel(), channel(), channel(), channel(), channel());
        let orchestrator = InProcess::start(add_to(Services::default(), clients, data, &OrchestratorArgs::default(), WorksOn::AllJobs));
        Self { fakes, orchestrator, _models: models }
    }

    fn dissect(&self) -> DissectServiceClient<tonic::transport::Channel> {
        DissectServiceClient::new(self.orchestrator.channel())
    }

    fn studies(&self) -> StudyServiceClient<tonic::transport::Channel> {
        StudyServiceClient::new(self.orchestrator.channel())
    }

    /// Runs a job to its end; gives its id.
    async fn job(&self, seed: u64) -> String {
        let request = DissectRequest {
            target: Some(Target { uri: "file:/somewhere/net.onnx".into(), ..Default::default() }),
            layers: vec![LayerUnits { layer: "layer".into(), units: vec![0, 1, 2, 99] }],
            probing_set: Some(ProbingSet::default()),
            parameters: Some(Parameters { images_per_concept: Some(2), seed: Some(seed), ..Default::default() }),
            ..Default::default()
        };
        let mut events = self.dissect().dissect(request).await.unwrap().into_inner();
        let mut id = String::new();
        loop {
            match events.message().await.unwrap().unwrap().event.unwrap().event.unwrap() {
                Event::Accepted(accepted) => id = accepted.job_id,
                Event::Done(done) => {
                    assert_eq!((done.labelled, done.dead), (3, 1));
                    return id;
                }
                _ => {}
            }
        }
    }

    async fn next(&self, study: &str, rater: &str) -> NextTaskResponse {
        self.studies().next_task(NextTaskRequest { study_id: study.into(), rater: rater.into() }).await.unwrap().into_inner()
    }

    /// Lets a rater rate all that there is for them: 5 for what `likes` says yes to, 2 for the rest. Gives the units.
    async fn rate_all(&self, study: &str, rater: &str, likes: impl Fn(&str) -> bool, chooses_it: bool) -> Vec<u32> {
        let mut seen = Vec::new();
        while let NextTaskResponse { task: Some(RatingTask { layer, unit, labels, pictures }), rated, left } = self.next(study, rater).await {
            assert_eq!((rated as usize, (rated + left) as usize, pictures.len()), (seen.len(), 3, 3));
            let ratings = labels.iter().map(|label| if likes(label) { 5 } else { 2 }).collect();
            let best = labels.iter().position(|label| likes(label) == chooses_it).unwrap() as u32;
            let request = RateRequest { study_id: study.into(), rater: rater.into(), layer, unit, ratings, best };
            self.studies().rate(request).await.unwrap();
            seen.push(unit);
        }
        seen
    }
}

fn method(name: &str, source: Source) -> StudyMethod {
    StudyMethod { name: name.into(), source: Some(source) }
}

/// Another method's labels, for some units.
fn others(units: &[u32]) -> Source {
    let label = |unit: &u32| UnitLabel { layer: "layer".into(), unit: *unit, label: format!("blue stars {unit}") };
    Source::Labels(UnitLabels { labels: units.iter().map(label).collect() })
}

fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, field: &str) {
    let status = answer.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let violations = tonic_types::StatusExt::get_details_bad_request(&status).unwrap().field_violations;
    assert_eq!(violations[0].field, field, "{status}");
}

#[tokio::test]
async fn labels_are_rated_blindly_and_what_was_said_outlives_the_job_and_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Mesh::start(folder.path()).await;
    let job = mesh.job(0).await;
    let methods = vec![method("theirs", others(&[0, 1, 2, 7])), method("ours", Source::JobId(job.clone()))];
    let request = CreateStudyRequest { name: "which is better?".into(), methods, raters_per_unit: Some(2), ..Default::default() };
    let study = mesh.studies().create_study(request).await.unwrap().into_inner().study.unwrap();
    assert_eq!((study.units, study.methods.as_slice()), (3, ["theirs".to_owned(), "ours".to_owned()].as_slice()));
    assert_eq!(study.shown[1].labels, ["blue stars 1", LABELS[1]]);
    let id = study.study_id;

    let first = mesh.next(&id, "Ann").await;
    assert_eq!(mesh.next(&id, "Ann").await, first, "looking is not rating");
    let mut by_ann = mesh.rate_all(&id, "Ann", |label| LABELS.contains(&label), true).await;
    mesh.rate_all(&id, "Bob", |label| LABELS.contains(&label), false).await;
    by_ann.sort_unstable();
    assert_eq!(by_ann, [0, 1, 2]);
    assert_eq!(mesh.next(&id, "Cy").await, NextTaskResponse { task: None, rated: 0, left: 0 }, "each unit has its two raters");

    let read = async |mesh: &Mesh| mesh.studies().get_study(GetStudyRequest { study_id: id.clone() }).await.unwrap().into_inner();
    let results = read(&mesh).await;
    assert_eq!((results.raters, results.study.as_ref().unwrap().responses, results.valid), (2, 6, 3), "Bob's best is not his highest");
    let said =
        |result: &MethodResult| (result.method.clone(), result.layer.clone(), result.responses, result.mean.unwrap(), result.best, result.share.unwrap());
    let overall = [("theirs".into(), String::new(), 3, 2.0, 0, 0.0), ("ours".into(), String::new(), 3, 5.0, 3, 1.0)];
    assert_eq!(results.results.iter().map(said).collect::<Vec<_>>()[..2], overall);
    assert!(results.results[2..].iter().all(|result| result.layer == "layer") && results.results.len() == 4);

    drop(mesh);
    let mesh = Mesh::start(folder.path()).await;
    mesh.dissect().delete_job(DeleteJobRequest { job_id: job }).await.unwrap();
    assert_eq!(read(&mesh).await, results);
    let digests = results.study.unwrap().shown.remove(2).pictures;
    let mut pictures = PictureServiceClient::new(mesh.orchestrator.channel()).get_pictures(GetPicturesRequest { digests }).await.unwrap().into_inner();
    let picture = pictures.message().await.unwrap().unwrap().result.unwrap();
    assert!(matches!(picture, get_pictures_response::Result::Picture(bytes) if bytes == png(6)));
    let mut ratings = mesh.studies().list_ratings(ListRatingsRequest { study_id: id.clone() }).await.unwrap().into_inner();
    let mut said = Vec::new();
    while let Some(rating) = ratings.message().await.unwrap().map(|row| row.rating.unwrap()) {
        said.push((rating.unit, rating.rater, rating.ratings, rating.best, rating.valid));
    }
    assert_eq!(said[..2], [(0, "Ann".into(), vec![2, 5], 1, true), (0, "Bob".into(), vec![2, 5], 0, false)], "in the order of the methods");

    let listed = mesh.studies().list_studies(ListStudiesRequest::default()).await.unwrap().into_inner().studies;
    assert_eq!((listed.len(), listed[0].responses, listed[0].shown.len()), (1, 6, 0));
    mesh.studies().delete_study(DeleteStudyRequest { study_id: id.clone() }).await.unwrap();
    let gone = mesh.studies().get_study(GetStudyRequest { study_id: id }).await.unwrap_err();
    assert_eq!((gone.code(), fault::reason_of(&gone).as_deref()), (Code::NotFound, Some("NO_SUCH_STUDY")));
}

#[tokio::test]
async fn a_study_that_can_say_nothing_and_a_rating_that_is_none_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Mesh::start(folder.path()).await;
    let ours = || method("ours", Source::JobId("none".into()));
    let create = async |name: &str, methods: Vec<StudyMethod>| {
        mesh.studies().create_study(CreateStudyRequest { name: name.into(), methods, ..Default::default() }).await
    };
    refused(create("", vec![ours(), ours()]).await, "name");
    refused(create("s", vec![ours()]).await, "methods");
    refused(create("s", vec![ours(), ours()]).await, "methods[1].name");
    refused(create("s", vec![method("a", others(&[0])), method("b", others(&[0]))]).await, "methods");
    refused(create("s", vec![method("a", others(&[0])), ours()]).await, "methods[1].job_id");
    let job = mesh.job(0).await;
    let ours = || method("ours", Source::JobId(job.clone()));
    refused(create("s", vec![ours(), method("theirs", others(&[7, 99]))]).await, "methods");

    let one = CreateStudyRequest { name: "s".into(), methods: vec![ours(), method("theirs", others(&[0, 1, 2]))], units_per_layer: 1, ..Default::default() };
    let study = mesh.studies().create_study(one).await.unwrap().into_inner().study.unwrap();
    assert_eq!((study.units, study.raters_per_unit), (1, 3));
    let unit = study.shown[0].unit;
    let request = RateRequest { study_id: study.study_id, rater: "Ann".into(), layer: "layer".into(), unit, ratings: vec![1, 5], best: 1 };
    let rate = async |request: RateRequest| mesh.studies().rate(request).await;
    refused(rate(RateRequest { rater: " ".into(), ..request.clone() }).await, "rater");
    refused(rate(RateRequest { rater: "x".repeat(101), ..request.clone() }).await, "rater");
    refused(rate(RateRequest { unit: (unit + 1) % 3, ..request.clone() }).await, "unit");
    refused(rate(RateRequest { ratings: vec![1], ..request.clone() }).await, "ratings");
    refused(rate(RateRequest { ratings: vec![0, 5], ..request.clone() }).await, "ratings[0]");
    refused(rate(RateRequest { ratings: vec![1, 6], ..request.clone() }).await, "ratings[1]");
    refused(rate(RateRequest { best: 2, ..request.clone() }).await, "best");
    rate(request).await.unwrap();
}

#[tokio::test]
async fn units_are_found_by_what_their_labels_mean_and_each_label_is_embedded_once() {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Mesh::start(folder.path()).await;
    let job = mesh.job(0).await;
    // The stand-in for CLIP knows nothing but how long a text is.
    let nearest = async |text: &str, most| {
        let request = NearestUnitsRequest { job_id: job.clone(), text: text.into(), most };
        let near = mesh.dissect().nearest_units(request).await.map(|found| found.into_inner().units);
        near.map(|units| units.into_iter().map(|near| (near.unit.unwrap().label, near.similarity)).collect::<Vec<_>>())
    };
    let found = nearest("blue", 0).await.unwrap();
    assert_eq!(found.iter().map(|(label, _)| label.as_str()).collect::<Vec<_>>(), LABELS);
    assert!((found[0].1 - 13.0 / 170.0_f64.sqrt()).abs() < 1e-6, "{found:?}: 1 · 1 + 3 · 4 over the lengths of (1, 3) and (1, 4)");
    let texts = mesh.fakes.0.texts.load(Ordering::Relaxed);
    let found = nearest("some green triangles on red", 2).await.unwrap();
    assert_eq!(found.iter().map(|(label, _)| label.as_str()).collect::<Vec<_>>(), [LABELS[2], LABELS[1]]);
    assert_eq!(mesh.fakes.0.texts.load(Ordering::Relaxed), texts + 1, "the new text alone");
    refused(nearest("", 0).await, "text");
    refused(nearest("red", 1001).await, "most");
    let request = NearestUnitsRequest { job_id: "none".into(), text: "red".into(), most: 0 };
    assert_eq!(fault::reason_of(&mesh.dissect().nearest_units(request).await.unwrap_err()).as_deref(), Some("NO_SUCH_JOB"));
}
