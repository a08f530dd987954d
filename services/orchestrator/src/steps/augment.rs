//! Step 1: probing-set augmentation (3.1, A.1.1), and the set I of highest activating images (3.2).

use std::io::Cursor;

use dnd_method::{
    resize::Map,
    top::{Source, Top},
};
use dnd_proto::v1::{ActivatingImage, ActivationMap, CroppedPicture, ProbedPicture, ProbedUnit, Stage, TopPicture};
use image::{GrayImage, ImageFormat};

use super::{Course, Unit};
use crate::failure::Failure;

/// The set I, highest activation first; every picture of it is kept.
#[derive(Debug, Clone)]
pub(crate) struct ActivatingImages(pub(crate) Vec<ActivatingImage>);

impl ActivatingImages {
    /// Digests of the pictures.
    pub(crate) fn digests(&self) -> Vec<String> {
        self.0.iter().map(|image| image.digest.clone()).collect()
    }
}

impl<C: Course> Unit<'_, C> {
    /// Keeps the unit's top whole pictures, with their activation maps as pictures, as evidence.
    pub(crate) async fn keep_probed(&mut self, probed: &ProbedUnit) -> Result<(), Failure> {
        let kept = self.timed(Stage::Crop, self.calls.originals(&probed.top)).await;
        for (picture, kept) in probed.top.iter().zip(kept) {
            match kept {
                Ok(()) => {
                    let map_digest = match picture.map.as_ref().and_then(grey) {
                        Some(png) => self.calls.keep(png.into()).await?,
                        None => String::new(),
                    };
                    self.result.probed.push(ProbedPicture {
                        digest: picture.digest.clone(),
                        path: picture.path.clone(),
                        activation: picture.activation,
                        map_digest,
                        seen: picture.seen,
                    });
                }
                Err(failure) if failure.is_the_items => self.warn(format!("{} was left out: {}", picture.path, failure.message)),
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }

    /// Crops the top pictures around their salient regions, and takes the K highest activating of pictures and crops.
    pub(crate) async fn augment(&mut self, probed: &ProbedUnit) -> Result<ActivatingImages, Failure> {
        let parameters = self.calls.parameters();
        let highest = &probed.top[..probed.top.len().min(parameters.probe_images as usize)];
        let cropped = self.timed(Stage::Crop, self.calls.crops(&probed.layer, probed.unit, highest)).await;
        let mut crops = Vec::new();
        for (picture, cropped) in highest.iter().zip(cropped) {
            match cropped {
                Ok(of_picture) => crops.push((picture, of_picture)),
                Err(failure) if failure.is_the_items => self.warn(format!("{} was not cropped: {}", picture.path, failure.message)),
                Err(failure) => return Err(failure),
            }
        }
        let mut top: Top<Source, ActivatingImage> = Top::new(parameters.top_images as usize);
        for picture in probed.top.iter().filter(|picture| self.result.probed.iter().any(|kept| kept.digest == picture.digest)) {
            top.offer(picture.activation, Source::Original(picture.index), || original(picture));
        }
        for (parent, crop) in crops.iter().flat_map(|(parent, crops)| crops.iter().map(move |crop| (*parent, crop))) {
            top.offer(crop.activation, Source::Crop(parent.index, crop.index), || ActivatingImage {
                digest: crop.digest.clone(),
                path: parent.path.clone(),
                r#box: Some(crop.area()),
                activation: crop.activation,
                parent_digest: parent.digest.clone(),
                ..Default::default()
            });
            self.result.crops.push(CroppedPicture {
                digest: crop.digest.clone(),
                path: parent.path.clone(),
                r#box: Some(crop.area()),
                activation: crop.activation.is_finite().then_some(crop.activation),
                threshold: crop.threshold,
                parent_digest: parent.digest.clone(),
            });
        }
        if top.not_finite() > 0 {
            self.warn(format!("{} crops have an activation that is not finite, and were not picked", top.not_finite()));
        }
        let images: Vec<ActivatingImage> = top.into_entries().into_iter().map(|entry| entry.with).collect();
        match images.len() {
            0 => return Err(Failure::new("no_images", "no picture of the probing set has a finite activation, or none could be read again")),
            n if n < parameters.top_images as usize => {
                self.warn(format!("only {n} pictures and crops for the {} highest activating images: all are used", parameters.top_images))
            }
            _ => {}
        }
        self.through(Stage::Crop).await?;
        Ok(ActivatingImages(images))
    }
}

fn original(picture: &TopPicture) -> ActivatingImage {
    ActivatingImage { digest: picture.digest.clone(), path: picture.path.clone(), activation: picture.activation, ..Default::default() }
}

/// An activation map as a grey PNG of its own size, 0 or what is lower black, the highest value white; none for a map without such a range or with values
/// that are not finite.
fn grey(map: &ActivationMap) -> Option<Vec<u8>> {
    let map = Map::new(map.height as usize, map.width as usize, map.values.clone())?;
    let (low, high) = map.values().iter().try_fold((0.0, f32::NEG_INFINITY), |(low, high): (f32, f32), &v| v.is_finite().then(|| (low.min(v), high.max(v))))?;
    if low >= high {
        return None;
    }
    let span = f64::from(high) - f64::from(low);
    let bytes = map.values().iter().map(|&v| ((f64::from(v) - f64::from(low)) / span * 255.0).round() as u8).collect();
    let (height, width) = map.size();
    let picture = GrayImage::from_raw(width as u32, height as u32, bytes)?;
    let mut png = Vec::new();
    picture.write_to(&mut Cursor::new(&mut png), ImageFormat::Png).ok()?;
    Some(png)
}
