//! What the activation service is asked: the probing pass, crops, and activations.

use std::{
    collections::HashMap,
    future::ready,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use dnd_mesh::{Fault, fault, parameters};
use dnd_method::parameters::Parameters;
use dnd_proto::v1::{
    self as proto, ActivatePicture, ActivateRequest, ActivateSetup, CropRequest, ListShardsRequest, ListShardsResponse, ProbeRequest, ProbeResponse,
    ProbingShard, ReadPicturesRequest, Stage, TopPicture, activate_request, activate_response, crop_response, read_pictures_response,
};
use futures::{StreamExt as _, stream};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tonic::{Response, Status, Streaming};

use super::{
    Calls,
    exchange::{Results, answered, each, listed},
};
use crate::{
    failure::Failure,
    models::passed_on,
    probing::{ProbedShard, kept},
    steps::looked_at,
    uploads::{self, NOT_UPLOADED},
};

/// Of which unit's picture crops are: the layer, the unit, and the picture's digest.
pub(super) type Cropped = (String, u32, String);

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

impl Calls {
    /// Lists the probing set in shards of so many pictures.
    pub(crate) async fn shards(&self, pictures: u32) -> Result<Vec<ListShardsResponse>, Fault> {
        let call = || async { self.list_shards(Some(pictures)).await };
        listed(call, ready).await.map_err(|status| passed_on("activation", &status))
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
        self.results.put(chunk).await.map_err(|failure| kept(&failure))
    }

    /// A kept chunk, if it is there.
    pub(crate) async fn chunk(&self, digest: &str) -> Result<Option<Bytes>, Fault> {
        self.results.picture(digest).await.map_err(|failure| kept(&failure))
    }

    /// Keeps whole pictures of the probing set; those that are not there yet are read.
    pub(crate) async fn originals(&self, pictures: &[TopPicture]) -> Results<()> {
        let (mut failures, mut missing) = (HashMap::new(), Vec::new());
        for picture in pictures {
            match self.results.has(&[picture.digest.as_str()]).await {
                Ok(true) => {}
                Ok(false) => missing.push(picture),
                Err(failure) => drop(failures.insert(picture.digest.clone(), failure)),
            }
        }
        if !missing.is_empty() {
            failures.extend(self.read(&missing).await);
        }
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
        let mut read: HashMap<usize, Result<(), Failure>> = match listed(call, keep).await {
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
            let answers = match listed(call, keep).await {
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
}
