//! Attention crops against OpenCV's (`goldens/make.py`).

#![allow(clippy::unwrap_used, reason = "it is all tests")]

mod common;

use std::{fmt::Write as _, sync::LazyLock};

use common::goldens;
use dnd_method::{
    boxes::BoundingBox,
    canvas::{Canvas, Seen},
    contours::{Region, external_regions},
    crops::{attention_crops, walk},
    otsu::threshold,
    parameters::Parameters,
    resize::{HeatMap, Map, heat_map},
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

#[derive(Deserialize)]
struct Case {
    name: String,
    map: (usize, usize),
    values: Vec<f32>,
    /// Height and width.
    picture: (u32, u32),
    seen: [f64; 4],
    parameters: Parameters,
    canvas: (u32, u32),
    sha256: Option<String>,
    /// Places, and OpenCV's byte there, where its value lies so close to the middle of two bytes that it may be either.
    #[serde(default)]
    near: Vec<usize>,
    otsu: Option<u8>,
    #[serde(default)]
    regions: Vec<[u32; 6]>,
    #[serde(default)]
    kept: Vec<[u32; 4]>,
    #[serde(default)]
    in_picture: Vec<[u32; 4]>,
}

impl Case {
    fn map(&self) -> Map {
        Map::new(self.map.0, self.map.1, self.values.clone()).unwrap()
    }

    fn seen(&self) -> Seen {
        let [left, top, width, height] = self.seen;
        Seen::new(left, top, width, height).unwrap()
    }

    /// The crate's heat map, and OpenCV's own; both are none if the map is constant.
    fn heat_maps(&self) -> Option<(HeatMap, HeatMap)> {
        let canvas = Canvas::new(&self.seen(), self.parameters.canvas_side);
        assert_eq!(canvas.size(), self.canvas, "{}", self.name);
        let ours = heat_map(&self.map(), &canvas);
        assert_eq!(ours.is_some(), self.sha256.is_some(), "{}", self.name);
        let ours = ours?;
        let mut bytes = ours.values().to_vec();
        for pair in self.near.chunks_exact(2) {
            let byte = u8::try_from(pair[1]).unwrap();
            assert!(bytes[pair[0]].abs_diff(byte) <= 1, "{} at {}", self.name, pair[0]);
            bytes[pair[0]] = byte;
        }
        let (height, width) = ours.size();
        Some((ours, HeatMap::new(height, width, bytes).unwrap()))
    }
}

/// The cases, and the heat maps of each.
type Cases = Vec<(Case, Option<(HeatMap, HeatMap)>)>;

static CASES: LazyLock<Cases> = LazyLock::new(|| {
    let cases: Vec<Case> = goldens("crops.json");
    assert!(cases.len() >= 300);
    cases
        .into_iter()
        .map(|case| {
            let heat_maps = case.heat_maps();
            (case, heat_maps)
        })
        .collect()
});

fn sides(b: &BoundingBox) -> [u32; 4] {
    [b.left, b.top, b.right, b.bottom]
}

#[test]
fn heat_maps_are_opencvs_bytes() {
    let (mut pixels, mut doubtful, mut different) = (0, 0, 0);
    for (case, heat_maps) in CASES.iter() {
        let Some((ours, theirs)) = heat_maps else {
            continue;
        };
        let digest = Sha256::digest(theirs.values()).iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").unwrap();
            text
        });
        assert_eq!(Some(&digest), case.sha256.as_ref(), "{}: a byte differs where rounding can't explain it", case.name);
        pixels += ours.values().len();
        doubtful += case.near.len() / 2;
        different += ours.values().iter().zip(theirs.values()).filter(|(a, b)| a != b).count();
    }
    println!("{different} of {pixels} bytes differ from OpenCV's; {doubtful} might");
    assert!(pixels > 4_000_000 && doubtful * 500 < pixels, "{doubtful} of {pixels} bytes are not compared");
    assert!(different * 4000 < pixels, "{different} of {pixels} bytes differ");
}

#[test]
fn thresholds_are_the_lowest_of_the_best() {
    let mut found = 0;
    for (case, heat_maps) in CASES.iter() {
        let Some((_, heat)) = heat_maps else { continue };
        assert_eq!(threshold(heat), case.otsu, "{}", case.name);
        found += usize::from(case.otsu.is_some());
    }
    assert!(found >= 300);
}

#[test]
fn regions_are_opencvs_external_contours() {
    let mut found = 0;
    for (case, heat_maps) in CASES.iter() {
        let Some(((_, heat), otsu)) = heat_maps.as_ref().zip(case.otsu) else {
            continue;
        };
        let regions: Vec<[u32; 6]> =
            external_regions(heat, otsu).into_iter().map(|Region { first: (x, y), bounds: b }| [x, y, b.left, b.top, b.right, b.bottom]).collect();
        assert_eq!(regions, case.regions, "{}", case.name);
        found += regions.len();
    }
    assert!(found >= 1500, "{found}");
}

#[test]
fn the_walk_keeps_the_same_boxes() {
    let mut lengths = [0; 41];
    for (case, _) in CASES.iter() {
        let canvas = Canvas::new(&case.seen(), case.parameters.canvas_side);
        let bounds = |[left, top, right, bottom]: [u32; 4]| BoundingBox { left, top, right, bottom };
        let regions = case.regions.iter().map(|&[x, y, left, top, right, bottom]| Region { first: (x, y), bounds: bounds([left, top, right, bottom]) });
        let kept = walk(regions.collect(), &canvas, &case.parameters);
        assert_eq!(kept.iter().map(sides).collect::<Vec<_>>(), case.kept, "{}", case.name);
        let in_picture: Vec<[u32; 4]> = kept.iter().map(|kept| sides(&canvas.in_picture(kept, &case.seen()))).collect();
        assert_eq!(in_picture, case.in_picture, "{}", case.name);
        let (height, width) = case.picture;
        assert!(in_picture.iter().all(|[_, _, right, bottom]| *right <= width && *bottom <= height), "{}", case.name);
        lengths[kept.len()] += 1;
    }
    assert!(lengths[..5].iter().all(|&cases| cases >= 10), "cases with 0 to 4 crops: {lengths:?}");
}

#[test]
fn from_map_to_crops_in_one_go() {
    let mut other = 0;
    for (case, heat_maps) in CASES.iter() {
        let crops = attention_crops(&case.map(), &case.seen(), &case.parameters);
        let same = crops.iter().map(|crop| sides(&crop.on_canvas)).eq(case.kept.iter().copied())
            && crops.iter().map(|crop| sides(&crop.in_picture)).eq(case.in_picture.iter().copied())
            && crops.iter().all(|crop| Some(crop.threshold) == case.otsu);
        // A byte that is rounded the other way may move a threshold or an outline.
        assert!(same || heat_maps.as_ref().is_some_and(|(ours, theirs)| ours != theirs), "{}", case.name);
        other += usize::from(!same);
    }
    println!("{other} cases have other crops for a byte that is rounded the other way");
    assert!(other <= 3, "{other}");
}
