//! `dnd dissect`: labels units of a network's layers.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use dnd_mesh::parameters::to_message;
use dnd_method::parameters::Parameters;
use dnd_proto::v1::{DissectRequest, JobDone, LayerUnits, OnDisconnect, ProbingSet, Stage, StageTime, Target, UnitResult, Usage, dissect_response::Event};

use crate::{
    args::{MeshArgs, Settings, TargetArgs, units},
    inputs::{Images, TargetFile},
    mesh::Mesh,
    out::{self, Folder, printable},
    problem::{INTERRUPTED, Problem, unless_interrupted},
    watch::Watch,
};

/// Labels units of a network's layers, and leaves the labels with all their evidence in a folder.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: TargetArgs,
    /// Layers to dissect, as `dnd layers` names them, or unique endings of such names
    #[arg(long, value_name = "NAME[,NAME]", value_delimiter = ',', required = true)]
    layer: Vec<String>,
    /// Units of each layer, such as 0-9,17; by default all
    #[arg(long, value_parser = units_of, value_name = "UNITS")]
    units: Option<Units>,
    /// Folder of pictures (subfolders too), or a .tar file; more than one make one probing set
    #[arg(long, value_name = "DIR", required = true)]
    images: Vec<PathBuf>,
    /// Folder for the results
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace results that are in the folder already, and make everything anew
    #[arg(long)]
    fresh: bool,
    /// Only say what there is to do, and from a trial of one unit how much space and time it will take
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    mesh: MeshArgs,
    #[command(flatten)]
    settings: Settings,
}

/// Units of a flag.
#[derive(Debug, Clone, Default)]
pub(crate) struct Units(pub(crate) Vec<u32>);

pub(crate) fn units_of(text: &str) -> Result<Units, String> {
    units(text).map(Units)
}

/// Pictures that a trial probes.
const TRIAL_PICTURES: usize = 64;

pub(crate) async fn run(mut args: Args) -> Result<ExitCode, Problem> {
    let parameters = args.settings.parameters()?;
    let target = TargetFile::open(&args.target.target, &args.target.flags)?;
    let images = Images::open(&args.images)?;
    let units = args.units.unwrap_or_default().0;
    let layers: Vec<LayerUnits> = args.layer.iter().map(|layer| LayerUnits { layer: layer.trim().to_owned(), units: units.clone() }).collect();
    if args.dry_run {
        return unless_interrupted(dry_run(&args.mesh, &target, layers, &images, &parameters)).await;
    }
    let mut folder = Folder::new(&args.out, args.fresh)?;
    let own = Folder::data(&args.out);
    if args.fresh && own.exists() {
        fs::remove_dir_all(&own).map_err(|e| Problem::file(&own, &e))?;
    }
    args.mesh.data.data.get_or_insert(own);
    let (mesh, request, skipped) = unless_interrupted(async {
        let mesh = Mesh::open(&args.mesh).await?;
        let (set, skipped) = images.give(&mesh).await?;
        let request = request(target.give(&mesh).await?, layers, set, &parameters);
        Ok((mesh, request, skipped))
    })
    .await?;
    for skipped in skipped {
        eprintln!("skipped {}: {}", printable(&skipped.path), printable(&skipped.reason));
        folder.skipped(skipped);
    }
    let Ran { folder, interrupted, .. } = dissect(mesh, request, folder).await?;
    summarise(&folder, interrupted)
}

/// A request for a job that ends with its caller: what it makes lives as long as the mesh's process, and nobody would come back for it.
pub(crate) fn request(target: Target, layers: Vec<LayerUnits>, set: ProbingSet, parameters: &Parameters) -> DissectRequest {
    DissectRequest {
        request_id: String::new(),
        on_disconnect: OnDisconnect::Cancel.into(),
        target: Some(target),
        layers,
        probing_set: Some(set),
        parameters: Some(to_message(parameters)),
    }
}

/// A run that has ended.
pub(crate) struct Ran {
    pub(crate) folder: Folder,
    pub(crate) mesh: Mesh,
    /// By Ctrl-C, before all units were finished.
    pub(crate) interrupted: bool,
}

/// Runs a job and keeps what it gives, until it is done or Ctrl-C ends it.
pub(crate) async fn dissect(mut mesh: Mesh, request: DissectRequest, mut folder: Folder) -> Result<Ran, Problem> {
    let mut watch = Watch::new();
    let ended = tokio::select! {
        ended = follow(request, &mut mesh, &mut folder, &mut watch) => Some(ended),
        _ = tokio::signal::ctrl_c() => None,
    };
    watch.end();
    match ended {
        Some(Ok(done)) => {
            folder.finish(Some(&done))?;
            Ok(Ran { folder, mesh, interrupted: done.cancelled })
        }
        Some(Err(problem)) => {
            if folder.has_begun() {
                folder.warn(problem.to_string());
                folder.finish(None)?;
                print(&folder);
                eprintln!("dnd: the job has stopped; what was finished is in {}", folder.root().display());
            }
            Err(problem)
        }
        None if !folder.has_begun() => Err(Problem::interrupted()),
        None => {
            folder.finish(None)?;
            Ok(Ran { folder, mesh, interrupted: true })
        }
    }
}

async fn follow(request: DissectRequest, mesh: &mut Mesh, folder: &mut Folder, watch: &mut Watch) -> Result<JobDone, Problem> {
    let mut events = mesh.dissect.dissect(request).await?.into_inner();
    while let Some(response) = events.message().await? {
        match response.event {
            Some(Event::Accepted(accepted)) => {
                for notice in out::notices(accepted.provenance.as_ref()) {
                    watch.say(&format!("note: {notice}"));
                }
                for warning in &accepted.warnings {
                    watch.say(&format!("warning: {warning}"));
                }
                folder.accepted(accepted)?;
            }
            Some(Event::Progress(progress)) => {
                watch.progress(&progress);
                folder.used(progress.usage);
            }
            Some(Event::Skipped(skipped)) => {
                watch.say(&format!("skipped {}: {}", skipped.path, skipped.reason));
                folder.skipped(skipped);
            }
            Some(Event::Unit(unit)) => folder.unit(unit, &mut mesh.pictures).await?,
            Some(Event::Done(done)) => {
                for warning in &done.warnings {
                    watch.say(&format!("warning: {warning}"));
                }
                return Ok(done);
            }
            None => {}
        }
    }
    Err(Problem::failure("the mesh ended the job without saying that it is done"))
}

/// Prints the labels and where everything is.
fn print(folder: &Folder) {
    let width = folder.units().iter().map(|unit| unit.layer.len()).max().unwrap_or(5).max(5);
    println!("{:<width$}  {:>5}  {:<40}  {:>8}", "layer", "unit", "label", "score");
    for unit in folder.units() {
        println!("{:<width$}  {:>5}  {}", unit.layer, unit.unit, outcome(unit));
    }
    let [labelled, dead, failed] = ["labelled", "dead", "failed"].map(|state| count(folder, state));
    println!("{labelled} labelled, {dead} dead, {failed} failed; {} pictures skipped", folder.skipped_count());
    if let Some(usage) = folder.usage() {
        println!("language model  {}", out::spent(usage));
    }
    println!("report  {}", folder.root().join("report.html").display());
}

fn count(folder: &Folder, state: &str) -> usize {
    folder.units().iter().filter(|unit| out::state(unit) == state).count()
}

/// Prints what there is, and says how the command ended.
fn summarise(folder: &Folder, interrupted: bool) -> Result<ExitCode, Problem> {
    print(folder);
    if interrupted {
        eprintln!("dnd: interrupted: what was finished is in {}", folder.root().display());
        return Ok(ExitCode::from(INTERRUPTED));
    }
    if count(folder, "failed") > 0 && count(folder, "labelled") == 0 {
        return Err(Problem::failure(format!("no unit got a label; {} says why", folder.root().join("results.csv").display())));
    }
    Ok(ExitCode::SUCCESS)
}

/// A unit's label and score, or why it has none.
pub(crate) fn outcome(unit: &UnitResult) -> String {
    match out::state(unit) {
        "labelled" => format!("{:<40}  {:>8.3}", printable(&unit.label), unit.concepts.first().and_then(|concept| concept.score).unwrap_or_default()),
        "dead" => "dead: all its activations are equal".to_owned(),
        state => format!("{state}: {} ({})", printable(&unit.message), unit.reason),
    }
}

/// Labels a unit of each layer on a few of the pictures and reckons from that.
async fn dry_run(args: &MeshArgs, target: &TargetFile, layers: Vec<LayerUnits>, images: &Images, parameters: &Parameters) -> Result<ExitCode, Problem> {
    let trial = tempfile::tempdir().map_err(|e| Problem::failure(e.to_string()))?;
    let (sample, pictures) = images.sample(TRIAL_PICTURES)?;
    let sampled = Images::open(&[sample.path().to_owned()])?;
    let mut mesh = Mesh::open(args).await?;
    let given = target.give(&mesh).await?;
    let (set, _) = sampled.give(&mesh).await?;
    let all = units_of_job(&mesh, request(given.clone(), layers, set.clone(), parameters)).await?;
    let count: usize = all.iter().map(|layer| layer.units.len()).sum();
    let firsts = all.iter().map(|layer| LayerUnits { layer: layer.layer.clone(), units: layer.units.iter().take(1).copied().collect() }).collect();
    let mut folder = Folder::new(trial.path(), true)?;
    let mut watch = Watch::new();
    let done = follow(request(given, firsts, set, parameters), &mut mesh, &mut folder, &mut watch).await;
    watch.end();
    let done = done?;
    println!("{} layers, {count} units, {pictures} pictures", all.len());
    for layer in &all {
        println!("  {}: {} units", layer.layer, layer.units.len());
    }
    for unit in folder.units() {
        println!("trial on {} pictures: {} unit {}: {}", done.pictures, unit.layer, unit.unit, outcome(unit).trim_end());
    }
    let tried = folder.units().iter().filter(|unit| out::state(unit) != "dead").count().max(1) as f64;
    let seconds = |of: &dyn Fn(&StageTime) -> bool| done.times.iter().filter(|time| of(time)).map(|time| time.seconds).sum::<f64>();
    let probing = seconds(&|time| time.stage() == Stage::Probe) * pictures as f64 / done.pictures.max(1) as f64;
    let labelling = seconds(&|time| time.stage() != Stage::Probe) * count as f64 / tried;
    let space = folder_size(trial.path()) as f64 * count as f64 / tried;
    println!(
        "time    about {} for the probing pass, at most {} for the units (less where they share pictures and concepts)",
        duration(probing),
        duration(labelling)
    );
    println!("space   at most {:.1} MB in --out", space / 1e6);
    if let Some(usage) = folder.usage() {
        let all = |tokens: u64| (tokens as f64 * count as f64 / tried).ceil() as u64;
        let Usage { calls, prompt_tokens, answer_tokens, cost } = *usage;
        let cost = cost.map(|cost| cost * count as f64 / tried);
        let usage = Usage { calls: all(calls), prompt_tokens: all(prompt_tokens), answer_tokens: all(answer_tokens), cost };
        println!("asking  about {}", out::spent(&usage));
    }
    Ok(ExitCode::SUCCESS)
}

/// The units of a job, all of them spelt out: it says so when it is accepted, and is ended there.
async fn units_of_job(mesh: &Mesh, request: DissectRequest) -> Result<Vec<LayerUnits>, Problem> {
    let mut events = mesh.dissect.clone().dissect(request).await?.into_inner();
    while let Some(response) = events.message().await? {
        if let Some(Event::Accepted(accepted)) = response.event {
            return Ok(accepted.layers);
        }
    }
    Err(Problem::failure("the mesh did not accept the job"))
}

fn folder_size(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries.flatten().map(|entry| if entry.path().is_dir() { folder_size(&entry.path()) } else { entry.metadata().map_or(0, |meta| meta.len()) }).sum()
}

fn duration(seconds: f64) -> String {
    let seconds = seconds.ceil() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}
