//! The constants of the method.

use std::{fmt::Display, ops::RangeInclusive};

use serde::{Deserialize, Serialize};

/// Every constant of the method, in the order of its steps. The default is the paper's value or, where the paper is silent, that of its
/// authors' code. Thresholds are `f32`; what is held against one is rounded to `f32` first, so that 4/5 is not less than 0.8.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Parameters {
    /// Part of the key of every draw. Default 0.
    pub seed: u64,
    /// `g`: how an activation map becomes a number (3.2). Default mean.
    pub summary: Summary,
    /// What of a transformer's tokens is the unit's activation. Default the class token.
    pub token_summary: TokenSummary,
    /// Highest activating images of `D_probe` that are cropped, 1 to 1,000. Default 10 (authors' code).
    pub probe_images: u32,
    /// `α`: attention crops of one image at most (A.1.1), 0 (the ablation of A.4.1) to 100. Default 4 (authors' code).
    pub crops_per_image: u32,
    /// `η`: intersection over union that two crops of an image may have at most (A.1.1), 0 to 1. Default 0.5 (authors' code).
    pub crop_iou: f32,
    /// Intersection over union with the whole canvas that a crop stays below, 0 to 1. Default 0.8 (authors' code).
    pub canvas_iou: f32,
    /// Longer side of the canvas at most, in pixels, 1 to 4,096. Default 375 (authors' code).
    pub canvas_side: u32,
    /// `K`: highest activating images and crops that are captioned (3.2), 1 to 1,000. Default 10 (authors' code).
    pub top_images: u32,
    /// Tokens of a caption at most, 1 to 512. Default 32 (authors' code).
    pub caption_max_new_tokens: u32,
    /// Length below which no caption ends, its start token counted, 0 to 512. Default 5 (authors' code).
    pub caption_min_length: u32,
    /// Whether captions are simplified before they are summarised (prompt 1 of A.1.2). Default true.
    pub simplify: bool,
    /// `N`: summaries that are asked for, 1 to 100. Default 5 (3.2).
    pub candidates: u32,
    /// Temperature of the language model, 0 (always the likeliest token) to 10. Default 0.3 (authors' code).
    pub temperature: f32,
    /// Tokens of an answer of the language model at most, 1 to 512. Default 32.
    pub answer_max_new_tokens: u32,
    /// `Q`: images generated of each candidate concept, 1 to 1,000. Default 10 (3.3).
    pub images_per_concept: u32,
    /// Denoising steps, 1 to 1,000. Default 50 (authors' code).
    pub num_inference_steps: u32,
    /// Scale of classifier-free guidance, 0 to 100; at most 1 means none. Default 7.5 (the diffusers library's, which the authors use).
    pub guidance_scale: f32,
    /// How candidates are scored (A.1.3). Default TopK Squared + Image Products.
    pub scoring: Scoring,
    /// `β`: ranks that TopK Squared looks at, 1 to 1,000. Default 5 (A.1.3).
    pub beta: u32,
    /// `t`: generated images of a concept that Image Products looks at (A.1.3), 1 to 1,000. Default 5.
    pub generated_top: u32,
    /// Which generated images those are. Default the concept's own top.
    pub generated_subset: GeneratedSubset,
    /// For [`GeneratedSubset::OverallTop`]: how many of all generated images are the highest, 1 to 1,000. Default 10 (authors' code).
    pub overall_top: u32,
    /// Ranked concepts that may become labels (A.5), 1 to 100. Default 3 (authors' code).
    pub labels: u32,
    /// Cosine of CLIP's text embeddings above which a concept says the same as a better one, -1 to 1. Default 0.81 (A.5).
    pub label_similarity: f32,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            seed: 0,
            summary: Summary::Mean,
            token_summary: TokenSummary::Class,
            probe_images: 10,
            crops_per_image: 4,
            crop_iou: 0.5,
            canvas_iou: 0.8,
            canvas_side: 375,
            top_images: 10,
            caption_max_new_tokens: 32,
            caption_min_length: 5,
            simplify: true,
            candidates: 5,
            temperature: 0.3,
            answer_max_new_tokens: 32,
            images_per_concept: 10,
            num_inference_steps: 50,
            guidance_scale: 7.5,
            scoring: Scoring::TopkSquaredImageProducts,
            beta: 5,
            generated_top: 5,
            generated_subset: GeneratedSubset::ConceptTop,
            overall_top: 10,
            labels: 3,
            label_similarity: 0.81,
        }
    }
}

/// `g`: how an activation map becomes a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Summary {
    /// Mean over space (the paper's choice).
    #[default]
    Mean,
    /// Largest value over space (named in A.6).
    Max,
}

/// What of a transformer's tokens is the unit's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenSummary {
    /// The class token: a number without a map, so there are no crops. (The authors' code makes pictures of class tokens, and crops by them.)
    #[default]
    Class,
    /// The patch tokens, laid out as a grid: a map like a convolution's, summarised by `g`.
    PatchMean,
}

/// Scoring functions (A.1.3). The highest score wins; equal ones go to the earlier candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// *Mean*.
    Mean,
    /// *TopK Squared*.
    TopkSquared,
    /// *Image Products*.
    ImageProducts,
    /// *TopK Squared + Image Products* (the paper's choice).
    #[default]
    TopkSquaredImageProducts,
}

/// `D_j^t`: which generated images of a concept Image Products compares with `I`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GeneratedSubset {
    /// The `t` highest activating ones of the concept (the text).
    #[default]
    ConceptTop,
    /// Those among the `overall_top` highest activating ones of all concepts; a concept without any gets −1 (the authors' code).
    OverallTop,
}

/// A parameter outside its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}; it is {low} to {high}")]
pub struct OutOfRange {
    /// Name of the field of [`Parameters`].
    pub field: &'static str,
    /// What it was set to.
    pub value: String,
    /// The least it may be.
    pub low: String,
    /// The most it may be.
    pub high: String,
}

impl Parameters {
    /// Checks every field; the error has all that are out of range, in the order of the fields.
    pub fn validate(&self) -> Result<(), Vec<OutOfRange>> {
        let wrong: Vec<OutOfRange> = [
            check("probe_images", self.probe_images, 1..=1000),
            check("crops_per_image", self.crops_per_image, 0..=100),
            check("crop_iou", self.crop_iou, 0.0..=1.0),
            check("canvas_iou", self.canvas_iou, 0.0..=1.0),
            check("canvas_side", self.canvas_side, 1..=4096),
            check("top_images", self.top_images, 1..=1000),
            check("caption_max_new_tokens", self.caption_max_new_tokens, 1..=512),
            check("caption_min_length", self.caption_min_length, 0..=512),
            check("candidates", self.candidates, 1..=100),
            check("temperature", self.temperature, 0.0..=10.0),
            check("answer_max_new_tokens", self.answer_max_new_tokens, 1..=512),
            check("images_per_concept", self.images_per_concept, 1..=1000),
            check("num_inference_steps", self.num_inference_steps, 1..=1000),
            check("guidance_scale", self.guidance_scale, 0.0..=100.0),
            check("beta", self.beta, 1..=1000),
            check("generated_top", self.generated_top, 1..=1000),
            check("overall_top", self.overall_top, 1..=1000),
            check("labels", self.labels, 1..=100),
            check("label_similarity", self.label_similarity, -1.0..=1.0),
        ]
        .into_iter()
        .flatten()
        .collect();
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }
}

/// NaN is in no range.
fn check<T: PartialOrd + Display>(field: &'static str, value: T, range: RangeInclusive<T>) -> Option<OutOfRange> {
    let wrong = || OutOfRange { field, value: value.to_string(), low: range.start().to_string(), high: range.end().to_string() };
    (!range.contains(&value)).then(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_the_papers_and_valid() {
        let expected = serde_json::json!({
            "seed": 0, "summary": "mean", "token_summary": "class", "probe_images": 10, "crops_per_image": 4, "crop_iou": 0.5,
            "canvas_iou": 0.8f32, "canvas_side": 375, "top_images": 10, "caption_max_new_tokens": 32, "caption_min_length": 5,
            "simplify": true, "candidates": 5, "temperature": 0.3f32, "answer_max_new_tokens": 32, "images_per_concept": 10,
            "num_inference_steps": 50, "guidance_scale": 7.5, "scoring": "topk_squared_image_products", "beta": 5, "generated_top": 5,
            "generated_subset": "concept_top", "overall_top": 10, "labels": 3, "label_similarity": 0.81f32,
        });
        let defaults = Parameters::default();
        assert_eq!(serde_json::to_value(&defaults).unwrap(), expected);
        assert_eq!(defaults.validate(), Ok(()));
        assert_eq!(serde_json::from_str::<Parameters>("{}").unwrap(), defaults);
        assert_eq!(serde_json::from_value::<Parameters>(expected).unwrap(), defaults);
        assert_eq!((Summary::default(), TokenSummary::default()), (defaults.summary, defaults.token_summary));
        assert_eq!((Scoring::default(), GeneratedSubset::default()), (defaults.scoring, defaults.generated_subset));
    }

    #[test]
    fn errors_name_every_field_that_is_out_of_range() {
        let parameters = Parameters { probe_images: 0, crop_iou: f32::NAN, canvas_side: 4097, label_similarity: -1.5, ..Parameters::default() };
        let wrong = parameters.validate().unwrap_err();
        assert_eq!(wrong.iter().map(|w| w.field).collect::<Vec<_>>(), ["probe_images", "crop_iou", "canvas_side", "label_similarity"]);
        assert_eq!(wrong[0].to_string(), "probe_images is 0; it is 1 to 1000");
        assert_eq!(wrong[3].to_string(), "label_similarity is -1.5; it is -1 to 1");
    }

    #[test]
    fn ranges_end_where_they_are_documented_to() {
        let counts = [
            ("probe_images", 1, 1000),
            ("crops_per_image", 0, 100),
            ("canvas_side", 1, 4096),
            ("top_images", 1, 1000),
            ("caption_max_new_tokens", 1, 512),
            ("caption_min_length", 0, 512),
            ("candidates", 1, 100),
            ("answer_max_new_tokens", 1, 512),
            ("images_per_concept", 1, 1000),
            ("num_inference_steps", 1, 1000),
            ("beta", 1, 1000),
            ("generated_top", 1, 1000),
            ("overall_top", 1, 1000),
            ("labels", 1, 100),
        ];
        for (field, low, high) in counts {
            let valid = |value: i64| value >= 0 && with(field, value.into()).validate().is_ok();
            assert_eq!([low - 1, low, high, high + 1].map(valid), [false, true, true, false], "{field}");
        }
        let reals =
            [("crop_iou", 0.0, 1.0), ("canvas_iou", 0.0, 1.0), ("temperature", 0.0, 10.0), ("guidance_scale", 0.0, 100.0), ("label_similarity", -1.0, 1.0)];
        for (field, low, high) in reals {
            let valid = |value: f64| with(field, value.into()).validate().is_ok();
            assert_eq!([low - 0.001, low, high, high + 0.001].map(valid), [false, true, true, false], "{field}");
        }
    }

    fn with(field: &str, value: serde_json::Value) -> Parameters {
        serde_json::from_value(serde_json::json!({ field: value })).unwrap()
    }

    #[test]
    fn unknown_fields_are_refused() {
        let error = serde_json::from_str::<Parameters>(r#"{"crop_iuo": 0.5}"#).unwrap_err().to_string();
        assert!(error.contains("crop_iuo"), "{error}");
    }
}
