//! `dnd demo`: labels the embedded networks' neurons, and says how many labels are right.

mod marks;

use std::path::{Path, PathBuf};

use dnd_mesh::program::ExitCode;

use dnd_method::parameters::Parameters;
use dnd_proto::v1::{LayerUnits, UnitResult};

use self::marks::{Marks, PlantedUnit};
use super::dissect::{Ran, dissect, outcome, request};
use crate::{
    args::{MeshArgs, TargetFlags},
    card::CardArgs,
    inputs::{Images, TargetFile},
    local::Suite,
    mesh::Mesh,
    out::Folder,
    problem::{INTERRUPTED, Problem, unless_interrupted},
};

/// Labels all units of a hand-built network, whose concepts are known, and 20 units of a trained one, with the sketch suite.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder for the results
    #[arg(long, value_name = "DIR", default_value = "out/demo")]
    out: PathBuf,
    /// Folder of the sketch suite
    #[arg(long, value_name = "DIR", default_value = "models/sketch")]
    models: PathBuf,
    #[command(flatten)]
    engine: dnd_onnx::runtime::EngineArgs,
    #[command(flatten)]
    card: CardArgs,
    #[command(flatten)]
    activation: dnd_activation::ActivationArgs,
    #[command(flatten)]
    orchestrator: dnd_orchestrator::OrchestratorArgs,
}

/// Denoising steps of the demo; the method's default is 50.
const STEPS: u32 = 20;
/// Of the trained network: units of its last block, and of its last layer, whose units are its classes.
const TRAINED: [(&str, u32); 2] = [("layer4", 10), ("fc", 10)];

pub(crate) async fn run(args: Args) -> Result<ExitCode, Problem> {
    let suite = Suite::read(&args.models)?;
    let planted = TargetFile::open(&suite.target("planted")?, &TargetFlags::default())?;
    let trained = TargetFile::open(&suite.target("resnet")?, &TargetFlags::default())?;
    let images = Images::open(&[suite.probing_set()?])?;
    let marks = Marks::read(&args.models, &planted.path)?;
    let mesh_args = MeshArgs {
        models: Some(args.models),
        engine: args.engine,
        card: args.card,
        activation: args.activation,
        orchestrator: args.orchestrator,
        ..MeshArgs::default()
    };

    println!("Labelling the neurons of two small networks: {} units whose concepts are known, and 20 of a trained one.", marks.units.len());
    println!("Pictures are drawn in {STEPS} steps; the method's default is 50.");
    let parameters = Parameters { num_inference_steps: STEPS, ..Parameters::default() };
    let mesh = unless_interrupted(Mesh::load(suite, &mesh_args)).await?;

    let (set, _) = images.give(&mesh).await?;
    let folder = Folder::new(&args.out.join("planted"), true)?;
    let layers = marks.layers().map(|layer| LayerUnits { layer: layer.to_owned(), units: Vec::new() }).collect();
    let asked = request(planted.give(&mesh).await?, layers, set.clone(), &parameters);
    let Ran { folder: planted, mesh, interrupted } = dissect(mesh, asked, folder).await?;
    if interrupted {
        return Ok(ExitCode::from(INTERRUPTED));
    }

    let folder = Folder::new(&args.out.join("resnet"), true)?;
    let layers = TRAINED.map(|(layer, units)| LayerUnits { layer: layer.to_owned(), units: (0..units).collect() }).to_vec();
    let asked = request(trained.give(&mesh).await?, layers, set, &parameters);
    let Ran { folder: resnet, interrupted, .. } = dissect(mesh, asked, folder).await?;
    if interrupted {
        return Ok(ExitCode::from(INTERRUPTED));
    }

    print_trained(resnet.units());
    print_planted(planted.units(), &marks);
    print_figures(planted.units(), &marks);
    print_reports(&args.out);
    Ok(ExitCode::SUCCESS)
}

fn print_trained(units: &[UnitResult]) {
    println!("\nA trained network (resnet)\n{:<8}  {:>4}  {:<40}  {:>8}", "layer", "unit", "label", "score");
    for unit in units {
        println!("{:<8}  {:>4}  {}", unit.layer, unit.unit, outcome(unit));
    }
}

fn print_planted(units: &[UnitResult], marks: &Marks) {
    println!(
        "\nA network whose units' concepts are known (planted)\n{:<8}  {:>4}  {:<26}  {:<5}  {:<40}  {:>8}",
        "layer", "unit", "concept", "", "label", "score"
    );
    for unit in units {
        let Some(planted) = marks.unit(unit) else { continue };
        let (concept, mark) = match (planted.dead, marks.is_right(planted, &unit.label)) {
            (true, _) => ("(dead)", ""),
            (false, true) => (planted.concept.as_deref().unwrap_or_default(), "right"),
            (false, false) => (planted.concept.as_deref().unwrap_or_default(), "WRONG"),
        };
        println!("{:<8}  {:>4}  {concept:<26}  {mark:<5}  {}", unit.layer, unit.unit, outcome(unit));
    }
}

fn print_figures(units: &[UnitResult], marks: &Marks) {
    let live: Vec<(&PlantedUnit, &UnitResult)> =
        units.iter().filter_map(|unit| marks.unit(unit).filter(|planted| !planted.dead).map(|planted| (planted, unit))).collect();
    let withheld: Vec<_> = live.iter().filter(|(planted, _)| planted.withheld).copied().collect();
    let share = |name: &str, units: &[(&PlantedUnit, &UnitResult)], label: &dyn Fn(usize, &UnitResult) -> String| {
        let right = units.iter().enumerate().filter(|(i, (planted, unit))| marks.is_right(planted, &label(*i, unit))).count();
        println!("  {name:<58}  {right:>2} of {:>2}  ({:.0} %)", units.len(), 100.0 * right as f64 / units.len().max(1) as f64);
    };
    println!("\nRight labels");
    share("live units", &live, &|_, unit| unit.label.clone());
    share("of these: combinations that no model has seen in training", &withheld, &|_, unit| unit.label.clone());
    println!("For comparison");
    share("the first candidate, without selection", &live, &|_, unit| first_candidate(unit));
    let competing = live.iter().filter(|(_, unit)| unit.concepts.len() > 1).count();
    println!("    (units with more than one candidate to select from: {competing})");
    share("the caption of the top image", &live, &|_, unit| unit.images.first().map(|image| image.caption.clone()).unwrap_or_default());
    let labels: Vec<String> = live.iter().map(|(_, unit)| unit.label.clone()).collect();
    let other = marks::shuffled(labels.len());
    share("the labels shuffled over the units", &live, &|i, _| other.get(i).and_then(|j| labels.get(*j)).cloned().unwrap_or_default());
    let dead: Vec<_> = units.iter().filter(|unit| marks.unit(unit).is_some_and(|planted| planted.dead)).collect();
    let told = dead.iter().filter(|unit| crate::out::state(unit) == "dead").count();
    println!("Dead units\n  {:<58}  {told:>2} of {:>2}", "reported as dead", dead.len());
}

/// The candidate that came first, whatever became of it in the selection.
fn first_candidate(unit: &UnitResult) -> String {
    unit.concepts.iter().find(|concept| concept.candidate == 0).map(|concept| concept.concept.clone()).unwrap_or_default()
}

fn print_reports(out: &Path) {
    println!("\nReports with the evidence for each label");
    for network in ["planted", "resnet"] {
        println!("  {}", out.join(network).join("report.html").display());
    }
}
