//! The memory of a card that the models of this process share.

use std::{fmt, num::NonZeroU64, process::Command};

use dnd_onnx::runtime::{EngineArgs, Provider};
use tokio::task::spawn_blocking;

use crate::{args::MeshArgs, problem::Problem};

/// Models that run in one process, as their metrics name them.
const MODELS: [&str; 5] = ["target", "captioner", "summarizer", "diffusion", "clip"];

/// What is said of a card that several models share.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct CardArgs {
    /// What --gpu-memory is for one of the models: target (for each that is kept loaded), captioner, summarizer, diffusion or clip, such as diffusion=10240
    #[arg(long, env = "DND_GPU_MEMORY_FOR", value_name = "MODEL=MIB", value_delimiter = ',', value_parser = limit)]
    gpu_memory_for: Vec<(&'static str, NonZeroU64)>,
    /// Mebibytes of memory that the card has, which the models' limits together may not exceed; by default what nvidia-smi says
    #[arg(long, env = "DND_CARD_MEMORY", value_name = "MIB")]
    card_memory: Option<NonZeroU64>,
}

/// A model's limit as a person writes it, such as `clip=1024`.
fn limit(text: &str) -> Result<(&'static str, NonZeroU64), String> {
    let parsed =
        text.split_once('=').and_then(|(name, mebibytes)| Some((MODELS.into_iter().find(|model| *model == name.trim())?, mebibytes.trim().parse().ok()?)));
    parsed.ok_or_else(|| format!("{text:?} is no model with mebibytes, such as diffusion=10240; models are {}", MODELS.join(", ")))
}

impl MeshArgs {
    /// How a model of this process is run.
    pub(crate) fn engine_of(&self, model: &str) -> EngineArgs {
        let own = self.card.gpu_memory_for.iter().rfind(|(name, _)| *name == model).map(|(_, limit)| *limit);
        EngineArgs { gpu_memory: own.or(self.engine.gpu_memory), ..self.engine.clone() }
    }

    /// Refuses limits that the card does not have the memory for.
    pub(crate) async fn check_card(&self) -> Result<(), Problem> {
        // One that is asked over HTTP takes nothing here.
        let here = MODELS.into_iter().filter(|model| *model != "summarizer" || self.llm.llm_url.is_none());
        let copies = |model| if model == "target" { self.activation.targets.get() as u64 } else { 1 };
        let shares: Vec<Share> = here.map(|model| Share { model, limit: self.engine_of(model).gpu_memory, copies: copies(model) }).collect();
        if shares.iter().all(|share| share.limit.is_none()) {
            return Ok(());
        }
        if self.engine.provider != Provider::Cuda {
            return Err(Problem::input(format!("--gpu-memory and --gpu-memory-for go with --provider cuda, and it is {}", self.engine.provider)));
        }
        let card = match self.card.card_memory {
            Some(memory) => Ok(Card { name: "by --card-memory".to_owned(), memory: memory.get() }),
            None => spawn_blocking(Card::ask).await.map_err(|e| Problem::failure(e.to_string()))?,
        };
        let card = card.map_err(|problem| Problem::input(format!("{problem}: say with --card-memory how much memory the card has")))?;
        fit(&shares, &card).map_err(Problem::input)
    }
}

/// What a model may take.
#[derive(Debug, Clone)]
struct Share {
    model: &'static str,
    /// Mebibytes.
    limit: Option<NonZeroU64>,
    /// How often it may be loaded at a time.
    copies: u64,
}

impl Share {
    fn mebibytes(&self) -> u64 {
        self.limit.map_or(0, |limit| limit.get().saturating_mul(self.copies))
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limit = self.limit.map_or(0, NonZeroU64::get);
        if self.copies > 1 { write!(f, "{} {} x {limit}", self.model, self.copies) } else { write!(f, "{} {limit}", self.model) }
    }
}

/// A card, and its memory in mebibytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Card {
    name: String,
    memory: u64,
}

impl Card {
    /// Asks the driver's own tool, which comes with it into containers, too: nothing has to be linked or loaded for it, and who is refused can ask the same. Blocking.
    fn ask() -> Result<Self, String> {
        const ASKED: [&str; 2] = ["--query-gpu=name,memory.total,mig.mode.current", "--format=csv,noheader,nounits"];
        let said = Command::new("nvidia-smi").args(ASKED).output().map_err(|error| format!("nvidia-smi can't be asked ({error})"))?;
        if !said.status.success() {
            return Err(format!("nvidia-smi ended with {} and said: {}", said.status, String::from_utf8_lossy(&said.stdout).trim()));
        }
        Self::read(&String::from_utf8_lossy(&said.stdout))
    }

    /// Reads what the tool says, a line a card.
    fn read(said: &str) -> Result<Self, String> {
        let cards: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
        let [card] = cards[..] else { return Err(format!("nvidia-smi knows {} cards, and not which of them is used", cards.len())) };
        match card.split(',').map(str::trim).collect::<Vec<_>>()[..] {
            [name, _, "Enabled"] => Err(format!("the {name} is partitioned (MIG), and nvidia-smi knows the whole")),
            [name, memory, _] if memory.parse::<u64>().is_ok() => Ok(Self { name: name.to_owned(), memory: memory.parse().unwrap_or_default() }),
            _ => Err(format!("nvidia-smi said {card:?}")),
        }
    }
}

/// Whether a card has the memory for all limits together; the problem, if it has not.
fn fit(shares: &[Share], card: &Card) -> Result<(), String> {
    let without: Vec<&str> = shares.iter().filter(|share| share.limit.is_none()).map(|share| share.model).collect();
    if !without.is_empty() {
        let names = without.join(", ");
        return Err(format!(
            "no limit of the card's memory for {names}: if one model has one, each needs one (--gpu-memory for all, --gpu-memory-for MODEL=MIB for one)"
        ));
    }
    let sum = shares.iter().map(Share::mebibytes).fold(0, u64::saturating_add);
    if sum <= card.memory {
        return Ok(());
    }
    let shares = shares.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    Err(format!(
        "the models may take {sum} MiB of the card's memory together, and the card has {} MiB ({}): {shares}; lower --gpu-memory, --gpu-memory-for or --targets",
        card.memory, card.name
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(model: &'static str, limit: u64, copies: u64) -> Share {
        Share { model, limit: NonZeroU64::new(limit), copies }
    }

    #[test]
    fn limits_that_fit_are_taken_and_others_are_refused_with_all_that_matters() {
        let card = Card { name: "NVIDIA L4".to_owned(), memory: 23_034 };
        let exactly = [share("target", 2048, 4), share("diffusion", 14_842, 1)];
        assert_eq!(fit(&exactly, &card), Ok(()));
        let problem = fit(&[share("target", 2048, 4), share("diffusion", 14_843, 1)], &card).unwrap_err();
        for said in ["23035 MiB", "23034 MiB", "NVIDIA L4", "target 4 x 2048", "diffusion 14843"] {
            assert!(problem.contains(said), "{problem}");
        }
        assert!(fit(&[share("clip", u64::MAX, 2)], &card).is_err());
        let problem = fit(&[share("clip", 1, 1), share("captioner", 0, 1)], &card).unwrap_err();
        assert!(problem.contains("for captioner:"), "{problem}");
    }

    #[test]
    fn what_the_drivers_tool_says_of_one_whole_card_is_its_memory() {
        let card = Card { name: "NVIDIA L4".to_owned(), memory: 23_034 };
        assert_eq!(Card::read("NVIDIA L4, 23034, [N/A]\n"), Ok(card));
        for (said, problem) in [
            ("NVIDIA L4, 23034, [N/A]\nNVIDIA L4, 23034, [N/A]\n", "2 cards"),
            ("", "0 cards"),
            ("NVIDIA A100-SXM4-40GB, 40960, Enabled\n", "partitioned"),
            ("NVIDIA GB10, [N/A], [N/A]\n", "[N/A]"),
        ] {
            assert!(Card::read(said).is_err_and(|error| error.contains(problem)), "{said}");
        }
    }

    #[test]
    fn a_limit_is_of_a_model_that_there_is() {
        assert_eq!(limit("diffusion=10240"), Ok(("diffusion", NonZeroU64::new(10_240).unwrap())));
        for wrong in ["diffusion", "diffusion=0", "diffusion=-1", "unet=5", "clip=8GB"] {
            assert!(limit(wrong).is_err_and(|problem| problem.contains("captioner")), "{wrong}");
        }
    }
}
