//! A job as large as they come: memory stays flat, and what is there of it is told quickly.
#![allow(clippy::unwrap_used, clippy::panic)]

mod stand_ins;

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use dnd_mesh::server::{InProcess, Services};
use dnd_orchestrator::{Data, DataArgs, Models, OrchestratorArgs, WorksOn, add_to};
use dnd_proto::v1::{
    CreateJobRequest, DissectRequest, GetJobRequest, JobState, LayerUnits, ListJobsRequest, ListUnitsRequest, Parameters, ProbingSet, SummarizeRequest, Target,
    dissect_service_client::DissectServiceClient,
};

use stand_ins::{Behaviour, Fakes, png};

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

fn size(folder: &Path) -> u64 {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes some minutes: 30,000 units"]
async fn a_job_of_thirty_thousand_units_keeps_memory_flat_and_is_listed_quickly() {
    fn summary(request: &SummarizeRequest) -> String {
        ["red circles", "blue stars", "green stripes", "yellow squares", "white dots"][request.attempt as usize % 5].to_owned()
    }
    let drawing: fn(&str, u32) -> Option<bytes::Bytes> = |concept, index| Some(png(10 * concept.len() as u8 + index as u8));
    let fakes = Fakes(Arc::new(Behaviour { summary: Some(summary), drawing: Some(drawing), ..Default::default() }));
    let models = fakes.start();
    let folder = tempfile::tempdir().unwrap();
    let data = Data::open(&DataArgs { data: Some(folder.path().to_owned()), ..Default::default() }).await.unwrap();
    let channel = || models.channel().into();
    let models = Models::over(channel(), channel(), channel(), channel(), channel());
    let server = InProcess::start(add_to(Services::default(), models, data, &OrchestratorArgs::default(), WorksOn::AllJobs));
    let mut client = DissectServiceClient::new(server.channel());
    let request = DissectRequest {
        target: Some(Target { uri: "file:/somewhere/net.onnx".into(), ..Default::default() }),
        layers: vec![LayerUnits { layer: "layer".into(), units: (0..UNITS).collect() }],
        probing_set: Some(ProbingSet::default()),
        parameters: Some(Parameters::default()),
        ..Default::default()
    };
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
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!("{} bytes of the store a unit", size(folder.path()) / u64::from(UNITS));
    let quick = |what: &str, since: Instant| {
        println!("{what} in {:?}", since.elapsed());
        assert!(since.elapsed() < QUICK, "{what}");
    };
    let since = Instant::now();
    client.list_jobs(ListJobsRequest::default()).await.unwrap();
    quick("jobs listed", since);
    let since = Instant::now();
    let page = client.list_units(ListUnitsRequest { job_id: id.clone(), page_token: "29000".into(), ..Default::default() }).await.unwrap().into_inner();
    assert_eq!(page.units.len(), 1000);
    quick("the last page of units listed", since);
    let since = Instant::now();
    client.list_units(ListUnitsRequest { job_id: id, text: "no such label".into(), ..Default::default() }).await.unwrap();
    quick("all labels searched", since);
    assert!(measured[2] <= measured[0] + MORE, "{measured:?}");
}
