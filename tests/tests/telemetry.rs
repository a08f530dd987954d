//! What it costs to measure, to log and to trace.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod collector;

use dnd_testing::{pictures, sketch, write_pictures};
use dnd_tests::{Mesh, Service, dnd};

use collector::Collector;

const PAIRS: usize = 10;
/// Of Student's distribution with nine degrees of freedom, for an interval of 95 %.
const STUDENT: f64 = 2.262;
/// What telemetry may cost at most.
const MOST: f64 = 0.03;

/// Processor time of a mesh's programs over a job, in seconds: long enough that the noise of the machine, which is that of some batches, is a small part of it.
fn job(telemetry: &[&str]) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    write_pictures(&folder.path().join("pictures"), &pictures(200, 2));
    let mesh = Mesh::start_with(&sketch(""), telemetry);
    let target = sketch("targets/planted/planted.onnx");
    let what = ["dissect", "--layer", "colour,mixture", "--units", "0-7", "--images", "pictures", "--out", "out", "--target", target.to_str().unwrap()];
    let small = ["--num-inference-steps", "20", "--candidates", "3", "--endpoint", &mesh.orchestrator.url()];
    let ran = dnd(folder.path(), &[&what[..], &small].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    mesh.models.iter().chain([&mesh.orchestrator]).map(Service::processor_time).sum()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes some minutes: twenty jobs"]
async fn telemetry_costs_less_than_three_percent_of_the_processor_time() {
    let spans = Collector::of(|_, url| {
        let on = ["--admin", "127.0.0.1:0", "--otlp", url, "--log", "info"];
        let off = ["--log", "error"];
        // Each is first every other time, since a machine is not the same from minute to minute.
        let pair = |pair: usize| {
            let (with, without) = if pair.is_multiple_of(2) {
                let with = job(&on);
                (with, job(&off))
            } else {
                let without = job(&off);
                (job(&on), without)
            };
            println!("{with:.2} s with telemetry, {without:.2} s without");
            (with / without).ln()
        };
        let ratios: Vec<f64> = (0..PAIRS).map(pair).collect();
        let mean = ratios.iter().sum::<f64>() / PAIRS as f64;
        let variance = ratios.iter().map(|ratio| (ratio - mean).powi(2)).sum::<f64>() / (PAIRS - 1) as f64;
        let half = STUDENT * (variance / PAIRS as f64).sqrt();
        let [low, middle, high] = [mean - half, mean, mean + half].map(|ratio| 100.0 * (ratio.exp() - 1.0));
        println!("telemetry takes {middle:.2} % more processor time; 95 % interval: {low:.2} % to {high:.2} %");
        assert!(high < 100.0 * MOST, "more than {MOST} can't be ruled out");
    })
    .await;
    assert!(!spans.is_empty());
}
