//! `dnd plan`: what a large run will take, from what a small one took.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use dnd_mesh::program::ExitCode;

use dnd_onnx::folder;
use serde::Deserialize;

use crate::problem::Problem;

/// Says how long a run will take, on how many replicas of each service, and what it will cost, from what the stages of a smaller run took.
///
/// The smaller run should be on the same kind of machine, layers and parameters, and begin with nothing kept of earlier ones (--fresh). Ten to thirty units and
/// a thousand pictures are enough.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The run.json of the measured run, or its --out folder
    #[arg(long, value_name = "PATH")]
    from: PathBuf,
    /// Units to label
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    units: u64,
    /// Pictures of the probing set
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    images: u64,
    /// Cards to plan for, each as fast as the one that the measured run had; without a card, machines
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    gpus: u64,
    /// What an hour of one of them costs
    #[arg(long, value_name = "AMOUNT")]
    price: Option<f64>,
}

/// The services that have replicas, and the stage that each is needed for after the probing pass. Scoring also runs the network on what was drawn, which is
/// little beside the rest and counted with clip.
const SERVICES: [(&str, &str); 5] =
    [("activation", "crop"), ("captioner", "caption"), ("summarizer", "summarize"), ("diffusion", "generate"), ("clip", "score")];
const PROBE: &str = "probe";

/// What is read of a `run.json`.
#[derive(Debug, Deserialize)]
struct Measured {
    interrupted: bool,
    seconds: f64,
    /// By state.
    units: BTreeMap<String, u64>,
    pictures: Option<u64>,
    #[serde(default)]
    stages: BTreeMap<String, Stage>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
struct Stage {
    seconds: f64,
    calls: u64,
    reused: u64,
}

/// What is asked for, reckoned from what was measured; times in seconds of one card.
#[derive(Debug, PartialEq)]
struct Plan {
    probing: f64,
    /// Each service's part of labelling, and its replicas; one that runs everything where there are fewer cards than services.
    services: Vec<(&'static str, f64, u64)>,
    /// Pictures to draw, and pictures that units need in all.
    drawn: (f64, f64),
}

pub(crate) async fn run(args: Args) -> Result<ExitCode, Problem> {
    let path = if args.from.is_dir() { args.from.join("run.json") } else { args.from.clone() };
    let measured: Measured = folder::read_json(&path)?;
    measured.check(&path)?;
    let plan = |calls| measured.plan(args.units, args.images, args.gpus, calls);
    print(&measured, &plan(Stage::calls_shared), &plan(Stage::calls_in_proportion), &args);
    Ok(ExitCode::SUCCESS)
}

impl Measured {
    fn check(&self, path: &Path) -> Result<(), Problem> {
        let wrong = |why: &str| Err(Problem::input(format!("{}: {why}", path.display())));
        if self.interrupted || self.stages.is_empty() {
            return wrong("this run was broken off, and its times say nothing; finish it first");
        }
        if self.count() == 0 || self.pictures.is_none_or(|pictures| pictures == 0) {
            return wrong("this run labelled no unit");
        }
        if self.stage("generate").calls == 0 {
            return wrong("no picture was drawn in this run, since all were kept of an earlier one; measure with --fresh");
        }
        Ok(())
    }

    fn count(&self) -> u64 {
        self.units.values().sum()
    }

    fn stage(&self, name: &str) -> Stage {
        self.stages.get(name).copied().unwrap_or_default()
    }

    /// A plan in which a stage makes so many calls of its model for so many times the units.
    fn plan(&self, units: u64, images: u64, gpus: u64, calls: fn(Stage, f64) -> f64) -> Plan {
        let growth = units as f64 / self.count() as f64;
        let probe = self.stage(PROBE).seconds.min(self.seconds);
        let probing = probe * images as f64 / self.pictures.unwrap_or(1).max(1) as f64;
        // The stages of many units ran side by side on one machine, so that their times add up to more than passed: each has its share of what passed.
        let stages = SERVICES.map(|(service, stage)| (service, self.stage(stage)));
        let together: f64 = stages.iter().map(|(_, stage)| stage.seconds).sum();
        let labelling = stages.map(|(service, stage)| {
            let passed = (self.seconds - probe) * stage.seconds / together.max(f64::MIN_POSITIVE);
            (service, passed * calls(stage, growth) / stage.calls.max(1) as f64)
        });
        let drawing = self.stage("generate");
        let drawn = (calls(drawing, growth), (drawing.calls + drawing.reused) as f64 * growth);
        Plan { probing, services: replicas(&labelling, gpus), drawn }
    }
}

impl Stage {
    /// Calls for so many times the units, if those share no more than the measured ones do.
    fn calls_in_proportion(self, growth: f64) -> f64 {
        self.calls as f64 * growth
    }

    /// Calls for so many times the units. Units share pictures and concepts, the more the more there are of them: what they ask for is as if drawn from a
    /// pool, of which the measured run shows the size, and is made once.
    fn calls_shared(self, growth: f64) -> f64 {
        let asked = (self.calls + self.reused) as f64;
        let new = |times: f64| if times > 0.0 { -(-times).exp_m1() / times } else { 1.0 };
        // How often the pool's things were asked for on average: the share of new ones falls with it.
        let (mut low, mut high) = (0.0, 1e6);
        for _ in 0..100 {
            let middle = (low + high) / 2.0;
            if new(middle) * asked > self.calls as f64 { low = middle } else { high = middle }
        }
        asked * growth * new(low * growth)
    }
}

/// Replicas of each service on so many cards, one at least: each further one for the service that the others would wait for.
fn replicas(labelling: &[(&'static str, f64); 5], gpus: u64) -> Vec<(&'static str, f64, u64)> {
    if gpus < labelling.len() as u64 {
        return vec![("dnd up", labelling.iter().map(|(_, seconds)| seconds).sum(), gpus)];
    }
    let mut planned = labelling.map(|(service, seconds)| (service, seconds, 1));
    for _ in labelling.len() as u64..gpus {
        if let Some(slowest) = planned.iter_mut().max_by(|a, b| (a.1 / a.2 as f64).total_cmp(&(b.1 / b.2 as f64))) {
            slowest.2 += 1;
        }
    }
    planned.to_vec()
}

impl Plan {
    /// Seconds until the probing pass has ended: it runs on the replicas of the first service.
    fn probed(&self) -> f64 {
        self.services.first().map_or(0.0, |(_, _, replicas)| self.probing / *replicas as f64)
    }

    /// Seconds that labelling takes after that: as long as the slowest service.
    fn labelled(&self) -> f64 {
        self.services.iter().map(|(_, seconds, replicas)| seconds / *replicas as f64).fold(0.0, f64::max)
    }
}

fn print(measured: &Measured, plan: &Plan, most: &Plan, args: &Args) {
    let pictures = measured.pictures.unwrap_or_default();
    println!("measured    {} units on {pictures} pictures in {}", measured.count(), duration(measured.seconds));
    println!("asked       {} units on {} pictures, with {} times the card (or machine) of that run", args.units, args.images, args.gpus);
    println!("service     replicas  busy");
    let labelled = plan.labelled();
    for (service, seconds, replicas) in &plan.services {
        println!("{service:<12}{replicas:>8}  {:>3.0} %", 100.0 * seconds / *replicas as f64 / labelled.max(f64::MIN_POSITIVE));
    }
    println!("drawing     about {:.0} pictures, at most {:.0}; the units need {:.0}, and share the others", plan.drawn.0, most.drawn.0, plan.drawn.1);
    let seconds = plan.probed() + labelled;
    println!("time        about {}: {} for the probing pass, {} for the units", duration(seconds), duration(plan.probed()), duration(labelled));
    let longest = most.probed() + most.labelled();
    println!("at most     {}, if more units share no more than those that were measured", duration(longest));
    let hours = |seconds: f64| seconds / 3600.0 * args.gpus as f64;
    let price = |hours: f64| args.price.map(|price| format!(" for {:.2}", hours * price)).unwrap_or_default();
    let (about, longest) = (hours(seconds), hours(longest));
    println!("cost        about {about:.2} hours of a card{}, at most {longest:.2}{}", price(about), price(longest));
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.1} s"),
        s if s < 5400.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(seconds: f64, calls: u64, reused: u64) -> Stage {
        Stage { seconds, calls, reused }
    }

    /// 10 units on 500 pictures: 5 s of probing and 100 s of labelling, in which units were side by side.
    fn measured() -> Measured {
        let stages = [("probe", stage(5.0, 500, 0)), ("crop", stage(10.0, 100, 0)), ("caption", stage(40.0, 200, 0)), ("summarize", stage(50.0, 250, 0))];
        let more = [("generate", stage(280.0, 500, 0)), ("score", stage(20.0, 500, 0))];
        let stages = stages.into_iter().chain(more).map(|(name, stage)| (name.to_owned(), stage)).collect();
        Measured { interrupted: false, seconds: 105.0, units: [("labelled".to_owned(), 9), ("dead".to_owned(), 1)].into(), pictures: Some(500), stages }
    }

    #[test]
    fn the_measured_run_is_what_it_predicts_of_itself() {
        let plan = measured().plan(10, 500, 1, Stage::calls_shared);
        assert!((plan.probed() + plan.labelled() - 105.0).abs() < 1e-6, "{plan:?}");
        assert_eq!(plan.drawn, (500.0, 500.0));
    }

    #[test]
    fn probing_grows_with_the_pictures_and_labelling_with_the_units() {
        let plan = measured().plan(1000, 5000, 1, Stage::calls_shared);
        assert!((plan.probed() - 50.0).abs() < 1e-6 && (plan.labelled() - 10_000.0).abs() < 1e-3, "{plan:?}");
    }

    #[test]
    fn each_further_card_goes_to_the_service_that_the_others_wait_for() {
        let plan = measured().plan(10, 500, 9, Stage::calls_shared);
        let replicas: Vec<_> = plan.services.iter().map(|(service, _, replicas)| (*service, *replicas)).collect();
        assert_eq!(replicas, [("activation", 1), ("captioner", 1), ("summarizer", 1), ("diffusion", 5), ("clip", 1)]);
        assert!((plan.labelled() - 14.0).abs() < 1e-6, "70 s of drawing on 5 cards");
        let few = measured().plan(10, 500, 4, Stage::calls_shared);
        assert_eq!(few.services.len(), 1, "all services on each of the four");
        assert!((few.labelled() - 25.0).abs() < 1e-6);
    }

    #[test]
    fn what_units_share_is_made_once_and_more_units_share_more() {
        // 160 asked for, 110 of them new: as from a pool of 200.
        let drawing = stage(1.0, 110, 50);
        assert!((drawing.calls_shared(1.0) - 110.0).abs() < 0.01);
        let more = drawing.calls_shared(2.5);
        assert!((165.0..180.0).contains(&more), "{more}");
        assert_eq!(drawing.calls_in_proportion(2.5), 275.0);
        assert!(drawing.calls_shared(1000.0) < 250.0, "the pool has no more");
        assert_eq!(stage(1.0, 0, 0).calls_shared(10.0), 0.0);
    }
}
