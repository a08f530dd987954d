//! Attention crops of one unit (A.1.1): made from its top pictures and their maps, and run through the target.

use std::sync::Arc;

use dnd_mesh::{Fault, MAX_PICTURE_BYTES, blobs, items, parameters};
use dnd_method::{
    boxes::BoundingBox,
    canvas,
    crops::{self, AttentionCrop},
    parameters::Parameters,
    resize::Map,
};
use dnd_onnx::{
    Error,
    pictures::{self, encode_png},
};
use dnd_proto::v1::{self as proto, CropRequest, CropResponse, TopPicture, crop_response};
use futures::{StreamExt as _, stream};
use image::RgbImage;

use super::{Prepared, check_count, prepare, read, reading};
use crate::{
    Activation,
    engine::{Cut, Output, ProbingSet, Source, blocking},
};

/// Pictures that are cropped at a time.
const AT_ONCE: usize = 4;

/// Streams the crops, a picture after the other, larger regions first.
pub(super) async fn crop(activation: Arc<Activation>, request: CropRequest) -> Result<items::Responses<CropResponse>, Fault> {
    let parameters = parameters_of(&request)?;
    check_count(request.pictures.len())?;
    let reading = reading(request.summary(), request.token_summary());
    let Prepared { cut, layers, .. } = prepare(&activation, request.target, &request.layers, reading).await?;
    let asked = (request.layers.iter().map(|layer| &layer.layer)).zip(&layers).position(|(said, found)| [said, &found.name].contains(&&request.layer));
    let layer = asked.ok_or_else(|| Fault::field("layer", format!("{:?} is not among the layers of the request", request.layer)))?;
    let units = cut.layers.get(layer).map_or(0, |layer| layer.units);
    if request.unit >= units {
        return Err(Error::UnitOutOfRange { layer: request.layer, unit: request.unit, units }.into());
    }
    let set = activation.set(request.probing_set).await?;
    let cropper = Arc::new(Cropper { limits: activation.picture_limits(), cut, set, layer, unit: request.unit as usize, parameters });
    let answers = stream::iter((0..).zip(request.pictures))
        .map(move |(place, picture)| {
            let cropper = Arc::clone(&cropper);
            async move { cropper.crops(place, picture).await }
        })
        .buffered(AT_ONCE)
        .flat_map(stream::iter)
        .map(Ok);
    Ok(Box::pin(answers))
}

fn parameters_of(request: &CropRequest) -> Result<Parameters, Fault> {
    let defaults = Parameters::default();
    let said = Parameters {
        crops_per_image: request.crops_per_image.unwrap_or(defaults.crops_per_image),
        crop_iou: request.crop_iou.unwrap_or(defaults.crop_iou),
        canvas_iou: request.canvas_iou.unwrap_or(defaults.canvas_iou),
        canvas_side: request.canvas_side.unwrap_or(defaults.canvas_side),
        ..defaults
    };
    parameters::check(said, "")
}

struct Cropper {
    limits: pictures::PictureLimits,
    cut: Arc<Cut>,
    set: Arc<ProbingSet>,
    /// Its place among the cut's.
    layer: usize,
    unit: usize,
    parameters: Parameters,
}

/// A crop that is not run yet.
struct Cutting {
    pixels: Arc<RgbImage>,
    png: Vec<u8>,
    area: BoundingBox,
    threshold: u8,
}

impl Cropper {
    async fn crops(self: Arc<Self>, place: u32, picture: TopPicture) -> Vec<CropResponse> {
        let answer = |result| CropResponse { picture: place, result: Some(result) };
        match self.run(picture).await {
            Ok(crops) => crops.into_iter().map(|crop| answer(crop_response::Result::Crop(crop))).collect(),
            Err(fault) => vec![answer(crop_response::Result::Status(fault.into_item()))],
        }
    }

    async fn run(self: Arc<Self>, picture: TopPicture) -> Result<Vec<proto::AttentionCrop>, Fault> {
        let Some(map) = &picture.map else { return Ok(Vec::new()) };
        let map = Map::new(map.height as usize, map.width as usize, map.values.clone())
            .ok_or_else(|| Fault::field("pictures.map", format!("{} values are no map of {} x {}", map.values.len(), map.height, map.width)))?;
        let bytes = read(Arc::clone(&self.set), picture, self.limits.bytes).await?;
        let this = Arc::clone(&self);
        let cuttings = blocking(move || this.cut_out(&bytes, &map)).await?;
        let mut crops = Vec::with_capacity(cuttings.len());
        for (index, cutting) in (0..).zip(cuttings) {
            let layers = self.cut.run(Source::Decoded(cutting.pixels), Output::Activations).await?;
            let activation = layers.get(self.layer).and_then(|layer| layer.get(self.unit)).copied().unwrap_or(f32::NAN);
            let BoundingBox { left, top, right, bottom } = cutting.area;
            crops.push(proto::AttentionCrop {
                digest: blobs::digest(&cutting.png),
                picture: cutting.png.into(),
                r#box: Some(proto::Box { left, top, right, bottom }),
                threshold: cutting.threshold.into(),
                index,
                activation,
            });
        }
        Ok(crops)
    }

    /// Decodes a picture and cuts out its salient regions.
    fn cut_out(&self, bytes: &[u8], map: &Map) -> Result<Vec<Cutting>, Fault> {
        let picture = pictures::decode(bytes, self.limits)?;
        let pictures::Seen { left, top, width, height } = self.cut.preprocessor.seen(picture.dimensions());
        let Some(seen) = canvas::Seen::new(left, top, width, height) else { return Ok(Vec::new()) };
        crops::attention_crops(map, &seen, &self.parameters)
            .into_iter()
            .map(|AttentionCrop { threshold, in_picture: area, .. }| {
                let pixels = image::imageops::crop_imm(&picture, area.left, area.top, area.right - area.left, area.bottom - area.top).to_image();
                let png = encode_png(&pixels)?;
                if png.len() > MAX_PICTURE_BYTES {
                    let message = format!(
                        "a crop of {} x {} pixels is {} bytes as PNG; at most {MAX_PICTURE_BYTES} are sent",
                        pixels.width(),
                        pixels.height(),
                        png.len()
                    );
                    return Err(Fault::new(tonic::Code::OutOfRange, "CROP_TOO_LARGE", message));
                }
                Ok(Cutting { png, pixels: Arc::new(pixels), area, threshold })
            })
            .collect()
    }
}
