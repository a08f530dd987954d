//! `dnd jobs`: jobs of an orchestrator, or of a data folder.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use dnd_mesh::program::ExitCode;

use dnd_proto::v1::{
    CancelJobRequest, DeleteJobRequest, GetJobRequest, Job, JobState, ListJobsRequest, ListUnitsRequest, ResumeJobRequest, UnitCounts, UnitState, UnitSummary,
    WatchJobRequest, job_event::Event,
};
use dnd_results::Format;
use indicatif::HumanDuration;
use serde::Serialize;
use tonic::metadata::MetadataMap;

use super::dissect::{self, What, begin, outcome};
use crate::{
    args::JobsArgs,
    mesh::Mesh,
    out::{Folder, print_parts, printable, write_parts},
    problem::Problem,
    watch,
};

/// Jobs of an orchestrator (--endpoint), or of a data folder (--data).
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Create a job at an orchestrator and come back; the same again finds the same job
    Create(Box<CreateArgs>),
    /// List the jobs, the newest first
    List(ListArgs),
    /// Show how a job stands, and what failed in it
    Show(OneArgs),
    /// Follow what happens in a job until it ends
    Watch(WatchArgs),
    /// Stop a job; what is finished stays
    Cancel(OneArgs),
    /// Let a job go on that is paused, cancelled or failed
    Resume(ResumeArgs),
    /// Delete a job and its results
    Delete(OneArgs),
    /// Write the results of a job, as far as they are there: a folder with all of them, or one file for another program
    Export(ExportArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    what: What,
    /// Print the job as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    jobs: JobsArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    /// Jobs at most
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    most: u32,
    /// Print them as JSON, one a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    jobs: JobsArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct OneArgs {
    /// The job's id
    id: String,
    /// Print the job as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    jobs: JobsArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct WatchArgs {
    /// The job's id
    id: String,
    /// Number of the last event that was seen: those after it are told
    #[arg(long, default_value_t = 0, value_name = "NUMBER")]
    after: u64,
    /// Print the events as JSON, one a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    jobs: JobsArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ResumeArgs {
    /// The job's id
    id: String,
    /// Try its failed units again, too
    #[arg(long)]
    failed: bool,
    /// Print the job as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    jobs: JobsArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ExportArgs {
    /// The job's id
    id: String,
    /// Write one file of this format, of the units that have ended; by default a folder with results, table, report and pictures, as `dnd dissect` leaves it
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Only the units of this layer
    #[arg(long, value_name = "NAME", requires = "format", default_value = "", hide_default_value = true)]
    layer: String,
    /// Folder for the results; with --format the file, by default standard output
    #[arg(long, value_name = "PATH", required_unless_present = "format")]
    out: Option<PathBuf>,
    /// Replace results that are there already
    #[arg(long)]
    fresh: bool,
    #[command(flatten)]
    jobs: JobsArgs,
}

/// Failed units that are shown.
const SHOWN: u32 = 20;

pub(crate) async fn run(command: Command) -> Result<ExitCode, Problem> {
    match command {
        Command::Create(args) => create(*args).await?,
        Command::List(args) => list(args).await?,
        Command::Show(args) => show(args).await?,
        Command::Watch(args) => watch(args).await?,
        Command::Cancel(args) => {
            let mut mesh = Mesh::of_jobs(&args.jobs).await?;
            tell(mesh.dissect.cancel_job(CancelJobRequest { job_id: args.id }).await?.into_inner().job, args.json)?;
        }
        Command::Resume(args) => {
            let mut mesh = Mesh::of_jobs(&args.jobs).await?;
            let request = ResumeJobRequest { job_id: args.id, failed: args.failed };
            let job = mesh.dissect.resume_job(request).await?.into_inner().job;
            let waits = job.as_ref().is_some_and(|job| job.state() == JobState::Running) && args.jobs.endpoint.is_none();
            tell(job, args.json)?;
            if waits {
                eprintln!("it goes on with the `dnd dissect` that it is of, or with a `dnd up` or orchestrator on this --data");
            }
        }
        Command::Delete(args) => {
            let mut mesh = Mesh::of_jobs(&args.jobs).await?;
            mesh.dissect.delete_job(DeleteJobRequest { job_id: args.id }).await?;
        }
        Command::Export(args) => export(args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn export(args: ExportArgs) -> Result<(), Problem> {
    let mut mesh = Mesh::of_jobs(&args.jobs).await?;
    let job = get(&mesh, &args.id).await?;
    match (args.format, args.out) {
        (Some(format), out) => {
            let results = dnd_results::Mesh { dissect: mesh.dissect.clone(), pictures: mesh.pictures.clone(), metadata: MetadataMap::new() };
            let parts = dnd_results::export(results, job, format, args.layer)?;
            match out {
                Some(path) => write_parts(&path, args.fresh, parts).await,
                None => print_parts(parts).await,
            }
        }
        (None, Some(out)) => {
            let mut folder = Folder::new(&out, args.fresh)?;
            dissect::export(&job, &mut mesh, &mut folder).await?;
            println!("{} units of {} in {}", folder.units().len(), counts(&job).total, out.display());
            Ok(())
        }
        (None, None) => Err(Problem::input("--out is not given: it names the folder for the results")),
    }
}

async fn create(args: CreateArgs) -> Result<(), Problem> {
    let inputs = args.what.open()?;
    if args.jobs.endpoint.is_none() {
        return Err(Problem::input("a job is created at an orchestrator: name one with --endpoint; `dnd dissect` works in its own process"));
    }
    let mesh = Mesh::of_jobs(&args.jobs).await?;
    let (request, skipped) = inputs.request(&mesh, "").await?;
    skipped.iter().for_each(|skipped| eprintln!("skipped {}: {}", skipped.path, skipped.reason));
    let job = begin(&mesh, request, false, false).await?;
    if args.json {
        return json(&job);
    }
    println!("{}", job.job_id);
    Ok(())
}

async fn get(mesh: &Mesh, id: &str) -> Result<Job, Problem> {
    let job = mesh.dissect.clone().get_job(GetJobRequest { job_id: id.to_owned() }).await?.into_inner().job;
    job.ok_or_else(|| Problem::failure("the mesh answered without a job"))
}

async fn list(args: ListArgs) -> Result<(), Problem> {
    let mut mesh = Mesh::of_jobs(&args.jobs).await?;
    let jobs = mesh.dissect.list_jobs(ListJobsRequest { page_size: args.most, page_token: String::new() }).await?.into_inner().jobs;
    if args.json {
        return jobs.iter().try_for_each(json);
    }
    println!("{:<36}  {:<9}  {:>15}  {:>7}  {:<24}  created", "job", "state", "units", "failed", "target");
    for job in &jobs {
        let UnitCounts { total, labelled, dead, failed } = counts(job);
        let units = format!("{}/{total}", labelled + dead + failed);
        let target: String = printable(&job.target_name).chars().take(24).collect();
        println!("{:<36}  {:<9}  {units:>15}  {failed:>7}  {target:<24}  {}", job.job_id, state(job), age(job));
    }
    Ok(())
}

async fn show(args: OneArgs) -> Result<(), Problem> {
    let mut mesh = Mesh::of_jobs(&args.jobs).await?;
    let job = get(&mesh, &args.id).await?;
    if args.json {
        return json(&job);
    }
    tell(Some(job.clone()), false)?;
    let UnitCounts { total, labelled, dead, failed } = counts(&job);
    println!("units    {total}: {labelled} labelled, {dead} dead, {failed} failed");
    let progress: Vec<String> = job.progress.iter().map(|stage| format!("{} {}/{}", watch::name(stage.stage()), stage.done, stage.total)).collect();
    println!("stages   {}", progress.join("  "));
    println!("created  {}", age(&job));
    let request = ListUnitsRequest { job_id: args.id, page_size: SHOWN, state: UnitState::Failed.into(), ..Default::default() };
    let units = mesh.dissect.list_units(request).await?.into_inner().units;
    for UnitSummary { layer, unit, reason, message, attempts, .. } in &units {
        println!("failed   {layer} unit {unit} after {attempts} attempts: {} ({reason})", printable(message));
    }
    if failed > units.len() as u64 {
        println!("         and {} more", failed - units.len() as u64);
    }
    Ok(())
}

async fn watch(args: WatchArgs) -> Result<(), Problem> {
    let mut mesh = Mesh::of_jobs(&args.jobs).await?;
    let mut events = mesh.dissect.watch_job(WatchJobRequest { job_id: args.id, after: args.after }).await?.into_inner();
    let mut bars = watch::Watch::new();
    while let Some(event) = events.message().await?.and_then(|response| response.event) {
        if args.json {
            json(&event)?;
            continue;
        }
        match event.event {
            Some(Event::Progress(progress)) => bars.progress(&progress),
            Some(Event::Unit(unit)) => bars.say(&format!("{} unit {}: {}", unit.layer, unit.unit, outcome(&unit).trim_end())),
            Some(Event::Skipped(skipped)) => bars.say(&format!("skipped {}: {}", skipped.path, skipped.reason)),
            Some(Event::Paused(paused)) => bars.say(&format!("paused: {}", paused.message)),
            Some(Event::Resumed(_)) => bars.say("the job goes on"),
            Some(Event::Done(done)) => {
                let how = if done.cancelled { "cancelled" } else { "done" };
                bars.say(&format!("{how}: {} labelled, {} dead, {} failed", done.labelled, done.dead, done.failed));
            }
            Some(Event::Accepted(_)) | None => {}
        }
    }
    bars.end();
    Ok(())
}

fn tell(job: Option<Job>, as_json: bool) -> Result<(), Problem> {
    let job = job.ok_or_else(|| Problem::failure("the mesh answered without a job"))?;
    if as_json {
        return json(&job);
    }
    println!("job      {}", job.job_id);
    match job.reason.as_str() {
        "" => println!("state    {}", state(&job)),
        reason => println!("state    {}: {} ({reason})", state(&job), printable(&job.message)),
    }
    Ok(())
}

fn json(value: &impl Serialize) -> Result<(), Problem> {
    println!("{}", serde_json::to_string(value).map_err(|e| Problem::failure(format!("it can't be written as JSON: {e}")))?);
    Ok(())
}

fn counts(job: &Job) -> UnitCounts {
    job.units.unwrap_or_default()
}

fn state(job: &Job) -> &'static str {
    match job.state() {
        JobState::Unspecified => "?",
        JobState::Running => "running",
        JobState::Paused => "paused",
        JobState::Done => "done",
        JobState::Cancelled => "cancelled",
        JobState::Failed => "failed",
    }
}

fn age(job: &Job) -> String {
    let created = job.created_at.as_ref().map_or(UNIX_EPOCH, |at| UNIX_EPOCH + Duration::from_secs(at.seconds.max(0) as u64));
    format!("{} ago", HumanDuration(SystemTime::now().duration_since(created).unwrap_or_default()))
}
