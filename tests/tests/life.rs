//! A service's life: health that follows its model, reflection, an end in order; and a job that outlives its caller, or does not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use dnd_proto::v1::{
    DissectRequest, LayerUnits, OnDisconnect, Parameters, ProbingSet, ProbingSource, Target, dissect_service_client::DissectServiceClient, job_event::Event,
    probing_source::Source,
};
use dnd_testing::sketch;
use dnd_tests::Service;
use tonic::transport::Channel;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

async fn channel(service: &Service) -> Channel {
    Channel::from_shared(service.url()).unwrap().connect().await.unwrap()
}

async fn serving(service: &Service, name: &str) {
    let mut health = HealthClient::new(channel(service).await);
    for _ in 0..600 {
        let status = health.check(HealthCheckRequest { service: name.to_owned() }).await.unwrap().into_inner().status();
        if status == ServingStatus::Serving {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{name} never served: {}", service.log());
}

#[tokio::test]
async fn a_service_serves_after_its_warm_up_answers_reflection_and_ends_in_order() {
    let model = sketch("captioner");
    let mut service = Service::start("dnd-captioner", &["--model", model.to_str().unwrap(), "--grace", "5"]);
    serving(&service, "dnd.v1.CaptionService").await;
    serving(&service, "").await;

    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient, server_reflection_request::MessageRequest,
        server_reflection_response::MessageResponse,
    };
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(MessageRequest::ListServices(String::new())) };
    let mut reflection = ServerReflectionClient::new(channel(&service).await);
    let mut answers = reflection.server_reflection_info(tokio_stream(request)).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = answers.message().await.unwrap().unwrap().message_response else { panic!("no list") };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"dnd.v1.CaptionService") && names.contains(&"grpc.health.v1.Health"), "{names:?}");
    drop((answers, reflection));

    assert_eq!(service.terminate(), Some(0), "{}", service.log());
    assert!(service.log().contains("stopping"), "{}", service.log());
}

#[test]
fn a_service_that_is_stopped_while_it_loads_its_model_ends_in_order_too() {
    let model = sketch("captioner");
    // A load takes some tenths of a second: its every part is met.
    for delay in (0..300).step_by(25) {
        let mut service = Service::start("dnd-captioner", &["--model", model.to_str().unwrap()]);
        thread::sleep(Duration::from_millis(delay));
        assert_eq!(service.terminate(), Some(0), "after {delay} ms: {}", service.log());
    }
}

fn tokio_stream<T: Send + 'static>(item: T) -> impl tonic::IntoStreamingRequest<Message = T> {
    tonic::Request::new(futures_once(item))
}

fn futures_once<T: Send + 'static>(item: T) -> impl futures::Stream<Item = T> + Send + 'static {
    futures::stream::iter([item])
}

#[test]
fn a_model_that_cannot_be_loaded_ends_its_service_with_why() {
    let folder = tempfile::tempdir().unwrap();
    let output =
        Command::new(dnd_tests::program("dnd-captioner")).args(["--model", folder.path().to_str().unwrap(), "--listen", "127.0.0.1:0"]).output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(err.contains("config.json"), "{err}");
}

fn request(id: &str, on_disconnect: OnDisconnect) -> DissectRequest {
    let uri = |name: &str| format!("file:{}", sketch(name).display());
    DissectRequest {
        request_id: id.to_owned(),
        on_disconnect: on_disconnect.into(),
        target: Some(Target { uri: uri("targets/planted/planted.onnx"), ..Default::default() }),
        layers: vec![LayerUnits { layer: "colour".to_owned(), units: vec![0, 1, 11] }],
        probing_set: Some(ProbingSet { sources: vec![ProbingSource { source: Some(Source::Uri(uri("probing.tar"))) }] }),
        parameters: Some(Parameters { num_inference_steps: Some(2), images_per_concept: Some(2), candidates: Some(1), ..Default::default() }),
    }
}

/// Follows a job: its id, the units that it finished, and whether it was cancelled; stops early after its acceptance.
async fn follow(client: &mut DissectServiceClient<Channel>, request: DissectRequest, to_the_end: bool) -> (String, Vec<u32>, Option<bool>) {
    let mut events = client.dissect(request).await.unwrap().into_inner();
    let (mut id, mut units) = (String::new(), Vec::new());
    while let Some(response) = events.message().await.unwrap() {
        match response.event.unwrap().event.unwrap() {
            Event::Accepted(accepted) => {
                id = accepted.job_id;
                if !to_the_end {
                    break;
                }
            }
            Event::Unit(unit) => units.push(unit.unit),
            Event::Done(done) => return (id, units, Some(done.cancelled)),
            _ => {}
        }
    }
    (id, units, None)
}

#[tokio::test]
async fn a_job_is_found_again_by_its_request_and_goes_on_or_not_as_was_asked() {
    let suite = sketch("");
    let service = Service::start("dnd", &["up", "--models", suite.to_str().unwrap()]);
    serving(&service, "").await;
    let mut client = DissectServiceClient::new(channel(&service).await);

    let (first, _, _) = follow(&mut client, request("detached", OnDisconnect::Detach), false).await;
    let (again, mut units, cancelled) = follow(&mut client, request("detached", OnDisconnect::Detach), true).await;
    units.sort_unstable();
    assert_eq!((again, units, cancelled), (first.clone(), vec![0, 1, 11], Some(false)), "one job, told from its beginning");

    let (gone, _, _) = follow(&mut client, request("cancelled", OnDisconnect::Cancel), false).await;
    assert_ne!(gone, first);
    let (again, _, cancelled) = follow(&mut client, request("cancelled", OnDisconnect::Cancel), true).await;
    assert_eq!((again, cancelled), (gone, Some(true)));
}

#[test]
fn ctrl_c_leaves_a_valid_partial_result() {
    let folder = tempfile::tempdir().unwrap();
    let (network, pictures, suite) = (sketch("targets/planted/planted.onnx"), sketch("probing.tar"), sketch(""));
    let out = folder.path().join("out");
    let mut child = Command::new(dnd_tests::program("dnd"))
        .args(["dissect", "--layer", "mixture", "--units-in-flight", "1", "--target", network.to_str().unwrap(), "--images", pictures.to_str().unwrap()])
        .args(["--models", suite.to_str().unwrap(), "--out", out.to_str().unwrap()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let results = || fs::read_to_string(out.join("results.jsonl")).unwrap_or_default();
    let since = Instant::now();
    while results().lines().count() < 1 {
        assert!(child.try_wait().unwrap().is_none() && since.elapsed() < Duration::from_secs(300));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let units: Vec<serde_json::Value> = results().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!((1..24).contains(&units.len()), "{}", units.len());
    let run: serde_json::Value = serde_json::from_str(&fs::read_to_string(out.join("run.json")).unwrap()).unwrap();
    assert_eq!((&run["interrupted"], run["units"]["labelled"].as_u64()), (&serde_json::Value::Bool(true), Some(units.len() as u64)));
    assert_eq!(fs::read_to_string(out.join("results.csv")).unwrap().lines().count(), units.len() + 1);
    assert!(fs::read_to_string(out.join("report.html")).unwrap().contains(units[0]["label"].as_str().unwrap()));
}
