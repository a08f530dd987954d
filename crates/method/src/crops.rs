//! Attention crops: which parts of an image make `D_cropped` (A.1.1).

use std::cmp::Reverse;

use crate::{
    boxes::BoundingBox,
    canvas::{Canvas, Seen},
    contours::{Region, external_regions},
    otsu::threshold,
    parameters::Parameters,
    resize::{Map, heat_map},
};

/// A salient region of an image, to be cut out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionCrop {
    /// `λ`: the region is part of what lies above this on the heat map.
    pub threshold: u8,
    /// Where it is on the canvas.
    pub on_canvas: BoundingBox,
    /// Where to cut it out of the picture: whole pixels, EXIF orientation applied.
    pub in_picture: BoundingBox,
}

/// The attention crops of one image, largest first, given the unit's activation map on it and what the network saw of the picture.
///
/// Step 1 of A.1.1 is [`threshold`] on the [`heat_map`], step 2 [`external_regions`], step 3 [`walk`]. The parameters that count are
/// `canvas_side`, `crops_per_image`, `crop_iou` and `canvas_iou`. A map that is constant or not finite has no crops. A crop is cut out of
/// the original, and never cropped again.
pub fn attention_crops(map: &Map, seen: &Seen, parameters: &Parameters) -> Vec<AttentionCrop> {
    let canvas = Canvas::new(seen, parameters.canvas_side);
    let Some(heat) = heat_map(map, &canvas) else {
        return Vec::new();
    };
    let Some(threshold) = threshold(&heat) else {
        return Vec::new();
    };
    walk(external_regions(&heat, threshold), &canvas, parameters)
        .into_iter()
        .map(|on_canvas| AttentionCrop { threshold, on_canvas, in_picture: canvas.in_picture(&on_canvas, seen) })
        .collect()
}

/// The boxes that are kept, from the largest down, at most `crops_per_image` (`α`) of them: those whose intersection over union is at
/// most `crop_iou` (`η`) with every box kept before, and less than `canvas_iou` with the canvas.
///
/// (At `η` itself the paper drops a box and its authors' code keeps it; so do we. The bound for the canvas is only in the code.) Of boxes
/// with equal area the one comes first whose region's first pixel lies lower, then further right: the order of OpenCV's contours.
pub fn walk(mut regions: Vec<Region>, canvas: &Canvas, parameters: &Parameters) -> Vec<BoundingBox> {
    regions.sort_by_key(|region| Reverse((region.bounds.area(), region.first.1, region.first.0)));
    let mut kept: Vec<BoundingBox> = Vec::new();
    for Region { bounds, .. } in regions {
        if kept.len() >= parameters.crops_per_image as usize {
            break;
        }
        let apart = kept.iter().all(|before| bounds.iou(before) <= parameters.crop_iou);
        if apart && bounds.iou(&canvas.bounds()) < parameters.canvas_iou {
            kept.push(bounds);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(left: u32, top: u32, right: u32, bottom: u32) -> Region {
        Region { first: (left, top), bounds: BoundingBox { left, top, right, bottom } }
    }

    fn kept(regions: &[Region], parameters: &Parameters) -> Vec<(u32, u32)> {
        let canvas = Canvas::new(&Seen::new(0.0, 0.0, 100.0, 100.0).unwrap(), 375);
        walk(regions.to_vec(), &canvas, parameters).iter().map(|b| (b.left, b.top)).collect()
    }

    #[test]
    fn largest_first_and_equals_from_the_bottom_right() {
        let regions = [region(0, 0, 5, 5), region(20, 0, 25, 5), region(40, 0, 46, 6), region(0, 50, 5, 55)];
        assert_eq!(kept(&regions, &Parameters::default()), [(40, 0), (0, 50), (20, 0), (0, 0)]);
        assert_eq!(kept(&regions, &Parameters { crops_per_image: 2, ..Parameters::default() }), [(40, 0), (0, 50)]);
        assert_eq!(kept(&regions, &Parameters { crops_per_image: 0, ..Parameters::default() }), []);
    }

    #[test]
    fn an_iou_of_eta_is_kept_and_one_above_is_not() {
        assert_eq!(kept(&[region(0, 0, 20, 10), region(0, 0, 10, 10)], &Parameters::default()).len(), 2);
        assert_eq!(kept(&[region(0, 0, 20, 10), region(0, 0, 11, 10)], &Parameters::default()).len(), 1);
    }

    #[test]
    fn a_box_is_held_against_all_that_were_kept_and_none_that_was_not() {
        let large = region(0, 0, 20, 10);
        assert_eq!(kept(&[large, region(6, 0, 25, 10), region(14, 0, 26, 10)], &Parameters::default()), [(0, 0), (14, 0)]);
        assert_eq!(kept(&[large, region(50, 0, 69, 10), region(1, 0, 19, 10)], &Parameters::default()), [(0, 0), (50, 0)]);
    }

    #[test]
    fn four_fifths_of_the_canvas_are_too_much() {
        assert_eq!(kept(&[region(0, 0, 100, 80)], &Parameters::default()), []);
        assert_eq!(kept(&[region(0, 0, 100, 79)], &Parameters::default()).len(), 1);
    }
}
