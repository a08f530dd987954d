//! What becomes of a job where what it makes can't be kept: it waits, loses nothing, and goes on when there is room.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod stand_ins;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use dnd_mesh::{
    blobs::{self, ObjectArgs},
    server::InProcess,
};
use dnd_orchestrator::{DataArgs, OrchestratorArgs, ProbingArgs};
use dnd_proto::v1::{
    CreateJobRequest, DeleteJobRequest, DissectRequest, JobPaused, Parameters, SelectConceptRequest, UnitResult, UnitState, WatchJobRequest,
    dissect_service_client::DissectServiceClient, job_event::Event, select_concept_request::Images,
};
use sqlx::{Connection as _, Row as _, SqliteConnection};
use tonic::transport::Channel;
use url::Url;

use stand_ins::{Behaviour, Fakes, orchestrator, request};

type Client = DissectServiceClient<Channel>;

/// A drawn picture that takes some room, and is no other's.
fn large_drawing(concept: &str, index: u32) -> Option<Bytes> {
    Some(format!("picture {index} drawn of {concept} ").repeat(2500).into())
}

fn data(folder: &Path) -> DataArgs {
    DataArgs { data: Some(folder.to_owned()), ..Default::default() }
}

fn client(server: &InProcess) -> Client {
    DissectServiceClient::new(server.channel())
}

async fn create(client: &mut Client, request: DissectRequest) -> String {
    client.create_job(CreateJobRequest { request: Some(request) }).await.unwrap().into_inner().job.unwrap().job_id
}

/// What is told of a job after the event of that number until one that `last` gives something of.
async fn watch<T>(client: &mut Client, job_id: &str, after: &mut u64, mut last: impl FnMut(Event) -> Option<T>) -> T {
    let mut events = client.watch_job(WatchJobRequest { job_id: job_id.to_owned(), after: *after }).await.unwrap().into_inner();
    loop {
        let told = tokio::time::timeout(Duration::from_secs(60), events.message()).await.expect("nothing happens in a job").unwrap();
        let event = told.unwrap().event.unwrap();
        *after = event.number.max(*after);
        if let Some(found) = last(event.event.unwrap()) {
            return found;
        }
    }
}

async fn paused(client: &mut Client, job_id: &str, after: &mut u64) -> JobPaused {
    watch(client, job_id, after, |event| if let Event::Paused(paused) = event { Some(paused) } else { None }).await
}

/// All units of a job, each told once, when it is done.
async fn done(client: &mut Client, job_id: &str) -> Vec<UnitResult> {
    let mut units = Vec::new();
    watch(client, job_id, &mut 0, |event| match event {
        Event::Unit(unit) => {
            units.push(unit);
            None
        }
        Event::Done(done) => Some(done),
        _ => None,
    })
    .await;
    units.sort_by_key(|unit| unit.unit);
    units
}

/// A small disk of its own; only who may mount one has it.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf, size: &str) -> Option<Self> {
        fs::create_dir(&at).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", size, "tmpfs"]).arg(&at).output().is_ok_and(|ran| ran.status.success());
        mounted.then_some(Self(at))
    }

    fn becomes(&self, options: &str) {
        let status = Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.0).status().unwrap();
        assert!(status.success(), "{options}");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn parameters() -> Parameters {
    Parameters { images_per_concept: Some(4), ..Default::default() }
}

/// What a job on these units gives where nothing is in its way.
async fn undisturbed(behaviour: Behaviour, units: Vec<u32>) -> Vec<UnitResult> {
    let models = Fakes(Arc::new(behaviour)).start();
    let server = orchestrator(&models, &DataArgs::default(), &OrchestratorArgs::default()).await;
    let mut client = client(&server);
    let id = create(&mut client, request(units, parameters())).await;
    done(&mut client, &id).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_pauses_while_its_disk_is_full_or_read_only_and_goes_on_when_it_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(folder.path().join("disk"), "size=256k") else { return };
    let behaviour = || Behaviour { drawing: Some(large_drawing), ..Default::default() };
    let whole = undisturbed(behaviour(), vec![0, 1, 2]).await;
    let models = Fakes(Arc::new(behaviour())).start();
    disk.becomes("ro");
    let objects = ObjectArgs { objects: Some(Url::from_directory_path(&disk.0).unwrap()) };
    let server = orchestrator(&models, &DataArgs { objects, ..data(&folder.path().join("data")) }, &OrchestratorArgs::default()).await;
    let (mut client, mut seen) = (client(&server), 0);
    let id = create(&mut client, request(vec![0, 1, 2], parameters())).await;
    for (state, next, message) in [("a read-only disk", "rw", "Read-only file system"), ("a full disk", "size=16m", "No space left")] {
        let paused = paused(&mut client, &id, &mut seen).await;
        assert!(paused.reason == "STORAGE" && paused.by_itself && paused.message.contains(message), "{state}: {paused:?}");
        disk.becomes(next);
    }
    assert!(done(&mut client, &id).await == whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_database_has_no_room_goes_on_when_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(folder.path().join("disk"), "size=512k") else { return };
    let units: Vec<u32> = (0..60).collect();
    let whole = undisturbed(Behaviour::default(), units.clone()).await;
    let models = Fakes(Arc::default()).start();
    let args = OrchestratorArgs { lease: 1.try_into().unwrap(), ..Default::default() };
    let server = orchestrator(&models, &data(&disk.0), &args).await;
    let mut client = client(&server);
    let id = create(&mut client, request(units, parameters())).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let more = disk.0.join("more");
    assert!(fs::write(&more, vec![0; 1 << 16]).is_err(), "the disk is full");
    fs::remove_file(more).unwrap();
    disk.becomes("size=64m");
    assert!(done(&mut client, &id).await == whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_has_no_room_left_waits_until_another_is_deleted() {
    let folder = tempfile::tempdir().unwrap();
    // Each unit has a concept of its own, whose pictures take 0.4 MB together.
    let behaviour = Behaviour {
        own_pictures: true,
        caption: Some(|picture| Ok(format!("circles {:.8}", blobs::digest(picture)))),
        summary: Some(|request| request.descriptions.iter().min().unwrap().clone()),
        drawing: Some(large_drawing),
        ..Default::default()
    };
    let models = Fakes(Arc::new(behaviour)).start();
    let args = OrchestratorArgs { units_in_flight: 1.try_into().unwrap(), ..Default::default() };
    let server = orchestrator(&models, &DataArgs { keep_bytes: Some("2MB".parse().unwrap()), ..data(folder.path()) }, &args).await;
    let mut client = client(&server);
    let first = create(&mut client, request((0..4).collect(), parameters())).await;
    done(&mut client, &first).await;
    let second = create(&mut client, request((10..18).collect(), parameters())).await;
    let paused = paused(&mut client, &second, &mut 0).await;
    assert!(paused.reason == "NO_ROOM" && paused.by_itself && paused.message.contains("--keep-bytes"), "{paused:?}");
    client.delete_job(DeleteJobRequest { job_id: first }).await.unwrap();
    let units = done(&mut client, &second).await;
    assert!(units.len() == 8 && units.iter().all(|unit| unit.state() == UnitState::Labelled), "{units:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_orchestrator_dies_while_it_merges_the_shards_goes_on_with_them() {
    const UNITS: u32 = 1500;
    let units: Vec<u32> = (0..UNITS).collect();
    let whole = undisturbed(Behaviour { live: Some(5), ..Default::default() }, units.clone()).await;
    let folder = tempfile::tempdir().unwrap();
    let fakes = Fakes(Arc::new(Behaviour { live: Some(5), shard_pictures: Some(1), ..Default::default() }));
    let models = fakes.start();
    // One unit at a time: while the pass is in work, no other is.
    let args = OrchestratorArgs { lease: 1.try_into().unwrap(), units_in_flight: 1.try_into().unwrap(), ..Default::default() };
    let server = orchestrator(&models, &data(folder.path()), &args).await;
    let id = create(&mut client(&server), request(units, parameters())).await;
    let mut store = SqliteConnection::connect(&format!("sqlite:{}", folder.path().join("store.sqlite").display())).await.unwrap();
    let count = "SELECT COUNT(*) FILTER (WHERE stage > 0), COUNT(*) FILTER (WHERE place = 0) FROM units";
    loop {
        let row = sqlx::query(count).fetch_one(&mut store).await.unwrap();
        let (merged, passes): (i64, i64) = (row.get(0), row.get(1));
        if merged > 0 {
            assert!(merged < i64::from(UNITS) && passes == 1, "{merged} units are merged");
            break;
        }
    }
    drop(server);
    let row = sqlx::query(count).fetch_one(&mut store).await.unwrap();
    let (merged, passes): (i64, i64) = (row.get(0), row.get(1));
    assert!(merged < i64::from(UNITS) && passes == 1, "{merged} units are merged: it died too late");
    let server = orchestrator(&models, &data(folder.path()), &args).await;
    assert!(done(&mut client(&server), &id).await == whole, "as where nobody dies");
    assert_eq!(fakes.0.probes.load(Ordering::Relaxed), 3, "no shard is run again");
}

/// An orchestrator, with its models, of a probing set of a hundred shards, of which sixteen are run at a time.
async fn many_shards(folder: &Path) -> (InProcess, InProcess) {
    let models = Fakes(Arc::new(Behaviour { large_set: true, shard_pictures: Some(1000), ..Default::default() })).start();
    let probing = ProbingArgs { shards_in_flight: 16.try_into().unwrap(), ..Default::default() };
    // A pass that stands still is not taken up again by the end of its lease.
    let args = OrchestratorArgs { probing, lease: 3600.try_into().unwrap(), ..Default::default() };
    (orchestrator(&models, &data(folder), &args).await, models)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pass_is_told_of_while_its_shards_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (server, _models) = many_shards(folder.path()).await;
    let mut client = client(&server);
    let id = create(&mut client, request(vec![1, 2, 3], parameters())).await;
    assert_eq!(done(&mut client, &id).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_does_not_read_how_far_a_pass_is_holds_up_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let (server, _models) = many_shards(folder.path()).await;
    let mut client = client(&server);
    let mut unread = Vec::new();
    for unit in 0..8 {
        let DissectRequest { target, probing_set, parameters, .. } = request(vec![unit], parameters());
        let concepts = vec!["circles".into()];
        let select = SelectConceptRequest { target, layer: "layer".into(), unit, concepts, images: Some(Images::ProbingSet(probing_set.unwrap())), parameters };
        unread.push(client.select_concept(select).await.unwrap());
    }
    let id = create(&mut client, request(vec![100, 101, 102], parameters())).await;
    assert_eq!(done(&mut client, &id).await.len(), 3);
    drop(unread);
}
