//! `dnd models check`: what a folder is, what is missing in it, and what of it would be refused and why.

use std::{
    fs,
    path::{Path, PathBuf},
};

use dnd_mesh::program::ExitCode;

use dnd_captioner::{Captioner, CaptionerArgs};
use dnd_clip::Clip;
use dnd_diffusion::Diffusion;
use dnd_onnx::{Error, folder, graph::Network, runtime::EngineArgs, tokenizer::Tokenizer};
use dnd_proto::v1::Model;
use dnd_summarizer::Summarizer;
use serde::Deserialize;

use crate::{
    local::{MODELS, Suite},
    problem::Problem,
};

/// What a model is for.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Captioner,
    Summarizer,
    Diffusion,
    Clip,
}

/// A file that a model needs: what it is, and the names that it may have. A star stands for whatever publishers add there, such as `_fp16`.
type Need = (&'static str, &'static [&'static str]);

const CONFIG: Need = ("configuration", &["config.json"]);
const PICTURES: Need = ("picture pre-processing", &["preprocessor_config.json"]);
const TOKENIZER: Need = ("tokenizer", &["tokenizer.json"]);
const TOKENIZER_CONFIG: Need = ("tokenizer configuration", &["tokenizer_config.json"]);

impl Kind {
    fn of_suite(name: &str) -> Self {
        match name {
            "captioner" => Self::Captioner,
            "summarizer" => Self::Summarizer,
            "diffusion" => Self::Diffusion,
            _ => Self::Clip,
        }
    }

    /// What a folder looks like.
    fn of(folder: &Path) -> Option<Self> {
        let there = |name: &str| folder.join(name).exists();
        if ["model_index.json", "unet", "vae_decoder"].into_iter().any(there) {
            return Some(Self::Diffusion);
        }
        if there("genai_config.json") {
            return Some(Self::Summarizer);
        }
        let is = |need: &'static [&'static str]| find(folder, need).is_some();
        match model_type(folder).as_deref() {
            Some("clip") => Some(Self::Clip),
            Some("blip" | "blip-2" | "vision-encoder-decoder") => Some(Self::Captioner),
            Some(_) => Some(Self::Summarizer),
            None if is(&["onnx/text_model*.onnx", "text_model*.onnx"]) => Some(Self::Clip),
            None if is(&["onnx/text_decoder_model*.onnx", "onnx/decoder_model*.onnx", "text_decoder_model*.onnx"]) => Some(Self::Captioner),
            None if is(&["onnx/model*.onnx", "model*.onnx"]) && is(TOKENIZER.1) => Some(Self::Summarizer),
            None => None,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Captioner => "a captioner",
            Self::Summarizer => "a language model",
            Self::Diffusion => "Stable Diffusion",
            Self::Clip => "CLIP",
        }
    }

    /// The files that a model in a folder needs.
    fn needs(self, folder: &Path) -> Vec<Need> {
        match self {
            // Captions out of a fixed set of concepts.
            Self::Captioner if model_type(folder).as_deref() == Some("clip") => Self::Clip.needs(folder),
            Self::Captioner => {
                let graphs: &[Need] = match model_type(folder).as_deref() {
                    Some("blip-2") => &[
                        ("vision encoder", &["onnx/vision_encoder*.onnx", "vision_encoder*.onnx"]),
                        ("token embeddings", &["onnx/embed_tokens*.onnx", "embed_tokens*.onnx"]),
                        ("text decoder", &["onnx/decoder_model_merged*.onnx", "decoder_model_merged*.onnx"]),
                    ],
                    Some("vision-encoder-decoder") => &[
                        ("vision encoder", &["onnx/encoder_model*.onnx", "encoder_model*.onnx"]),
                        ("text decoder", &["onnx/decoder_model*.onnx", "decoder_model*.onnx"]),
                    ],
                    _ => &[
                        ("vision encoder", &["onnx/vision_model*.onnx", "vision_model*.onnx"]),
                        ("text decoder", &["onnx/text_decoder_model*.onnx", "text_decoder_model*.onnx"]),
                    ],
                };
                [&[CONFIG, PICTURES, TOKENIZER], graphs].concat()
            }
            Self::Summarizer if folder.join("genai_config.json").is_file() => vec![TOKENIZER, TOKENIZER_CONFIG, ("language model", &["*.onnx"])],
            Self::Summarizer => vec![
                CONFIG,
                TOKENIZER,
                TOKENIZER_CONFIG,
                ("language model", &["onnx/model*.onnx", "model*.onnx", "onnx/decoder_model*.onnx", "decoder_model*.onnx"]),
            ],
            Self::Diffusion => vec![
                ("pipeline", &["model_index.json"]),
                ("text encoder", &["text_encoder/model*.onnx"]),
                ("UNet", &["unet/model*.onnx"]),
                ("UNet configuration", &["unet/config.json"]),
                ("decoder", &["vae_decoder/model*.onnx"]),
                ("decoder configuration", &["vae_decoder/config.json", "vae/config.json"]),
                ("scheduler", &["scheduler/scheduler_config.json"]),
                ("tokenizer", &["tokenizer/tokenizer.json"]),
                ("tokenizer configuration", &["tokenizer/tokenizer_config.json"]),
            ],
            Self::Clip => vec![
                CONFIG,
                PICTURES,
                TOKENIZER,
                TOKENIZER_CONFIG,
                ("image encoder", &["onnx/vision_model*.onnx", "vision_model*.onnx"]),
                ("text encoder", &["onnx/text_model*.onnx", "text_model*.onnx"]),
            ],
        }
    }

    fn load(self, folder: &Path, captioner: &CaptionerArgs) -> Result<Model, Error> {
        let args = &EngineArgs::one_session();
        match self {
            Self::Captioner => Captioner::load(folder, captioner, args).map(|model| model.model().clone()),
            Self::Summarizer => Summarizer::load(folder, args).map(|model| model.model().clone()),
            Self::Diffusion => Diffusion::load(folder, args).map(|model| model.model().clone()),
            Self::Clip => Clip::load(folder, args).map(|model| model.model().clone()),
        }
    }
}

/// Looks at a suite, or at a single model.
pub(super) fn check(dir: &Path, captioner: &CaptionerArgs) -> Result<ExitCode, Problem> {
    if dir.is_dir() && !dir.join("suite.json").is_file() && !MODELS.iter().any(|name| dir.join(name).is_dir()) {
        return check_model(dir, captioner);
    }
    let suite = Suite::read(dir)?;
    println!("suite {} in {}", suite.name, dir.display());
    if !suite.notice.is_empty() {
        println!("notice: {}", suite.notice);
    }
    let wrong = MODELS.into_iter().filter(|name| !look(name, Kind::of_suite(name), &suite.model(name), captioner)).count();
    if wrong == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    Err(Problem::input(format!("{}: {wrong} of {} models can't be used", dir.display(), MODELS.len())))
}

fn check_model(dir: &Path, captioner: &CaptionerArgs) -> Result<ExitCode, Problem> {
    let Some(kind) = Kind::of(dir) else {
        return Err(Problem::input(format!(
            "{}: no model that dnd knows: there is neither a suite (suite.json, or folders {}), nor Stable Diffusion (model_index.json), nor a config.json \
             whose model_type would say what it is",
            dir.display(),
            MODELS.join(", ")
        )));
    };
    println!("{} in {}", kind.title(), dir.display());
    if look("model", kind, dir, captioner) { Ok(ExitCode::SUCCESS) } else { Err(Problem::input(format!("{}: the model can't be used", dir.display()))) }
}

/// Says what a model is, or everything that is wrong with it; gives whether it can be used.
fn look(name: &str, kind: Kind, folder: &Path, captioner: &CaptionerArgs) -> bool {
    let refused = match kind.load(folder, captioner) {
        Ok(model) => {
            println!("  {name:<10} ok     {}, {}, sha256 {}", model.layout, model.engine, &model.digest[..12.min(model.digest.len())]);
            return true;
        }
        Err(error) => error,
    };
    println!("  {name:<10} WRONG  {refused}");
    if folder.is_dir() {
        let refused = refused.to_string();
        for problem in kind.needs(folder).into_iter().filter_map(|need| problem_with(folder, need)) {
            // What the loader met first is said already.
            let what = problem.split(": looked for").next().unwrap_or(&problem);
            if !refused.contains(what) {
                println!("  {:<10}        {problem}", "");
            }
        }
    }
    false
}

/// What is wrong with a file that is needed: it is not there, or can't be read.
fn problem_with(folder: &Path, (what, names): Need) -> Option<String> {
    let Some(path) = find(folder, names) else {
        let plain: Vec<String> = names.iter().map(|name| if name.starts_with('*') { (*name).to_owned() } else { name.replace('*', "") }).collect();
        return Some(format!("no {what}: looked for {}", plain.join(", ")));
    };
    let read = match path.extension().and_then(|ending| ending.to_str()) {
        Some("onnx") => Network::read(&path).and_then(|network| missing_external(&path, network.external_files()?.into_keys())),
        _ if path.ends_with("tokenizer.json") => Tokenizer::read(&path).map(drop),
        _ => folder::read_json::<serde_json::Value>(&path).map(drop),
    };
    read.err().map(|error| error.to_string())
}

fn missing_external(network: &Path, external: impl IntoIterator<Item = PathBuf>) -> Result<(), Error> {
    let beside = network.parent().unwrap_or(Path::new(""));
    let missing: Vec<String> = external.into_iter().filter(|file| !beside.join(file).is_file()).map(|file| file.display().to_string()).collect();
    if missing.is_empty() { Ok(()) } else { Err(Error::file(network, format!("its external data is not beside it: {}", missing.join(", ")))) }
}

/// The first file that has one of the names.
fn find(folder: &Path, names: &[&str]) -> Option<PathBuf> {
    names.iter().find_map(|name| {
        let Some((start, end)) = name.split_once('*') else { return Some(folder.join(name)).filter(|path| path.is_file()) };
        let (inner, start) = start.rsplit_once('/').unwrap_or(("", start));
        let fits = |name: &str| name.starts_with(start) && name.ends_with(end);
        let mut files: Vec<PathBuf> = fs::read_dir(folder.join(inner)).ok()?.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
        files.sort();
        files.into_iter().find(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(fits))
    })
}

fn model_type(folder: &Path) -> Option<String> {
    #[derive(Deserialize)]
    struct Config {
        model_type: Option<String>,
    }
    folder::read_json::<Config>(&folder.join("config.json")).ok()?.model_type
}
