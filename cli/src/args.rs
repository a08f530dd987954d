//! Arguments that several commands share.

use std::path::PathBuf;

use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser},
};
use dnd_activation::ActivationArgs;
use dnd_captioner::CaptionerArgs;
use dnd_mesh::{args::TlsArgs, parameters::check};
use dnd_method::parameters::{GeneratedSubset, Parameters, Scoring, Summary, TokenSummary};
use dnd_onnx::runtime::EngineArgs;
use dnd_orchestrator::{DataArgs, OrchestratorArgs};
use dnd_proto::v1::{DataFormat, FixedInput, Preprocessing, Resampling, ResizeMode, TargetOptions};
use dnd_summarizer::LlmArgs;
use serde::de::{DeserializeOwned, IntoDeserializer, value};

use crate::{card::CardArgs, problem::Problem};

/// Which network, and how pictures become its input.
#[derive(Debug, Clone, Args)]
pub(crate) struct TargetArgs {
    /// The network, an ONNX file
    #[arg(long, value_name = "NET.onnx")]
    pub(crate) target: PathBuf,
    #[command(flatten)]
    pub(crate) flags: TargetFlags,
}

/// What is said of a network beside its file.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "The network's input and layers (defaults come from its file and those beside it)")]
pub(crate) struct TargetFlags {
    /// How pictures become the network's input: a preprocessor_config.json, or timm's config.json; by default the one beside the network, else ImageNet's usual one
    #[arg(long, value_name = "FILE")]
    pub(crate) preprocessing: Option<PathBuf>,
    /// Height and width of the input in pixels, such as 224x224
    #[arg(long, value_name = "HEIGHTxWIDTH", value_parser = sides)]
    input_size: Option<(u32, u32)>,
    /// Bring pictures to the input's size whatever their aspect
    #[arg(long, conflicts_with = "shortest_edge")]
    squash: bool,
    /// Bring the shorter side of pictures to so many pixels, then cut out the centre
    #[arg(long, value_name = "PIXELS")]
    shortest_edge: Option<u32>,
    /// The filter of that resizing
    #[arg(long, value_parser = PossibleValuesParser::new(["nearest", "bilinear", "bicubic", "lanczos"]))]
    resampling: Option<String>,
    /// Subtracted from the channels, which are scaled to 0..1 before
    #[arg(long, value_name = "R,G,B", value_delimiter = ',', allow_negative_numbers = true)]
    mean: Option<Vec<f32>>,
    /// What the channels are divided by after that
    #[arg(long, value_name = "R,G,B", value_delimiter = ',')]
    std: Option<Vec<f32>>,
    /// An input other than the picture, and the value that it always has; more than one number for more than one value
    #[arg(long, value_name = "NAME=NUMBER[,NUMBER]", value_parser = fixed_input)]
    fixed_input: Vec<FixedInput>,
    /// Order of the axes of the picture and of feature maps, where the graph does not tell it
    #[arg(long, value_parser = PossibleValuesParser::new(["channels_first", "channels_last"]))]
    data_format: Option<String>,
    /// Tokens before the patches of a transformer's layers, where their grid does not tell it
    #[arg(long, value_name = "COUNT")]
    prefix_tokens: Option<u32>,
}

impl TargetFlags {
    /// What is said of the graph.
    pub(crate) fn options(&self) -> Option<TargetOptions> {
        let data_format = match self.data_format.as_deref() {
            None => DataFormat::Unspecified,
            Some("channels_last") => DataFormat::ChannelsLast,
            Some(_) => DataFormat::ChannelsFirst,
        };
        let options = TargetOptions { fixed_inputs: self.fixed_input.clone(), data_format: data_format.into(), prefix_tokens: self.prefix_tokens };
        (options != TargetOptions::default()).then_some(options)
    }

    /// Whether anything is said of the pre-processing.
    pub(crate) fn any_preprocessing(&self) -> bool {
        let Self { preprocessing, input_size, squash, shortest_edge, resampling, mean, std, .. } = self;
        preprocessing.is_some() || input_size.is_some() || *squash || shortest_edge.is_some() || resampling.is_some() || mean.is_some() || std.is_some()
    }

    /// A pre-processing with what is said of it put in its place.
    pub(crate) fn change(&self, base: Preprocessing) -> Preprocessing {
        let resampling = |name: &str| match name {
            "nearest" => Resampling::Nearest,
            "bicubic" => Resampling::Bicubic,
            "lanczos" => Resampling::Lanczos,
            _ => Resampling::Bilinear,
        };
        let (height, width) = self.input_size.unwrap_or((base.height, base.width));
        let (resize_mode, shortest_edge) = match (self.squash, self.shortest_edge) {
            (true, _) => (ResizeMode::Squash, 0),
            (false, Some(edge)) => (ResizeMode::ShortestEdge, edge),
            (false, None) => (base.resize_mode(), base.shortest_edge),
        };
        Preprocessing {
            resize_mode: resize_mode.into(),
            height,
            width,
            shortest_edge,
            resampling: self.resampling.as_deref().map_or(base.resampling, |name| resampling(name).into()),
            mean: self.mean.clone().unwrap_or(base.mean),
            std: self.std.clone().unwrap_or(base.std),
        }
    }
}

/// Height and width as a person writes them, such as `224x224`.
fn sides(text: &str) -> Result<(u32, u32), String> {
    let sides = text.split_once('x').and_then(|(height, width)| Some((height.trim().parse().ok()?, width.trim().parse().ok()?)));
    sides.ok_or_else(|| format!("{text:?} is no height and width, such as 224x224"))
}

/// An input and its value, such as `training=0`.
fn fixed_input(text: &str) -> Result<FixedInput, String> {
    let number = |text: &str| match text.trim() {
        "true" => Some(1.0),
        "false" => Some(0.0),
        number => number.parse().ok(),
    };
    let parsed = text.rsplit_once('=').and_then(|(name, values)| Some((name, values.split(',').map(number).collect::<Option<Vec<f64>>>()?)));
    let (name, values) = parsed.ok_or_else(|| format!("{text:?} is no input with a value, such as training=0"))?;
    Ok(FixedInput { name: name.to_owned(), values, shape: Vec::new() })
}

/// Where the mesh is: in this process, or behind an endpoint.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct MeshArgs {
    /// Folder of the model suite; needed unless --endpoint is given
    #[arg(long, env = "DND_MODELS", value_name = "DIR")]
    pub(crate) models: Option<PathBuf>,
    /// An orchestrator to ask, such as http://localhost:50051, whatever --models and --llm-url say; by default the mesh runs in this process
    #[arg(long, env = "DND_ENDPOINT", value_name = "URL")]
    pub(crate) endpoint: Option<String>,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten)]
    pub(crate) card: CardArgs,
    #[command(flatten)]
    pub(crate) activation: ActivationArgs,
    #[command(flatten)]
    pub(crate) captioner: CaptionerArgs,
    #[command(flatten)]
    pub(crate) orchestrator: OrchestratorArgs,
    #[command(flatten)]
    pub(crate) llm: LlmArgs,
    /// File with the token that calls of the endpoint show
    #[arg(long, env = "DND_TOKEN_FILE", value_name = "FILE", help_heading = "Certificates and tokens")]
    pub(crate) token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
}

/// Where jobs are: behind an endpoint, or in a data folder.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct JobsArgs {
    /// An orchestrator to ask, such as http://localhost:50051; by default the jobs are looked for in --data
    #[arg(long, env = "DND_ENDPOINT", value_name = "URL")]
    pub(crate) endpoint: Option<String>,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// File with the token that calls of the endpoint show
    #[arg(long, env = "DND_TOKEN_FILE", value_name = "FILE", help_heading = "Certificates and tokens")]
    pub(crate) token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
}

/// The method's constants; those that are not set have the paper's values.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "The method's constants (defaults are the paper's)")]
pub(crate) struct Settings {
    /// Seed of every draw [default: 0]
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// g: how an activation map becomes a number [default: mean]
    #[arg(long, value_parser = named::<Summary>(&["mean", "max"]))]
    pub(crate) summary: Option<Summary>,
    /// Which token of a transformer's layer counts [default: class]
    #[arg(long, value_parser = named::<TokenSummary>(&["class", "patch_mean"]))]
    pub(crate) token_summary: Option<TokenSummary>,
    /// Highest activating pictures that are cropped [default: 10]
    #[arg(long, value_name = "COUNT")]
    pub(crate) probe_images: Option<u32>,
    /// alpha: attention crops of one picture at most; 0 for none [default: 4]
    #[arg(long, value_name = "COUNT")]
    pub(crate) crops_per_image: Option<u32>,
    /// eta: IoU that two crops of a picture may have at most [default: 0.5]
    #[arg(long, value_name = "IOU")]
    pub(crate) crop_iou: Option<f32>,
    /// IoU with the whole canvas that a crop must stay below [default: 0.8]
    #[arg(long, value_name = "IOU")]
    pub(crate) canvas_iou: Option<f32>,
    /// Longer side of the canvas that maps are thresholded on [default: 375]
    #[arg(long, value_name = "PIXELS")]
    pub(crate) canvas_side: Option<u32>,
    /// K: highest activating pictures and crops that are captioned [default: 10]
    #[arg(long, value_name = "COUNT")]
    pub(crate) top_images: Option<u32>,
    /// Tokens of a caption at most [default: 32]
    #[arg(long, value_name = "COUNT")]
    pub(crate) caption_max_new_tokens: Option<u32>,
    /// Length below which a caption may not end, the start token counted [default: 5]
    #[arg(long, value_name = "COUNT")]
    pub(crate) caption_min_length: Option<u32>,
    /// Whether captions are simplified before they are summarised [default: true]
    #[arg(long, value_name = "BOOL")]
    pub(crate) simplify: Option<bool>,
    /// N: summaries that are asked for [default: 5]
    #[arg(long, value_name = "COUNT")]
    pub(crate) candidates: Option<u32>,
    /// Temperature of the language model [default: 0.3]
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// Tokens of an answer at most [default: 32]
    #[arg(long, value_name = "COUNT")]
    pub(crate) answer_max_new_tokens: Option<u32>,
    /// Q: pictures drawn of each candidate [default: 10]
    #[arg(long, value_name = "COUNT")]
    pub(crate) images_per_concept: Option<u32>,
    /// Denoising steps of a drawn picture [default: 50]
    #[arg(long, value_name = "COUNT")]
    pub(crate) num_inference_steps: Option<u32>,
    /// Scale of classifier-free guidance; 1 and below for none [default: 7.5]
    #[arg(long, value_name = "SCALE")]
    pub(crate) guidance_scale: Option<f32>,
    /// The scoring function [default: topk_squared_image_products]
    #[arg(long, value_parser = named::<Scoring>(&["mean", "topk_squared", "image_products", "topk_squared_image_products"]))]
    pub(crate) scoring: Option<Scoring>,
    /// beta: ranks that topk_squared looks at [default: 5]
    #[arg(long, value_name = "COUNT")]
    pub(crate) beta: Option<u32>,
    /// t: drawn pictures of a concept that image_products looks at [default: 5]
    #[arg(long, value_name = "COUNT")]
    pub(crate) generated_top: Option<u32>,
    /// Which those are: the paper's text, or the authors' code [default: concept_top]
    #[arg(long, value_parser = named::<GeneratedSubset>(&["concept_top", "overall_top"]))]
    pub(crate) generated_subset: Option<GeneratedSubset>,
    /// For overall_top: how many of all drawn pictures count [default: 10]
    #[arg(long, value_name = "COUNT")]
    pub(crate) overall_top: Option<u32>,
    /// Labels that a unit may have [default: 3]
    #[arg(long, value_name = "COUNT")]
    pub(crate) labels: Option<u32>,
    /// CLIP text cosine above which a label is dropped for a better one [default: 0.81]
    #[arg(long, value_name = "COSINE")]
    pub(crate) label_similarity: Option<f32>,
}

/// A value by its name.
fn named<T: DeserializeOwned + Clone + Send + Sync + 'static>(names: &'static [&'static str]) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(names).try_map(|name| T::deserialize(IntoDeserializer::<value::Error>::into_deserializer(name.as_str())))
}

impl Settings {
    /// The constants: those that are set, else the paper's.
    pub(crate) fn parameters(&self) -> Result<Parameters, Problem> {
        let paper = Parameters::default();
        let parameters = Parameters {
            seed: self.seed.unwrap_or(paper.seed),
            summary: self.summary.unwrap_or(paper.summary),
            token_summary: self.token_summary.unwrap_or(paper.token_summary),
            probe_images: self.probe_images.unwrap_or(paper.probe_images),
            crops_per_image: self.crops_per_image.unwrap_or(paper.crops_per_image),
            crop_iou: self.crop_iou.unwrap_or(paper.crop_iou),
            canvas_iou: self.canvas_iou.unwrap_or(paper.canvas_iou),
            canvas_side: self.canvas_side.unwrap_or(paper.canvas_side),
            top_images: self.top_images.unwrap_or(paper.top_images),
            caption_max_new_tokens: self.caption_max_new_tokens.unwrap_or(paper.caption_max_new_tokens),
            caption_min_length: self.caption_min_length.unwrap_or(paper.caption_min_length),
            simplify: self.simplify.unwrap_or(paper.simplify),
            candidates: self.candidates.unwrap_or(paper.candidates),
            temperature: self.temperature.unwrap_or(paper.temperature),
            answer_max_new_tokens: self.answer_max_new_tokens.unwrap_or(paper.answer_max_new_tokens),
            images_per_concept: self.images_per_concept.unwrap_or(paper.images_per_concept),
            num_inference_steps: self.num_inference_steps.unwrap_or(paper.num_inference_steps),
            guidance_scale: self.guidance_scale.unwrap_or(paper.guidance_scale),
            scoring: self.scoring.unwrap_or(paper.scoring),
            beta: self.beta.unwrap_or(paper.beta),
            generated_top: self.generated_top.unwrap_or(paper.generated_top),
            generated_subset: self.generated_subset.unwrap_or(paper.generated_subset),
            overall_top: self.overall_top.unwrap_or(paper.overall_top),
            labels: self.labels.unwrap_or(paper.labels),
            label_similarity: self.label_similarity.unwrap_or(paper.label_similarity),
        };
        Ok(check(parameters, "")?)
    }
}

/// Units as a person writes them, such as `0-9,17`.
pub(crate) fn units(text: &str) -> Result<Vec<u32>, String> {
    let wrong = |part: &str| format!("{part:?} is no unit or range of units; units look like 0-9,17");
    let mut units = Vec::new();
    for part in text.split(',').map(str::trim) {
        let number = |text: &str| text.trim().parse::<u32>().map_err(|_| wrong(part));
        match part.split_once('-') {
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                if first > last || last - first > 1_000_000 {
                    return Err(wrong(part));
                }
                units.extend(first..=last);
            }
            None => units.push(number(part)?),
        }
    }
    Ok(units)
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, Command, FromArgMatches as _};

    use super::*;

    fn settings(flags: &[&str]) -> Result<Settings, clap::Error> {
        let command = Settings::augment_args(Command::new("dnd"));
        Settings::from_arg_matches(&command.try_get_matches_from([&["dnd"], flags].concat())?)
    }

    #[test]
    fn units_are_numbers_and_ranges() {
        assert_eq!(units("0-3,17, 5").unwrap(), [0, 1, 2, 3, 17, 5]);
        for wrong in ["", "a", "3-1", "1-", "-2", "1,,2"] {
            assert!(units(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn an_input_has_a_name_and_numbers() {
        let fixed = fixed_input("scale:0=0.5,-2").unwrap();
        assert_eq!((fixed.name.as_str(), fixed.values), ("scale:0", vec![0.5, -2.0]));
        assert_eq!(fixed_input("training=false").unwrap().values, [0.0]);
        assert_eq!(sides("224x192").unwrap(), (224, 192));
        for wrong in ["training", "training=", "training=on"] {
            assert!(fixed_input(wrong).is_err(), "{wrong:?}");
        }
        assert!(sides("224").is_err());
    }

    #[test]
    fn every_constant_of_the_method_is_a_flag_with_the_same_name() {
        let all = serde_json::to_value(Parameters::default()).unwrap();
        for (name, value) in all.as_object().unwrap() {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            settings(&[&format!("--{}", name.replace('_', "-")), &value]).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
}
