//! Rating studies: each request a call of the orchestrator's StudyService.

use std::collections::HashMap;

use axum::{
    Json,
    body::Body,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use dnd_mesh::Fault;
use dnd_proto::v1::{
    CreateStudyRequest, CreateStudyResponse, DeleteStudyRequest, GetStudyRequest, GetStudyResponse, ListRatingsRequest, ListStudiesRequest,
    ListStudiesResponse, NextTaskRequest, NextTaskResponse, RateRequest, RateResponse, Rating, Study,
};
use dnd_results::table::{cell, record};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde::Deserialize;
use tonic::Code;

use crate::{
    Gateway,
    api::{Caller, Message, Page, Path, Query},
    export::attachment,
    problem::Problem,
};

pub(crate) async fn list(State(mut gateway): State<Gateway>, caller: Caller, Query(page): Query<Page>) -> Result<Json<ListStudiesResponse>, Problem> {
    let Page { page_size, page_token } = page;
    Ok(Json(gateway.studies.list_studies(caller.asks(ListStudiesRequest { page_size, page_token })).await?.into_inner()))
}

pub(crate) async fn create(
    State(mut gateway): State<Gateway>,
    caller: Caller,
    Message(request): Message<CreateStudyRequest>,
) -> Result<(StatusCode, Json<CreateStudyResponse>), Problem> {
    Ok((StatusCode::CREATED, Json(gateway.studies.create_study(caller.asks(request)).await?.into_inner())))
}

pub(crate) async fn get(State(mut gateway): State<Gateway>, caller: Caller, Path(study_id): Path<String>) -> Result<Json<GetStudyResponse>, Problem> {
    Ok(Json(gateway.studies.get_study(caller.asks(GetStudyRequest { study_id })).await?.into_inner()))
}

pub(crate) async fn delete(State(mut gateway): State<Gateway>, caller: Caller, Path(study_id): Path<String>) -> Result<StatusCode, Problem> {
    gateway.studies.delete_study(caller.asks(DeleteStudyRequest { study_id })).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct By {
    rater: String,
}

pub(crate) async fn task(
    State(mut gateway): State<Gateway>,
    caller: Caller,
    Path(study_id): Path<String>,
    Query(By { rater }): Query<By>,
) -> Result<Json<NextTaskResponse>, Problem> {
    Ok(Json(gateway.studies.next_task(caller.asks(NextTaskRequest { study_id, rater })).await?.into_inner()))
}

pub(crate) async fn rate(
    State(mut gateway): State<Gateway>,
    caller: Caller,
    Path(study_id): Path<String>,
    Message(request): Message<RateRequest>,
) -> Result<Json<RateResponse>, Problem> {
    Ok(Json(gateway.studies.rate(caller.asks(RateRequest { study_id, ..request })).await?.into_inner()))
}

/// All ratings as a table: a rater's rating of one method's label a row.
pub(crate) async fn ratings(State(mut gateway): State<Gateway>, caller: Caller, Path(study_id): Path<String>) -> Result<Response, Problem> {
    let study = gateway.studies.get_study(caller.asks(GetStudyRequest { study_id: study_id.clone() })).await?.into_inner().study;
    let study = study.ok_or_else(|| Fault::new(Code::NotFound, "NO_SUCH_STUDY", "there is no such study"))?;
    let ratings = gateway.studies.list_ratings(caller.asks(ListRatingsRequest { study_id })).await?.into_inner();
    let first = record(&["rater", "layer", "unit", "method", "label", "rating", "best", "valid"]).map_err(Into::into);
    let name = format!("dnd-study-{}.csv", study.study_id);
    let Study { methods, shown, .. } = study;
    let labels: HashMap<(String, u32), Vec<String>> = shown.into_iter().map(|unit| ((unit.layer, unit.unit), unit.labels)).collect();
    let rows = ratings.map_ok(move |row| stream::iter(row.rating.map(|rating| rows(&methods, &labels, rating)).unwrap_or_default())).try_flatten();
    let rows = stream::iter([first]).chain(rows.and_then(|row| std::future::ready(record(&row).map_err(Into::into))));
    let body = Body::from_stream(rows.take_until(gateway.stopping.cancelled_owned()));
    Ok(([(header::CONTENT_TYPE, "text/csv; charset=utf-8")], attachment(&name), body).into_response())
}

fn rows(methods: &[String], labels: &HashMap<(String, u32), Vec<String>>, rating: Rating) -> Vec<Result<[String; 8], tonic::Status>> {
    let Rating { rater, layer, unit, ratings, best, valid, .. } = rating;
    let (rater_cell, layer_cell) = (cell(&rater), cell(&layer));
    let labels = labels.get(&(layer, unit)).map(Vec::as_slice).unwrap_or_default();
    let row = |((i, method), (label, rated)): ((usize, &String), (&String, &u32))| {
        let is_best = (i == best as usize).to_string();
        Ok([rater_cell.clone(), layer_cell.clone(), unit.to_string(), cell(method), cell(label), rated.to_string(), is_best, valid.to_string()])
    };
    methods.iter().enumerate().zip(labels.iter().zip(&ratings)).map(row).collect()
}
