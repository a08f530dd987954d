//! A target runs in processes of its own: what it does to them is told of it, and costs nobody else anything.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use dnd_mesh::fault;
use dnd_proto::v1::{
    ActivationServiceGetModelRequest, DescribeTargetRequest, LayerUnits, Preprocessing, ProbeRequest, ProbedUnit, ProbingSet, ProbingSource, ResizeMode,
    Target, activation_service_client::ActivationServiceClient, probe_response::Event, probing_source::Source,
};
use dnd_testing::{by_hand, pictures, sketch, write_pictures};
use dnd_tests::{Service, get};
use tonic::{Code, Status, transport::Channel};

type Client = ActivationServiceClient<Channel>;

async fn client(service: &Service) -> Client {
    let mut client = ActivationServiceClient::new(Channel::from_shared(service.url()).unwrap().connect().await.unwrap());
    let since = Instant::now();
    while client.get_model(ActivationServiceGetModelRequest {}).await.is_err() {
        assert!(since.elapsed() < Duration::from_secs(60), "never ready: {}", service.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    client
}

fn uri(path: &Path) -> String {
    format!("file:{}", path.display())
}

/// A network by hand, written into a folder.
fn target(folder: &Path, name: &str, network: &[u8]) -> Target {
    let file = folder.join(name);
    fs::write(&file, network).unwrap();
    let preprocessing =
        Preprocessing { resize_mode: ResizeMode::Squash.into(), height: 4, width: 4, mean: vec![0.0; 3], std: vec![1.0; 3], ..Default::default() };
    Target { uri: uri(&file), preprocessing: Some(preprocessing), ..Default::default() }
}

fn planted() -> Target {
    Target { uri: uri(&sketch("targets/planted/planted.onnx")), ..Default::default() }
}

/// So many pictures of the sketch suite, in a folder.
fn probing_set(folder: &Path, count: usize) -> ProbingSet {
    let folder = folder.join("pictures");
    write_pictures(&folder, &pictures(count, 3));
    ProbingSet { sources: vec![ProbingSource { source: Some(Source::Uri(uri(&folder))) }] }
}

async fn describe(client: &mut Client, target: &Target) -> Result<(), Status> {
    client.describe_target(DescribeTargetRequest { target: Some(target.clone()), asked: vec![] }).await.map(drop)
}

async fn probe(client: &mut Client, target: Target, set: &ProbingSet, layer: &str) -> Result<Vec<ProbedUnit>, Status> {
    let layers = vec![LayerUnits { layer: layer.to_owned(), units: vec![] }];
    let request = ProbeRequest { target: Some(target), probing_set: Some(set.clone()), layers, ..Default::default() };
    let mut events = client.probe(request).await?.into_inner();
    let mut units = Vec::new();
    while let Some(response) = events.message().await? {
        units.extend(response.event.and_then(|event| if let Event::Unit(unit) = event { Some(unit) } else { None }));
    }
    Ok(units)
}

/// The processes of targets that a service has started.
fn processes_of(service: u32) -> Vec<u32> {
    let process = |entry: fs::DirEntry| -> Option<u32> {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let of = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse::<u32>().ok()?;
        (of == service && is_targets(&entry.path())).then_some(pid)
    };
    let mut found: Vec<u32> = fs::read_dir("/proc").unwrap().filter_map(|entry| process(entry.ok()?)).collect();
    found.sort_unstable();
    found
}

fn is_targets(process: &Path) -> bool {
    fs::read(process.join("cmdline")).is_ok_and(|line| line.starts_with(b"dnd-target\0"))
}

fn kill(process: u32) {
    assert!(Command::new("kill").args(["-KILL", &process.to_string()]).status().unwrap().success());
}

/// Waits until a service has other processes than it had; gives them.
async fn others(service: u32, than: &[u32]) -> Vec<u32> {
    let since = Instant::now();
    loop {
        let now = processes_of(service);
        if !now.is_empty() && !now.iter().any(|process| than.contains(process)) {
            return now;
        }
        assert!(since.elapsed() < Duration::from_secs(60), "{now:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn is(status: &Status, code: Code, reason: &str) {
    assert_eq!((status.code(), fault::reason_of(status).as_deref()), (code, Some(reason)), "{status:?}");
}

#[tokio::test]
async fn a_target_that_takes_too_much_or_never_ends_is_told_so_while_another_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let limits = ["--target-memory", "400", "--target-timeout", "6", "--threads", "2", "--sessions", "1"];
    let service = Service::start("dnd-activation", &[&limits[..], &["--admin", "127.0.0.1:0"]].concat());
    let (large, endless) = (target(folder.path(), "large.onnx", &by_hand::large(1700)), target(folder.path(), "endless.onnx", &by_hand::endless(-1.0)));
    let set = probing_set(folder.path(), 40);

    let (mut one, mut other) = (client(&service).await, client(&service).await);
    let since = Instant::now();
    let (late, good) = tokio::join!(describe(&mut one, &endless), async {
        let units = probe(&mut other, planted(), &set, "colour").await.unwrap();
        assert!(since.elapsed() < Duration::from_secs(6), "it was not held up: {:?}", since.elapsed());
        units
    });
    let late = late.unwrap_err();
    is(&late, Code::FailedPrecondition, "TARGET_TIMEOUT");
    assert!(late.message().contains("--target-timeout"), "{late:?}");
    assert_eq!(good.len(), 12);

    let status = describe(&mut one, &large).await.unwrap_err();
    is(&status, Code::FailedPrecondition, "TARGET_MEMORY");
    assert!(status.message().contains("its 400 MiB (--target-memory)"), "{status:?}");
    // That half of it is no more than a target may take.
    describe(&mut one, &target(folder.path(), "less.onnx", &by_hand::large(600))).await.unwrap();

    assert_eq!(probe(&mut one, planted(), &set, "colour").await.unwrap(), good, "the service is the same as before");
    let (_, measured) = get(&service.admin(), "/metrics");
    assert!(measured.contains("dnd_target_deaths_total{reason=\"timeout\"} 1"), "{measured}");
    assert_eq!(get(&service.admin(), "/readyz").0, 200);
}

#[tokio::test]
async fn processes_that_are_killed_under_a_pass_are_started_again_and_it_finds_what_it_would_have_found() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start("dnd-activation", &["--sessions", "2"]);
    let mut client = client(&service).await;
    let set = probing_set(folder.path(), 300);
    let undisturbed = probe(&mut client, planted(), &set, "mixture").await.unwrap();
    let first = processes_of(service.pid());
    assert_eq!(first.len(), 2, "one for each session");
    // Both are killed under a pass.
    let mut disturbed = client.clone();
    let again = tokio::spawn({
        let set = set.clone();
        async move { probe(&mut disturbed, planted(), &set, "mixture").await }
    });
    for process in &first {
        tokio::time::sleep(Duration::from_millis(60)).await;
        kill(*process);
    }
    assert_eq!(again.await.unwrap().unwrap(), undisturbed);
    // Those that were idle when it happened are found out by what comes next.
    assert_eq!(probe(&mut client, planted(), &set, "mixture").await.unwrap(), undisturbed);
    assert!(processes_of(service.pid()).iter().all(|process| !first.contains(process)));
}

#[tokio::test]
async fn a_target_whose_processes_die_again_and_again_is_refused_and_none_outlives_its_service() {
    let folder = tempfile::tempdir().unwrap();
    let mut service = Service::start("dnd-activation", &["--sessions", "1"]);
    let client = client(&service).await;
    // They hang on any picture that is not black, so that each kill meets them at work; one picture is one batch.
    let set = probing_set(folder.path(), 1);
    let hanging = async |name: &str, above: f32| {
        let target = target(folder.path(), name, &by_hand::endless(above));
        describe(&mut client.clone(), &target).await.unwrap();
        target
    };
    let ask = |target: &Target| {
        let (mut client, target, set) = (client.clone(), target.clone(), set.clone());
        tokio::spawn(async move { probe(&mut client, target, &set, "looped").await })
    };
    let first = hanging("first.onnx", 0.2).await;
    let mut killed = Vec::new();
    for (kills, code, reason) in [(2, Code::Aborted, "TARGET_DIED"), (1, Code::FailedPrecondition, "TARGET_REFUSED")] {
        let asked = ask(&first);
        for _ in 0..kills {
            let processes = others(service.pid(), &killed).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            processes.iter().copied().for_each(kill);
            killed.extend(processes);
        }
        let status = asked.await.unwrap().unwrap_err();
        is(&status, code, reason);
        assert_eq!(fault::retry_after(&status).is_some(), reason == "TARGET_REFUSED");
    }
    let status = ask(&first).await.unwrap().unwrap_err();
    is(&status, Code::FailedPrecondition, "TARGET_REFUSED");
    assert_eq!(probe(&mut client.clone(), planted(), &set, "colour").await.unwrap().len(), 12, "others are served");

    let known = processes_of(service.pid());
    let second = hanging("second.onnx", 0.3).await;
    let asked = ask(&second);
    let since = Instant::now();
    let working = loop {
        let working: Vec<u32> = processes_of(service.pid()).into_iter().filter(|process| !known.contains(process)).collect();
        if !working.is_empty() {
            break working;
        }
        assert!(since.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    tokio::time::sleep(Duration::from_millis(300)).await;
    service.kill();
    asked.await.unwrap().unwrap_err();
    let since = Instant::now();
    while working.iter().chain(&known).any(|process| is_targets(Path::new(&format!("/proc/{process}")))) {
        assert!(since.elapsed() < Duration::from_secs(10), "they outlive their service");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
