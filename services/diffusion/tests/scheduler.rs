//! The scheduler does what the diffusers library's does; `goldens/make.py` asked it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use dnd_diffusion::scheduler::{Scheduler, SchedulerConfig};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    name: String,
    config: SchedulerConfig,
    steps: usize,
    timesteps: Vec<f64>,
    start: Vec<f32>,
    end: Vec<f32>,
}

fn output(latents: &[f32], timestep: f64) -> Vec<f32> {
    latents.iter().enumerate().map(|(place, latent)| (0.4 * f64::from(*latent) + 0.5 * (place as f64 + timestep / 100.0).sin()) as f32).collect()
}

#[test]
fn every_schedule_visits_the_librarys_time_steps_and_ends_at_its_latents() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("goldens/scheduler.json")).unwrap();
    assert!(cases.len() >= 12);
    for case in cases {
        let schedule = Scheduler::new(case.config).unwrap().schedule(case.steps).unwrap();
        let timesteps: Vec<f64> = schedule.steps.iter().map(|step| step.timestep).collect();
        assert_eq!(timesteps, case.timesteps, "{}", case.name);
        let (mut latents, mut estimate) = (case.start, Vec::new());
        for step in &schedule.steps {
            let output = output(&latents, step.timestep);
            step.advance(&mut latents, &output, &mut estimate);
        }
        let scale = case.end.iter().map(|v| v.abs()).fold(0.0, f32::max);
        for (ours, theirs) in latents.iter().zip(&case.end) {
            assert!((ours - theirs).abs() <= 1e-3 * scale, "{}: {latents:?} and {:?}", case.name, case.end);
        }
    }
}

#[test]
fn a_configuration_that_cannot_be_followed_is_refused_by_its_key() {
    for (json, key) in [
        (r#"{"beta_schedule": "sigmoid"}"#, "beta_schedule"),
        (r#"{"prediction_type": "flow"}"#, "prediction_type"),
        (r#"{"timestep_spacing": "random"}"#, "timestep_spacing"),
        (r#"{"use_karras_sigmas": true}"#, "use_karras_sigmas"),
        (r#"{"trained_betas": [0.1, 0.2]}"#, "trained_betas"),
        (r#"{"beta_start": 2.0}"#, "beta_start"),
        (r#"{"num_train_timesteps": 1}"#, "num_train_timesteps"),
    ] {
        let problem = Scheduler::new(serde_json::from_str(json).unwrap()).unwrap_err();
        assert!(problem.contains(key), "{problem}");
    }
}

#[test]
fn more_steps_than_there_are_different_ones_are_refused() {
    for spacing in ["linspace", "leading"] {
        let config = serde_json::from_value(serde_json::json!({ "timestep_spacing": spacing })).unwrap();
        let scheduler = Scheduler::new(config).unwrap();
        assert!(scheduler.schedule(50).is_ok());
        let problem = scheduler.schedule(1000).unwrap_err();
        assert!(problem.contains("1000 steps that the model was trained with"), "{problem}");
    }
}
