//! The method's constants between the wire and the method.

use dnd_method::parameters::{GeneratedSubset, Parameters, Scoring, Summary, TokenSummary};
use dnd_proto::v1 as proto;

use crate::Fault;

/// The constants of a request, defaults filled in and ranges checked; the fault names the field.
pub fn from_request(said: Option<&proto::Parameters>) -> Result<Parameters, Fault> {
    let nothing = proto::Parameters::default();
    let said = said.unwrap_or(&nothing);
    let usual = Parameters::default();
    let parameters = Parameters {
        seed: said.seed.unwrap_or(usual.seed),
        summary: summary_from(said.summary()),
        token_summary: token_summary_from(said.token_summary()),
        probe_images: said.probe_images.unwrap_or(usual.probe_images),
        crops_per_image: said.crops_per_image.unwrap_or(usual.crops_per_image),
        crop_iou: said.crop_iou.unwrap_or(usual.crop_iou),
        canvas_iou: said.canvas_iou.unwrap_or(usual.canvas_iou),
        canvas_side: said.canvas_side.unwrap_or(usual.canvas_side),
        top_images: said.top_images.unwrap_or(usual.top_images),
        caption_max_new_tokens: said.caption_max_new_tokens.unwrap_or(usual.caption_max_new_tokens),
        caption_min_length: said.caption_min_length.unwrap_or(usual.caption_min_length),
        simplify: said.simplify.unwrap_or(usual.simplify),
        candidates: said.candidates.unwrap_or(usual.candidates),
        temperature: said.temperature.unwrap_or(usual.temperature),
        answer_max_new_tokens: said.answer_max_new_tokens.unwrap_or(usual.answer_max_new_tokens),
        images_per_concept: said.images_per_concept.unwrap_or(usual.images_per_concept),
        num_inference_steps: said.num_inference_steps.unwrap_or(usual.num_inference_steps),
        guidance_scale: said.guidance_scale.unwrap_or(usual.guidance_scale),
        scoring: match said.scoring() {
            proto::Scoring::Unspecified => usual.scoring,
            proto::Scoring::Mean => Scoring::Mean,
            proto::Scoring::TopkSquared => Scoring::TopkSquared,
            proto::Scoring::ImageProducts => Scoring::ImageProducts,
            proto::Scoring::TopkSquaredImageProducts => Scoring::TopkSquaredImageProducts,
        },
        beta: said.beta.unwrap_or(usual.beta),
        generated_top: said.generated_top.unwrap_or(usual.generated_top),
        generated_subset: match said.generated_subset() {
            proto::GeneratedSubset::Unspecified => usual.generated_subset,
            proto::GeneratedSubset::ConceptTop => GeneratedSubset::ConceptTop,
            proto::GeneratedSubset::OverallTop => GeneratedSubset::OverallTop,
        },
        overall_top: said.overall_top.unwrap_or(usual.overall_top),
        labels: said.labels.unwrap_or(usual.labels),
        label_similarity: said.label_similarity.unwrap_or(usual.label_similarity),
    };
    check(parameters, "parameters.")
}

/// The constants if each is in its range; the fault names the first that is not, its name after `prefix`.
pub fn check(parameters: Parameters, prefix: &str) -> Result<Parameters, Fault> {
    let wrong = parameters.validate().err().and_then(|wrong| wrong.into_iter().next());
    match wrong {
        None => Ok(parameters),
        Some(wrong) => Err(Fault::field(format!("{prefix}{}", wrong.field), wrong.to_string())),
    }
}

/// The constants as messages have them, every field set.
pub fn to_message(parameters: &Parameters) -> proto::Parameters {
    proto::Parameters {
        seed: Some(parameters.seed),
        summary: summary(parameters).into(),
        token_summary: token_summary(parameters).into(),
        probe_images: Some(parameters.probe_images),
        crops_per_image: Some(parameters.crops_per_image),
        crop_iou: Some(parameters.crop_iou),
        canvas_iou: Some(parameters.canvas_iou),
        canvas_side: Some(parameters.canvas_side),
        top_images: Some(parameters.top_images),
        caption_max_new_tokens: Some(parameters.caption_max_new_tokens),
        caption_min_length: Some(parameters.caption_min_length),
        simplify: Some(parameters.simplify),
        candidates: Some(parameters.candidates),
        temperature: Some(parameters.temperature),
        answer_max_new_tokens: Some(parameters.answer_max_new_tokens),
        images_per_concept: Some(parameters.images_per_concept),
        num_inference_steps: Some(parameters.num_inference_steps),
        guidance_scale: Some(parameters.guidance_scale),
        scoring: match parameters.scoring {
            Scoring::Mean => proto::Scoring::Mean,
            Scoring::TopkSquared => proto::Scoring::TopkSquared,
            Scoring::ImageProducts => proto::Scoring::ImageProducts,
            Scoring::TopkSquaredImageProducts => proto::Scoring::TopkSquaredImageProducts,
        }
        .into(),
        beta: Some(parameters.beta),
        generated_top: Some(parameters.generated_top),
        generated_subset: match parameters.generated_subset {
            GeneratedSubset::ConceptTop => proto::GeneratedSubset::ConceptTop,
            GeneratedSubset::OverallTop => proto::GeneratedSubset::OverallTop,
        }
        .into(),
        overall_top: Some(parameters.overall_top),
        labels: Some(parameters.labels),
        label_similarity: Some(parameters.label_similarity),
    }
}

/// `g` as messages have it; unset means the paper's.
pub fn summary_from(said: proto::Summary) -> Summary {
    match said {
        proto::Summary::Unspecified => Summary::default(),
        proto::Summary::Mean => Summary::Mean,
        proto::Summary::Max => Summary::Max,
    }
}

/// Which token counts, as messages have it; unset means the class token.
pub fn token_summary_from(said: proto::TokenSummary) -> TokenSummary {
    match said {
        proto::TokenSummary::Unspecified => TokenSummary::default(),
        proto::TokenSummary::Class => TokenSummary::Class,
        proto::TokenSummary::PatchMean => TokenSummary::PatchMean,
    }
}

/// `g` for a message.
pub fn summary(parameters: &Parameters) -> proto::Summary {
    match parameters.summary {
        Summary::Mean => proto::Summary::Mean,
        Summary::Max => proto::Summary::Max,
    }
}

/// Which token counts, for a message.
pub fn token_summary(parameters: &Parameters) -> proto::TokenSummary {
    match parameters.token_summary {
        TokenSummary::Class => proto::TokenSummary::Class,
        TokenSummary::PatchMean => proto::TokenSummary::PatchMean,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_resolved_resolves_to_itself() {
        let parameters = Parameters {
            seed: 7,
            simplify: false,
            scoring: Scoring::Mean,
            generated_subset: GeneratedSubset::OverallTop,
            summary: Summary::Max,
            ..Parameters::default()
        };
        assert_eq!(from_request(Some(&to_message(&parameters))).unwrap(), parameters);
        assert_eq!(from_request(None).unwrap(), Parameters::default());
    }

    #[test]
    fn a_value_out_of_its_range_is_refused_by_name() {
        let fault = from_request(Some(&proto::Parameters { crop_iou: Some(f32::NAN), ..Default::default() })).unwrap_err();
        assert!(fault.to_string().contains("crop_iou"), "{fault}");
    }
}
