//! Pictures against Pillow and the transformers library: goldens of tests/parity/pictures.py.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use dnd_onnx::pictures::{PictureLimits, Preprocessor, PreprocessorConfig, decode};
use image::RgbImage;
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    source: String,
    config: serde_json::Value,
    offset: usize,
    shape: [usize; 3],
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/pictures")
}

fn read(path: &Path) -> RgbImage {
    decode(&fs::read(path).unwrap(), PictureLimits::default()).unwrap()
}

/// How far values are from the library's, in levels of 1/255 before the deviation is divided out.
#[derive(Debug, Default)]
struct Difference {
    worst: f32,
    differing: usize,
    values: usize,
}

impl Difference {
    fn add(&mut self, levels: f32) {
        self.worst = self.worst.max(levels);
        self.differing += usize::from(levels > 0.01);
        self.values += 1;
    }

    fn share(&self) -> f64 {
        self.differing as f64 / self.values as f64
    }
}

/// All cases of a folder; `change` may spoil the configuration.
fn compare(folder: &Path, change: impl Fn(&mut serde_json::Value)) -> Difference {
    let cases: Vec<Case> = serde_json::from_slice(&fs::read(folder.join("cases.json")).unwrap()).unwrap();
    let tensors: Vec<f32> = fs::read(folder.join("tensors.f32")).unwrap().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let mut difference = Difference::default();
    for mut case in cases {
        change(&mut case.config);
        let config: PreprocessorConfig = serde_json::from_value(case.config).unwrap();
        let preprocessing = config.preprocessing().unwrap();
        let mut tensor = Vec::new();
        Preprocessor::new(&preprocessing).unwrap().append(&read(&folder.join(&case.source)), &mut tensor).unwrap();
        let expected = &tensors[case.offset..][..case.shape.iter().product()];
        assert_eq!(tensor.len(), expected.len(), "{}", case.source);
        let plane = case.shape[1] * case.shape[2];
        let before = difference.differing;
        for (i, (ours, theirs)) in tensor.iter().zip(expected).enumerate() {
            difference.add((ours - theirs).abs() * preprocessing.std[i / plane] * 255.0);
        }
        if difference.differing > before {
            println!("{}: {:?} differs in {} of {} values", case.source, preprocessing, difference.differing - before, tensor.len());
        }
    }
    difference
}

#[test]
fn every_kind_of_preprocessor_config_prepares_pictures_as_pillow_does() {
    let difference = compare(&goldens(), |_| {});
    assert_eq!(difference.differing, 0, "the bytes are the same, not only within a level: {difference:?}");
}

#[test]
fn another_filter_mean_or_crop_would_be_seen() {
    let changes: [fn(&mut serde_json::Value); 3] = [
        |config| config["resample"] = if config["resample"] == 3 { 1.into() } else { 3.into() },
        |config| config["image_mean"] = serde_json::json!([0.5, 0.45, 0.41]),
        |config| {
            if config.get("crop_size").is_some() {
                config["size"]["shortest_edge"] = 15.into();
            }
        },
    ];
    for change in changes {
        let difference = compare(&goldens(), change);
        assert!(difference.worst > 4.0, "{difference:?}");
    }
}

#[test]
fn files_of_every_mode_are_read_as_pillow_reads_them() {
    let sizes: std::collections::BTreeMap<String, [usize; 2]> = serde_json::from_slice(&fs::read(goldens().join("read.json")).unwrap()).unwrap();
    assert!(sizes.len() > 20);
    for (name, [height, width]) in sizes {
        let ours = read(&goldens().join(&name));
        assert_eq!((ours.height() as usize, ours.width() as usize), (height, width), "{name}");
        let theirs = fs::read(goldens().join(format!("{name}.rgb"))).unwrap();
        let worst = ours.as_raw().iter().zip(&theirs).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        // Another decoder of JPEG rounds otherwise, and interpolates subsampled colours otherwise.
        let allowed = match name.as_str() {
            "subsampled.jpg" => 40,
            name if name.ends_with(".jpg") => 3,
            _ => 0,
        };
        assert!(worst <= allowed, "{name}: differs by {worst}");
    }
}

#[test]
fn sixteen_bits_are_scaled_to_eight_and_not_clipped() {
    let ours = read(&goldens().join("sixteen-bit-grey.png"));
    let values = fs::read(goldens().join("sixteen-bit-grey.png.u16")).unwrap();
    for (pixel, value) in ours.pixels().zip(values.chunks_exact(2)) {
        let value = f32::from(u16::from_le_bytes(value.try_into().unwrap()));
        assert!(pixel.0.iter().all(|level| (f32::from(*level) - value / 257.0).abs() <= 1.0), "{pixel:?} of {value}");
    }
}

#[test]
#[ignore = "needs the folder that tests/parity/pictures.py makes of whole photographs"]
fn photographs_are_prepared_as_pillow_does() {
    let folder = PathBuf::from(env::var_os("DND_PARITY").expect("DND_PARITY names the folder")).join("pictures");
    let difference = compare(&folder, |_| {});
    let other = compare(&folder, |config| config["resample"] = if config["resample"] == 3 { 2.into() } else { 3.into() });
    assert_eq!(difference.differing, 0, "{difference:?}");
    assert!(other.worst > 8.0, "{other:?}");
    let (worst, mean, files) = jpegs(&folder);
    let rows = serde_json::json!([
        {
            "what": "pre-processing of 16 photographs (CLIP, BLIP, ViT configurations; nearest, Lanczos, bilinear, bicubic), from the same decoded pixels",
            "reference": "Pillow 13.0.0 through transformers 5.24.0",
            "measured": format!("{:.2} levels of 255 at most; {:.4} % of values differ", difference.worst, 100.0 * difference.share()),
            "limit": "1 level",
            "control": format!("another filter: {:.0} levels", other.worst),
        },
        {
            "what": format!("decoding of {files} JPEG photographs"),
            "reference": "Pillow 13.0.0",
            "measured": format!("{worst} levels at most, {mean:.3} on average"),
            "limit": "none: decoders round and interpolate otherwise",
            "control": "",
        },
    ]);
    fs::write(folder.join("measured.json"), serde_json::to_string_pretty(&rows).unwrap()).unwrap();
}

/// How far this decoder's pixels of JPEG files are from Pillow's: at most, and on average; and how many files there are.
fn jpegs(folder: &Path) -> (u8, f64, usize) {
    let (mut worst, mut sum, mut values, mut files) = (0, 0_u64, 0_u64, 0);
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "jpg")) {
        let (ours, theirs) = (read(&path), read(&path.with_extension("png")));
        assert_eq!(ours.dimensions(), theirs.dimensions());
        for (a, b) in ours.iter().zip(theirs.iter()) {
            worst = worst.max(a.abs_diff(*b));
            sum += u64::from(a.abs_diff(*b));
            values += 1;
        }
        files += 1;
    }
    (worst, sum as f64 / values as f64, files)
}
