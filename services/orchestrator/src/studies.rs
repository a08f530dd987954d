//! StudyService over the store: what raters see, and what comes of it (A.1.5).

use std::collections::{HashMap, HashSet};

use dnd_mesh::{Fault, fault::check_text, items};
use dnd_method::rating::{self, Fared, PICTURES, Response as Said, drawn_units, fared, order_of_labels, order_of_units};
use dnd_proto::v1::{
    CreateStudyRequest, CreateStudyResponse, DeleteStudyRequest, DeleteStudyResponse, GetStudyRequest, GetStudyResponse, Interval, ListRatingsRequest,
    ListRatingsResponse, ListStudiesRequest, ListStudiesResponse, MethodResult, NextTaskRequest, NextTaskResponse, RateRequest, RateResponse, Rating,
    RatingTask, Study, StudyMethod, StudyUnit, UnitState, study_method::Source, study_service_server::StudyService,
};
use futures::{StreamExt as _, stream};
use tonic::{Code, Request, Response, Status};

use crate::{
    server::{MOST_JOBS, USUAL_JOBS, page, page_size},
    store::{Store, UnitFilter},
};

const MOST_METHODS: usize = 10;
const MOST_UNITS: usize = 10_000;
const MOST_RATERS: u32 = 1_000;
const RATERS: u32 = 3;
const LONGEST_RATER: usize = 100;

/// Studies in a store.
pub(crate) struct Studies {
    pub(crate) store: Store,
}

/// A layer and a unit.
type Named = (String, u32);

impl Studies {
    async fn create(&self, request: CreateStudyRequest) -> Result<Study, Fault> {
        let CreateStudyRequest { name, methods, units_per_layer, seed, raters_per_unit } = request;
        check_text("name", &name)?;
        if !(2..=MOST_METHODS).contains(&methods.len()) {
            return Err(Fault::field("methods", format!("{}; 2 to {MOST_METHODS} are compared", methods.len())));
        }
        let raters_per_unit = raters_per_unit.unwrap_or(RATERS);
        if !(1..=MOST_RATERS).contains(&raters_per_unit) {
            return Err(Fault::field("raters_per_unit", format!("{raters_per_unit}; 1 to {MOST_RATERS}")));
        }
        let names: Vec<String> = methods.iter().map(|method| method.name.clone()).collect();
        for (i, name) in names.iter().enumerate() {
            check_text(format!("methods[{i}].name"), name)?;
            if names[..i].contains(name) {
                return Err(Fault::field(format!("methods[{i}].name"), format!("{name:?} is the name of another method, too")));
            }
        }
        let Compared { job, units, labels } = self.compared(methods).await?;
        let mut shown = Vec::new();
        for (layer, units) in by_layer(units.into_iter().filter(|unit| labels.iter().all(|labels| labels.contains_key(unit)))) {
            let most = if units_per_layer == 0 { units.len() } else { units_per_layer as usize };
            shown.extend(drawn_units(&units, most, seed, &layer).into_iter().map(|unit| (layer.clone(), unit)));
        }
        match shown.len() {
            0 => return Err(Fault::field("methods", "there is no unit that all of them have a label for")),
            units if units > MOST_UNITS => return Err(Fault::field("units_per_layer", format!("{units} units in all; at most {MOST_UNITS} are shown"))),
            _ => {}
        }
        let mut study =
            Study { study_id: uuid::Uuid::now_v7().to_string(), name, methods: names, raters_per_unit, units: shown.len() as u32, ..Default::default() };
        for named in shown {
            let probed = self.store.unit(&job, &named.0, named.1).await?.unwrap_or_default().probed;
            let pictures = probed.into_iter().take(PICTURES).map(|picture| picture.digest).collect();
            let labels = labels.iter().map(|labels| labels.get(&named).cloned().unwrap_or_default()).collect();
            study.shown.push(StudyUnit { layer: named.0, unit: named.1, pictures, labels });
        }
        let id = study.study_id.clone();
        self.store.create_study(study).await?;
        self.study(&id).await
    }

    /// What the methods say.
    async fn compared(&self, methods: Vec<StudyMethod>) -> Result<Compared, Fault> {
        let mut first: Option<(String, String, Vec<Named>)> = None;
        let mut all = Vec::new();
        for (i, StudyMethod { source, .. }) in methods.into_iter().enumerate() {
            let mut labels = HashMap::new();
            match source {
                Some(Source::JobId(id)) => {
                    let field = format!("methods[{i}].job_id");
                    let (_, accepted) = self.store.work(&id).await?.ok_or_else(|| Fault::field(&field, format!("no job {id:?} is kept here")))?;
                    let network = accepted.provenance.unwrap_or_default().target_digest;
                    let filter = UnitFilter { most: u32::MAX, state: UnitState::Labelled, ..Default::default() };
                    let units = self.store.units(&id, &filter).await?;
                    labels.extend(units.iter().map(|(_, unit)| ((unit.layer.clone(), unit.unit), unit.label.clone())));
                    match &first {
                        Some((job, of, _)) if *of != network => return Err(Fault::field(field, format!("its network is another than that of job {job:?}"))),
                        Some(_) => {}
                        None => first = Some((id, network, units.into_iter().map(|(_, unit)| (unit.layer, unit.unit)).collect())),
                    }
                }
                Some(Source::Labels(given)) => {
                    for (j, given) in given.labels.into_iter().enumerate() {
                        check_text(format!("methods[{i}].labels.labels[{j}].label"), &given.label)?;
                        labels.insert((given.layer, given.unit), given.label);
                    }
                }
                None => return Err(Fault::field(format!("methods[{i}]"), "neither job_id nor labels is set")),
            }
            all.push(labels);
        }
        let (job, _, units) = first.ok_or_else(|| Fault::field("methods", "none is a job; the pictures that raters see are a job's"))?;
        Ok(Compared { job, units, labels: all })
    }

    async fn study(&self, id: &str) -> Result<Study, Fault> {
        self.store.study(id).await?.ok_or_else(|| no_such_study(id))
    }

    async fn next(&self, request: NextTaskRequest) -> Result<NextTaskResponse, Fault> {
        let NextTaskRequest { study_id, rater } = request;
        check_rater(&rater)?;
        let study = self.study(&study_id).await?;
        let rated = self.store.rated(&study_id, &rater).await?;
        let times = |place: &usize| rated.get(place).map_or(0, |rated| rated.times);
        let wants = |place: &usize| rated.get(place).is_none_or(|rated| !rated.by_rater && rated.times < u64::from(study.raters_per_unit));
        let open: Vec<usize> = order_of_units(study.shown.len(), &study_id, &rater).into_iter().filter(wants).collect();
        let task = open.iter().min_by_key(|place| times(place)).map(|place| {
            let StudyUnit { layer, unit, pictures, labels } = study.shown[*place].clone();
            let order = order_of_labels(labels.len(), &study_id, &rater, &layer, unit);
            RatingTask { labels: order.iter().map(|method| labels[*method].clone()).collect(), layer, unit, pictures }
        });
        let by_rater = rated.values().filter(|rated| rated.by_rater).count();
        Ok(NextTaskResponse { task, rated: by_rater as u32, left: open.len() as u32 })
    }

    async fn keep(&self, request: RateRequest) -> Result<(), Fault> {
        let RateRequest { study_id, rater, layer, unit, ratings: given, best } = request;
        check_rater(&rater)?;
        let study = self.study(&study_id).await?;
        let place = study.shown.iter().position(|shown| shown.layer == layer && shown.unit == unit);
        let place = place.ok_or_else(|| Fault::field("unit", format!("the study has no unit {unit} of {layer:?}")))?;
        let methods = study.methods.len();
        if given.len() != methods {
            return Err(Fault::field("ratings", format!("{}; one for each of the {methods} labels", given.len())));
        }
        let highest = u32::from(rating::HIGHEST);
        if let Some((i, odd)) = given.iter().enumerate().find(|(_, rating)| !(1..=highest).contains(*rating)) {
            return Err(Fault::field(format!("ratings[{i}]"), format!("{odd}; 1 to {highest}")));
        }
        let order = order_of_labels(methods, &study_id, &rater, &layer, unit);
        let best = *order.get(best as usize).ok_or_else(|| Fault::field("best", format!("{best}; there are {methods} labels, the first is 0")))?;
        let mut ratings = vec![0; methods];
        for (method, rating) in order.into_iter().zip(given) {
            ratings[method] = rating;
        }
        let valid = said(place, &ratings, best as u32).is_valid();
        let rating = Rating { rater, layer, unit, ratings, best: best as u32, valid, rated_at: None };
        if self.store.rate(&study_id, place, &rating).await? { Ok(()) } else { Err(no_such_study(&study_id)) }
    }

    async fn results(&self, id: &str) -> Result<GetStudyResponse, Fault> {
        let study = self.study(id).await?;
        let ratings = self.store.ratings(id).await?;
        let raters: HashSet<&str> = ratings.iter().map(|(_, rating)| rating.rater.as_str()).collect();
        let layers = by_layer(study.shown.iter().map(|unit| (unit.layer.clone(), unit.unit))).into_iter().map(|(layer, _)| layer);
        let results = std::iter::once(String::new()).chain(layers).flat_map(|layer| {
            let of_layer = ratings.iter().filter(|(_, rating)| layer.is_empty() || rating.layer == layer);
            let said: Vec<Said> = of_layer.map(|(place, rating)| said(*place, &rating.ratings, rating.best)).collect();
            let valid = said.iter().filter(|said| said.is_valid()).count() as u32;
            let fared = fared(&said, study.methods.len());
            study.methods.iter().zip(fared).map(|(method, fared)| result(method, &layer, valid, fared)).collect::<Vec<_>>()
        });
        let results = results.collect();
        let valid = ratings.iter().filter(|(_, rating)| rating.valid).count() as u32;
        Ok(GetStudyResponse { raters: raters.len() as u32, valid, results, study: Some(study) })
    }
}

/// What is compared: the job whose pictures are shown, its labelled units in order, and each method's labels.
struct Compared {
    job: String,
    units: Vec<Named>,
    labels: Vec<HashMap<Named, String>>,
}

/// Units by their layers, in the order in which those come first.
fn by_layer(units: impl Iterator<Item = Named>) -> Vec<(String, Vec<u32>)> {
    let mut layers: Vec<(String, Vec<u32>)> = Vec::new();
    for (layer, unit) in units {
        match layers.iter_mut().find(|(known, _)| *known == layer) {
            Some((_, units)) => units.push(unit),
            None => layers.push((layer, vec![unit])),
        }
    }
    layers
}

fn said(place: usize, ratings: &[u32], best: u32) -> Said {
    Said { unit: place, ratings: ratings.iter().map(|rating| *rating as u8).collect(), best: best as usize }
}

fn result(method: &str, layer: &str, responses: u32, fared: Fared) -> MethodResult {
    let Fared { mean, mean_interval, best, share, share_interval } = fared;
    let there = |value: f64| Some(value).filter(|value| value.is_finite());
    let interval = |interval: Option<(f64, f64)>| interval.map(|(low, high)| Interval { low, high });
    MethodResult {
        method: method.to_owned(),
        layer: layer.to_owned(),
        responses,
        mean: there(mean),
        mean_interval: interval(mean_interval),
        best: best as u32,
        share: there(share),
        share_interval: interval(share_interval),
    }
}

fn check_rater(rater: &str) -> Result<(), Fault> {
    check_text("rater", rater)?;
    if rater.len() > LONGEST_RATER {
        return Err(Fault::field("rater", format!("{} bytes; at most {LONGEST_RATER}", rater.len())));
    }
    Ok(())
}

fn no_such_study(id: &str) -> Fault {
    Fault::new(Code::NotFound, "NO_SUCH_STUDY", format!("no study {id:?} is kept here"))
}

#[tonic::async_trait]
impl StudyService for Studies {
    async fn create_study(&self, request: Request<CreateStudyRequest>) -> Result<Response<CreateStudyResponse>, Status> {
        Ok(Response::new(CreateStudyResponse { study: Some(self.create(request.into_inner()).await?) }))
    }

    async fn get_study(&self, request: Request<GetStudyRequest>) -> Result<Response<GetStudyResponse>, Status> {
        Ok(Response::new(self.results(&request.into_inner().study_id).await?))
    }

    async fn list_studies(&self, request: Request<ListStudiesRequest>) -> Result<Response<ListStudiesResponse>, Status> {
        let ListStudiesRequest { page_size: size, page_token } = request.into_inner();
        let size = page_size(size, USUAL_JOBS, MOST_JOBS)?;
        let after = Some(page_token.as_str()).filter(|token| !token.is_empty());
        let studies = self.store.studies(after, size + 1).await.map_err(Fault::from)?;
        let (studies, next_page_token) = page(studies, size, |study| study.study_id.clone());
        Ok(Response::new(ListStudiesResponse { studies, next_page_token }))
    }

    async fn delete_study(&self, request: Request<DeleteStudyRequest>) -> Result<Response<DeleteStudyResponse>, Status> {
        let id = request.into_inner().study_id;
        if self.store.delete_study(&id).await.map_err(Fault::from)? { Ok(Response::new(DeleteStudyResponse {})) } else { Err(no_such_study(&id).into()) }
    }

    async fn next_task(&self, request: Request<NextTaskRequest>) -> Result<Response<NextTaskResponse>, Status> {
        Ok(Response::new(self.next(request.into_inner()).await?))
    }

    async fn rate(&self, request: Request<RateRequest>) -> Result<Response<RateResponse>, Status> {
        self.keep(request.into_inner()).await?;
        Ok(Response::new(RateResponse {}))
    }

    type ListRatingsStream = items::Responses<ListRatingsResponse>;

    async fn list_ratings(&self, request: Request<ListRatingsRequest>) -> Result<Response<Self::ListRatingsStream>, Status> {
        let id = request.into_inner().study_id;
        self.study(&id).await?;
        let ratings = self.store.ratings(&id).await.map_err(Fault::from)?;
        Ok(Response::new(Box::pin(stream::iter(ratings).map(|(_, rating)| Ok(ListRatingsResponse { rating: Some(rating) })))))
    }
}
