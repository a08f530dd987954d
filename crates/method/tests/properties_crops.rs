//! What holds of every attention crop.

#![allow(clippy::unwrap_used, reason = "it is all tests")]

use dnd_method::{
    boxes::BoundingBox,
    canvas::{Canvas, Seen},
    contours::external_regions,
    crops::attention_crops,
    otsu::threshold,
    parameters::Parameters,
    resize::{HeatMap, Map, heat_map},
};
use proptest::prelude::*;

fn map_of(value: impl Strategy<Value = f32> + Clone) -> impl Strategy<Value = Map> {
    let values =
        (1_usize..12, 1_usize..12).prop_flat_map(move |(height, width)| (Just(height), Just(width), prop::collection::vec(value.clone(), height * width)));
    values.prop_map(|(height, width, values)| Map::new(height, width, values).unwrap())
}

/// Maps of a few whole numbers; they have many regions.
fn levels() -> impl Strategy<Value = Map> {
    map_of((0_i8..4).prop_map(f32::from))
}

fn map() -> impl Strategy<Value = Map> {
    prop_oneof![levels(), map_of(-1e3_f32..1e3), map_of(prop_oneof![3 => Just(0.0_f32), 1 => 0.0_f32..1.0])]
}

/// A picture's sides, and which part of it was seen: the whole, or a square of its middle.
fn picture() -> impl Strategy<Value = (u32, u32, Seen)> {
    (1_u32..200, 1_u32..200, any::<bool>()).prop_map(|(width, height, whole)| {
        let (w, h) = (f64::from(width), f64::from(height));
        let side = w.min(h) * 0.875;
        let seen = if whole { Seen::new(0.0, 0.0, w, h) } else { Seen::new((w - side) / 2.0, (h - side) / 2.0, side, side) };
        (width, height, seen.unwrap())
    })
}

fn parameters() -> impl Strategy<Value = Parameters> {
    (0_u32..6, 0.0_f32..=1.0, 0.0_f32..=1.0, 1_u32..100).prop_map(|(crops_per_image, crop_iou, canvas_iou, canvas_side)| Parameters {
        crops_per_image,
        crop_iou,
        canvas_iou,
        canvas_side,
        ..Parameters::default()
    })
}

fn inside(inner: &BoundingBox, outer: &BoundingBox) -> bool {
    let held = outer.left <= inner.left && inner.right <= outer.right && outer.top <= inner.top && inner.bottom <= outer.bottom;
    held && inner.left < inner.right && inner.top < inner.bottom
}

/// A picture mirrored from left to right.
fn mirrored(map: &Map) -> Map {
    let (height, width) = map.size();
    Map::new(height, width, map.rows().flat_map(|row| row.iter().rev().copied()).collect()).unwrap()
}

proptest! {
    #[test]
    fn crops_keep_the_rules(map in map(), (width, height, seen) in picture(), parameters in parameters()) {
        let canvas = Canvas::new(&seen, parameters.canvas_side);
        let crops = attention_crops(&map, &seen, &parameters);
        prop_assert!(crops.len() <= parameters.crops_per_image as usize);
        let picture = BoundingBox { left: 0, top: 0, right: width, bottom: height };
        for (i, crop) in crops.iter().enumerate() {
            prop_assert!(inside(&crop.on_canvas, &canvas.bounds()));
            prop_assert!(inside(&crop.in_picture, &picture));
            prop_assert!(crop.on_canvas.iou(&canvas.bounds()) < parameters.canvas_iou);
            for larger in &crops[..i] {
                prop_assert!(crop.on_canvas.iou(&larger.on_canvas) <= parameters.crop_iou);
                prop_assert!(crop.on_canvas.area() <= larger.on_canvas.area());
            }
        }
    }

    #[test]
    fn fewer_crops_are_the_first_of_more(map in map(), (_, _, seen) in picture(), parameters in parameters()) {
        let more = attention_crops(&map, &seen, &parameters);
        let fewer = Parameters { crops_per_image: parameters.crops_per_image / 2, ..parameters };
        let first = more.len().min(fewer.crops_per_image as usize);
        prop_assert_eq!(&attention_crops(&map, &seen, &fewer)[..], &more[..first]);
    }

    #[test]
    fn only_the_form_of_a_map_counts(map in levels(), (_, _, seen) in picture(), parameters in parameters(), scale in -8_i32..8, shift in -4_i8..4) {
        // None of this rounds.
        let (height, width) = map.size();
        let other = map.values().iter().map(|value| (value + f32::from(shift)) * 2_f32.powi(scale)).collect();
        let other = Map::new(height, width, other).unwrap();
        prop_assert_eq!(attention_crops(&other, &seen, &parameters), attention_crops(&map, &seen, &parameters));
    }

    #[test]
    fn a_map_that_is_not_finite_has_no_crops(map in map(), at in any::<prop::sample::Index>(), value in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY])) {
        let (height, width) = map.size();
        let mut values = map.values().to_vec();
        *at.get_mut(&mut values) = value;
        let seen = Seen::new(0.0, 0.0, 50.0, 50.0).unwrap();
        let all = Parameters { canvas_iou: 1.0, ..Parameters::default() };
        prop_assert!(attention_crops(&Map::new(height, width, values).unwrap(), &seen, &all).is_empty());
    }

    #[test]
    fn the_canvas_keeps_its_bounds(width in 0.01_f64..5000.0, height in 0.01_f64..5000.0, side in 1_u32..4096) {
        let (rows, columns) = Canvas::new(&Seen::new(0.0, 0.0, width, height).unwrap(), side).size();
        prop_assert!(rows >= 1 && columns >= 1 && rows.max(columns) <= side);
        let (longer, shorter) = (width.max(height), width.min(height));
        // As close to the true aspect as whole pixels can be.
        let exact = shorter * f64::from(side).min(longer) / longer;
        prop_assert!((f64::from(rows.min(columns)) - exact.max(1.0)).abs() <= 0.5 + 1e-6);
    }

    #[test]
    fn boxes_in_the_picture_cover_what_they_stand_for((width, height, seen) in picture(), side in 1_u32..300, a in any::<[prop::sample::Index; 4]>()) {
        let canvas = Canvas::new(&seen, side);
        let (rows, columns) = canvas.size();
        let (left, top) = (a[0].index(columns as usize) as u32, a[1].index(rows as usize) as u32);
        let right = left + 1 + a[2].index((columns - left) as usize) as u32;
        let bottom = top + 1 + a[3].index((rows - top) as usize) as u32;
        let small = canvas.in_picture(&BoundingBox { left, top, right, bottom }, &seen);
        let whole = canvas.in_picture(&canvas.bounds(), &seen);
        prop_assert!(inside(&small, &whole));
        let picture = BoundingBox { left: 0, top: 0, right: width, bottom: height };
        prop_assert!(inside(&whole, &picture));
        // Boxes side by side leave no gap and share a pixel of the picture at most.
        let beside = canvas.in_picture(&BoundingBox { left: right.min(columns - 1), right: columns, ..BoundingBox { left, top, right, bottom } }, &seen);
        prop_assert!(right == columns || small.right - 1 <= beside.left && beside.left <= small.right);
    }

    #[test]
    fn the_threshold_is_of_no_less_variance_than_any_other(bytes in prop::collection::vec(prop::sample::select(vec![0_u8, 1, 2, 9, 100, 101, 200, 255]), 1..40)) {
        let heat = HeatMap::new(1, bytes.len(), bytes.clone()).unwrap();
        let variance = |threshold: u8| {
            let (back, fore): (Vec<f64>, Vec<f64>) = bytes.iter().map(|&b| f64::from(b)).partition(|&b| b <= f64::from(threshold));
            let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
            if back.is_empty() || fore.is_empty() { -1.0 } else { back.len() as f64 * fore.len() as f64 * (mean(&back) - mean(&fore)).powi(2) }
        };
        match threshold(&heat) {
            None => prop_assert!(bytes.iter().all(|byte| *byte == bytes[0])),
            Some(best) => {
                for other in 0..=254 {
                    prop_assert!(variance(other) <= variance(best) * (1.0 + 1e-9));
                }
                prop_assert!((0..best).all(|lower| variance(lower) < variance(best)), "{} is not the lowest of the best", best);
            }
        }
    }

    #[test]
    fn mirrored_pictures_have_mirrored_regions(map in map()) {
        let (height, width) = map.size();
        let canvas = Canvas::new(&Seen::new(0.0, 0.0, width as f64, height as f64).unwrap(), 4096);
        let boxes = |map: &Map| -> Option<Vec<BoundingBox>> {
            let heat = heat_map(map, &canvas)?;
            Some(external_regions(&heat, threshold(&heat)?).into_iter().map(|region| region.bounds).collect())
        };
        let key = |b: &BoundingBox| (b.left, b.top, b.right, b.bottom);
        let turned = |b: BoundingBox| BoundingBox { left: width as u32 - b.right, right: width as u32 - b.left, ..b };
        let (mut plain, mut other) = (boxes(&map).unwrap_or_default(), boxes(&mirrored(&map)).unwrap_or_default().into_iter().map(turned).collect::<Vec<_>>());
        plain.sort_by_key(key);
        other.sort_by_key(key);
        prop_assert_eq!(plain, other);
    }

    #[test]
    fn each_region_fills_its_box_and_begins_at_its_first_pixel(map in map()) {
        let (height, width) = map.size();
        let canvas = Canvas::new(&Seen::new(0.0, 0.0, width as f64, height as f64).unwrap(), 4096);
        let Some(heat) = heat_map(&map, &canvas) else { return Ok(()) };
        let Some(threshold) = threshold(&heat) else { return Ok(()) };
        let regions = external_regions(&heat, threshold);
        prop_assert!(regions.is_sorted_by_key(|region| (region.first.1, region.first.0)));
        prop_assert!(!regions.is_empty(), "what is brightest is a region, or inside one");
        let bright = |x: u32, y: u32| heat.values()[y as usize * width + x as usize] > threshold;
        for region in regions {
            let b = region.bounds;
            prop_assert!(inside(&b, &canvas.bounds()));
            prop_assert_eq!(region.first.1, b.top);
            prop_assert!(bright(region.first.0, region.first.1));
            prop_assert!((b.top..b.bottom).any(|y| bright(b.left, y)) && (b.top..b.bottom).any(|y| bright(b.right - 1, y)));
            prop_assert!((b.left..b.right).any(|x| bright(x, b.bottom - 1)));
        }
    }
}
