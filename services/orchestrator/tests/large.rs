//! A job as large as they come: memory stays flat, and what is there of it is told quickly.
#![allow(clippy::unwrap_used, clippy::panic)]

mod stand_ins;

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use dnd_orchestrator::{DataArgs, OrchestratorArgs};
use dnd_proto::v1::{
    CreateJobRequest, GetJobRequest, GetUnitRequest, JobState, ListJobsRequest, ListUnitsRequest, Parameters, SummarizeRequest,
    dissect_service_client::DissectServiceClient,
};

use stand_ins::{Behaviour, Fakes, orchestrator, request};

const UNITS: u32 = 30_000;
/// Mebibytes that the process may have more at its end than at a tenth of the job.
const MORE: u64 = 64;
const QUICK: Duration = Duration::from_secs(2);

/// The memory of this process in mebibytes.
fn memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// Bytes of the database, and of the pictures.
fn sizes(folder: &Path) -> (u64, u64) {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let (database, pictures): (Vec<_>, Vec<_>) = files.partition(|file| file.file_name().to_string_lossy().starts_with("store.sqlite"));
    let size = |files: Vec<fs::DirEntry>| files.iter().map(|file| file.metadata().unwrap().len()).sum();
    (size(database), size(pictures))
}

/// What the stand-ins make is told by what they are asked, so that units have some of it in common, and much not.
fn hash(of: &[u8]) -> usize {
    of.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)) as usize >> 8
}

const COLOURS: [&str; 10] = ["red", "blue", "green", "yellow", "white", "black", "orange", "purple", "brown", "grey"];
const SHAPES: [&str; 5] = ["circles", "stars", "stripes", "squares", "dots"];

fn words(of: &[u8]) -> String {
    format!("{} {}", COLOURS[hash(of) % COLOURS.len()], SHAPES[hash(of) / 16 % SHAPES.len()])
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes some minutes: 30,000 units"]
async fn a_job_of_thirty_thousand_units_on_a_hundred_thousand_pictures_keeps_memory_flat_and_is_listed_quickly() {
    fn summary(request: &SummarizeRequest) -> String {
        words(request.descriptions[request.attempt as usize % request.descriptions.len()].as_bytes())
    }
    let fakes = Fakes(Arc::new(Behaviour {
        large_set: true,
        caption: Some(|picture| Ok(words(picture))),
        summary: Some(summary),
        drawing: Some(|concept, index| Some(format!("picture {index} drawn of {concept}").into())),
        activation: Some(|picture| (hash(picture) % 1000) as f32),
        ..Default::default()
    }));
    let models = fakes.start();
    let folder = tempfile::tempdir().unwrap();
    let server = orchestrator(&models, &DataArgs { data: Some(folder.path().to_owned()), ..Default::default() }, &OrchestratorArgs::default()).await;
    let mut client = DissectServiceClient::new(server.channel());
    let request = request((0..UNITS).collect(), Parameters::default());
    let since = Instant::now();
    let id = client.create_job(CreateJobRequest { request: Some(request) }).await.unwrap().into_inner().job.unwrap().job_id;
    println!("created in {:?}", since.elapsed());
    let mut marks = [10, 50, 100].into_iter().peekable();
    let mut measured = Vec::new();
    while let Some(percent) = marks.peek() {
        let job = client.get_job(GetJobRequest { job_id: id.clone() }).await.unwrap().into_inner().job.unwrap();
        let counts = job.units.unwrap();
        assert_ne!(job.state(), JobState::Failed, "{}", job.message);
        if counts.labelled + counts.dead + counts.failed >= u64::from(UNITS) * percent / 100 {
            println!("{percent} %: {} MiB after {:?}", memory(), since.elapsed());
            measured.push(memory());
            marks.next();
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let (database, pictures) = sizes(folder.path());
    println!("{} bytes of the database and {} of pictures a unit", database / u64::from(UNITS), pictures / u64::from(UNITS));
    let quick = |what: &str, since: Instant| {
        println!("{what} in {:?}", since.elapsed());
        assert!(since.elapsed() < QUICK, "{what}");
    };
    let since = Instant::now();
    client.list_jobs(ListJobsRequest::default()).await.unwrap();
    quick("jobs listed", since);
    let since = Instant::now();
    client.get_job(GetJobRequest { job_id: id.clone() }).await.unwrap();
    quick("the job shown", since);
    let since = Instant::now();
    client.get_unit(GetUnitRequest { job_id: id.clone(), layer: "layer".into(), unit: UNITS - 1 }).await.unwrap();
    quick("a unit shown", since);
    let since = Instant::now();
    let page = client.list_units(ListUnitsRequest { job_id: id.clone(), page_token: "29000".into(), ..Default::default() }).await.unwrap().into_inner();
    assert_eq!(page.units.len(), 1000);
    quick("the last page of units listed", since);
    let since = Instant::now();
    client.list_units(ListUnitsRequest { job_id: id, text: "no such label".into(), ..Default::default() }).await.unwrap();
    quick("all labels searched", since);
    assert!(measured[2] <= measured[0] + MORE, "{measured:?}");
}
