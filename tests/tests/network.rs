//! The network between an orchestrator and the services fails in the middle of a job, and heals: the job goes on, and its results are those of an undisturbed run.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use dnd_testing::{Proxy, pictures, sketch, write_pictures};
use dnd_tests::{Mesh, dnd, orchestrator};
use serde_json::Value;

const SERVICES: [&str; 5] = ["activation", "captioner", "summarizer", "diffusion", "clip"];
/// How long a job may take to end once the network has healed.
const PATIENCE: Duration = Duration::from_secs(300);

/// What happens to the network before a service.
#[derive(Debug, Clone, Copy)]
enum Failure {
    /// Connections end, and new ones with them.
    Cut(Duration),
    /// Connections stay, and nothing arrives.
    Silence(Duration),
}

/// Runs a job while each service in turn is out of reach in each of these ways.
fn fail(failures: &[Failure]) {
    let folder = tempfile::tempdir().unwrap();
    write_pictures(&folder.path().join("pictures"), &pictures(80, 4));
    let suite = sketch("");
    let mesh = Mesh::start(&suite);
    let proxies = mesh.models.each_ref().map(|service| Proxy::start(service.url().trim_start_matches("http://")));
    let urls = proxies.each_ref().map(|proxy| format!("http://{}", proxy.address()));
    let data = folder.path().join("data").to_str().unwrap().to_owned();
    let orchestrator = orchestrator(&urls, &["--data", &data, "--units-in-flight", "2"]);
    let run = |args: &[&str]| {
        let ran = dnd(folder.path(), args);
        assert_eq!(ran.code, 0, "{args:?}: {}\n{}", ran.err, orchestrator.log());
        ran.out
    };
    let (target, images) = (sketch("targets/planted/planted.onnx"), folder.path().join("pictures"));
    let paths = ["--target", target.to_str().unwrap(), "--images", images.to_str().unwrap()];
    let fixed = ["--num-inference-steps", "2", "--images-per-concept", "2", "--candidates", "2", "--layer", "mixture"];
    let what = [&fixed[..], &paths].concat();

    let id = run(&[&["jobs", "create", "--endpoint", &orchestrator.url()], &what[..]].concat()).trim().to_owned();
    let job = || serde_json::from_str::<Value>(&run(&["jobs", "show", &id, "--data", &data, "--json"])).unwrap();
    let mut last = Value::Null;
    let mut met = 0;
    for failure in failures {
        for (service, proxy) in SERVICES.iter().zip(&proxies) {
            // Something has come of the job since the last time.
            let since = Instant::now();
            let now = loop {
                let now = job();
                if now["progress"] != last || now["state"] == "JOB_STATE_DONE" || since.elapsed() > PATIENCE {
                    break now;
                }
                thread::sleep(Duration::from_millis(30));
            };
            met += usize::from(now["state"] != "JOB_STATE_DONE");
            last = now["progress"].clone();
            match failure {
                Failure::Cut(time) => {
                    proxy.cut();
                    thread::sleep(*time);
                }
                Failure::Silence(time) => {
                    proxy.silence();
                    thread::sleep(*time);
                }
            }
            proxy.heal();
            println!("{service}: {failure:?}");
        }
    }
    let since = Instant::now();
    while job()["state"] != "JOB_STATE_DONE" {
        assert!(since.elapsed() < PATIENCE, "{}\n{}", job(), orchestrator.log());
        thread::sleep(Duration::from_millis(200));
    }
    println!("{met} of {} failures met the job at work", failures.len() * SERVICES.len());
    assert!(met >= failures.len() * SERVICES.len() / 2);
    run(&["jobs", "export", &id, "--data", &data, "--out", "disturbed"]);
    run(&[&["dissect", "--models", suite.to_str().unwrap(), "--out", "whole"], &what[..]].concat());
    let results = |out: &str| fs::read_to_string(folder.path().join(out).join("results.jsonl")).unwrap();
    assert_eq!(results("disturbed"), results("whole"));
}

#[test]
fn a_job_goes_on_when_the_network_is_cut_and_heals() {
    fail(&[Failure::Cut(Duration::from_millis(400)), Failure::Silence(Duration::from_millis(600))]);
}

#[test]
#[ignore = "takes minutes: the network is silent for longer than connections are given up after"]
fn a_job_goes_on_when_the_network_is_away_for_long() {
    fail(&[Failure::Silence(Duration::from_secs(40)), Failure::Cut(Duration::from_secs(20))]);
}
