//! `dnd dissect`: labels units of a network's layers.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use dnd_mesh::{blobs, parameters::to_message, program::ExitCode, retry::is_away};
use dnd_method::parameters::Parameters;
use dnd_proto::v1::{
    CancelJobRequest, CreateJobRequest, DeleteJobRequest, DissectRequest, Job, JobDone, JobPaused, JobState, LayerUnits, ProbingSet, ResumeJobRequest,
    SkippedPicture, Stage, StageTime, Target, UnitResult, Usage, WatchJobRequest, WatchJobResponse, job_event::Event,
};
use prost::Message as _;
use tonic::Status;

use crate::{
    args::{MeshArgs, Settings, TargetArgs, units},
    inputs::{Images, TargetFile, absolute},
    mesh::Mesh,
    out::{self, Folder, printable},
    problem::{INTERRUPTED, Problem, unless_interrupted},
    watch::Watch,
};

/// What to dissect.
#[derive(Debug, clap::Args)]
pub(crate) struct What {
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
    #[command(flatten)]
    settings: Settings,
}

/// What to dissect, looked at.
pub(crate) struct Inputs {
    target: TargetFile,
    images: Images,
    layers: Vec<LayerUnits>,
    parameters: Parameters,
}

impl What {
    /// Looks at the files.
    pub(crate) fn open(self) -> Result<Inputs, Problem> {
        let parameters = self.settings.parameters()?;
        let target = TargetFile::open(&self.target.target, &self.target.flags)?;
        let images = Images::open(&self.images)?;
        let units = self.units.unwrap_or_default().0;
        let layers = self.layer.iter().map(|layer| LayerUnits { layer: layer.trim().to_owned(), units: units.clone() }).collect();
        Ok(Inputs { target, images, layers, parameters })
    }
}

impl Inputs {
    /// The request for a job, and what of the pictures can't be read here. Its id says what is asked for and `place`: the same again is the same job.
    pub(crate) async fn request(self, mesh: &Mesh, place: &str) -> Result<(DissectRequest, Vec<SkippedPicture>), Problem> {
        let stamps = [place.to_owned(), self.target.stamp()?, self.images.stamp()?];
        let (set, skipped) = self.images.give(mesh).await?;
        let request = request(self.target.give(mesh).await?, self.layers, set, &self.parameters);
        let stamped = [request.encode_to_vec(), stamps.join("\n\n").into_bytes()].concat();
        Ok((DissectRequest { request_id: blobs::digest(&stamped), ..request }, skipped))
    }
}

/// Labels units of a network's layers, and leaves the labels with all their evidence in a folder. What was broken off goes on with the same command.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    what: What,
    /// Folder for the results
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace results that are in the folder already, and make everything anew
    #[arg(long)]
    fresh: bool,
    /// Try the failed units of the run in the folder again
    #[arg(long, conflicts_with = "fresh")]
    failed: bool,
    /// Only say what there is to do, and from a trial of one unit how much space and time it will take
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    mesh: MeshArgs,
}

/// Units of a flag.
#[derive(Debug, Clone, Default)]
pub(crate) struct Units(pub(crate) Vec<u32>);

pub(crate) fn units_of(text: &str) -> Result<Units, String> {
    units(text).map(Units)
}

/// Pictures that a trial probes.
const TRIAL_PICTURES: usize = 64;
/// How often a stream of events that breaks off is taken up again without anything having come of it, and how long after.
const TRIES: u32 = 60;
const AGAIN: Duration = Duration::from_secs(1);

pub(crate) async fn run(mut args: Args) -> Result<ExitCode, Problem> {
    let inputs = args.what.open()?;
    if args.dry_run {
        return unless_interrupted(dry_run(&args.mesh, inputs)).await;
    }
    let mut folder = Folder::new(&args.out, args.fresh || args.failed)?;
    let own = Folder::data(&args.out);
    if args.fresh && own.exists() {
        fs::remove_dir_all(&own).map_err(|e| Problem::file(&own, &e))?;
    }
    let first = !own.exists();
    args.mesh.data.data.get_or_insert_with(|| own.clone());
    let place = absolute(&args.out)?.display().to_string();
    let begun = unless_interrupted(async {
        let mesh = Mesh::open(&args.mesh).await?;
        let (request, skipped) = inputs.request(&mesh, &place).await?;
        for skipped in skipped {
            eprintln!("skipped {}: {}", printable(&skipped.path), printable(&skipped.reason));
            folder.skipped(skipped);
        }
        let job = begin(&mesh, request, args.fresh, args.failed).await?;
        Ok((mesh, job))
    })
    .await;
    if begun.is_err() && first && own.exists() {
        // A run that never began leaves nothing; a folder in which there is more stays.
        let _ = fs::remove_dir_all(&own).and_then(|()| fs::remove_dir(&args.out));
    }
    let (mesh, job) = begun?;
    let Ran { folder, interrupted, .. } = follow_to_the_end(mesh, &job, folder).await?;
    summarise(&folder, interrupted)
}

/// A request for a job that nobody else will find.
pub(crate) fn request(target: Target, layers: Vec<LayerUnits>, set: ProbingSet, parameters: &Parameters) -> DissectRequest {
    DissectRequest { target: Some(target), layers, probing_set: Some(set), parameters: Some(to_message(parameters)), ..Default::default() }
}

/// The job of a request, which runs: a new one, or one that had been stopped. A `fresh` one has no past; of one with a past `failed` units are tried again.
pub(crate) async fn begin(mesh: &Mesh, request: DissectRequest, fresh: bool, failed: bool) -> Result<Job, Problem> {
    let mut service = mesh.dissect.clone();
    let mut job = create(mesh, request.clone()).await?;
    if fresh && job.last_event > 1 {
        service.delete_job(DeleteJobRequest { job_id: job.job_id }).await?;
        job = create(mesh, request).await?;
    }
    if failed || matches!(job.state(), JobState::Paused | JobState::Cancelled | JobState::Failed) {
        let resumed = service.resume_job(ResumeJobRequest { job_id: job.job_id.clone(), failed }).await?.into_inner();
        job = resumed.job.unwrap_or(job);
    }
    Ok(job)
}

/// Creates the job of a request, or finds it.
pub(crate) async fn create(mesh: &Mesh, request: DissectRequest) -> Result<Job, Problem> {
    let created = mesh.dissect.clone().create_job(CreateJobRequest { request: Some(request) }).await?.into_inner();
    created.job.ok_or_else(|| Problem::failure("the mesh created a job without saying which"))
}

/// A run that has ended.
pub(crate) struct Ran {
    pub(crate) folder: Folder,
    pub(crate) mesh: Mesh,
    /// By Ctrl-C, before all units were finished.
    pub(crate) interrupted: bool,
}

/// Runs a new job, as [`follow_to_the_end`] does.
pub(crate) async fn dissect(mesh: Mesh, request: DissectRequest, folder: Folder) -> Result<Ran, Problem> {
    let job = unless_interrupted(create(&mesh, request)).await?;
    follow_to_the_end(mesh, &job, folder).await
}

/// Keeps what a job gives, until it is done or Ctrl-C cancels it.
async fn follow_to_the_end(mut mesh: Mesh, job: &Job, mut folder: Folder) -> Result<Ran, Problem> {
    let mut watch = Watch::new();
    let ended = tokio::select! {
        ended = follow(job, &mut mesh, &mut folder, &mut watch) => Some(ended),
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
        None => {
            mesh.dissect.cancel_job(CancelJobRequest { job_id: job.job_id.clone() }).await?;
            if !folder.has_begun() {
                return Err(Problem::interrupted());
            }
            folder.finish(None)?;
            Ok(Ran { folder, mesh, interrupted: true })
        }
    }
}

/// Keeps what a job gives, from its beginning to its end, or until it waits for someone. What it told of before it was resumed last is its past.
async fn follow(job: &Job, mesh: &mut Mesh, folder: &mut Folder, watch: &mut Watch) -> Result<JobDone, Problem> {
    let (mut after, mut tries) = (0, TRIES);
    loop {
        let status = match follow_from(job, &mut after, &mut tries, mesh, folder, watch).await? {
            Followed::Done(done) => return Ok(done),
            Followed::Broken(status) => status,
        };
        if tries == 0 || !is_away(&status) {
            return Err(status.into());
        }
        tries -= 1;
        tokio::time::sleep(AGAIN).await;
    }
}

enum Followed {
    Done(JobDone),
    Broken(Status),
}

async fn follow_from(job: &Job, after: &mut u64, tries: &mut u32, mesh: &mut Mesh, folder: &mut Folder, watch: &mut Watch) -> Result<Followed, Problem> {
    let request = WatchJobRequest { job_id: job.job_id.clone(), after: *after };
    let mut events = match mesh.dissect.watch_job(request).await {
        Ok(events) => events.into_inner(),
        Err(status) => return Ok(Followed::Broken(status)),
    };
    loop {
        let event = match events.message().await {
            Ok(Some(WatchJobResponse { event })) => event.unwrap_or_default(),
            Ok(None) => return Ok(Followed::Broken(Status::unavailable("the mesh ended the job without saying that it is done"))),
            Err(status) => return Ok(Followed::Broken(status)),
        };
        *tries = TRIES;
        let told = std::mem::replace(after, event.number.max(*after));
        let is_past = event.number < job.last_event;
        match event.event {
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
            Some(Event::Unit(unit)) => match folder.unit(unit, &mut mesh.pictures).await {
                // It is told of again, and then its pictures are asked for again.
                Err(problem) if problem.is_away() => {
                    *after = told;
                    return Ok(Followed::Broken(Status::unavailable(problem.to_string())));
                }
                kept => kept?,
            },
            Some(Event::Paused(JobPaused { by_itself: false, message, .. })) if !is_past => return Err(Problem::failure(message)),
            Some(Event::Paused(paused)) => watch.say(&format!("paused: {}", paused.message)),
            Some(Event::Resumed(resumed)) => {
                watch.say("the job goes on");
                if resumed.retried > 0 {
                    folder.retried();
                }
            }
            Some(Event::Done(done)) if !is_past => {
                for warning in &done.warnings {
                    watch.say(&format!("warning: {warning}"));
                }
                return Ok(Followed::Done(done));
            }
            Some(Event::Done(_)) | None => {}
        }
    }
}

/// Keeps what a job has given so far.
pub(crate) async fn export(job: &Job, mesh: &mut Mesh, folder: &mut Folder) -> Result<(), Problem> {
    let mut events = mesh.dissect.watch_job(WatchJobRequest { job_id: job.job_id.clone(), after: 0 }).await?.into_inner();
    let mut last = 0;
    while last < job.last_event
        && let Some(WatchJobResponse { event }) = events.message().await?
    {
        let event = event.unwrap_or_default();
        last = event.number.max(last);
        match event.event {
            Some(Event::Accepted(accepted)) => folder.accepted(accepted)?,
            Some(Event::Progress(progress)) => folder.used(progress.usage),
            Some(Event::Skipped(skipped)) => folder.skipped(skipped),
            Some(Event::Unit(unit)) => folder.unit(unit, &mut mesh.pictures).await?,
            Some(Event::Resumed(resumed)) if resumed.retried > 0 => folder.retried(),
            _ => {}
        }
    }
    folder.finish(job.done.as_ref())
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
async fn dry_run(args: &MeshArgs, inputs: Inputs) -> Result<ExitCode, Problem> {
    let Inputs { target, images, layers, parameters } = inputs;
    let trial = tempfile::tempdir().map_err(|e| Problem::failure(e.to_string()))?;
    let (sample, pictures) = images.sample(TRIAL_PICTURES)?;
    let sampled = Images::open(&[sample.path().to_owned()])?;
    let mut mesh = Mesh::open(args).await?;
    let given = target.give(&mesh).await?;
    let (set, _) = sampled.give(&mesh).await?;
    let all = units_of_job(&mesh, request(given.clone(), layers, set.clone(), &parameters)).await?;
    let count: usize = all.iter().map(|layer| layer.units.len()).sum();
    let firsts = all.iter().map(|layer| LayerUnits { layer: layer.layer.clone(), units: layer.units.iter().take(1).copied().collect() }).collect();
    let mut folder = Folder::new(trial.path(), true)?;
    let mut watch = Watch::new();
    let job = create(&mesh, request(given, firsts, set, &parameters)).await?;
    let done = follow(&job, &mut mesh, &mut folder, &mut watch).await;
    watch.end();
    mesh.dissect.delete_job(DeleteJobRequest { job_id: job.job_id }).await?;
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
    let job = create(mesh, request).await?;
    mesh.dissect.clone().delete_job(DeleteJobRequest { job_id: job.job_id }).await?;
    Ok(job.accepted.unwrap_or_default().layers)
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
