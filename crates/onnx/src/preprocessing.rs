//! Where a network's pre-processing is written: transformers' `preprocessor_config.json`, timm's `config.json`. And whether it can be right.

use std::path::Path;

use dnd_proto::v1::{Preprocessing, Resampling, ResizeMode};
use serde::Deserialize;
use serde_json::Value;

use crate::{Error, folder::read_json, pictures::PreprocessorConfig};

/// Height and width of the input of a network that says them nowhere.
pub const USUAL_SIZE: (u32, u32) = (224, 224);
/// The files that are looked for beside a network.
const BESIDE: [&str; 2] = ["preprocessor_config.json", "config.json"];

/// The pre-processing that a file beside a network describes, and the file's name. `size` is the height and width of the network's input, where its graph
/// says them.
pub fn beside(network: &Path, size: Option<(u32, u32)>) -> Result<Option<(Preprocessing, &'static str)>, Error> {
    let folder = network.parent().unwrap_or(Path::new(""));
    for name in BESIDE {
        let file = folder.join(name);
        if file.is_file()
            && let Some(preprocessing) = read(&file, size)?
        {
            return Ok(Some((preprocessing, name)));
        }
    }
    Ok(None)
}

/// The pre-processing in a file: a `preprocessor_config.json`, or a configuration of timm's. None if the file is about something else, as a `config.json` mostly is.
pub fn read(file: &Path, size: Option<(u32, u32)>) -> Result<Option<Preprocessing>, Error> {
    let value: Value = read_json(file)?;
    let wrong = |problem: String| Error::file(file, problem);
    let of_timm = ["pretrained_cfg", "default_cfg"].iter().find_map(|key| value.get(key)).or_else(|| value.get("input_size").map(|_| &value));
    if let Some(config) = of_timm {
        let config = TimmConfig::deserialize(config).map_err(|e| wrong(format!("not a configuration of timm's: {e}")))?;
        return config.preprocessing(size).map(Some).map_err(wrong);
    }
    if !["size", "image_mean", "do_resize", "do_normalize"].iter().any(|key| value.get(key).is_some()) {
        return Ok(None);
    }
    let config = PreprocessorConfig::deserialize(&value).map_err(|e| wrong(e.to_string()))?;
    config.preprocessing().map(Some).map_err(wrong)
}

/// The part of timm's configuration of a network (`pretrained_cfg`) that says how pictures are prepared. What it leaves out has timm's own defaults.
#[derive(Debug, Deserialize)]
struct TimmConfig {
    input_size: (u32, u32, u32),
    test_input_size: Option<(u32, u32, u32)>,
    interpolation: Option<String>,
    crop_pct: Option<f64>,
    test_crop_pct: Option<f64>,
    crop_mode: Option<String>,
    mean: Option<Vec<f32>>,
    std: Option<Vec<f32>>,
}

impl TimmConfig {
    /// What timm's evaluation transform does: at the size for tests where the network is of that size.
    fn preprocessing(&self, size: Option<(u32, u32)>) -> Result<Preprocessing, String> {
        const CROP_PCT: f64 = 0.875;
        let test = self.test_input_size.filter(|(_, height, width)| size == Some((*height, *width)));
        let (channels, height, width) = test.unwrap_or(self.input_size);
        if channels != 3 {
            return Err(format!("input_size: {channels} channels; pictures have 3"));
        }
        let crop_pct = test.and(self.test_crop_pct).or(self.crop_pct).unwrap_or(CROP_PCT);
        let (resize_mode, shortest_edge) = match self.crop_mode.as_deref().unwrap_or("center") {
            "squash" if crop_pct == 1.0 => (ResizeMode::Squash, 0),
            "center" if height == width => (ResizeMode::ShortestEdge, (f64::from(height) / crop_pct).floor() as u32),
            "center" => return Err(format!("crop_mode center for an input of {height} x {width}: only squares are done as timm does them")),
            mode => return Err(format!("crop_mode {mode} with a crop_pct of {crop_pct}: center, and squash with a crop_pct of 1, can be done")),
        };
        let resampling = match self.interpolation.as_deref().unwrap_or("bicubic") {
            "nearest" => Resampling::Nearest,
            "bilinear" => Resampling::Bilinear,
            "bicubic" => Resampling::Bicubic,
            "lanczos" => Resampling::Lanczos,
            other => return Err(format!("interpolation {other}: nearest, bilinear, bicubic and lanczos are known")),
        };
        Ok(Preprocessing {
            resize_mode: resize_mode.into(),
            height,
            width,
            shortest_edge,
            resampling: resampling.into(),
            mean: self.mean.clone().unwrap_or_else(|| vec![0.485, 0.456, 0.406]),
            std: self.std.clone().unwrap_or_else(|| vec![0.229, 0.224, 0.225]),
        })
    }
}

/// What of a pre-processing can hardly be right, for the person who gave it: pixels are scaled to 0..1 before the mean is taken off, and published networks are
/// trained on values between about -3 and 3, or on 0..255.
pub fn doubts(said: &Preprocessing) -> Vec<String> {
    /// A network that takes 0..255 has a deviation of 1/255.
    const SMALLEST_STD: f32 = 0.9 / 255.0;
    let mut doubts = Vec::new();
    if said.mean.iter().any(|mean| !(0.0..=1.0).contains(mean)) {
        doubts.push(format!(
            "preprocessing: a mean of {:?} can hardly be right: pixels are scaled to 0..1 before it is subtracted; one in units of 0..255 is divided by 255",
            said.mean
        ));
    }
    if said.std.iter().any(|std| *std > 1.0) {
        doubts.push(format!(
            "preprocessing: a std of {:?} can hardly be right: pixels are scaled to 0..1 before they are divided by it; one in units of 0..255 is divided by 255",
            said.std
        ));
    }
    if said.std.iter().any(|std| *std < SMALLEST_STD) {
        doubts.push(format!("preprocessing: a std of {:?} can hardly be right: the network would see values beyond 0..255", said.std));
    }
    doubts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pictures::default_preprocessing;

    fn of(json: &str, size: Option<(u32, u32)>) -> Result<Option<Preprocessing>, Error> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), json).unwrap();
        Ok(beside(&folder.path().join("net.onnx"), size)?.map(|(preprocessing, _)| preprocessing))
    }

    #[test]
    fn timms_configuration_says_what_its_evaluation_transform_does() {
        let config = r#"{"architecture": "resnet50", "pretrained_cfg": {"input_size": [3, 224, 224], "test_input_size": [3, 288, 288], "interpolation": "bicubic",
            "crop_pct": 0.95, "test_crop_pct": 1.0, "crop_mode": "center", "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "num_classes": 1000}}"#;
        let expected = Preprocessing {
            resize_mode: ResizeMode::ShortestEdge.into(),
            height: 224,
            width: 224,
            shortest_edge: 235,
            resampling: Resampling::Bicubic.into(),
            mean: vec![0.5, 0.4, 0.3],
            std: vec![0.1, 0.2, 0.3],
        };
        assert_eq!(of(config, None).unwrap(), Some(expected.clone()));
        let test = Preprocessing { height: 288, width: 288, shortest_edge: 288, ..expected };
        assert_eq!(of(config, Some((288, 288))).unwrap(), Some(test), "a network of the size for tests is prepared for as in tests");
        // What is left out, and the older spelling.
        let usual = Preprocessing { resampling: Resampling::Bicubic.into(), ..default_preprocessing(224, 224) };
        assert_eq!(of(r#"{"default_cfg": {"input_size": [3, 224, 224], "crop_pct": null}}"#, None).unwrap(), Some(usual));
        let squash = of(r#"{"input_size": [3, 384, 256], "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}"#, None).unwrap().unwrap();
        assert_eq!((squash.resize_mode(), squash.height, squash.width, squash.resampling()), (ResizeMode::Squash, 384, 256, Resampling::Bilinear));
    }

    #[test]
    fn what_timm_does_and_is_not_done_here_is_refused_with_its_name() {
        for (config, named) in [
            (r#"{"input_size": [3, 224, 224], "crop_mode": "border"}"#, "border"),
            (r#"{"input_size": [3, 224, 224], "crop_mode": "squash", "crop_pct": 0.9}"#, "0.9"),
            (r#"{"input_size": [3, 224, 448]}"#, "224 x 448"),
            (r#"{"input_size": [1, 224, 224]}"#, "1 channels"),
            (r#"{"input_size": [3, 224, 224], "interpolation": "hamming"}"#, "hamming"),
        ] {
            let error = of(config, None).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("config.json"), "{error}");
        }
    }

    #[test]
    fn a_configuration_of_something_else_is_passed_over() {
        assert_eq!(of(r#"{"model_type": "vit", "image_size": 224}"#, None).unwrap(), None);
    }

    #[test]
    fn a_mean_in_other_units_and_a_deviation_out_of_all_bounds_are_doubted() {
        let usual = default_preprocessing(224, 224);
        let with = |mean: [f32; 3], std: [f32; 3]| doubts(&Preprocessing { mean: mean.to_vec(), std: std.to_vec(), ..usual.clone() });
        assert!(doubts(&usual).is_empty());
        for right in [([0.5; 3], [0.5; 3]), ([0.0; 3], [1.0; 3]), ([0.0; 3], [1.0 / 255.0; 3]), ([0.4, 0.46, 0.48], [1.0 / 255.0; 3])] {
            assert!(with(right.0, right.1).is_empty(), "{right:?}");
        }
        let bytes = with([123.7, 116.3, 103.5], [58.4, 57.1, 57.4]);
        assert!(bytes.len() == 2 && bytes[0].contains("mean") && bytes[1].contains("std"), "{bytes:?}");
        assert!(with([0.485, 0.456, 0.406], [0.0009, 0.0009, 0.0009])[0].contains("std"));
        assert_eq!(with([-0.5, 0.5, 0.5], [0.5; 3]).len(), 1);
    }
}
