//! Every program that serves has the whole stack: reflection, health, the admin port, metrics, and an end within the grace period.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use dnd_proto::v1::{
    EmbedTextsRequest, ProbingSet, ProbingSource, ReadPicturesRequest, TopPicture, activation_service_client::ActivationServiceClient,
    embedding_service_client::EmbeddingServiceClient, probing_source::Source,
};
use dnd_testing::sketch;
use dnd_tests::{Service, get};
use futures::{StreamExt as _, stream};
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient, server_reflection_request::MessageRequest,
    server_reflection_response::MessageResponse,
};

async fn channel(address: &str) -> Channel {
    Channel::from_shared(format!("http://{}", address.trim_start_matches("http://"))).unwrap().connect().await.unwrap()
}

/// The services that a server names.
async fn listed(address: &str) -> Result<BTreeSet<String>, tonic::Status> {
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(MessageRequest::ListServices(String::new())) };
    let mut answers = ServerReflectionClient::new(channel(address).await).server_reflection_info(stream::iter([request])).await?.into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = answers.message().await?.unwrap().message_response else { panic!("no list") };
    Ok(list.service.into_iter().map(|service| service.name).collect())
}

fn ready(service: &Service) -> String {
    let admin = service.admin();
    let since = Instant::now();
    while get(&admin, "/readyz").0 != 200 {
        assert!(since.elapsed() < Duration::from_secs(120), "never ready: {}", service.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    admin
}

/// Starts each program that serves, with an admin port.
fn programs() -> Vec<(&'static str, Service)> {
    let suite = sketch("");
    let model = |name: &str| suite.join(name).to_str().unwrap().to_owned();
    let nobody = "http://127.0.0.1:9";
    let start = |program: &'static str, args: &[&str]| (program, Service::start(program, &[args, &["--admin", "127.0.0.1:0", "--grace", "20"]].concat()));
    let endpoints = ["--activation", nobody, "--captioner", nobody, "--summarizer", nobody, "--diffusion", nobody, "--clip", nobody];
    vec![
        start("dnd-activation", &[]),
        start("dnd-captioner", &["--model", &model("captioner")]),
        start("dnd-summarizer", &["--model", &model("summarizer")]),
        start("dnd-diffusion", &["--model", &model("diffusion")]),
        start("dnd-clip", &["--model", &model("clip")]),
        start("dnd-orchestrator", &endpoints),
    ]
}

#[tokio::test]
async fn every_program_of_the_workspace_that_serves_has_the_whole_stack() {
    let mut programs = programs();
    let services = Path::new(env!("CARGO_MANIFEST_DIR")).join("../services");
    let folders: BTreeSet<String> = fs::read_dir(services).unwrap().map(|entry| format!("dnd-{}", entry.unwrap().file_name().to_str().unwrap())).collect();
    assert_eq!(folders, programs.iter().map(|(name, _)| (*name).to_owned()).collect(), "the services of the workspace, and those that are tested here");
    for (name, service) in &mut programs {
        let admin = ready(service);
        assert_eq!(get(&admin, "/livez").0, 200);

        let names = listed(&service.url()).await.unwrap();
        let own: Vec<&String> = names.iter().filter(|name| name.starts_with("dnd.")).collect();
        // Health of each service is told on both ports.
        for address in [&service.url(), &admin] {
            let mut health = HealthClient::new(channel(address).await);
            let mut serving = 0;
            for service in own.iter().copied().chain([&String::new()]) {
                // Reflection lists what the project has; health knows what the program serves.
                match health.check(HealthCheckRequest { service: service.clone() }).await {
                    Ok(answer) => {
                        assert_eq!(answer.into_inner().status(), ServingStatus::Serving, "{name} {service}");
                        serving += 1;
                    }
                    Err(status) => assert_eq!((status.code(), service.is_empty()), (Code::NotFound, false), "{name} {service}"),
                }
            }
            assert!(serving >= 2, "{name} serves something of its own");
        }
        // The admin port serves nothing else.
        assert_eq!(get(&admin, "/").0, 404, "{name}");
        assert!(listed(&admin).await.is_err(), "{name}");

        // Each call is counted, and measured.
        let measured = get(&admin, "/metrics").1;
        for line in ["dnd_calls_total{service=\"grpc.health.v1.Health\",method=\"Check\",code=\"ok\"} ", "dnd_call_duration_seconds_bucket{"] {
            assert!(measured.contains(line), "{name}: {measured}");
        }
        let since = Instant::now();
        assert_eq!(service.terminate(), Some(0), "{}", service.log());
        assert!(since.elapsed() < Duration::from_secs(15), "nothing was running: {:?}", since.elapsed());
    }
}

#[tokio::test]
async fn at_the_end_of_a_service_idle_streams_are_closed_and_what_has_come_is_answered() {
    let mut service = Service::start("dnd-clip", &["--model", sketch("clip").to_str().unwrap(), "--admin", "127.0.0.1:0", "--grace", "60"]);
    ready(&service);
    let one = stream::iter([EmbedTextsRequest { item_id: 7, text: "a red circle".into() }]);
    let requests = one.chain(stream::pending());
    let mut answers = EmbeddingServiceClient::new(channel(&service.url()).await).embed_texts(requests).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap().item_id, 7);
    let ended = tokio::task::spawn_blocking(move || {
        let since = Instant::now();
        (service.terminate(), since.elapsed())
    });
    let status = answers.message().await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "the service is shutting down"));
    let (code, took) = ended.await.unwrap();
    assert!(code == Some(0) && took < Duration::from_secs(20), "{code:?} after {took:?}");
}

#[tokio::test]
async fn a_client_that_never_reads_holds_a_service_up_no_longer_than_its_grace_period() {
    let mut service = Service::start("dnd-activation", &["--admin", "127.0.0.1:0", "--grace", "4"]);
    ready(&service);
    let source = Source::Uri(format!("file:{}", sketch("probing.tar").display()));
    let request = ReadPicturesRequest {
        probing_set: Some(ProbingSet { sources: vec![ProbingSource { source: Some(source) }] }),
        // Each is answered with a status that names it.
        pictures: vec![TopPicture { path: "x".repeat(2000), ..Default::default() }; 1000],
    };
    let mut client = ActivationServiceClient::new(channel(&service.url()).await);
    // More than the windows of the streams and of their connection take.
    let mut unread = Vec::new();
    for _ in 0..8 {
        unread.push(client.read_pictures(request.clone()).await.unwrap().into_inner());
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let ended = tokio::task::spawn_blocking(move || {
        let since = Instant::now();
        (service.terminate(), since.elapsed(), service)
    });
    let (code, took, service) = ended.await.unwrap();
    assert!(code == Some(0) && took < Duration::from_secs(6), "{code:?} after {took:?}");
    assert!(service.log().contains("still running at the end of the grace period"), "{}", service.log());
    drop(unread);
}
